"""What a config promises: parameters, shapes, scenarios. By pencil, and against transformers and
mlx-lm.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mis_mlx.models.architectures import arch, scenarios
from mis_mlx.models.architectures.sizes import shape_of
from mis_mlx.models.opening import load
from mis_mlx.types import Checkpoint, MisError, TensorAt
from tests import tiny

SMOLLM2: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49_152,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
}
PAPER = {
    **SMOLLM2,
    "hidden_size": 8192,
    "intermediate_size": 28_672,
    "num_hidden_layers": 96,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "tie_word_embeddings": False,
}


def test_params_of_smollm2_by_pencil() -> None:
    """134,515,008, as published; the 20-layer, FFN 1280 student by hand."""
    assert arch.params(SMOLLM2) == 134_515_008
    attention = 576 * 576 * 2 + 576 * 192 * 2  # q, o; k, v of 3 heads of 64
    block = attention + 3 * 576 * 1280 + 2 * 576
    student = arch.student_config(
        SMOLLM2, replace(shape_of(SMOLLM2), layers=20, ffn=1280), tuple(range(20)), "bfloat16"
    )
    assert arch.params(student) == 20 * block + 49_152 * 576 + 576 == 90_266_688


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_tensors_are_those_of_mlx_lm(models: Callable[[str], Checkpoint], kind: str) -> None:
    """Names, shapes and their sum are what mlx-lm's own model has, for every kind."""
    config = models(kind).config
    theirs = {
        name: value.shape
        for name, value in tree_flatten(load.resident_model(models(kind), mx.float32).parameters())
    }
    assert arch.tensors_of(config) == theirs
    assert arch.params(config) == sum(math.prod(shape) for shape in theirs.values())


@pytest.mark.parametrize(
    ("scenario", "paper", "small"),
    [
        # 1206.9, nearest multiple of 256
        ("goral", {"layers": 64, "ffn": 22_528}, {"layers": 20, "ffn": 1280}),
        ("baca", {"hidden": 6144}, {"hidden": 432}),  # 576 * 0.75 = 432 = 3 * lcm(16, 9)
        ("halny", {"ffn": 16_384}, {"ffn": 768}),  # 877.7 lies nearer to 768 than to 1024
        ("juhas", {"layers": 64}, {"layers": 20}),
        ("zbojnik", {"layers": 48, "ffn": 12_288}, {"layers": 15, "ffn": 768}),  # 658.3
    ],
)
def test_scenarios(scenario: str, paper: dict[str, int], small: dict[str, int]) -> None:
    """Exactly table 1's sizes on the paper's teacher; on SmolLM2 the same ratios, rounded to what
    kernels like.

    Nothing else moves. What is given exactly wins over its ratio.
    """
    ratios = scenarios.RATIOS[scenarios.plain(scenario)]
    assert arch.target_shape(PAPER, ratios) == replace(shape_of(PAPER), **paper)
    assert arch.target_shape(SMOLLM2, ratios) == replace(shape_of(SMOLLM2), **small)
    exact = arch.target_shape(SMOLLM2, ratios, ffn=640, layers=None)
    assert exact == replace(shape_of(SMOLLM2), **{**small, "ffn": 640})


@pytest.mark.parametrize(
    ("kind", "sizes", "sentence"),
    [
        ("llama", {"layers": 0}, "--layers 0 is outside 1 to 3"),
        ("llama", {"ffn": 769}, "--ffn 769 is outside 1 to 768"),
        ("llama", {"heads": 3}, "--heads 3 does not divide into 2 key-value heads"),
        ("llama", {"hidden": 50}, "hidden 50 is not a multiple of 4 heads"),
        ("llama", {"hidden": -4}, "--hidden -4 is outside"),
        ("qwen2", {"hidden": 48}, "a qwen2 cannot change hidden"),
        ("qwen2", {"heads": 2}, "a qwen2 cannot change hidden"),
    ],
)
def test_a_shape_no_loader_accepts_is_refused(
    kind: str, sizes: dict[str, int], sentence: str
) -> None:
    """One sentence with the number and what to choose."""
    with pytest.raises(MisError, match=sentence):
        arch.target_shape({**tiny.CONFIG, **tiny.KINDS[kind]}, {}, **sizes)


def test_student_config_is_what_transformers_reads(tmp_path: Any) -> None:
    """AutoConfig opens it, and sees the sizes, theta and tying that were meant."""
    import json

    transformers = pytest.importorskip("transformers")
    for kind, changes in tiny.KINDS.items():
        teacher = {
            **tiny.CONFIG,
            **changes,
            "rope_theta": 5e5,
            "quantization": {"bits": 4, "group_size": 64},
        }
        shape = replace(shape_of(teacher), layers=2, ffn=512)
        made = arch.student_config(teacher, shape, (0, 2), "float16")
        folder = tmp_path / kind
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(made))
        read = transformers.AutoConfig.from_pretrained(folder)
        assert read.model_type == teacher["model_type"]
        assert (read.num_hidden_layers, read.intermediate_size, read.hidden_size) == (2, 512, 64)
        assert read.num_key_value_heads == 2
        assert read.tie_word_embeddings == teacher["tie_word_embeddings"]
        assert getattr(read, "quantization", None) is None
        assert read.to_dict()["rope_parameters"]["rope_theta"] == 5e5


def checkpoint(tensors: dict[str, tuple[int, ...]], **changes: Any) -> Checkpoint:
    from pathlib import Path

    at = {
        n: TensorAt(file=Path("model.safetensors"), dtype="F32", shape=s, offset=0, nbytes=0)
        for n, s in tensors.items()
    }
    return Checkpoint(Path("folder"), {**tiny.CONFIG, **changes}, at)


def test_files_and_config_must_agree() -> None:
    """A tensor missing, of another shape, or with no place: named, with both shapes."""
    good = arch.tensors_of(tiny.CONFIG)
    arch.check_tensors(checkpoint(good))
    q = "model.layers.1.self_attn.q_proj.weight"
    with pytest.raises(MisError, match=rf"lists {q} \[64, 64\]"):
        arch.check_tensors(checkpoint({n: s for n, s in good.items() if n != q}))
    with pytest.raises(MisError, match=rf"{q} is \[32, 64\], but config.json says \[64, 64\]"):
        arch.check_tensors(checkpoint({**good, q: (32, 64)}))
    with pytest.raises(
        MisError, match=r"holds model\.layers\.3\.x\.weight, which a llama of 3 layers"
    ):
        arch.check_tensors(checkpoint({**good, "model.layers.3.x.weight": (1,)}))
    with pytest.raises(MisError, match=r"q_proj\.bias"):
        arch.check_tensors(checkpoint({**good, q.replace("weight", "bias"): (64,)}))
    # tied models often carry a copy
    arch.check_tensors(checkpoint({**good, "lm_head.weight": (512, 64)}))
    whole = checkpoint(good)
    norm = replace(whole.tensors["model.norm.weight"], dtype="I32")
    with pytest.raises(
        MisError,
        match=r"model\.norm\.weight is stored as I32, but weights must be F32, F16 or BF16",
    ):
        arch.check_tensors(replace(whole, tensors={**whole.tensors, "model.norm.weight": norm}))
