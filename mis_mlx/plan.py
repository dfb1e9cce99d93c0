"""Estimate a run before it starts: time, memory, files, SSD wear.

Only configs are read.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mis_mlx import cli
from mis_mlx.distillation import conversations, plan_report, strategies, teacher_answers
from mis_mlx.hardware import memory
from mis_mlx.hardware.rates import Rates
from mis_mlx.hardware.thermal.run_monitor import ThermalFlags, battery
from mis_mlx.judge import answers
from mis_mlx.models.architectures import arch, scenarios
from mis_mlx.models.architectures.families import shape_of
from mis_mlx.models.architectures.mixture import MOST_EXPERTS
from mis_mlx.models.opening import load, resolve
from mis_mlx.models.opening.config import read_config
from mis_mlx.models.opening.model_size import ModelSize, model_of
from mis_mlx.planner import distillation_spec, estimates, measured_block
from mis_mlx.pruning import vocabulary
from mis_mlx.quantization import packed_format
from mis_mlx.reporting import text
from mis_mlx.settings import recipe
from mis_mlx.settings.parts import part_of
from mis_mlx.size_search import size_request
from mis_mlx.types import Bits, Budget, Checkpoint, Count, Whole


@dataclass(frozen=True)
class Settings(cli.Budgeted, recipe.Steps):
    """Shows what `distill` would take with these flags. Reads configs only and starts nothing."""

    teacher: str | None = None
    """folder (config.json is enough), hub id, mis-137b (the paper's), qwen3-30b-a3b, gemma-4-e2b
    or gemma-4-e4b; default: SmolLM2-135M-Instruct
    """
    student: str | None = None
    """folder of a student that is already pruned; default: from --scenario, or as a search usually
    leaves it: every block, and most of the tokens
    """
    scenario: scenarios.Scenario | None = None
    """sizes as in `prune`; for mis-137b the default is balanced, the paper's own student"""
    machine: estimates.Machine = "here"
    """m1-air, m1-air-16gb: plan for a fanless laptop of 8 or 16 GB, from published figures"""
    measure: bool = False
    """measure this machine's speed first, in 20 s, for this and later plans; without --teacher,
    only measure
    """
    experts: str | None = None
    """experts to keep, as in `prune`"""
    vocab: str | None = None
    """tokens to keep, as in `prune`"""
    quantize: Literal[4, 0] = 4
    """bits per weight of the result; 0: no quantization"""
    iters: Count | None = None  # type: ignore[assignment]
    """optimizer steps, as in `distill`"""
    train: recipe.Train = "auto"
    """how the student trains, as in `distill`"""
    reconstruct_samples: Whole = 64
    """windows for the repair; 0: no repair"""
    num_samples: Count = 32
    """calibration windows for importance"""
    target_bpw: Bits | None = 4.5
    """average bits per weight, including scales"""
    q_method: recipe.Method = "gptq"
    """how weights are rounded, as in `distill`"""
    q_iters: Whole | None = None
    """steps in which scales learn, as in `distill`"""

    def __post_init__(self) -> None:
        # frozen, but still being made
        object.__setattr__(self, "scenario", scenarios.plain(self.scenario))


def _open(name: str | None) -> tuple[Checkpoint | Mapping[str, Any], str]:
    """(model or config, path or name) of a folder, a hub model, or the paper's teacher.

    The folder may be without weights; then only its config is read.
    """
    if name in arch.PUBLISHED:
        return arch.PUBLISHED[name], name
    folder = resolve.resolve_model(name).path
    if any(folder.glob("*.safetensors")):
        return load.open_checkpoint(folder), str(folder)
    return read_config(folder), str(folder)


def _pair(s: Settings, opened: Checkpoint | Mapping[str, Any], gpu: bool) -> list[ModelSize]:
    """[teacher with the vocabulary of --vocab, student], as in `distill`.

    Of the paper's teacher the paper's student.
    """
    config: Mapping[str, Any]
    if isinstance(opened, Checkpoint):
        config = opened.config
        folder = opened.path
    else:
        config = opened
        folder = None
    if not s.student:
        name = s.scenario or ("balanced" if s.teacher == "mis-137b" else None)
        if name or s.vocab or s.experts:
            sizes = vocabulary.defaults(name, s.vocab, config, folder)
        else:  # as `distill` without sizes
            sizes = size_request.likely_student(config, folder)
        s = replace(s, **sizes)
    rows = vocabulary.size(s.vocab, folder, shape_of(config).vocab)
    config = vocabulary.with_rows(config, rows)
    teacher: Checkpoint | Mapping[str, Any] = config
    if isinstance(opened, Checkpoint):
        teacher = vocabulary.first_rows(opened, rows)
    student: Checkpoint | Mapping[str, Any]
    if s.student:
        student, _ = _open(s.student)
        if isinstance(student, Checkpoint):
            packed_format.check_dense(student)
    else:
        most = shape_of(config).experts or MOST_EXPERTS
        experts = arch.count("--experts", s.experts, most, "experts")
        ratios = scenarios.RATIOS.get(s.scenario or "", {})
        student = arch.student_config(config, arch.target_shape(config, ratios, experts=experts))
    return [model_of(model, gpu) for model in (teacher, student)]


def template_beside(folder: Path) -> bool:
    """Whether a model's folder has a chat template, without which nobody answers.

    Its file is looked for, not opened, for a plan takes no second.
    """
    tokenizer = folder / "tokenizer_config.json"
    if tokenizer.is_file() and '"chat_template"' in tokenizer.read_text("utf-8", "replace"):
        return True
    return (folder / "chat_template.jinja").is_file()


def talking(
    job: distillation_spec.DistillationSpec, budget: Budget, *, known: bool
) -> distillation_spec.DistillationSpec:
    """The job of a teacher with a chat template: what is answered before and behind it.

    known: its answers come with the package.
    """
    teacher = job.whole_teacher
    if known:
        return replace(job, answers=recipe.EVAL_PROMPTS, answers_known=True)
    count = conversations.FEWEST
    writes = teacher_answers.is_whole(teacher, teacher_answers.settings_of(count), budget)
    return replace(
        job,
        conversations=count if writes else 0,
        teacher_writes=writes,
        answers=teacher_answers.judging_prompts(teacher, budget),
    )


def planned(settings: Settings, rates: Rates) -> tuple[strategies.MemoryPlan, str]:
    """(the plan of these settings on a machine of these rates, the teacher's path or name)."""
    opened, name = _open(settings.teacher)
    config = opened.config if isinstance(opened, Checkpoint) else opened
    rounding = part_of(recipe.QuantizationConfig, vars(settings))
    rounding = replace(rounding, **packed_format.of_mixture(config, rounding))
    teacher_as_is = model_of(opened, rates.gpu)
    teacher, student = _pair(settings, opened, rates.gpu)
    job = distillation_spec.spec_of(
        teacher,
        student,
        part_of(recipe.DistillationConfig, vars(settings)),
        rounding if settings.quantize else recipe.ROUND_TO_NEAREST,
        shown=teacher_as_is,
        copied=not settings.student,
    )
    budget = memory.budget(settings.budget_bytes, rates.room_bytes)
    if template_beside(Path(name)):
        known = isinstance(opened, Checkpoint) and answers.shipped_for(opened)
        job = talking(job, budget, known=known)
    if settings.machine == "here":
        job = measured_block.of_job(job, budget.limit_bytes)
    return strategies.best_plan(job, budget.limit_bytes, rates), name


def run(settings: Settings) -> dict[str, Any]:
    """The command: print the plan."""
    rates = estimates.machine_rates(settings.machine, settings.measure)
    print(f"{rates}\n")
    if settings.measure and settings.teacher is None:
        return asdict(rates)
    plan, name = planned(settings, rates)
    if not template_beside(Path(name)):
        cli.say(f"{name} has no chat template here: the plan counts no answers")
    print(text.aligned(plan_report.table(plan)))
    if settings.machine == "here":
        state = battery(ThermalFlags())
        if state:
            print(f"\nThis machine is {state}.")
    return plan_report.outcome(plan, name) | {
        "micro_batch": plan.micro_batch,
        "shard_layers": plan.shard_layers,
        "scratch_bytes": max(p.scratch_bytes for p in plan.phases),
        "read_bytes": sum(p.read_bytes for p in plan.phases),
        "written_bytes": sum(p.written_bytes for p in plan.phases),
        "disk_bytes": plan_report.disk_bytes(plan),
        "least_budget_bytes": strategies.least_bytes(plan.job, rates),
        "rates": rates.source,
    }


if __name__ == "__main__":
    cli.main(Settings, run)
