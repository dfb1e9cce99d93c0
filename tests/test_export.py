"""The command `export`: what gguf-py reads back is the model, and a second program in numpy runs it
the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGUFReader, dequantize

from mis_mlx import export
from mis_mlx.models.architectures import arch
from mis_mlx.models.opening import load
from mis_mlx.types import Checkpoint, MisError
from tests import tiny
from tests.conftest import Done, last_line

IDS = [5, 300, 17, 17, 400, 9, 250, 19, 0, 77]
# What llama.cpp's loader reads of these models (llama_model_base::load_hparams,
# llama_vocab::impl::load), by hand.
NEEDED = """
general.architecture general.type general.name general.size_label general.file_type
general.quantization_version A.context_length A.embedding_length A.block_count
A.feed_forward_length A.vocab_size A.attention.head_count A.attention.head_count_kv
A.attention.key_length A.attention.value_length A.attention.layer_norm_rms_epsilon
A.rope.dimension_count A.rope.freq_base tokenizer.ggml.model tokenizer.ggml.pre
tokenizer.ggml.tokens tokenizer.ggml.token_type tokenizer.ggml.merges
tokenizer.ggml.bos_token_id tokenizer.ggml.eos_token_id tokenizer.ggml.add_bos_token
"""


def exported(model: Path, out: Path, **settings: Any) -> tuple[dict[str, Any], GGUFReader]:
    """(result, reader) of an export to GGUF."""
    done = export.run(export.Settings(model=str(model), out=str(out), **settings))
    return done, GGUFReader(out / done["file"])


def tensors(reader: GGUFReader) -> dict[str, np.ndarray]:
    """{GGUF name: float32 values (out, in)}."""
    return {
        t.name: dequantize(t.data, t.tensor_type)
        .astype(np.float32)
        .reshape([*reversed(t.shape.tolist())])
        for t in reader.tensors
    }


def facts(reader: GGUFReader) -> dict[str, Any]:
    """{key: value}, the architecture in a key as A."""
    found = {
        key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")
    }
    prefix = f"{found['general.architecture']}."
    return {
        f"A.{k.removeprefix(prefix)}" if k.startswith(prefix) else k: v for k, v in found.items()
    }


def rotate(x: np.ndarray, theta: float, neighbours: bool) -> np.ndarray:
    """RoPE of x (heads, T, d) as ggml does it: pairs (2i, 2i + 1) for llama, (i, i + d/2) for
    qwen.
    """
    d = x.shape[-1]
    angle = np.arange(x.shape[1])[:, None] * theta ** (-np.arange(0, d, 2) / d)
    a, b = (x[..., 0::2], x[..., 1::2]) if neighbours else (x[..., : d // 2], x[..., d // 2 :])
    turned = [a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)]
    return np.stack(turned, -1).reshape(x.shape) if neighbours else np.concatenate(turned, -1)


def forward(reader: GGUFReader, ids: list[int]) -> np.ndarray:
    """Logits (T, V) in float64, from the file alone: what llama.cpp's graphs of llama, qwen2 and
    qwen3 compute.
    """
    w = {k: v.astype(np.float64) for k, v in tensors(reader).items()}
    f = facts(reader)
    heads, kv, d = (
        f[f"A.attention.{key}"] for key in ("head_count", "head_count_kv", "key_length")
    )
    neighbours = f["general.architecture"] == "llama"
    theta = f["A.rope.freq_base"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        eps = f["A.attention.layer_norm_rms_epsilon"]
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * w[name]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    h = w["token_embd.weight"][ids]
    future = np.triu(np.full((len(ids), len(ids)), -np.inf), 1)
    for i in range(f["A.block_count"]):
        b = f"blk.{i}."
        x = norm(h, f"blk.{i}.attn_norm.weight")
        q, k, v = (
            linear(x, f"{b}attn_{n}").reshape(len(ids), count, d).swapaxes(0, 1)
            for n, count in (("q", heads), ("k", kv), ("v", kv))
        )
        if f"{b}attn_q_norm.weight" in w:
            q = norm(q, f"{b}attn_q_norm.weight")
            k = norm(k, f"{b}attn_k_norm.weight")
        q = rotate(q, theta, neighbours)
        k = rotate(k, theta, neighbours)
        k, v = (np.repeat(a, heads // kv, 0) for a in (k, v))
        scores = np.exp(q @ k.swapaxes(1, 2) / np.sqrt(d) + future)
        mixed = (scores / scores.sum(-1, keepdims=True)) @ v
        h = h + linear(mixed.swapaxes(0, 1).reshape(len(ids), -1), f"{b}attn_output")
        x = norm(h, f"{b}ffn_norm.weight")
        gate = linear(x, f"{b}ffn_gate")
        h = h + linear(gate / (1 + np.exp(-gate)) * linear(x, f"{b}ffn_up"), f"{b}ffn_down")
    head = w["output.weight"] if "output.weight" in w else w["token_embd.weight"]
    return norm(h, "output_norm.weight") @ head.T


def mlx_logits(folder: Path, ids: list[int]) -> np.ndarray:
    """Logits (T, V) of mlx-lm's own model in float32."""
    return np.array(
        load.resident_model(load.open_checkpoint(folder), mx.float32)(mx.array(ids)[None])[0]
    )


