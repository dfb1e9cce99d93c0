"""A plan as people and machines read it: phases, seconds, memory, bytes on disk."""

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from mis_mlx import cli
from mis_mlx.distillation import block_student, strategies
from mis_mlx.hardware import memory
from mis_mlx.maths import optimizer
from mis_mlx.models.architectures import arch
from mis_mlx.models.architectures.shape import Shape
from mis_mlx.models.opening.model_size import BY_FORMULA
from mis_mlx.planner import estimates
from mis_mlx.planner.distillation_spec import SCALES, STORE
from mis_mlx.quantization import rounded_size
from mis_mlx.reporting import html, progress
from mis_mlx.types import duration, gib

NIGHT_S = 8 * 3600.0  # a run that takes longer says so first, and what would take less
LIFE_BYTES = 150e12  # written: 600 times a 256 GB SSD, a rule of thumb; Apple publishes no figure
FORMS = {  # of a cut, for people
    "layers": "{} layers",
    "experts": "{} experts",
    "ffn": "FFN {}",
    "heads": "{} heads",
    "kv_heads": "{} kv heads",
    "hidden": "hidden {}",
    "vocab": "{:,} tokens",
}


class Search(NamedTuple):
    """What the search before a run takes."""

    seconds: float
    peak_bytes: int


def table(
    plan: strategies.MemoryPlan,
    expected_loss: float | None = None,
    *,
    search: Search | None = None,
) -> str:
    """The plan for people: the student, time and memory of each phase, how; or what would fit.

    What has to be left out comes first. expected_loss: with nothing left out, in bits per byte,
    where a search says so. search: for sizes, before it. With -v every byte of it.
    """
    search_seconds = search.seconds if search else 0.0
    seconds = search_seconds + sum(plan.planned.values())
    hours = duration(seconds)
    if plan.rates.hot < 1:
        hot = search_seconds + sum(p.seconds(plan.rates, hot=True) for p in plan.phases)
        hours += f" ({duration(hot)} once hot)"
    job = plan.job
    page = _page(plan, expected_loss) | {
        "hours": hours,
        "search": search,
        "peak_bytes": peak_bytes(plan, search),
        "night": night(plan, seconds),
        "measured": job.student.block_factors != BY_FORMULA,
        "remedy": strategies.remedy(plan),
        "disk": disk_bytes(plan),
        "spooled": max((p.scratch_bytes for p in plan.phases if p.name != SCALES), default=0),
        "learning": max((p.scratch_bytes for p in plan.phases if p.name == SCALES), default=0),
        "written": sum(p.written_bytes for p in plan.phases),
        "life": LIFE_BYTES,
        "verbose": cli.DETAILS in os.environ,
    }
    return html.document("plan.md", page)


def brief(
    plan: strategies.MemoryPlan,
    expected_loss: float | None = None,
    *,
    searched: bool = False,
) -> str:
    """What a run makes, when it is done and what it holds, in a line each: how a run begins.

    searched: the lines of time and memory stand before the search. With -v the table.
    """
    if cli.DETAILS in os.environ:
        return table(plan, expected_loss)
    page = _page(plan, expected_loss) | {
        "night": "" if searched else night(plan, sum(plan.planned.values())),
        "searched": searched,
        "time": time_line(plan.planned),
        "memory": memory_line(plan),
    }
    lines = html.document("plan_brief.md", page).splitlines()
    return "\n".join(line for line in lines if line)


def time_line(phases: Mapping[str, float]) -> str:
    """'time: about 6.9 min, done at 03:42: ...', with the seconds of each phase."""
    parts = ", ".join(f"{name} {duration(seconds)}" for name, seconds in phases.items())
    return f"time: {progress.promise(sum(phases.values()))}: {parts}"


def peak_bytes(plan: strategies.MemoryPlan, search: Search | None) -> int:
    """The most that a run takes, with the search before it."""
    return max(plan.peak_bytes, search.peak_bytes if search else 0)


def memory_line(plan: strategies.MemoryPlan, search: Search | None = None) -> str:
    """'memory: up to 2.55 GiB of 5.00 GiB', with the bytes of files that the run writes."""
    held = f"{gib(peak_bytes(plan, search))} of {gib(plan.budget_bytes)}"
    return f"memory: up to {held}; disk: up to {gib(disk_bytes(plan))} of files"


