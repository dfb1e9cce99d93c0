"""Quantize every linear layer; stock mlx-lm opens the result."""

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np

from mis_mlx import cli
from mis_mlx.compute import precision
from mis_mlx.data import preparation
from mis_mlx.data.token_windows import Windows, fingerprint
from mis_mlx.distillation import conversations, pipeline, plan_report, strategies
from mis_mlx.hardware import memory
from mis_mlx.hardware.stage_cost import StageCost
from mis_mlx.hardware.thermal.run_monitor import Governed, battery
from mis_mlx.models.opening import compute_type, load, resolve, unlisted
from mis_mlx.models.opening.model_size import model_of
from mis_mlx.models.writing import model_writer
from mis_mlx.planner import estimates, measured_block
from mis_mlx.planner.distillation_spec import DistillationSpec
from mis_mlx.pruning import vocabulary
from mis_mlx.quantization import packed_format, stage, without_row
from mis_mlx.reporting import html, progress, text
from mis_mlx.runs import run_loop
from mis_mlx.settings.parts import part_of
from mis_mlx.settings.recipe import TUNE_ITERS, DistillationConfig, QuantizationConfig
from mis_mlx.storage import checkpoint as protocol
from mis_mlx.storage import run_folder
from mis_mlx.storage.files import DISK, DiskRefused, as_mis_error, need_place
from mis_mlx.types import Also, Budget, Checkpoint, Count, MisError, Seed, Tokens, Whole, Within

MODEL = "model"  # the result, before it is moved to --mlx-path
# Settings that may differ when work is resumed: none of them changes a weight.
FREE = run_loop.FREE_ANYWHERE | {"mlx_path", "save_every"}


@dataclass(frozen=True)
class Settings(cli.Resumable, precision.Computing, Governed, QuantizationConfig):
    """Only quantizes; `distill` does this in its last stages."""

    BASIC: ClassVar = frozenset(
        {"model", "teacher", "data", "budget", "mlx_path", "target_bpw", "q_iters", "resume"}
        | {"dry_run"}
    )

    model: Annotated[str | None, Also(("hf_path",))] = None
    """folder or hub id of an unquantized model; default: SmolLM2-135M-Instruct"""
    teacher: str | None = None
    """folder or hub id of the model that the scales learn from; default: the unquantized model"""
    mlx_path: str = "quantized"
    """folder to write"""
    out: str | None = None
    """folder of the unfinished work, gone once --mlx-path is written; default: next to it, its
    name with -unfinished
    """
    resume: bool = False
    """continue the unfinished work for --mlx-path, or in --out"""
    data: str | None = None
    """calibration text: a folder with train.jsonl, or a hub data set; default: built-in text"""
    conversations: Annotated[float | None, Within(0.0, 0.95)] = None
    """share of the text in which the model answers our prompts, as in `distill`; 0: none"""
    num_samples: Whole = 32
    """calibration windows for --q-method gptq and --target-bpw"""
    max_seq_length: Tokens = 256
    """tokens per window"""
    batch_size: Count = 2
    """windows per --q-iters step"""
    save_every: Count = 5
    """--q-iters steps between checkpoints"""
    seed: Seed = 0
    """selects the windows, and the tokens that the model samples after them"""


def run(settings: Settings) -> dict[str, Any]:
    """The command: open, plan, round, let scales learn, put the result in its place.

    The work lies in a folder of its own, where it goes on after a kill.
    """
    out = settings.out or f"{Path(settings.mlx_path)}-unfinished"
    s, folder = run_loop.resumed(settings.with_values(out=out), FREE)
    if folder is not None and (folder / run_folder.RESULT).exists() and not s.dry_run:
        with protocol.lock(folder):
            return _deliver(s, folder)
    found = run_loop.find_model(s, s.model, place=s.mlx_path, new="--mlx-path")
    if unlisted.is_unlisted(found):
        return _without_row(s, found)
    checkpoint = run_loop.opened(s, found)
    s = s.with_values(**packed_format.of_mixture(checkpoint.config, s))
    _check(s, checkpoint, folder)
    other = checkpoint
    if s.teacher:
        other = compute_type.open_to_compute(resolve.resolve_model(s.teacher).path, s.precision)
    with vocabulary.shared(other, [checkpoint]) as teacher:
        plan = _plan(s, checkpoint, teacher, folder)
        tell = plan_report.table if s.dry_run else plan_report.brief
        cli.say(text.aligned(tell(plan)))
        if s.dry_run:
            return _dry_run(s, checkpoint, teacher, plan)
        if not plan.fits:
            raise MisError(strategies.remedy(plan))
        with run_loop.entered(folder, out, out=s.out, asked=settings.given) as place:
            strategy = {**plan.strategy, conversations.WRITES: plan.job.teacher_writes}
            place.decide(asdict(s), strategy, memory.budget(s.budget_bytes))
            with _no_empty_work(place, new=folder is None):
                return _work(s, checkpoint, teacher, plan=plan, place=place)


