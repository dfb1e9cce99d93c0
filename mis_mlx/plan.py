"""Plan: what fits, bytes, passes, hours and SSD wear of a distillation, from the configs alone,
before any work.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from mis_mlx import cli
from mis_mlx.evaluation import answers
from mis_mlx.hardware import memory
from mis_mlx.hardware.thermal.run_monitor import ThermalFlags, battery
from mis_mlx.models import arch, load, resolve
from mis_mlx.models.config import MOST_EXPERTS, read_config, shape_of
from mis_mlx.planner import compression_size, estimates, phases, recipe
from mis_mlx.pruning import select, shape_search, vocabulary
from mis_mlx.quantization import packed_format
from mis_mlx.reporting import html, text
from mis_mlx.types import Checkpoint, duration, gib

LIFE_BYTES = 150e12  # written: 600 times a 256 GB SSD, a rule of thumb; Apple publishes no figure


def table(plan: phases.MemoryPlan) -> str:
    """For people: what is made, time and memory of each phase, how; or what would fit. With -v
    every byte of it.
    """
    job = plan.job
    names = [p.name for p in plan.phases]
    whole = job.shown or job.teacher
    hot = sum(p.seconds(plan.rates, hot=True) for p in plan.phases)
    others = job.modes[:-1] if plan.mode == "none" else ()  # which train, and do not fit
    hours = duration(sum(plan.planned.values())) + (
        f" ({duration(hot)} once hot)" if plan.rates.hot < 1 else ""
    )
    return html.document(
        "plan.md",
        {
            "plan": plan,
            "before": arch.params(whole.config),
            "after": arch.params(job.student.config),
            "gib": gib,
            "words": shape_search.words(job.student.shape, whole.shape),
            "hours": hours,
            "duration": duration,
            "packed": compression_size.packed_bytes(job.student, job.rounding)
            if "quantize" in names
            else 0,
            "one": estimates.token(job.teacher, job.max_seq_length, plan.budget_bytes),
            "remedy": phases.remedy(plan),
            "disk": disk_bytes(plan),
            "verbose": cli.DETAILS in os.environ,
            "visit": phases.steps_per_shard(job, plan.shard_layers or job.student.shape.layers),
            "life": LIFE_BYTES,
            "flag": estimates.flag,
            "trains": phases.least_bytes(replace(job, modes=others), plan.rates) if others else 0,
            "spooled": max(p.spooled_bytes for p in plan.phases),
            "written": sum(p.written_bytes for p in plan.phases),
        },
    )


def outcome(plan: phases.MemoryPlan, teacher: str) -> dict[str, Any]:
    """For machines: what `distill --dry-run` says in its last line, too. teacher: its path or
    name.
    """
    whole = plan.job.shown or plan.job.teacher
    small = plan.job.student
    return {
        "teacher": teacher,
        "params_teacher": arch.params(whole.config),
        "params_student": arch.params(small.config),
        "mode": plan.mode,
        "peak_bytes": plan.peak_bytes,
        "budget_bytes": plan.budget_bytes,
        "seconds": round(sum(plan.planned.values())),
        "check_failed": not plan.fits,
    }


def disk_bytes(plan: phases.MemoryPlan) -> int:
    """Files there may be at once, the teacher's not among them: models, two checkpoints,
    scratch.
    """
    m = plan.job.student
    params = arch.params(m.config)
    blocks = plan.shard_layers or m.shape.layers
    saved = blocks * compression_size.block_state_bytes(m.config)
    saved = phases.SAVED_BYTES * params if plan.mode == "resident" else saved
    run = 2 * saved * (plan.mode != "none") + params * phases.in_parts(plan.job, plan.mode)
    kept = sum(p.written_bytes for p in plan.phases if p.name in ("quantize", "logit store"))
    return 2 * m.nbytes + run + kept + max(p.spooled_bytes for p in plan.phases)


@dataclass(frozen=True)
class Settings(cli.Budgeted, recipe.QuantizationConfig, recipe.DistillationConfig):
    """What would `distill` take with these flags? Reads configs, computes, starts nothing."""

    teacher: str | None = None
    """folder (config.json is enough), hub id, mis-137b (the paper's), qwen3-30b-a3b, gemma-4-e2b,
    gemma-4-e4b, gemma-3n-e2b or gemma-3n-e4b; default: SmolLM2-135M-Instruct
    """
    student: str | None = None
    """folder of a student pruned earlier; default: what --scenario gives"""
    scenario: select.Scenario | None = None
    """sizes as in `prune`; of mis-137b the default is goral, the paper's own student"""
    machine: Literal["here", "m1-air"] = "here"
    """m1-air: an 8 GB fanless laptop, by published figures"""
    measure: bool = False
    """take this machine's rates first, in 20 s; later plans use them; without --teacher that is
    all
    """
    experts: str | None = None
    """experts of a mixture that stay, as in `prune`"""
    vocab: str | None = None
    """tokens that stay, as in `prune`"""
    quantize: Literal[4, 0] = 4
    """bits of the result; 0 keeps it unquantized"""


def _open(name: str | None) -> tuple[Checkpoint | Mapping[str, Any], str]:
    """(model or config, path or name) of a folder, with or without weights, of a hub model, or the
    paper's teacher.
    """
    if name in arch.PUBLISHED:
        return arch.PUBLISHED[name], name
    folder = resolve.resolve_model(name).path
    return load.open_checkpoint(folder) if any(folder.glob("*.safetensors")) else read_config(
        folder
    ), str(folder)


def _pair(
    s: Settings, opened: Checkpoint | Mapping[str, Any], gpu: bool
) -> list[estimates.ModelSize]:
    """[teacher with the vocabulary of --vocab, student], as in `distill`; of the paper's teacher
    the paper's.
    """
    config, folder = (
        (opened.config, opened.path) if isinstance(opened, Checkpoint) else (opened, None)
    )
    if not s.student:
        name = s.scenario or ("goral" if s.teacher == "mis-137b" else None)
        s = replace(s, **vocabulary.defaults(name, s.vocab, config, folder))
    rows = vocabulary.size(s.vocab, folder, shape_of(config).vocab)
    config = vocabulary.with_rows(config, rows)
    teacher = vocabulary.first_rows(opened, rows) if isinstance(opened, Checkpoint) else config
    if s.student:
        student = _open(s.student)[0]
    else:
        experts = arch.count(
            "--experts", s.experts, shape_of(config).experts or MOST_EXPERTS, "experts"
        )
        shape = arch.target_shape(config, arch.SCENARIOS.get(s.scenario or "", {}), experts=experts)
        student = arch.student_config(config, shape)
    return [estimates.model_of(model, gpu) for model in (teacher, student)]


def _prompts(opened: Checkpoint | Mapping[str, Any]) -> int:
    """How many prompts a run's models answer at its end: none without a chat template. Its file is
    looked for, not opened, for a plan takes no second.
    """
    if not isinstance(opened, Checkpoint):
        return 0
    beside = opened.path / "tokenizer_config.json"
    named = beside.is_file() and '"chat_template"' in beside.read_text("utf-8", "replace")
    return recipe.EVAL_PROMPTS if named or (opened.path / "chat_template.jinja").is_file() else 0


def run(settings: Settings) -> dict[str, Any]:
    """The command: print the plan."""
    at = estimates.machine_rates(settings.machine, settings.measure)
    print(f"{at}\n")
    if settings.measure and settings.teacher is None:
        return asdict(at)
    opened, name = _open(settings.teacher)
    config = opened.config if isinstance(opened, Checkpoint) else opened
    settings = replace(settings, **packed_format.of_mixture(config, settings))
    whole = estimates.model_of(opened, at.gpu)
    (teacher, student) = _pair(settings, opened, at.gpu)
    how = settings if settings.quantize else recipe.PLAIN
    asked = _prompts(opened)
    known = isinstance(opened, Checkpoint) and asked > 0 and answers.shipped_for(opened)
    job = recipe.spec_of(
        teacher,
        student,
        settings,
        how,
        shown=whole,
        copied=not settings.student,
        answers=asked,
        answers_known=known,
    )
    plan = phases.make(job, memory.budget(settings.budget_bytes, at.room_bytes).limit_bytes, at)
    print(text.aligned(table(plan)))
    if settings.machine == "here" and (said := battery(ThermalFlags())):
        print(f"\nThis machine is {said}.")
    return outcome(plan, name) | {
        "micro_batch": plan.micro_batch,
        "shard_layers": plan.shard_layers,
        "pinned": plan.pinned,
        "spooled_bytes": max(p.spooled_bytes for p in plan.phases),
        "read_bytes": sum(p.read_bytes for p in plan.phases),
        "written_bytes": sum(p.written_bytes for p in plan.phases),
        "disk_bytes": disk_bytes(plan),
        "least_budget_bytes": phases.least_bytes(job, at),
        "rates": at.source,
    }


if __name__ == "__main__":
    cli.main(Settings, run)