@pytest.mark.parametrize("kind", sorted(tiny.KINDS))
def test_another_program_runs_the_file_as_mlx_runs_the_folder(tmp_path: Path, kind: str) -> None:
    """Rows of q and k, names, biases, norms, tying and every number of the header are right, or
    these differ. Every key that llama.cpp's loader reads is there with the model's own numbers, and
    each tensor once.
    """
    model = tiny.make(tmp_path / kind, dtype="F16", **tiny.KINDS[kind])
    _, reader = exported(model, tmp_path / "out", out_type="f16")
    # the weights are the same numbers, so what is left is float32 against float64, on logits of
    # about 1
    np.testing.assert_allclose(forward(reader, IDS), mlx_logits(model, IDS), atol=2e-5)
    assert len(reader.tensors) == len(arch.tensors_of(load.open_checkpoint(model).config))
    f = facts(reader)
    assert set(f) == set(NEEDED.split())
    sizes = ("context_length", "embedding_length", "block_count", "feed_forward_length")
    assert [f[f"A.{key}"] for key in (*sizes, "vocab_size")] == [512, 64, 3, 768, 512]
    heads = ("head_count", "head_count_kv", "key_length", "value_length")
    assert [f[f"A.attention.{key}"] for key in heads] == [4, 2, 16, 16]
    assert f["A.rope.dimension_count"] == 16
    assert f["A.rope.freq_base"] == 10000.0
    assert f["A.attention.layer_norm_rms_epsilon"] == np.float32(1e-5)
    assert f["general.architecture"] == {"qwen2": "qwen2", "qwen3": "qwen3"}.get(kind, "llama")
    assert f["general.file_type"] == 1
    assert f["general.name"] == kind
    assert len(f["tokenizer.ggml.tokens"]) == 512
    assert f["tokenizer.ggml.add_bos_token"] is False


