"""Write a GGUF for llama.cpp, or a Hugging Face folder."""

from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import gguf
import mlx.core as mx
import tyro

from mis_mlx import cli
from mis_mlx.compute import precision
from mis_mlx.gguf_export import model_card, publication, rerounding, tensors, vocab
from mis_mlx.hardware import memory
from mis_mlx.models.architectures import arch
from mis_mlx.models.architectures.families import family, shape_of
from mis_mlx.models.opening import load, resolve, tokenizer_check
from mis_mlx.models.opening.model_size import model_of
from mis_mlx.models.passing import pass_cost, stream
from mis_mlx.models.writing import model_writer
from mis_mlx.planner import estimates
from mis_mlx.reporting import html, progress
from mis_mlx.storage import checkpoint as protocol
from mis_mlx.storage import hub
from mis_mlx.storage.files import DISK, need_place
from mis_mlx.storage.safetensors import InParts, Tensor
from mis_mlx.types import Checkpoint, MisError, gib

Type = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "mxfp4", "nvfp4"]
OutType = Annotated[Type | None, tyro.conf.arg(aliases=["--outtype"])]  # llama.cpp's spelling too
HF_DTYPES = {"f16": "float16", "bf16": "bfloat16"}
TOKEN_BYTES = 2048  # Python's memory for a token and its merge, measured on SmolLM2's 49 thousand
PAPERS_BYTES = 64 * 1024  # README.md and Modelfile, generously


@dataclass(frozen=True)
class Settings(cli.Budgeted):
    """Writes a new folder and changes no existing file."""

    model: str | None = None
    """folder or hub id, unquantized or quantized by MLX; default: SmolLM2-135M-Instruct"""
    format: Literal["gguf", "hf"] = "gguf"
    """gguf: one file with a Modelfile and a README.md; hf: config, safetensors, tokenizer and a
    README.md
    """
    out_type: OutType = None
    """type of the matrices; default: q4_1 for a 4-bit model (its 4-bit matrices stay exact, others
    are rounded again), f16 for other GGUFs, bf16 for hf
    """
    out: Annotated[str, tyro.conf.arg(aliases=["--mlx-path"])] = "exported"
    """folder to write"""
    base_model: str | None = None
    """hub id of the original model, for the model card; default: from the run"""
    license: str | None = None
    """license of the weights for the model card, as the hub spells it, such as apache-2.0; known
    only for the default teacher
    """
    upload_repo: str | None = None
    """hub repository for the export and, if MLX packed the model, for its folder, such as
    NAME/MODEL; needs --license, and `hf auth login` once
    """
    dry_run: bool = False
    """show bytes and types, and stop"""


def need_bytes(checkpoint: Checkpoint, form: str) -> int:
    """Peak memory of an export's arrays, in bytes.

    hf de-quantizes a whole tensor. gguf holds one as stored, slabs of its rows, and the tokens.
    """
    if form == "hf":
        return pass_cost.tensor_bytes(model_of(checkpoint))
    largest = max(tensor.nbytes for tensor in checkpoint.tensors.values())
    slabs = 6 * tensors.SLAB_BYTES
    return 5 * largest // 4 + slabs + TOKEN_BYTES * shape_of(checkpoint.config).vocab


def _facts(
    parts: list[tensors.Part],
    checkpoint: Checkpoint,
    tally: rerounding.Rerounding,
) -> list[str]:
    """What became of the matrices, for people: which were re-wrapped, which rounded."""
    kinds = Counter[str]()
    again = Counter[str]()  # of matrices that were packed, and rounded once more
    exact = 0
    for part in parts:
        kinds[part.kind] += 1
        exact += part.exact
        if not part.exact and load.packing(checkpoint, part.source):
            again[part.kind] += 1
    facts = [f"types of the tensors: {', '.join(f'{n} {kind}' for kind, n in kinds.items())}"]
    if exact:
        rounding = "no number rounded again"
        if tally.inexact:
            rounding = f"but {tally.inexact} scales or biases are not exact in float16"
        facts.append(f"{exact} matrices re-wrapped as MLX packed them, {rounding}")
    if again:
        types = ", ".join(f"{kind} ({n})" for kind, n in again.items())
        fact = f"{again.total()} packed matrices de-quantized and rounded again to {types}"
        if tally.total:
            fact += f", which moves their weights by {tally.relative:.2%} (root mean square)"
        facts.append(fact)
    return facts


