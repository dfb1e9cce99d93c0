"""Re-wrapped blocks are bit-equal, rows in llama.cpp's order; what has no place is refused."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize, quants

from mis_mlx.gguf_export import rerounding, tensors
from mis_mlx.models.architectures.families import family
from mis_mlx.models.opening import load
from mis_mlx.storage.safetensors import spec_of, write_tensors
from mis_mlx.types import Checkpoint, MisError
from tests import tiny
from tests.models.test_gguf_reader import llama_cpp_permute

Q = "model.layers.1.self_attn.q_proj.weight"


def packed(
    folder: Path,
    group: int,
    dtype: mx.Dtype = mx.float16,
    tweak: Callable[[Any], Any] = lambda x: x,
    bits: int = 4,
    mode: str = "affine",
    mixed: Mapping[str, int] = MappingProxyType({}),
) -> Checkpoint:
    """The tiny llama with every matrix packed, affine scales and biases (scales through `tweak`) in
    `dtype`.

    mixed: other bits of single modules, by their path.
    """
    source = load.open_checkpoint(
        tiny.make(folder / "dense", intermediate_size=256, hidden_size=128, head_dim=32)
    )
    arrays: dict[str, mx.array] = {}
    for name in source.tensors:
        weight = load.dense(source, name)
        if weight.ndim == 1:
            arrays[name] = weight
            continue
        stem = name.removesuffix(".weight")
        arrays[name], scales, *biases = mx.quantize(weight, group, mixed.get(stem, bits), mode)
        arrays[f"{stem}.scales"] = tweak(scales).astype(dtype) if biases else scales
        arrays |= {f"{stem}.biases": b.astype(dtype) for b in biases}
    out = folder / "packed"
    out.mkdir()
    write_tensors(out, {name: spec_of(a) for name, a in arrays.items()}, arrays.items())
    settings: dict[str, Any] = {"group_size": group, "bits": bits, "mode": mode}
    settings |= {path: {**settings, "bits": own} for path, own in mixed.items()}
    (out / "config.json").write_text(json.dumps({**source.config, "quantization": settings}))
    tiny.write_tokenizer(out)
    return load.open_checkpoint(out)


def content(
    checkpoint: Checkpoint, name: str, wanted: str
) -> tuple[tensors.Part, np.ndarray, rerounding.Rerounding]:
    """(the part made of tensor `name`, its values as gguf-py decodes them, the tally)."""
    part = next(p for p in tensors.parts(checkpoint, wanted) if p.source == name)
    tally = rerounding.Rerounding()
    data = np.concatenate(list(tensors.rows(checkpoint, part, tally)))
    return part, dequantize(data, GGMLQuantizationType[part.kind]).reshape(part.shape), tally


@pytest.mark.parametrize(
    ("mode", "bits", "group", "kind"),
    [
        ("affine", 2, 64, "Q4_1"),
        ("affine", 3, 128, "Q4_1"),
        ("affine", 4, 32, "Q4_1"),
        ("affine", 4, 64, "Q4_1"),
        ("affine", 4, 128, "Q4_1"),
        ("affine", 5, 64, "Q5_1"),
        ("affine", 5, 32, "Q5_1"),
        ("mxfp4", 4, 32, "MXFP4"),
        ("nvfp4", 4, 16, "NVFP4"),
    ],
)
def test_every_packing_that_llama_cpp_has_is_exact(
    tmp_path: Path, mode: str, bits: int, group: int, kind: str
) -> None:
    """The same numbers, whatever the bits, and a type of the file that a dense model has not."""
    checkpoint = packed(tmp_path, group, bits=bits, mode=mode)
    wanted = tensors.out_type(checkpoint)
    assert wanted == ("q4_1" if mode == "affine" else mode)
    for name in ("model.layers.0.mlp.down_proj.weight", "model.embed_tokens.weight", Q):
        part, values, tally = content(checkpoint, name, wanted)
        want = np.array(load.dense(checkpoint, name))
        want = llama_cpp_permute(want, 4) if name == Q else want
        np.testing.assert_array_equal(values, want)
        assert np.ptp(values) > 0.1
        assert (part.kind, part.exact, tally.inexact) == (kind, True, 0)
    if mode != "affine":
        with pytest.raises(MisError, match=f"--out-type {mode}"):
            tensors.parts(load.open_checkpoint(tmp_path / "dense"), mode)


def test_mixed_bits_are_exact_where_they_can_be(tmp_path: Path) -> None:
    """3, 4 and 5 bits as they are; 6 and 8 to Q8_0, within half a step; wide ones stay wide."""
    paths = {
        3: "model.layers.0.mlp.up_proj",
        5: "model.layers.1.mlp.up_proj",
        6: "model.layers.1.mlp.down_proj",
    }
    paths[8] = "model.layers.2.mlp.up_proj"
    checkpoint = packed(tmp_path, 64, mixed={path: n for n, path in paths.items()})
    assert tensors.out_type(checkpoint) == "q4_1"
    for bits, kind in ((3, "Q4_1"), (5, "Q5_1"), (6, "Q8_0"), (8, "Q8_0")):
        name = f"{paths[bits]}.weight"
        part, values, tally = content(checkpoint, name, "q4_1")
        want = np.array(load.dense(checkpoint, name))
        change = np.linalg.norm(values - want) / np.linalg.norm(want)
        assert tally.relative == pytest.approx(change, rel=1e-5)
        step = np.abs(want.reshape(-1, 32)).max(axis=1, keepdims=True) / 127
        error = np.abs(values - want).reshape(-1, 32)
        assert (part.kind, part.exact) == (kind, bits < 6)
        assert np.all(error <= (0.5 + 127 * 2**-11) * step)
        assert (error.max() == 0) == part.exact
    kinds = Counter(p.kind for p in tensors.parts(checkpoint, "q4_1"))
    assert kinds == {"Q4_1": 22 - 3, "Q5_1": 1, "Q8_0": 2, "F32": 7}
    assert {p.source for p in tensors.parts(checkpoint, "q4_0") if p.kind == "Q8_0"} == {
        load.EMBEDDING + "weight",
        *(f"{paths[n]}.weight" for n in (5, 6, 8)),
    }


def test_bfloat16_scales_that_float16_cannot_hold_are_counted(tmp_path: Path) -> None:
    """Below 2**-14 bfloat16 loses bits in float16, and every such scale is counted."""
    checkpoint = packed(
        tmp_path,
        64,
        mx.bfloat16,
        tweak=lambda s: mx.where(mx.arange(s.shape[1]) == 0, s * 2.0**-14, s),
    )
    name = "model.layers.0.mlp.down_proj.weight"
    _, values, tally = content(checkpoint, name, "q4_1")
    arrays = load.safetensors.lazy(
        checkpoint.tensors, [name.replace("weight", p) for p in ("scales", "biases")]
    )
    floats = [np.array(a.astype(mx.float32)) for a in arrays.values()]
    lost = sum(int((a.astype(np.float16).astype(np.float32) != a).sum()) for a in floats)
    assert tally.inexact == lost
    assert 32 <= lost <= 128
    np.testing.assert_allclose(values, np.array(load.dense(checkpoint, name)), rtol=2e-3, atol=2e-6)
    clean = packed(tmp_path / "clean", 64, mx.bfloat16)
    assert content(clean, name, "q4_1")[2].inexact == 0


@pytest.mark.parametrize("kind", ["qwen2", "biased"])
def test_biases_are_float32(models: Callable[[str], Checkpoint], kind: str) -> None:
    """Those of q and k of a llama in llama.cpp's order."""
    model = models(kind)
    biases = [name for name in model.tensors if name.endswith(".bias")]
    assert len(biases) == {"qwen2": 9, "biased": 21}[kind]
    for name in biases:
        part, values, _ = content(model, name, "f16")
        want = np.array(load.dense(model, name))
        heads = {"attn_q": 4, "attn_k": 2}.get(part.name.split(".")[2], 0)
        if heads and kind == "biased":
            want = llama_cpp_permute(want, heads)
        assert (part.kind, part.name[-5:]) == ("F32", ".bias")
        np.testing.assert_array_equal(values, want)


