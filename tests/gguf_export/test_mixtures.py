"""Mixtures of experts in llama.cpp's form, by gguf-py: stacks of experts, their keys, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGUFReader, dequantize

from mis_mlx import export
from mis_mlx.models.architectures import arch
from mis_mlx.models.architectures.families import FAMILIES, family
from mis_mlx.models.architectures.mixture import Mixture
from mis_mlx.models.opening import load
from mis_mlx.types import Checkpoint, MisError
from tests import tiny

KINDS = [name for name, kind in FAMILIES.items() if issubclass(kind, Mixture) and kind.gguf]
OTHER_KEYS = {
    "gpt_oss": {"attention.sliding_window": 7},
    "qwen2_moe": {"expert_shared_feed_forward_length": 96},
}
SLIDES_SECOND = [*["full_attention", "sliding_attention"] * 3, "full_attention"]
PLACES = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")


def numbers(arrays: list[np.ndarray]) -> np.ndarray:
    """All of them, in order of size."""
    return np.sort(np.concatenate([array.reshape(-1) for array in arrays]))


@pytest.mark.parametrize("kind", KINDS)
def test_every_expert_has_its_place(
    kind: str, models: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    """An expert's matrices stand at its number in three stacks a block; no number is lost, and none
    is there twice.
    """
    model = models(kind)
    export.run(export.Settings(model=str(model.path), out=str(tmp_path / "m"), out_type="f32"))
    (path,) = tmp_path.rglob("*.gguf")
    reader = GGUFReader(path)
    found = {}
    for tensor in reader.tensors:
        shape = [*reversed(tensor.shape.tolist())]
        found[tensor.name] = dequantize(tensor.data, tensor.tensor_type).reshape(shape)
    ours = {}
    for name in arch.tensors_of(model.config):
        ours[name] = np.array(load.dense(model, name).astype(mx.float32))
    np.testing.assert_array_equal(numbers([*found.values()]), numbers([*ours.values()]))
    of = family(model.config)
    assert isinstance(of, Mixture)
    for place, matrix in zip(PLACES, of.matrices, strict=True):
        stack = found[f"blk.3.{place}.weight"]
        assert len(stack) == of.shape.experts
        for number, array in enumerate(stack):
            end = f"experts.{number}.{matrix}.weight"
            (name,) = (n for n in ours if n.startswith("model.layers.3.") and n.endswith(end))
            np.testing.assert_array_equal(array, ours[name], err_msg=name)
    words = {
        "expert_count": of.shape.experts,
        "expert_used_count": 2,
        "expert_feed_forward_length": 64,
        **OTHER_KEYS.get(kind, {}),
    }
    for key, value in words.items():
        assert reader.fields[f"{of.gguf}.{key}"].contents() == value, key


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}),
        ("qwen2_moe", {"norm_topk_prob": True}),
        ("olmoe", {"num_key_value_heads": 2}),
        ("gpt_oss", {"layer_types": SLIDES_SECOND}),
    ],
)
def test_what_llama_cpp_computes_otherwise(kind: str, change: dict[str, Any]) -> None:
    """It has these in its program, whatever a file says."""
    config = {**tiny.CONFIG, **tiny.FAMILIES[kind]}
    family(config).check_gguf()
    with pytest.raises(MisError):
        family({**config, **change}).check_gguf()