def test_stretched_positions(tmp_path: Path) -> None:
    """linear and yarn have keys; whoever forgets them talks nonsense beyond the old context."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    yarn |= {"beta_fast": 16.0}
    for name, scaling in (("linear", {"type": "linear", "factor": 2.0}), ("yarn", yarn)):
        model = tiny.make(tmp_path / name, rope_scaling=scaling)
        f = facts(exported(model, tmp_path / f"{name}-out")[1])
        assert f["A.rope.scaling.type"] == name
        assert f["A.rope.scaling.factor"] == scaling["factor"]
    assert f["A.rope.scaling.original_context_length"] == 128
    assert f["A.rope.scaling.yarn_beta_fast"] == 16.0


@pytest.mark.parametrize(
    ("wanted", "step"), [("q8_0", 1 / 127), ("q4_0", 1 / 8), ("q4_1", 1 / 15), ("bf16", 2**-7)]
)
def test_a_dense_model_in_each_type(
    tmp_path: Path, llama: Checkpoint, wanted: str, step: float
) -> None:
    """Within one step of the block: its largest number (or its span) over the levels, and the type
    as asked.
    """
    _, reader = exported(llama.path, tmp_path / "out", out_type=wanted)
    name = "blk.1.ffn_gate.weight"
    assert next(t for t in reader.tensors if t.name == name).tensor_type.name == wanted.upper()
    want = np.array(load.dense(llama, "model.layers.1.mlp.gate_proj.weight")).reshape(-1, 32)
    size = np.ptp(want, axis=1) if wanted == "q4_1" else np.abs(want).max(axis=1)
    error = np.abs(tensors(reader)[name].reshape(-1, 32) - want).max(axis=1)
    # q4_0's eighth level on the far side does not exist: a whole step there; half of one, and
    # float16's 2**-10, else
    assert np.all(error <= size * step * (1.0 if wanted == "q4_0" else 0.5) + size * 2**-10)
    assert error.max() > 0


def test_four_bits_are_rewrapped_not_rounded(tmp_path: Path, four: Path) -> None:
    """All 21 4-bit matrices (to the bit: tests/gguf_export/test_tensors.py); the 8-bit embedding is
    rounded to Q8_0, and it says so. Another program runs the file as MLX runs the folder.
    """
    done, reader = exported(four, tmp_path / "out")
    assert done["out_type"] == "q4_1"
    assert done["rewrapped"] == 21
    assert done["inexact_scales"] == 0
    want = np.array(load.dense(load.open_checkpoint(four), "model.embed_tokens.weight"))
    found = tensors(reader)["token_embd.weight"]
    moved = np.linalg.norm(found - want) / np.linalg.norm(want)
    assert 0.003 < moved < 0.01
    assert any(f"{moved:.2%}" in note for note in done["notes"])
    # what is left is the embedding's rounding, 1/254 of a block's largest number
    np.testing.assert_allclose(forward(reader, IDS), mlx_logits(four, IDS), atol=0.02)


def test_end_to_end(tmp_path: Path, four: Path, command: Callable[..., Done]) -> None:
    """As a user runs it: three files, JSON last, the size as a dry run foretold, which writes
    nothing.
    """
    flags = ("--model", four, "--outtype", "q4_1", "--mlx-path", tmp_path / "out")
    dry = command("export", *flags, "--dry-run")
    assert dry.returncode == 0
    assert not (tmp_path / "out").exists()
    done = command("export", *flags)
    assert done.returncode == 0, done.stderr
    result = last_line(done)
    assert sorted(os.listdir(tmp_path / "out")) == ["Modelfile", "README.md", "four-Q4_1.gguf"]
    file = tmp_path / "out" / result["file"]
    assert result["nbytes"] == last_line(dry)["nbytes"] == file.stat().st_size
    assert last_line(dry)["notes"][0] == result["notes"][0]
    assert (tmp_path / "out" / "Modelfile").read_text().startswith("FROM ./four-Q4_1.gguf\n")
    assert "21 matrices re-wrapped" in (tmp_path / "out" / "README.md").read_text()
    assert result["peak_bytes"] > 0


@pytest.mark.parametrize(("wanted", "ulp"), [("bf16", 2**-8), ("f16", 2**-11)])
def test_a_hugging_face_folder(tmp_path: Path, four: Path, wanted: str, ulp: float) -> None:
    """Dense weights rounded once, a config without quantization, tokenizer and card; opens like any
    other.
    """
    done = export.run(
        export.Settings(model=str(four), format="hf", out_type=wanted, out=str(tmp_path / "hf"))
    )  # type: ignore[arg-type]
    before = load.open_checkpoint(four)
    after = load.open_checkpoint(tmp_path / "hf")
    assert not arch.is_quantized(after.tensors)
    assert "quantization" not in after.config
    assert after.config["torch_dtype"] == export.HF_DTYPES[wanted]
    assert done["nbytes"] == after.nbytes
    for name in arch.tensors_of(before.config):
        want, got = (np.array(load.dense(c, name).astype(mx.float32)) for c in (before, after))
        np.testing.assert_allclose(got, want, rtol=ulp, atol=2**-25, err_msg=name)
    assert (tmp_path / "hf" / "tokenizer.json").is_file()
    assert done["notes"][1] in (tmp_path / "hf" / "README.md").read_text()


def test_refusals_write_nothing(tmp_path: Path, llama: Checkpoint) -> None:
    """A GGUF, a type of the other format, NaN, no context length, no tokenizer."""
    out = tmp_path / "out"

    def refused(why: str, model: Path = llama.path, **settings: Any) -> None:
        with pytest.raises(MisError, match=why):
            export.run(export.Settings(model=str(model), out=str(out), **settings))
        assert not out.exists()

    refused("x.gguf", tmp_path / "x.gguf")
    refused("q8_0", format="hf", out_type="q8_0")
    broken = tiny.make(tmp_path / "broken")
    data = bytearray((broken / "model.safetensors").read_bytes())
    data[-4:] = np.float32("nan").tobytes()
    (broken / "model.safetensors").write_bytes(data)
    refused("model.norm.weight", broken, format="hf")
    config = json.loads((broken / "config.json").read_text())
    del config["max_position_embeddings"]
    (broken / "config.json").write_text(json.dumps(config))
    refused("max_position_embeddings", broken)
    (broken / "tokenizer.json").unlink()
    refused("tokenizer", broken, format="hf")
