"""Export a model: a GGUF for llama.cpp, LM Studio and Ollama, or an ordinary Hugging Face
folder.
"""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import gguf
import mlx.core as mx
import tyro

from mis_mlx import cli
from mis_mlx.gguf_export import model_card, tensors, vocab
from mis_mlx.hardware import memory, programs
from mis_mlx.models import (
    arch,
    families,
    load,
    model_writer,
    policy,
    resolve,
    stream,
    tokenizer_check,
)
from mis_mlx.models.config import shape_of
from mis_mlx.planner import estimates
from mis_mlx.reporting import html, progress
from mis_mlx.storage import checkpoint as protocol
from mis_mlx.storage import hub
from mis_mlx.storage.files import DISK, need_place
from mis_mlx.types import Checkpoint, MisError, gib

Type = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q4_k_m", "mxfp4", "nvfp4"]
OutType = Annotated[Type | None, tyro.conf.arg(aliases=["--outtype"])]  # llama.cpp's spelling too
K_QUANT = "q4_k_m"  # which llama.cpp makes
STAGED = "float16.gguf"  # what it makes it of
THEIR_BYTES = 128 * 2**20  # of a process with llama.cpp in it, beside a model's tensors
HF_DTYPES = {"f16": "float16", "bf16": "bfloat16"}
TOKEN_BYTES = 2048  # Python's memory for a token and its merge, measured on SmolLM2's 49 thousand
PAPERS_BYTES = 64 * 1024  # README.md and Modelfile, generously


@dataclass(frozen=True)
class Settings(cli.Budgeted):
    """The result is a new folder; nothing that exists is touched."""

    model: str | None = None
    """folder or hub id, dense or packed by MLX; default: SmolLM2-135M-Instruct"""
    format: Literal["gguf", "hf"] = "gguf"
    """gguf: one file, a Modelfile and a README.md; hf: config, safetensors, tokenizer and a
    README.md
    """
    out_type: OutType = None
    """type of the matrices; default: gguf q4_1 for a 4-bit model, which holds it exactly, else f16;
    hf bf16. q4_k_m is llama.cpp's own, and needs llama-quantize or llama-cpp-python
    """
    out: Annotated[str, tyro.conf.arg(aliases=["--mlx-path"])] = "exported"
    """folder to write"""
    base_model: str | None = None
    """hub id of the model it was made from, for the card; default: what its run says"""
    license: str | None = None
    """licence of the weights for the card, in the hub's words, such as apache-2.0; default: the
    default teacher's
    """
    upload_repo: str | None = None
    """hub repository to upload --format hf to, such as NAME/MODEL; needs --license, and `hf auth
    login` once
    """
    dry_run: bool = False
    """say bytes and types and stop"""