def _base(settings: Settings, checkpoint: Checkpoint) -> str | None:
    """The hub id of the model that this one was made from, where it is known."""
    return settings.base_model or model_card.base_of(checkpoint.path)


def _readme(
    settings: Settings,
    checkpoint: Checkpoint,
    base: str | None,
    file: str,
    facts: list[str],
) -> bytes:
    """The model card. file: the GGUF's name; "" for a Hugging Face folder."""
    packed = publication.packed_files(checkpoint)
    card = model_card.readme(
        checkpoint,
        base,
        file,
        facts,
        license=settings.license or "",
        repository=settings.upload_repo or "" if packed else "",
    )
    return card.encode()


def _gguf(settings: Settings, checkpoint: Checkpoint, wanted: str) -> dict[str, Any]:
    """Commit FOLDER/NAME-TYPE.gguf, Modelfile and README.md."""
    name = model_card.name_of(checkpoint.path)
    config = checkpoint.config
    parts = tensors.parts(checkpoint, wanted)
    writer = gguf.GGUFWriter(None, family(config).gguf)
    tensors.describe(writer, config, name, wanted)
    notes = vocab.add(writer, checkpoint.path, shape_of(config).vocab)
    facts = {key: value.value for key, value in writer.kv_data[0].items()}
    head = tensors.head(writer, parts)
    file = f"{name}-{wanted.upper()}.gguf"
    nbytes = len(head) + tensors.padded_bytes(parts)
    exact = sum(part.exact for part in parts)
    result = {"file": file, "nbytes": nbytes, "tensors": len(parts), "rewrapped": exact}
    if settings.dry_run:
        types = _facts(parts, checkpoint, rerounding.Rerounding())[0]
        return {**result, "notes": [types, *notes]}
    base = _base(settings, checkpoint)
    end = facts.get("tokenizer.ggml.eos_token_id")
    stop = None
    if end is not None:
        stop = facts["tokenizer.ggml.tokens"][end]
    words = {"file": file, "template": facts.get("tokenizer.chat_template", ""), "stop": stop}
    modelfile = f"{html.document('Modelfile', words)}\n".encode()
    tally = rerounding.Rerounding()
    room = nbytes + PAPERS_BYTES
    with protocol.commit_folder(Path(settings.out), room, "the GGUF") as folder:
        rows = (
            tensors.rows(checkpoint, part, tally) for part in cli.show_progress("tensor", parts)
        )
        tensors.write(folder / file, head, parts, rows)
        notes = _facts(parts, checkpoint, tally) + notes
        DISK.write(folder / "Modelfile", modelfile)
        DISK.write(folder / "README.md", _readme(settings, checkpoint, base, file, notes))
    result["nbytes"] = (Path(settings.out) / file).stat().st_size
    return {**result, "inexact_scales": tally.inexact, "notes": notes}