def _without_row(s: Settings, folder: Path) -> dict[str, Any]:
    """Round a model of a family that mlx-lm alone knows, whole in memory."""
    model_writer.need_tokenizer(folder)
    config, model = unlisted.open_whole(folder)
    kind = config["model_type"]
    cli.say(
        f"{kind} is not in mis_mlx's table of families: mlx-lm's own model is rounded, whole "
        f"in memory, to 4 bits, embeddings and head to 8; left out are pruning, streaming, "
        f"--target-bpw, --q-iters and --resume"
    )
    formats = without_row.formats_of(model, s.q_group_size)
    limit = memory.budget(s.budget_bytes)
    tokens = s.num_samples * s.max_seq_length if s.compensates else 0
    length = min(tokens, s.max_seq_length)
    vocab = config.get("vocab_size", 0)
    taken = without_row.peak_bytes(model, formats, vocab=vocab, length=length)
    estimates.require_fit(limit, StageCost(f"rounding a {kind}", peak_bytes=taken), other="")
    peak_bytes = limit.limit_bytes - memory.headroom_bytes(limit.limit_bytes, taken)
    method = "gptq" if tokens else "round"
    result = {"model": str(folder), "mlx_path": s.mlx_path, "method": method}
    if s.dry_run:
        return {**result, "peak_bytes": peak_bytes}
    batches = []
    if tokens:
        source = preparation.Source(s.data, share=s.conversations, tokens=tokens)
        text_of = preparation.prepare(source, load.tokenizer(folder), s.max_seq_length).train
        batches = preparation.calibration(text_of, s.num_samples, s.seed)
        run_loop.forget_text()
    with progress.run("quantize", {}), memory.limited(limit):
        figures = without_row.write(folder, (config, model), formats, batches, Path(s.mlx_path))
    cli.say(
        f"{s.mlx_path}: {figures['nbytes'] / 1e6:.1f} MB, {figures['bits_per_weight']:.2f} bits "
        f"per weight: mlx_lm.generate --model opens it"
    )
    return {**result, **figures, "peak_bytes": memory.held_bytes()[1]}


def _check(s: Settings, checkpoint: Checkpoint, folder: Path | None) -> None:
    """Refuse, before any work, what cannot be done.

    folder: of work that goes on.
    """
    if s.looks and s.num_samples < 1:
        flag = f"--q-method {s.q_method}" if s.compensates else "--target-bpw"
        raise MisError(f"{flag} needs text, but --num-samples is {s.num_samples}: give 1 or more")
    packed_format.check_dense(checkpoint)
    model_writer.need_tokenizer(checkpoint.path)
    stage.check(checkpoint.config, s)
    work = folder or Path(s.out or "")
    need_place("--out", work)
    if _disk_of(work) != _disk_of(Path(s.mlx_path)):
        raise MisError(
            f"--out {work} is on another disk than --mlx-path {s.mlx_path}: put both on one disk"
        )


