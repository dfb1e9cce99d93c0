"""Make a small 4-bit student: prune, distill, quantize, measure."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mis_mlx import cli, search
from mis_mlx.data import preparation
from mis_mlx.distillation import (
    conversations,
    pipeline,
    plan_report,
    run_plan,
    strategies,
    summary,
)
from mis_mlx.distillation.strategies import MemoryPlan
from mis_mlx.hardware.thermal.run_monitor import battery
from mis_mlx.judge import answers, comparison
from mis_mlx.models.architectures import arch
from mis_mlx.models.architectures.families import shape_of
from mis_mlx.models.opening import compute_type, load
from mis_mlx.pruning import vocabulary
from mis_mlx.reporting import progress, text
from mis_mlx.runs import run_loop
from mis_mlx.size_search import size_request
from mis_mlx.storage import run_folder
from mis_mlx.storage.files import DISK
from mis_mlx.types import Budget, Checkpoint, MisError, Row


@dataclass(frozen=True)
class Settings(search.Settings):
    """Every default was measured to work. No flag is required."""


def run(settings: Settings) -> dict[str, Any]:
    """The command: open, plan, prune, repair, distil, quantize, measure.

    Where sizes are to be found, the first phase of the run is a search, in the run's folder.
    """
    s, folder = run_loop.resumed(settings, search.FREE)
    cli.check_ranges(s)
    teacher = run_loop.open_model(s, s.teacher, "teacher")
    begun = None  # the folder of a run whose settings are all decided
    if folder is not None and run_folder.is_decided(folder):
        begun = folder
    sought = None if begun else search.plan(s, teacher, folder)
    if s.dry_run:
        return _dry_run(s, teacher, sought, begun)
    if sought is None:
        resolved, plan = _resolved(s, size_request.unsearched(s), teacher, begun)
        name = f"{teacher.path.name}-{resolved.scenario or 'student'}"
        with run_loop.entered(folder, name, out=s.out, asked=s.given) as place:
            return _work(resolved, plan, teacher, place)
    # What all of the run should take, by a likely student.
    rest = sought.rest
    phases = {"search": sought.takes.seconds, **rest.planned}
    cli.say(plan_report.time_line(phases), plan_report.memory_line(rest, sought.takes))
    note = plan_report.night(rest, sum(phases.values()))
    if note:
        cli.say(note)
    name = f"{teacher.path.name}-none"
    with run_loop.entered(folder, name, out=s.out, asked=s.given) as place:
        found = search.carry_out(sought, place)
        expected = max(0.0, found["expected_bits"])
        sizes = {"lose": sought.lose, **found["best"], "expected_loss": expected}
        resolved, plan = _resolved(s, sizes, teacher, begun, searched=True)
        return _work(resolved, plan, teacher, place, told=True)


def _resolved(
    s: Settings,
    sizes: Mapping[str, Any],
    teacher: Checkpoint,
    begun: Path | None,
    *,
    sought: search.Sought | None = None,
    searched: bool = False,
) -> tuple[Settings, MemoryPlan]:
    """The run with everything decided, and its plan, which is said.

    sizes: that a search chose. begun: the folder of a run for which all is decided. sought: the
    search that comes first, of a dry run; searched: it has been, and has said how long all takes.
    MisError where the plan does not fit the budget, except in a dry run.
    """
    resolved, plan = run_plan.resolve(s, sizes, teacher, begun)
    if s.quantize:
        size_request.warn_of_few_bits(teacher, resolved.target_bpw)
    expected = resolved.expected_loss
    if s.dry_run:
        before = sought.takes if sought else None
        said = plan_report.table(plan, expected, search=before)
    elif plan.fits:
        # Of a run that goes on, some is done.
        said = plan_report.brief(plan, expected, searched=searched or begun is not None)
    else:
        raise MisError(strategies.remedy(plan))
    cli.say(text.aligned(said))
    if plan.job.uncut and s.iters is not None and (begun is None or s.dry_run):
        cli.say(
            f"--iters {s.iters} is left out: no block is cut, so no weight learns; --q-iters sets "
            f"the steps of scales, and --scenario or --train blocks trains weights"
        )
    return resolved, plan


def _dry_run(
    s: Settings, teacher: Checkpoint, sought: search.Sought | None, begun: Path | None
) -> dict[str, Any]:
    """What a run would do before its first stage, said; its plan for machines."""
    sizes: Mapping[str, Any] = size_request.unsearched(s)
    if sought is not None:
        sizes = sought.likely
        cli.say("the plan below is that of a likely student: a search chooses another, perhaps")
    resolved, plan = _resolved(s, sizes, teacher, begun, sought=sought)
    if plan.fits:
        conversations.source(
            teacher,
            run_plan.text(resolved),
            Budget(plan.budget_bytes),
            writes=plan.job.teacher_writes,
            dry_run=True,
        )
    note = battery(s)  # a run says it when it begins
    if note:
        cli.say(note)
    outcome = plan_report.outcome(plan, str(teacher.path))
    if sought is not None:
        outcome["peak_bytes"] = plan_report.peak_bytes(plan, sought.takes)
        outcome["seconds"] += round(sought.takes.seconds)
        outcome["check_failed"] = outcome["check_failed"] or sought.outcome["check_failed"]
    return outcome


def _work(
    s: Settings,
    plan: MemoryPlan,
    teacher: Checkpoint,
    place: run_loop.Account,
    *,
    told: bool = False,
) -> dict[str, Any]:
    """Read the text, open the run, go through all stages; the result.

    s, plan: of `_resolved`. teacher: with its own vocabulary. told: a search has said what the text
    is.
    """
    budget = Budget(plan.budget_bytes)
    place.decide(
        asdict(s), {**plan.strategy, conversations.WRITES: plan.job.teacher_writes}, budget
    )
    with progress.run("distill", plan.planned):
        source = conversations.source(
            teacher, run_plan.text(s), budget, writes=plan.job.teacher_writes
        )
        tell = cli.detail if told else cli.say
        data, origin = run_loop.prepare_text(teacher, source, s.max_seq_length, tell)
        same: tuple[str, ...] = run_folder.SAME
        if s.student:
            given = load.open_checkpoint(s.student)
            origin["student"] = run_folder.origin(given, "")["teacher"]
            same = (*same, "student")
        with run_loop.open_run(
            place,
            origin,
            same=same,
            thermal=s,
            limit=budget,
        ) as opened:
            run_plan.log(s, plan, opened)
            c = pipeline.Run(
                **vars(opened),
                recipe=plan.recipe(s, teacher),
                teacher=teacher,
                data=data.train,
                plan=plan,
            )
            rows = plan.job.teacher.shape.vocab
            choosing: AbstractContextManager[None] = nullcontext()
            if s.student is None and rows != shape_of(teacher.config).vocab:
                # the plan of `prune` has it in, where something else is cut, too
                choosing = c.phase("vocabulary" if plan.job.viewed else "prune")
            with choosing:
                seen, data = vocabulary.of_run(
                    teacher,
                    s.student,
                    rows,
                    data,
                    config=s,
                    source=source,
                    run=c.folder,
                )
            table, result = _stages(s, replace(c, teacher=seen, data=data.train), teacher, data)
    if table:
        print(text.aligned(table))
        cli.say(summary.next_steps(Path(result["run"])))
    return result


def _stages(
    s: Settings, c: pipeline.Run, teacher: Checkpoint, data: preparation.Data
) -> tuple[str, dict[str, Any]]:
    """(what the screen shows, the result)."""
    folder = c.folder
    rounding = bool(s.quantize)
    judging = pipeline.judging_windows(c, data, teacher, s.eval_windows)
    run_loop.forget_text()
    if s.student is None:
        before = arch.params(teacher.config)
        pruned = pipeline.view(c) or pipeline.prune(c, s, before)
    else:
        pruned = compute_type.open_to_compute(s.student, teacher.precision)
    dense = pruned
    models = {"teacher": teacher}
    if not c.plan.job.uncut:
        models["pruned"] = pruned
    elif rounding and c.teacher is not teacher:
        models["trimmed"] = c.teacher
    if not c.plan.job.rounds_teacher:
        out = folder / ("distilled" if rounding else "model")
        pipeline.distil(c, pruned, out)
        dense = compute_type.open_to_compute(out, teacher.precision)
        models["distilled"] = dense
    if rounding:
        pipeline.quantize(c, s, dense)
        models["4-bit"] = compute_type.open_to_compute(folder / "model", teacher.precision)
    with c.phase("measure"):
        measured = pipeline.measured(c, judging, models, s.eval_prompts or 0)
    return _finish(s, c, models, *measured)


def _finish(
    s: Settings,
    c: pipeline.Run,
    models: comparison.Models,
    answered: answers.Judgement | None,
    quality: summary.Quality,
    languages: Mapping[str, float],
) -> tuple[str, dict[str, Any]]:
    """Write the table and the result; (what the screen shows, the result).

    answered: None: nobody was asked. languages: {language: bits a byte lost in it}, of a student
    with fewer tokens.
    """
    folder = c.folder
    sizes = []
    for name, model in models.items():
        sizes.append(Row(name, "params", arch.params(model.config) / 1e6))
        sizes.append(Row(name, "bytes", model.nbytes / 1e6))
    expected = None
    if s.expected_loss is not None:
        # Where the budget leaves something out, more is to be expected.
        more = strategies.loss_factor(strategies.left_out(c.plan))
        expected = round(s.expected_loss * more, 4)
    *_, student = models
    losses = summary.expectation(expected, student, answered, quality)

    def page(*, for_screen: bool) -> str:
        return summary.result_page(
            models,
            sizes,
            quality,
            s.max_seq_length,
            answered=answered,
            for_screen=for_screen,
            losses=losses,
            lose=s.lose,
            languages=languages,
        )

    DISK.replace_text(folder / "table.md", page(for_screen=False) + "\n")
    result = summary.result(folder, models, sizes, quality)
    if answered:
        result = {**conversations.figures(answered), **result}
    if languages:
        result["languages"] = languages
    result = c.finish({**result, **losses, "mode": c.plan.mode})
    # The answer first: what was won, then what the models say, then the tables.
    screen = page(for_screen=True)
    if not s.keep_steps:
        for name in pipeline.TEMPORARY:
            DISK.discard(folder / name)
    return screen, result


if __name__ == "__main__":
    cli.main(Settings, run, several=True)