def _hf(settings: Settings, checkpoint: Checkpoint, wanted: str) -> dict[str, Any]:
    """Commit an ordinary folder: every weight dense in one type."""
    if wanted not in HF_DTYPES:
        raise MisError(
            f"--out-type {wanted} is a GGUF type: use --format gguf, or --out-type bf16 or f16"
        )
    model_writer.need_tokenizer(checkpoint.path)
    shape = shape_of(checkpoint.config)
    dtype = HF_DTYPES[wanted]
    config = arch.student_config(checkpoint.config, shape, tuple(range(shape.layers)), dtype)
    names = arch.tensors_of(checkpoint.config)
    packed = sum(load.packing(checkpoint, name) != {} for name in names)
    facts = [f"weights in {dtype}"]
    if packed:
        facts.append(f"{packed} packed matrices de-quantized, then rounded to {dtype}")

    stored = model_writer.SAFETENSORS_NAMES[dtype]

    def held(name: str, weight: mx.array) -> mx.array:
        weight = weight.astype(precision.DTYPES[dtype])
        if stream.not_numbers(weight):
            raise MisError(
                f"{name} holds NaN, infinity or more than {dtype} can hold: try the other "
                f"--out-type"
            )
        return weight

    def take(name: str) -> Tensor:
        weight = model_writer.dense(checkpoint, name)
        if isinstance(weight, InParts):
            return weight.mapped(partial(held, name), columns=weight.spec[1][1], dtype=stored)
        return held(name, weight)

    if not settings.dry_run:
        papers = {
            "README.md": _readme(settings, checkpoint, _base(settings, checkpoint), "", facts)
        }
        model_writer.write_model(
            config,
            take,
            source=checkpoint.path,
            out=Path(settings.out),
            dtype=dtype,
            extra=papers,
        )
    return {"nbytes": 2 * arch.params(checkpoint.config), "tensors": len(names), "notes": facts}


def run(settings: Settings) -> dict[str, Any]:
    """The command."""
    cli.check_ranges(settings)
    need_place("--out", settings.out, "new")
    if settings.model and settings.model.endswith(".gguf"):
        raise MisError(
            f"{settings.model} is a GGUF already: give the model folder that it was made from"
        )
    folder = resolve.resolve_model(settings.model).path
    checkpoint = load.open_checkpoint(folder)
    tokenizer_check.check_tokenizer(folder)
    if settings.format == "gguf" and not family(checkpoint.config).gguf:
        kind = checkpoint.config["model_type"]
        raise MisError(
            f"a {kind} is not exported to GGUF, because its linear attention cannot be written for "
            f"llama.cpp yet: use --format hf, or the folder in mlx-lm"
        )
    if settings.upload_repo:
        if not resolve.REPO_ID.fullmatch(settings.upload_repo):
            raise MisError(
                f"--upload-repo {settings.upload_repo!r} is not a hub repository: write NAME/MODEL"
            )
        if not settings.license and _base(settings, checkpoint) != resolve.DEFAULT:
            raise MisError(
                "--upload-repo publishes weights, and their license is not known: name it with "
                "--license"
            )
    limit = memory.budget(settings.budget_bytes)
    wanted = settings.out_type or (
        tensors.out_type(checkpoint) if settings.format == "gguf" else "bf16"
    )
    need = memory.needed_bytes(need_bytes(checkpoint, settings.format))
    remedy = f"give --budget {estimates.budget_flag(need)} or more"
    limit.need(need, "the largest tensor on its way", remedy)
    export = _gguf if settings.format == "gguf" else _hf
    with progress.run("export"), memory.limited(limit):
        result = export(settings, checkpoint, wanted)
    if settings.upload_repo and not settings.dry_run:
        parts = publication.parts(Path(settings.out), checkpoint, settings.format)
        result["uploaded"] = hub.upload(parts, settings.upload_repo)
        result["uploaded_files"] = sorted(parts)
        result["notes"].append(f"uploaded: {result['uploaded']}")
    cli.say(*result["notes"])
    dry = ", nothing written (dry run)" if settings.dry_run else ""
    cli.say(f"{settings.out}: {gib(result['nbytes'])}{dry}")
    where = {
        "model": str(folder),
        "format": settings.format,
        "out_type": wanted,
        "out": settings.out,
    }
    return {**where, **result, "peak_bytes": need}


if __name__ == "__main__":
    cli.main(Settings, run)