def _disk_of(path: Path) -> int:
    """The number of the disk where `path` is, or will be."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path.stat().st_dev


def _plan(
    s: Settings, checkpoint: Checkpoint, other: Checkpoint, folder: Path | None
) -> strategies.MemoryPlan:
    """What rounding takes, and the steps after it, if any.

    other: the model that the scales learn from. folder: of work that goes on, in the way that was
    decided when it began.
    """
    limit = memory.budget(s.budget_bytes).limit_bytes
    job = _job(s, checkpoint, other)
    if _steps(s):
        job = measured_block.of_job(job, limit)
    strategy = {}
    if folder is not None and run_folder.is_decided(folder):
        strategy = run_folder.stored_settings(folder, run_folder.PLAN)
    writes: bool | None = strategy.pop(conversations.WRITES, None)
    if _reads(s):
        job = conversations.planned(job, other, _wanted(s), Budget(limit), writes)
    rates = estimates.machine_rates()
    if strategy:
        return strategies.plan_strategy(job, limit, rates, **strategy)
    return strategies.best_plan(job, limit, rates)


def _job(s: Settings, checkpoint: Checkpoint, other: Checkpoint) -> DistillationSpec:
    """The work in sizes and counts: a distillation that has nothing but its end."""
    rounding = part_of(QuantizationConfig, asdict(s))
    if not s.looks:
        rounding = replace(rounding, q_iters=_steps(s))
    count = s.num_samples if s.looks else 0
    teacher = model_of(other)
    student = model_of(checkpoint)
    asked = DistillationSpec(
        teacher=teacher,
        student=student,
        iters=max(1, _steps(s)),
        batch_size=s.batch_size,
        max_seq_length=s.max_seq_length,
        num_samples=count,
        save_every=s.save_every,
        rounding=rounding,
    )
    return replace(asked, reconstruct_samples=0, modes=("none",), rounds_only=True)


def _dry_run(
    s: Settings, checkpoint: Checkpoint, teacher: Checkpoint, plan: strategies.MemoryPlan
) -> dict[str, Any]:
    """The plan for machines, after a sentence on what is answered first."""
    if plan.fits and _reads(s):
        limit = Budget(plan.budget_bytes)
        writes = plan.job.teacher_writes
        conversations.source(teacher, _wanted(s), limit, writes=writes, dry_run=True)
    note = battery(s)  # a run says it when it begins
    if note:
        cli.say(note)
    phases = {}
    for name, taken in plan.planned.items():
        phases[name] = round(taken, 3)
    return {
        "model": str(checkpoint.path),
        "mlx_path": s.mlx_path,
        "method": s.q_method,
        "phases": phases,
        "disk_bytes": plan_report.disk_bytes(plan),
        **plan_report.totals(plan),
    }


@contextmanager
def _no_empty_work(place: run_loop.Account, *, new: bool) -> Iterator[None]:
    """Delete the folder of new work that ends before there is anything to go on with.

    A rounding that ends for another reason than the disk would end again in the same way.
    """
    try:
        yield
    except MisError as error:
        begun = {pipeline.ROUNDED, pipeline.TARGETS, pipeline.TUNE_STEPS, MODEL}
        if isinstance(error, DiskRefused):
            begun.add(pipeline.ROUNDING)
        if new and not any((place.folder / name).exists() for name in begun):
            DISK.discard(place.folder)
        raise


def _work(
    s: Settings,
    checkpoint: Checkpoint,
    other: Checkpoint,
    *,
    plan: strategies.MemoryPlan,
    place: run_loop.Account,
) -> dict[str, Any]:
    """Round, and let scales learn from the model `other`, which reads the same tokens."""
    asked = part_of(DistillationConfig, asdict(s))
    limit = Budget(plan.budget_bytes)
    with progress.run("quantize", plan.planned):
        data = _text(s, other, limit, writes=plan.job.teacher_writes)
        run_loop.forget_text()
        origin = {
            "model": run_folder.origin(checkpoint, "")["teacher"],
            **run_folder.origin(other, fingerprint(data)),
        }
        same = ("model", *run_folder.SAME)
        with run_loop.open_run(place, origin, same=same, thermal=s, limit=limit) as opened:
            c = pipeline.Run(
                **vars(opened),
                recipe=plan.recipe(asked, other),
                teacher=other,
                data=data,
                plan=plan,
            )
            pipeline.quantize(c, s, checkpoint)
            result = place.folder / MODEL
            packed = packed_format.formats(load.open_checkpoint(result))
            figures = packed_format.figures(checkpoint, packed)
            figures |= packed_format.expert_figures(result, checkpoint.config)
            c.finish({"model": str(checkpoint.path), "method": s.q_method, **figures})
    return _deliver(s, place.folder)


def _reads(s: Settings) -> bool:
    """Whether anything looks at text or learns from it."""
    return s.looks or _steps(s) > 0


def _steps(s: Settings) -> int:
    """Steps after rounding, where the budget has room for them; rounding that looks at no text has
    none of its own accord.
    """
    return s.steps(TUNE_ITERS if s.looks else 0)


def _wanted(s: Settings) -> preparation.Source:
    """The text to look at and to learn from."""
    count = s.num_samples if s.looks else 0
    visited = (count + _steps(s) * s.batch_size) * s.max_seq_length
    return preparation.Source(s.data, share=s.conversations, tokens=visited, seed=s.seed)


def _text(s: Settings, teacher: Checkpoint, limit: Budget, *, writes: bool) -> Windows:
    """The windows to look at and to learn from, written now if need be; none where nothing does."""
    if _reads(s):
        source = conversations.source(teacher, _wanted(s), limit, writes=writes)
        tokenizer = load.tokenizer(teacher.path)
        return preparation.prepare(source, tokenizer, s.max_seq_length).train
    empty = np.zeros((0, s.max_seq_length))
    return Windows(empty.astype(np.int32), empty.astype(np.float32))


def _deliver(s: Settings, folder: Path) -> dict[str, Any]:
    """Move the finished model from its folder to --mlx-path, delete the folder; the result."""
    done = run_folder.stored_settings(folder, run_folder.RESULT)
    out = Path(s.mlx_path)
    if (folder / MODEL).exists():
        need_place("--mlx-path", out, "new")
        parent = out.absolute().parent
        with as_mis_error(parent, "the model", remedy=cli.continuing(folder)):
            DISK.make_folder(parent)
            DISK.rename(folder / MODEL, out)
            DISK.fsync(parent)
    # Under another name first: half a folder would pass for work that goes on.
    trash = folder.with_name(f".trash-{folder.name}-{os.getpid()}")
    with suppress(OSError):
        DISK.rename(folder, trash)
        DISK.discard(trash)
    values = {
        **done,
        "out": out,
        "quoted": shlex.quote(str(out)),
        "teacher": shlex.quote(str(done["model"])),
        "python": shlex.quote(str(cli.from_here(Path(sys.executable)))),
    }
    cli.say(html.document("next_quantized.md", values))
    return {**done, "mlx_path": s.mlx_path}


if __name__ == "__main__":
    cli.main(Settings, run)
