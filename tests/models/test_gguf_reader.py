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
from mis_mlx.models.opening import wheel_model
from mis_mlx.storage import safetensors
from mis_mlx.storage.files import file_sha256
from mis_mlx.types import MisError
from tests import tiny as tiny_model

HIDDEN = 64
FFN = 96
HEADS = 4
KV_HEADS = 2
HEAD_DIM = 16
LAYERS = 2
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
PIECES = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *BYTES, "he", "12"]


def llama_cpp_permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """`permute` of llama.cpp's convert_hf_to_gguf.py, word for word."""
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def original() -> dict[str, np.ndarray]:
    """{Hugging Face name: float32 weights} of a tied 2-block llama."""
    random = np.random.default_rng(0)
    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "vocab_size": len(PIECES),
    }
    shapes = arch.tensors_of({**tiny_model.CONFIG, **sizes})
    return {name: random.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def write_gguf(path: Path, weights: dict[str, np.ndarray], quantized: str = "") -> None:
    """A GGUF of `weights`, with q and k permuted; the tensor called `quantized` is stored as
    Q4_1.
    """
    writer = GGUFWriter(path, "llama")
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(100_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_context_length(8192)
    writer.add_vocab_size(len(PIECES))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(PIECES)
    writer.add_token_types([3, 3, 3] + [1] * (len(PIECES) - 3))
    writer.add_token_merges(["h e", "1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ messages }}")
    theirs = get_tensor_name_map(MODEL_ARCH.LLAMA, LAYERS)
    for name, values in weights.items():
        if "q_proj" in name or "k_proj" in name:
            values = llama_cpp_permute(values, HEADS if "q_proj" in name else KV_HEADS)
        kind = GGMLQuantizationType.Q4_1 if name == quantized else None
        data = quants.quantize(values, kind) if kind else np.ascontiguousarray(values)
        writer.add_tensor(theirs.get_name(name, (".weight",)), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def convert(source: Path, folder: Path, dtype: str, expected: str) -> None:
    """As SmolLM2's wheel is, but for sizes, special tokens and type."""
    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "vocab_size": len(PIECES),
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "torch_dtype": dtype,
    }
    files = wheel_model.SMOLLM2.files
    files = {
        **files,
        "config.json": {**files["config.json"], **sizes},
        "tokenizer_config.json": {
            **files["tokenizer_config.json"],
            "additional_special_tokens": PIECES[:3],
        },
    }
    wheel_model.convert_smollm2(
        replace(wheel_model.SMOLLM2, files=files, gguf_sha256=expected), source, folder
    )


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """The tiny model's GGUF."""
    write_gguf(tmp_path / "tiny.gguf", original())
    return tmp_path / "tiny.gguf"


def converted(source: Path, dtype: str = "float32") -> Path:
    """The folder made of `source`."""
    folder = source.with_name("model")
    folder.mkdir()
    convert(source, folder, dtype, file_sha256(source))
    return folder


def test_weights_come_back_bit_for_bit(tiny: Path) -> None:
    """In float32 every tensor has its Hugging Face name, shape and order of rows, the gate
    agrees.
    """
    folder = converted(tiny)
    assert safetensors.index(folder).keys() == original().keys()
    arrays: Any = mx.load(str(folder / "model.safetensors"))
    for name, values in original().items():
        np.testing.assert_array_equal(np.array(arrays[name]), values, err_msg=name)


def test_a_packed_tensor_is_unpacked(tmp_path: Path) -> None:
    """Q4_1 (here q, so permuted too) comes back to half a step: 16 levels between a group's
    ends.
    """
    name = "model.layers.1.self_attn.q_proj.weight"
    write_gguf(tmp_path / "tiny.gguf", original(), quantized=name)
    arrays: Any = mx.load(str(converted(tmp_path / "tiny.gguf") / "model.safetensors"))
    want = original()[name].reshape(-1, 32)
    step = np.ptp(want, axis=1, keepdims=True) / 15
    error = np.abs(np.array(arrays[name]).reshape(-1, 32) - want)
    assert np.all(error <= step * 0.5 + 0.01)  # scale and minimum are float16
    assert error.max() > 0.01  # it was packed indeed


def test_config_is_explicit(tiny: Path) -> None:
    """What mlx-lm or transformers would otherwise guess, silently and wrongly, is spelled out."""
    folder = converted(tiny, "bfloat16")
    assert {t.dtype for t in safetensors.index(folder).values()} == {"BF16"}
    config = json.loads((folder / "config.json").read_text())
    assert config["head_dim"] == HEAD_DIM
    assert config["tie_word_embeddings"] is True
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 100_000.0
    assert config["rms_norm_eps"] == 1e-5
    assert config["torch_dtype"] == "bfloat16"
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)


def test_tokenizer_splits_digits_and_keeps_polish(tiny: Path) -> None:
    """Merges are used except between digits, special tokens are single ids, text survives."""
    tokenizer = Tokenizer.from_file(str(converted(tiny) / "tokenizer.json"))
    assert tokenizer.encode("he 12").tokens == ["he", "Ġ", "1", "2"]
    assert tokenizer.encode("<|im_start|>he<|im_end|>").ids == [1, PIECES.index("he"), 2]
    text = "Zażółć gęślą jaźń, 832 m n.p.m."
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_foreign_gguf_is_refused_before_it_is_read(tiny: Path, tmp_path: Path) -> None:
    """Any file but the pinned one is refused by its hash, even one that no reader could open."""
    (tmp_path / "junk.gguf").write_bytes(b"GGUF" + b"\xff" * 100)
    (tmp_path / "out").mkdir()
    for foreign in (tiny, tmp_path / "junk.gguf"):
        with pytest.raises(MisError, match="use the safetensors model it was made from"):
            wheel_model.convert_smollm2(wheel_model.SMOLLM2, foreign, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