def _page(plan: strategies.MemoryPlan, expected_loss: float | None) -> dict[str, Any]:
    """What the templates of a plan have in common."""
    job = plan.job
    teacher = job.whole_teacher
    rounded = any(p.name == "quantize" for p in plan.phases)
    layers = plan.shard_layers or job.student.shape.layers
    left_out = strategies.left_out(plan)
    return {
        "plan": plan,
        "words": cut_words(job.student.shape, teacher.shape),
        "left_out": left_out,
        "more_loss": strategies.loss_factor(left_out),
        "expected_loss": expected_loss,
        "before": arch.params(teacher.config),
        "after": arch.params(job.student.config),
        "packed": student_bytes(plan) if rounded else 0,
        "too_large": too_large(plan),
        "visit": block_student.steps_per_shard(job, layers),
        "gib": gib,
        "duration": duration,
        "flag": estimates.budget_flag,
    }


def cut_words(shape: Shape, before: Shape) -> str:
    """The cuts of the teacher's shape, for people: '20 layers, FFN 1280'."""
    cuts = []
    for axis, form in FORMS.items():
        size = getattr(shape, axis)
        if size != getattr(before, axis):
            cuts.append(form.format(size))
    return ", ".join(cuts) or "the teacher's own"


def student_bytes(plan: strategies.MemoryPlan) -> int:
    """Bytes of the weights of the model that comes out."""
    job = plan.job
    if any(p.name == "quantize" for p in plan.phases):
        return rounded_size.rounded_bytes(job.student, job.rounding)
    return job.student.nbytes


def too_large(plan: strategies.MemoryPlan) -> str:
    """That the machine of a plan cannot run the model that comes out; '' where it can."""
    room = plan.rates.room_bytes or memory.usable_memory_bytes()
    nbytes = student_bytes(plan)
    if nbytes <= room:
        return ""
    needs = nbytes / 1e9
    if plan.rates.gpu:  # Metal gives a process two thirds
        needs *= 1.5
    return (
        f"The result cannot run there ({plan.rates.device}): its weights are {nbytes / 1e9:,.1f} "
        f"GB, and a process has {room / 1e9:,.1f} GB: take a smaller teacher, or run it on a "
        f"machine of {needs:,.0f} GB or more"
    )


def night(plan: strategies.MemoryPlan, seconds: float) -> str:
    """What to leave out of a run of so many seconds longer than a night; '' of another."""
    if seconds <= NIGHT_S or not plan.fits:
        return ""
    job = plan.job
    ways = {
        "--eval-prompts 0": replace(job, answers=0),
        "--conversations 0": replace(job, conversations=0),
        "--q-method round": replace(job, rounding=job.rounding.blind),
    }
    saved = {}
    for flags, less in ways.items():
        other = strategies.plan_strategy(less, plan.budget_bytes, plan.rates, **plan.strategy)
        saved[flags] = sum(plan.planned.values()) - sum(other.planned.values())
    most = sorted(saved, key=saved.__getitem__, reverse=True)
    told = [
        f"{flags} saves {duration(saved[flags])}" for flags in most if 10 * saved[flags] > seconds
    ]
    return f"This takes longer than a night: {', '.join(told) or 'a smaller model takes less'}."


def outcome(plan: strategies.MemoryPlan, teacher: str) -> dict[str, Any]:
    """The plan for machines: the last line of `distill --dry-run`, too.

    teacher: its path or name.
    """
    before = plan.job.whole_teacher
    return {
        "teacher": teacher,
        "params_teacher": arch.params(before.config),
        "params_student": arch.params(plan.job.student.config),
        "student_bytes": student_bytes(plan),
        "can_run": not too_large(plan),
        "mode": plan.mode,
        **totals(plan),
        "left_out": {part.name: part.budget_bytes for part in strategies.left_out(plan)},
    }


def totals(plan: strategies.MemoryPlan) -> dict[str, Any]:
    """Memory and time of all phases together."""
    return {
        "peak_bytes": plan.peak_bytes,
        "budget_bytes": plan.budget_bytes,
        "seconds": round(sum(plan.planned.values())),
        "check_failed": not plan.fits,
    }


def disk_bytes(plan: strategies.MemoryPlan) -> int:
    """Files there may be at once, without the teacher's: models, two checkpoints, scratch."""
    m = plan.job.student
    params = arch.params(m.config)
    files = 0
    if not plan.job.rounds_only and not plan.job.viewed:
        files += (1 if plan.job.rounds_teacher else 2) * m.nbytes
    files += params * strategies.in_parts(plan.job, plan.mode)
    if plan.mode != "none":
        blocks = plan.shard_layers or m.shape.layers
        files += 2 * blocks * block_student.block_state_bytes(m.config)
    for p in plan.phases:
        if p.name == "quantize":
            files += rounded_size.files_bytes(m, plan.job.rounding)
        if p.name == STORE:
            files += p.written_bytes
        if p.name == SCALES:
            # the rounded model stays beside the one with what was learned
            files += rounded_size.rounded_bytes(m, plan.job.rounding)
            files += 2 * optimizer.STATE_BYTES * block_student.learning_scales(plan.job)
    return files + max(p.scratch_bytes for p in plan.phases)
