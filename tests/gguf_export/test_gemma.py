"""Gemma 4 in a GGUF: tensors and facts by gguf-py, and what is refused."""

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
from mis_mlx.models.architectures.families import family
from mis_mlx.models.opening import load, wheel_model
from mis_mlx.types import Checkpoint, MisError
from tests import family_checks, tiny
from tests.gguf_export import gemma_graph


def opened(model: Path, out: Path, wanted: str = "f32") -> GGUFReader:
    """gguf-py's view of an export."""
    settings: dict[str, Any] = {"model": str(model), "out": str(out), "out_type": wanted}
    done = export.run(export.Settings(**settings))
    return GGUFReader(out / done["file"])


def values(reader: GGUFReader) -> dict[str, np.ndarray]:
    """{llama.cpp's name: float32 values (out, in)}."""
    found = {}
    for tensor in reader.tensors:
        shape = [*reversed(tensor.shape.tolist())]
        found[tensor.name] = dequantize(tensor.data, tensor.tensor_type).reshape(shape)
    return found


def facts(reader: GGUFReader, arch: str) -> dict[str, Any]:
    """{key: value} of the architecture's own keys."""
    keys = [key for key in reader.fields if key.startswith(f"{arch}.")]
    return {key.removeprefix(f"{arch}."): reader.fields[key].contents() for key in keys}


def stored(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """A tensor of the model in float32."""
    return np.array(load.dense(checkpoint, name))


def test_gemma4(models: Callable[[str], Checkpoint], tmp_path: Path) -> None:
    """Two head sizes, doubled MLPs, shared keys, per-layer inputs, and a number behind each
    block."""
    model = models("gemma4_text")
    reader = opened(model.path, tmp_path / "out")
    told = facts(reader, "gemma4")
    assert told["feed_forward_length"] == [768] * 3 + [1536] * 4
    assert told["attention.sliding_window_pattern"] == [True, True, False, True, False, True, False]
    assert [told[f"attention.{side}_length"] for side in ("key", "value")] == [32, 32]
    assert [told[f"attention.{side}_length_swa"] for side in ("key", "value")] == [16, 16]
    assert [told["rope.dimension_count"], told["rope.dimension_count_swa"]] == [32, 16]
    assert [told["rope.freq_base"], told["rope.freq_base_swa"]] == [1e6, 1e4]
    assert told["attention.shared_kv_layers"] == 4
    assert told["embedding_length_per_layer_input"] == 32
    assert told["final_logit_softcapping"] == 3.0
    weights = values(reader)
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
    for theirs, ours in pairs.items():
        np.testing.assert_array_equal(weights[theirs], stored(model, ours), err_msg=theirs)
    assert "blk.3.attn_k.weight" not in weights


def test_llama_cpps_graph_computes_the_model(tmp_path: Path) -> None:
    """Logits in numpy's float64, from the file alone, as llama.cpp goes through it: windows, shared
    keys, both head sizes."""
    folder = tiny.make(tmp_path / "m", **tiny.FAMILIES["gemma4_text"])
    reader = opened(folder, tmp_path / "out")
    ids = np.random.default_rng(0).integers(1, 512, 40).tolist()
    model = load.resident_model(load.open_checkpoint(folder), mx.float32)
    want = np.array(model(mx.array(ids)[None])[0])
    np.testing.assert_allclose(gemma_graph.gemma4(reader, ids), want, atol=5e-4)
    assert np.ptp(want) > 0.5


def test_packed_models(tmp_path: Path) -> None:
    """Four bits as MLX packed them, also of the table; eight bits are rounded once more, by half a
    step of 127."""
    dense = tiny.make(tmp_path / "m", **tiny.FAMILIES["gemma4_text"])
    model = family_checks.quantized(dense, tmp_path / "four", target_bpw=None)
    done = export.run(export.Settings(model=str(model.path), out=str(tmp_path / "out")))
    reader = GGUFReader(tmp_path / "out" / done["file"])
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["per_layer_token_embd.weight"] == "Q4_1"
    assert kinds["blk.1.inp_gate.weight"] == kinds["token_embd.weight"] == "Q8_0"
    weights = values(reader)
    names = wheel_model.gguf_names(model.config, arch.tensors_of(model.config, stacked=True))
    for ours, theirs in names.items():
        assert theirs
        want = stored(model, ours)
        off = np.abs(weights[theirs] - want.reshape(weights[theirs].shape)).max()
        most = 0.6 / 127 * np.abs(want).max() if kinds[theirs] == "Q8_0" else 0.0
        assert off <= most, theirs


def test_whose_keys_are_used() -> None:
    """llama.cpp takes those of the last block but one where there is a window, else of the last."""
    config = tiny.FAMILIES["gemma4_text"]
    family(config).check_gguf()
    kinds = ["full_attention", "sliding_attention", *config["layer_types"][2:]]
    family({**config, "layer_types": kinds}).check_gguf()
    kinds = ["sliding_attention", "full_attention", "sliding_attention", *kinds[3:]]
    with pytest.raises(
        MisError, match="block 3 uses the keys of block 2, but in llama.cpp's gemma4"
    ):
        family({**config, "layer_types": kinds}).check_gguf()