def test_slabs_make_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven rows at a time or all at once: the same bytes, permuted or not, packed or dense."""
    checkpoint = packed(tmp_path, 64)
    dense = load.open_checkpoint(tmp_path / "dense")
    whole = [content(c, Q, wanted)[1] for c, wanted in ((checkpoint, "q4_1"), (dense, "q8_0"))]
    monkeypatch.setattr(tensors, "SLAB_BYTES", 7 * 4 * 128)
    part = next(p for p in tensors.parts(checkpoint, "q4_1") if p.source == Q)
    assert len(list(tensors.rows(checkpoint, part, rerounding.Rerounding()))) == 19
    for before, (c, wanted) in zip(whole, ((checkpoint, "q4_1"), (dense, "q8_0")), strict=True):
        np.testing.assert_array_equal(content(c, Q, wanted)[1], before)


def facts(config: dict[str, Any]) -> dict[str, Any]:
    """{key without the architecture: value} of what `describe` writes."""
    writer = GGUFWriter(None, "x")
    tensors.describe(writer, config, "name", "f16")
    return {key.removeprefix("x."): value.value for key, value in writer.kv_data[0].items()}


def test_a_familys_own_numbers(models: Callable[[str], Checkpoint]) -> None:
    """Multipliers, windows and what queries grow by have their keys, with the config's numbers."""
    granite = facts({**models("granite").config, "logits_scaling": None})
    assert [granite[f"{n}_scale"] for n in ("embedding", "residual", "logit")] == [12.0, 0.22, 1.0]
    assert granite["attention.scale"] == 0.1
    gemma = facts(models("gemma3_text").config)
    assert gemma["attention.sliding_window"] == 7
    assert gemma["attention.sliding_window_pattern"] == 3
    assert gemma["rope.freq_base_swa"] == 1e3
    assert gemma["rope.freq_base"] == 1e4
    mistral = facts({**models("ministral3").config, "layer_types": None})
    scaling = {key: mistral[key] for key in mistral if key.startswith("rope.scaling.")}
    wanted = {"type": "yarn", "factor": 4.0, "original_context_length": 8}
    wanted |= {"yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0, "yarn_log_multiplier": 1.0}
    assert scaling == {f"rope.scaling.{key}": value for key, value in wanted.items()}
    assert mistral["attention.temperature_scale"] == 0.1
    assert not any("scal" in key or "slid" in key for key in facts(models("smollm3").config))


def test_gemmas_norms_are_what_multiplies(models: Callable[[str], Checkpoint]) -> None:
    """One more than is stored; those of queries take the odd score divisor in."""
    gemma = models("gemma3_text")
    q = "model.layers.2.self_attn.q_norm.weight"
    k = "model.layers.2.self_attn.k_norm.weight"
    for name, gain in ((q, (16 / 20) ** 0.5), (k, 1.0), ("model.norm.weight", 1.0)):
        want = gain * (1 + np.array(load.dense(gemma, name)))
        np.testing.assert_allclose(content(gemma, name, "f16")[1], want, rtol=1e-6)
    assert family({**gemma.config, "num_hidden_layers": 62}).query_gain() == (16 / 20) ** 0.5
    # 20 a head, which is what the scalar is
    deep = {**gemma.config, "num_hidden_layers": 62, "hidden_size": 80}
    assert family(deep).query_gain() == 1.0


def test_llama_3s_frequencies_are_mlx_lms(models: Callable[[str], Checkpoint]) -> None:
    """rope_freqs divides each frequency by what mlx-lm's own Llama3RoPE divides it by."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 512}
    scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama = models("llama")
    changed = Checkpoint(
        llama.path, {**llama.config, "rope_scaling": scaling, "head_dim": 64}, llama.tensors
    )
    part = tensors.Part("rope_freqs.weight", "", (32,), "F32")
    rows = list(tensors.rows(changed, part, rerounding.Rerounding()))
    found = np.concatenate(rows).view(np.float32)
    made = load.mlx_lm("models.rope_utils").initialize_rope
    rope = made(64, 10000.0, False, scaling_config=scaling, max_position_embeddings=4096)
    plain = 10000.0 ** (np.arange(0, 64, 2) / 64)
    # theirs is computed in float32
    np.testing.assert_allclose(found, np.array(rope._freqs) / plain, rtol=1e-5)
    assert found[0] == 1
    assert found[-1] == 8
    assert np.any((found > 1.01) & (found < 7.99))


def test_rows_without_whole_blocks_are_a_sentence(tmp_path: Path) -> None:
    """48 is no multiple of 32: refused for every block type, fine in float16."""
    odd = load.open_checkpoint(tiny.make(tmp_path / "odd", intermediate_size=48))
    for wanted in ("q8_0", "q4_0", "q4_1"):
        with pytest.raises(MisError, match="rows of 48 .*--out-type f16"):
            tensors.parts(odd, wanted)
    assert tensors.parts(odd, "f16")


@pytest.mark.parametrize(
    ("value", "wanted", "why"),
    [(float("nan"), "q8_0", "NaN"), (1e5, "f16", "float16 ends at 65504")],
)
def test_numbers_that_cannot_be_written(
    tmp_path: Path, value: float, wanted: str, why: str
) -> None:
    """NaN anywhere; more than float16 holds where float16 is asked for."""
    source = load.open_checkpoint(tiny.make(tmp_path / "m"))
    weight = mx.array(load.dense(source, Q))
    weight[3, 5] = value
    slab = {Q: weight}
    part = next(p for p in tensors.parts(source, wanted) if p.source == Q)
    with pytest.raises(MisError, match=f"{Q} h.*{why}"):
        tensors._converted(source, part, slab, Counter())


VALUES = np.random.default_rng(0).standard_normal((5, 64), dtype=np.float32)
PARTS = [
    tensors.Part("a.weight", "", (5, 64), "Q8_0"),
    tensors.Part("b.weight", "", (5, 64), "F16"),
    tensors.Part("c.weight", "", (3,), "F32"),
]


def test_the_reader_finds_what_was_written(tmp_path: Path) -> None:
    """Facts, shapes, types and bytes, each tensor at a multiple of 32; the size as foretold."""
    writer = GGUFWriter(None, "llama")
    writer.add_context_length(77)
    arrays = {
        "a.weight": quants.quantize(VALUES, GGMLQuantizationType.Q8_0),
        "b.weight": VALUES.astype(np.float16).view(np.uint8),
        "c.weight": VALUES[0, :3].copy().view(np.uint8),
    }
    slabs = [iter([arrays["a.weight"][i : i + 2] for i in (0, 2, 4)])]  # of 2, 2 and 1 rows
    slabs += [iter([arrays[name]]) for name in ("b.weight", "c.weight")]
    path = tmp_path / "x.gguf"
    tensors.write(path, tensors.head(writer, PARTS), parts=PARTS, rows=slabs)
    reader = GGUFReader(path)
    assert reader.fields["llama.context_length"].contents() == 77
    assert [
        tensors.Part(t.name, "", tuple(reversed(t.shape.tolist())), t.tensor_type.name)
        for t in reader.tensors
    ] == PARTS
    for tensor in reader.tensors:
        assert tensor.data_offset % 32 == 0
        assert tensor.data.tobytes() == arrays[tensor.name].tobytes()
    assert path.stat().st_size == reader.data_offset + tensors.padded_bytes(PARTS)