def need_bytes(checkpoint: Checkpoint, form: str, wanted: str) -> int:
    """Peak of an export: hf de-quantizes a whole tensor; gguf holds one as stored, slabs of its
    rows, the tokens; for a K-quant llama.cpp has a tensor in float16, in float32 and rounded, in a
    process of its own.
    """
    if form == "hf":
        return estimates.tensor_bytes(estimates.model_of(checkpoint))
    largest = max(t.nbytes for t in checkpoint.tensors.values())
    tokens = TOKEN_BYTES * shape_of(checkpoint.config).vocab
    theirs = 10 * max(map(math.prod, arch.tensors_of(checkpoint.config).values())) + THEIR_BYTES
    return (
        max(5 * largest // 4 + 6 * tensors.SLAB_BYTES, theirs if wanted == K_QUANT else 0) + tokens
    )


def _facts(parts: list[tensors.Part], checkpoint: Checkpoint, inexact: int = 0) -> list[str]:
    """What became of the matrices, for people: which were re-wrapped, which rounded."""
    again = Counter(p.kind for p in parts if not p.exact and load.packing(checkpoint, p.source))
    facts = [
        f"types of the tensors: "
        f"{', '.join(f'{n} {k}' for k, n in Counter(p.kind for p in parts).items())}"
    ]
    if exact := sum(p.exact for p in parts):
        off = (
            f"but {inexact} scales or biases are not exact in float16"
            if inexact
            else "no number rounded again"
        )
        facts.append(f"{exact} matrices re-wrapped as MLX packed them, {off}")
    if again:
        types = ", ".join(f"{kind} ({n})" for kind, n in again.items())
        facts.append(f"{again.total()} packed matrices de-quantized and rounded again to {types}")
    return facts


def _check_upload(s: Settings, checkpoint: Checkpoint) -> None:
    """MisError where --upload-repo cannot be obeyed, before any work."""
    if s.format != "hf":
        raise MisError(
            f"--upload-repo sends a Hugging Face folder, --format is {s.format}: add --format hf"
        )
    if not resolve.REPO_ID.fullmatch(s.upload_repo or ""):
        raise MisError(
            f"--upload-repo {s.upload_repo!r} is no repository of the hub: write NAME/MODEL"
        )
    if not s.license and (s.base_model or model_card.base_of(checkpoint.path)) != resolve.DEFAULT:
        raise MisError(
            "--upload-repo publishes weights, and their licence is not known: say it with --license"
        )


def _gguf(s: Settings, checkpoint: Checkpoint, wanted: str) -> dict[str, Any]:
    """Commit FOLDER/NAME-TYPE.gguf, Modelfile and README.md. A K-quant: llama.cpp makes it of a
    float16 file there.
    """
    name = model_card.name_of(checkpoint.path)
    config = checkpoint.config
    k_quant = wanted == K_QUANT
    if k_quant:
        programs.quantizer()  # its absence is said before the work
    parts = tensors.parts(checkpoint, wanted)
    staged = tensors.parts(checkpoint, "f16") if k_quant else parts
    writer = gguf.GGUFWriter(None, families.family(config).gguf)
    tensors.describe(writer, config, name, wanted)
    notes = vocab.add(writer, checkpoint.path, shape_of(config).vocab)
    facts = {key: value.value for key, value in writer.kv_data[0].items()}
    head = tensors.head(writer, staged)
    file = f"{name}-{wanted.upper()}.gguf"
    nbytes = len(head) + tensors.padded_bytes(parts)
    tally = Counter[str]()
    result = {
        "file": file,
        "nbytes": nbytes,
        "tensors": len(parts),
        "rewrapped": sum(p.exact for p in parts),
    }
    if s.dry_run:
        return {**result, "notes": [*_facts(parts, checkpoint)[:1], *notes]}
    end = facts.get("tokenizer.ggml.eos_token_id")
    base = s.base_model or model_card.base_of(checkpoint.path)
    stop = None if end is None else facts["tokenizer.ggml.tokens"][end]
    room = nbytes + PAPERS_BYTES + (tensors.padded_bytes(staged) if k_quant else 0)
    with protocol.commit_folder(Path(s.out), DISK, room, "the GGUF") as folder:
        rows = (
            tensors.rows(checkpoint, part, tally)
            for part in cli.counted("tensor", staged, len(staged))
        )
        tensors.write(folder / (STAGED if k_quant else file), head, staged, rows, DISK)
        final = parts
        if k_quant:
            programs.quantize(folder / STAGED, folder / file, wanted.upper())
            DISK.remove_tree(folder / STAGED)
            # by its own version
            chosen = {t.name: t.tensor_type.name for t in gguf.GGUFReader(folder / file).tensors}
            final = [p._replace(kind=chosen[p.name]) for p in parts]
        notes[:0] = _facts(final, checkpoint, tally["inexact"])
        words = {"file": file, "template": facts.get("tokenizer.chat_template", ""), "stop": stop}
        DISK.write(folder / "Modelfile", f"{html.document('Modelfile', words)}\n".encode())
        DISK.write(
            folder / "README.md",
            model_card.readme(checkpoint, base, file, notes, s.license or "").encode(),
        )
    result["nbytes"] = (Path(s.out) / file).stat().st_size
    return {**result, "inexact_scales": tally["inexact"], "notes": notes}


def _hf(s: Settings, checkpoint: Checkpoint, wanted: str) -> dict[str, Any]:
    """Commit an ordinary folder: every weight dense in one type."""
    if wanted not in HF_DTYPES:
        raise MisError(f"--out-type {wanted} is a type of GGUF: take --format gguf, or bf16 or f16")
    model_writer.need_tokenizer(checkpoint.path)
    shape = shape_of(checkpoint.config)
    dtype = HF_DTYPES[wanted]
    config = arch.student_config(checkpoint.config, shape, tuple(range(shape.layers)), dtype)
    names = arch.tensors_of(checkpoint.config)
    packed = sum(load.packing(checkpoint, name) != {} for name in names)
    rounded = [f"{packed} packed matrices de-quantized, then rounded to {dtype}"] if packed else []
    facts = [f"weights in {dtype}", *rounded]

    def take(name: str) -> mx.array:
        weight = load.dense(checkpoint, name).astype(policy.DTYPES[dtype])
        if stream.not_numbers(weight):
            raise MisError(
                f"{name} holds NaN, infinity or more than {dtype} can: try the other --out-type"
            )
        return weight

    if not s.dry_run:
        base = s.base_model or model_card.base_of(checkpoint.path)
        papers = {
            "README.md": model_card.readme(checkpoint, base, "", facts, s.license or "").encode()
        }
        model_writer.write_model(config, take, checkpoint.path, Path(s.out), dtype, DISK, papers)
    return {"nbytes": 2 * arch.params(checkpoint.config), "tensors": len(names), "notes": facts}


def run(settings: Settings) -> dict[str, Any]:
    """The command."""
    s = settings
    cli.check_ranges(s)
    need_place("--out", s.out, "new")
    if s.model and s.model.endswith(".gguf"):
        raise MisError(f"{s.model} is a GGUF already: give the model folder that it was made from")
    folder = resolve.resolve_model(s.model).path
    checkpoint = load.open_checkpoint(folder)
    tokenizer_check.check_tokenizer(folder)
    if s.format == "gguf" and not (of := families.family(checkpoint.config)).gguf:
        why = "what llama.cpp reads of its per-layer inputs and shared keys was not tried"
        raise MisError(
            f"a {of.name} is not exported to GGUF, because {why}: use --format hf, or the folder "
            f"in mlx-lm"
        )
    if s.upload_repo:
        _check_upload(s, checkpoint)
    limit = memory.budget(s.budget_bytes)
    wanted = s.out_type or (tensors.out_type(checkpoint) if s.format == "gguf" else "bf16")
    need = need_bytes(checkpoint, s.format, wanted)
    limit.need(
        need, "the largest tensor on its way", f"give --budget {estimates.flag(need)} or more"
    )
    with progress.run("export"), memory.limited(limit):
        result = (_gguf if s.format == "gguf" else _hf)(s, checkpoint, wanted)
    if s.upload_repo and not s.dry_run:
        result["uploaded"] = hub.upload(Path(s.out), s.upload_repo)
        result["notes"].append(f"uploaded: {result['uploaded']}")
    cli.say(*result["notes"])
    cli.say(f"{s.out}: {gib(result['nbytes'])}{', nothing written (dry run)' if s.dry_run else ''}")
    where = {"model": str(folder), "format": s.format, "out_type": wanted, "out": s.out}
    return {**where, **result, "peak_bytes": need}


if __name__ == "__main__":
    cli.main(Settings, run)
