"""Families in llama.cpp's form, by gguf-py: names, shapes and numbers of every tensor, the keys of
hybrids, mixtures and Gemma 4, and what llama.cpp computes otherwise, which is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from gguf import MODEL_ARCH_NAMES, GGUFReader, get_tensor_name_map

from mis_mlx.gguf_export.tensors import parts
from mis_mlx.models.architectures import arch
from mis_mlx.models.architectures.families import FAMILIES, family
from mis_mlx.models.architectures.mixture import Mixture
from mis_mlx.models.opening import load, wheel_model
from mis_mlx.storage import safetensors
from mis_mlx.types import Checkpoint, MisError
from tests import family_checks, tiny
from tests.test_export import exported, facts, tensors

Models = Callable[[str], Checkpoint]
DENSE = [name for name in tiny.FAMILIES if FAMILIES[name].gguf]
DENSE = [name for name in DENSE if not issubclass(FAMILIES[name], Mixture)]
MIXTURES = [name for name, kind in FAMILIES.items() if issubclass(kind, Mixture) and kind.gguf]
MIXTURES_KEYS = {
    "gpt_oss": {"attention.sliding_window": 7},
    "qwen2_moe": {"expert_shared_feed_forward_length": 96},
}


def stored(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """Every tensor of the model in float32."""
    names = arch.tensors_of(checkpoint.config)
    return {name: np.array(load.dense(checkpoint, name).astype(mx.float32)) for name in names}


def kinds(reader: GGUFReader) -> dict[str, str]:
    """{llama.cpp's name: how it is packed}."""
    return {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}


@pytest.mark.parametrize("kind", DENSE)
def test_every_tensor_has_its_place(kind: str, tmp_path: Path) -> None:
    """Under gguf-py's name for the published one; no number is lost, but for gains of norms."""
    sizes = {**tiny.MODELS[kind], **({"layer_types": None} if kind == "ministral3" else {})}
    model = load.open_checkpoint(tiny.make(tmp_path / "m", **sizes))
    _, reader = exported(model.path, tmp_path / "out", out_type="f32")
    found = tensors(reader)
    told = facts(reader)
    (place,) = (a for a, name in MODEL_ARCH_NAMES.items() if name == told["general.architecture"])
    names = get_tensor_name_map(place, told["A.block_count"])
    wanted = {}
    for name, at in safetensors.index(model.path).items():
        stem, dot, end = name.rpartition(".")
        if end not in ("weight", "bias"):
            stem, dot, end = name, ".", "weight"
        values = np.array(safetensors.lazy({name: at}, [name])[name]).reshape(-1)
        wanted[f"{names.get_name(stem)}{dot}{end}"] = np.sort(values)
    assert {name for name in found if not name.startswith("rope_")} == wanted.keys()
    for name, values in wanted.items():
        if "norm" not in name or not family(model.config).gain_offset:
            np.testing.assert_array_equal(np.sort(found[name].reshape(-1)), values, err_msg=name)


def test_lfm2(models: Models, tmp_path: Path) -> None:
    """No key-value heads without attention; kernels are float32 matrices, also in 8 bits."""
    _, reader = exported(models("lfm2").path, tmp_path / "out", out_type="q8_0")
    told = facts(reader)
    assert told["A.shortconv.l_cache"] == 3
    assert told["A.attention.head_count"] == 4
    assert told["A.attention.head_count_kv"] == [0, 0, 2, 0, 2, 0, 2]
    assert told["A.feed_forward_length"] == 768
    kernel = next(t for t in reader.tensors if t.name == "blk.0.shortconv.conv.weight")
    assert kernel.shape.tolist() == [3, 64]  # innermost first
    assert kernel.tensor_type.name == "F32"
    assert kinds(reader)["blk.0.shortconv.in_proj.weight"] == "Q8_0"


@pytest.mark.parametrize("kind", MIXTURES)
def test_every_expert_has_its_place(kind: str, models: Models, tmp_path: Path) -> None:
    """An expert's matrices stand at its number in three stacks a block; no number is lost, and none
    is there twice.
    """
    model = models(kind)
    _, reader = exported(model.path, tmp_path / "m", out_type="f32")
    found = tensors(reader)
    ours = stored(model)

    def numbers(arrays: dict[str, np.ndarray]) -> np.ndarray:
        return np.sort(np.concatenate([array.reshape(-1) for array in arrays.values()]))

    np.testing.assert_array_equal(numbers(found), numbers(ours))
    of = family(model.config)
    assert isinstance(of, Mixture)
    for place, matrix in zip(("gate", "up", "down"), of.matrices, strict=True):
        stack = found[f"blk.3.ffn_{place}_exps.weight"]
        assert len(stack) == of.shape.experts
        for number, array in enumerate(stack):
            end = f"experts.{number}.{matrix}.weight"
            (name,) = (n for n in ours if n.startswith("model.layers.3.") and n.endswith(end))
            np.testing.assert_array_equal(array, ours[name], err_msg=name)
    words = {"expert_count": of.shape.experts, "expert_used_count": 2}
    words |= {"expert_feed_forward_length": 64, **MIXTURES_KEYS.get(kind, {})}
    told = facts(reader)
    for key, value in words.items():
        assert told[f"A.{key}"] == value, key


def test_gemma4(models: Models, tmp_path: Path) -> None:
    """Two head sizes, doubled MLPs, shared keys, per-layer inputs, and a number behind each
    block."""
    model = models("gemma4_text")
    _, reader = exported(model.path, tmp_path / "out", out_type="f32")
    told = {key.removeprefix("A."): value for key, value in facts(reader).items()}
    assert told["feed_forward_length"] == [768] * 3 + [1536] * 4
    assert told["attention.sliding_window_pattern"] == [True, True, False, True, False, True, False]
    assert [told[f"attention.{side}_length"] for side in ("key", "value")] == [32, 32]
    assert [told[f"attention.{side}_length_swa"] for side in ("key", "value")] == [16, 16]
    assert [told["rope.dimension_count"], told["rope.dimension_count_swa"]] == [32, 16]
    assert [told["rope.freq_base"], told["rope.freq_base_swa"]] == [1e6, 1e4]
    assert told["attention.shared_kv_layers"] == 4
    assert told["embedding_length_per_layer_input"] == 32
    assert told["final_logit_softcapping"] == 3.0
    weights = tensors(reader)
    # A quarter of 16 pairs of channels rotates.
    np.testing.assert_array_equal(weights["rope_freqs.weight"], np.float32([1.0] * 4 + [1e30] * 12))
    pairs = {
        "per_layer_token_embd.weight": "model.embed_tokens_per_layer.weight",
        "per_layer_model_proj.weight": "model.per_layer_model_projection.weight",
        "blk.3.inp_gate.weight": "model.layers.3.per_layer_input_gate.weight",
        "blk.3.layer_output_scale.weight": "model.layers.3.layer_scalar",
        "blk.3.attn_q_norm.weight": "model.layers.3.self_attn.q_norm.weight",
        "blk.2.attn_v.weight": "model.layers.2.self_attn.v_proj.weight",
    }
    ours = stored(model)
    for theirs, name in pairs.items():
        np.testing.assert_array_equal(weights[theirs], ours[name], err_msg=theirs)
    assert "blk.3.attn_k.weight" not in weights


def test_packed_gemma4(models: Models, tmp_path: Path) -> None:
    """Four bits as MLX packed them, also of the table; eight bits are rounded once more, by half a
    step of 127."""
    dense = models("gemma4_text").path
    model = family_checks.quantized(dense, tmp_path / "four", target_bpw=None)
    _, reader = exported(model.path, tmp_path / "out")
    packed = kinds(reader)
    assert packed["per_layer_token_embd.weight"] == "Q4_1"
    assert packed["blk.1.inp_gate.weight"] == packed["token_embd.weight"] == "Q8_0"
    weights = tensors(reader)
    names = wheel_model.gguf_names(model.config, arch.tensors_of(model.config, stacked=True))
    for ours, theirs in names.items():
        assert theirs
        want = np.array(load.dense(model, ours))
        off = np.abs(weights[theirs] - want.reshape(weights[theirs].shape)).max()
        most = 0.6 / 127 * np.abs(want).max() if packed[theirs] == "Q8_0" else 0.0
        assert off <= most, theirs


SHARED = tiny.FAMILIES["gemma4_text"]["layer_types"]
SLIDES = [*["full_attention", "sliding_attention"] * 3, "full_attention"]
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256}
LLAMA3 = {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}
PLAIN = {"layer_types": None, "sliding_window": None}  # ministral3 without windows
STRETCHED = tiny.FAMILIES["ministral3"]["rope_parameters"]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}),  # of which length?
        ("llama", {"rope_scaling": {**YARN, "attention_factor": 1.3}}),
        ("llama", {"layer_types": ["sliding_attention"] * 3}),
        ("qwen2", LLAMA3),
        ("gemma3_text", LLAMA3),
        ("smollm3", {"no_rope_layers": [1, 1, 0, 1, 1, 1, 1]}),
        ("smollm3", {"mlp_bias": True}),
        ("ministral3", {}),  # some layers slide
        ("ministral3", {**PLAIN, "rope_parameters": {**STRETCHED, "mscale": 0.7}}),
        ("ministral3", {**PLAIN, "rope_parameters": {**STRETCHED, "rope_type": "linear"}}),
        ("qwen3_moe", {"norm_topk_prob": False}),
        ("qwen2_moe", {"norm_topk_prob": True}),
        ("olmoe", {"num_key_value_heads": 2}),
        ("gpt_oss", {"layer_types": SLIDES}),
        # the keys of the last block but one where there is a window, else of the last
        ("gemma4_text", {"layer_types": [SHARED[0], SHARED[2], SHARED[0], *SHARED[3:]]}),
    ],
)
def test_what_llama_cpp_computes_otherwise(
    kind: str, changes: dict[str, Any], models: Models
) -> None:
    """It has these in its program, whatever a file says, or reads positions as plain ones; a model
    would lose its thread without an error.
    """
    c = models(kind)
    if changes:
        family({**c.config, **(PLAIN if kind == "ministral3" else {})}).check_gguf()
    with pytest.raises(MisError):
        parts(Checkpoint(c.path, {**c.config, **changes}, c.tensors), "f16")


def test_whose_keys_are_used() -> None:
    """llama.cpp's gemma4 takes those of the last block with its kind of attention."""
    config = tiny.FAMILIES["gemma4_text"]
    family({**config, "layer_types": [SHARED[2], SHARED[0], *SHARED[2:]]}).check_gguf()
