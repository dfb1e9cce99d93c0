"""Make a small 4-bit student: prune, distill, quantize, measure."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mis_mlx import cli, plan, search
from mis_mlx.data import preparation
from mis_mlx.distillation import (
    compression,
    conversations,
    measurement,
    pipeline,
    plan_report,
    run_plan,
    strategies,
    summary,
)
from mis_mlx.distillation.run_plan import ResolvedRun
from mis_mlx.hardware.thermal.run_monitor import ThermalFlags, battery
from mis_mlx.judge import answers, comparison
from mis_mlx.models.architectures import arch
from mis_mlx.models.architectures.sizes import shape_of
from mis_mlx.models.opening import compute_type, load
from mis_mlx.pruning import vocabulary
from mis_mlx.reporting import progress, text
from mis_mlx.runs import run_loop
from mis_mlx.settings.parts import part_of
from mis_mlx.size_search import shortfall, size_request
from mis_mlx.storage import run_folder
from mis_mlx.types import Checkpoint, MisError, Row


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
        resolved = _resolved(s, size_request.unsearched(s), teacher, begun)
        name = resolved.name
        entered = run_loop.entered(folder, name, out=s.out, asked=s.given, plan=resolved.strategy)
        with entered as place:
            return _work(resolved, place)
    # What all of the run should take, by a likely student.
    rest = sought.rest
    phases = {"search": sought.takes.seconds, **rest.planned}
    cli.say(plan_report.time_line(phases), plan_report.memory_line(rest, sought.takes))
    note = plan_report.night(rest, sum(phases.values()))
    if note:
        cli.say(note)
    with run_loop.entered(
        folder, f"{teacher.path.name}-none", out=s.out, asked=s.given, plan={}
    ) as place:
        found = search.carry_out(sought, place)
        expected = max(0.0, found["expected_bits"])
        sizes = {"lose": sought.lose, **found["best"], "expected_loss": expected}
        return _work(_resolved(s, sizes, teacher, place.folder), place, told=True)


def _resolved(
    s: Settings,
    sizes: Mapping[str, Any],
    teacher: Checkpoint,
    folder: Path | None,
    *,
    sought: plan_report.Search | None = None,
) -> ResolvedRun:
    """The run with everything decided, its plan said.

    sizes: that a search chose. folder: of a run for which some of it is decided. sought: the
    search that comes first. MisError where the plan does not fit the budget, except in a dry run.
    """
    resolved = run_plan.resolve(s, sizes, teacher, folder)
    if resolved.rounding:
        size_request.warn_of_few_bits(teacher, resolved.rounding.target_bpw)
    expected = resolved.expected_loss
    if s.dry_run:
        known = plan.outlook(resolved.plan, expected)
        table = plan_report.table(resolved.plan, known, search=sought)
        cli.say(text.aligned(table))
        _say_untrained(s, resolved.plan)
        return _expecting_more(resolved)
    if not resolved.plan.fits:
        raise MisError(strategies.remedy(resolved.plan))
    # A search has said how long all takes; of a run that goes on, some is done.
    decided = folder is not None and run_folder.is_decided(folder)
    begun = decided or (folder is not None and "lose" in sizes)
    known = plan.outlook(resolved.plan, expected)
    cli.say(text.aligned(plan_report.brief(resolved.plan, known, searched=begun)))
    if not decided:
        _say_untrained(s, resolved.plan)
    return _expecting_more(resolved)


def _say_untrained(s: Settings, chosen: strategies.MemoryPlan) -> None:
    """That steps were asked for which nothing takes."""
    if chosen.job.uncut and s.iters is not None:
        cli.say(
            f"--iters {s.iters} is left out: no block is cut, so no weight learns; --q-iters sets "
            f"the steps of scales, and --scenario or --train blocks trains weights"
        )


def _expecting_more(resolved: ResolvedRun) -> ResolvedRun:
    """The run, where its budget leaves something out with the loss that is to be expected of it."""
    expected = resolved.expected_loss
    if expected is None:
        return resolved
    more = round(expected * shortfall.loss_factor(resolved.plan), 4)
    return replace(resolved, expected_loss=more)


def _dry_run(
    s: Settings, teacher: Checkpoint, sought: search.Sought | None, folder: Path | None
) -> dict[str, Any]:
    """What a run would do before its first stage, said; its plan for machines."""
    sizes = size_request.unsearched(s)
    before = None
    if sought is not None:
        sizes = {**sought.likely}
        before = sought.takes
        cli.say("the plan below is that of a likely student: a search chooses another, perhaps")
    resolved = _resolved(s, sizes, teacher, folder, sought=before)
    if resolved.plan.fits:
        conversations.source(
            teacher,
            resolved.text,
            resolved.budget,
            writes=resolved.plan.job.teacher_writes,
            dry_run=True,
        )
    note = battery(s)  # a run says it when it begins
    if note:
        cli.say(note)
    outcome = plan.outcome(resolved.plan, str(teacher.path))
    outcome["peak_bytes"] = plan_report.peak_bytes(resolved.plan, before)
    if sought is not None:
        outcome["seconds"] += round(sought.takes.seconds)
        outcome["check_failed"] = outcome["check_failed"] or sought.outcome["check_failed"]
    return outcome


def _work(resolved: ResolvedRun, place: run_loop.Place, *, told: bool = False) -> dict[str, Any]:
    """Read the text, go through all stages; the result.

    told: a search has said what the text is.
    """
    place.decide(resolved.stored, resolved.strategy, resolved.budget)
    with progress.run("distill", resolved.plan.planned):
        source = conversations.source(
            resolved.teacher,
            resolved.text,
            resolved.budget,
            writes=resolved.plan.job.teacher_writes,
        )
        table, result = _begin(resolved, source, place, told=told)
    if table:
        print(text.aligned(table))
        cli.say(summary.next_steps(Path(result["run"])))
    return result


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the last stage measured of all models.

    answered: None: nobody was asked. languages: {language: bits a byte lost in it}, of a student
    with fewer tokens.
    """

    models: comparison.Models
    quality: summary.Quality
    answered: answers.Judgement | None
    languages: dict[str, float]


def _begin(
    resolved: ResolvedRun, source: preparation.Source, place: run_loop.Place, *, told: bool
) -> tuple[str, dict[str, Any]]:
    """Read the data, open the run, go through all stages."""
    teacher = resolved.teacher
    folder = resolved.settings.student
    memory_plan = resolved.plan
    length = resolved.recipe.max_seq_length
    tell = cli.detail if told else cli.say
    data, origin = run_loop.prepare_text(teacher, source, length, tell)
    same: tuple[str, ...] = run_folder.SAME
    if folder:
        given = load.open_checkpoint(folder)
        origin["student"] = run_folder.origin(given, "")["teacher"]
        same = (*same, "student")
    with run_loop.open_run(
        place,
        origin,
        same=same,
        thermal=part_of(ThermalFlags, vars(resolved.settings)),
        limit=resolved.budget,
        wired=memory_plan.peak_bytes if memory_plan.mode != "sharded" else 0,
    ) as opened:
        run_plan.log(resolved, opened)
        c = pipeline.Run(
            **vars(opened),
            recipe=resolved.recipe,
            teacher=teacher,
            data=data.train,
            plan=memory_plan,
        )
        choosing: AbstractContextManager[None] = nullcontext()
        if folder is None and resolved.rows != shape_of(teacher.config).vocab:
            # the plan of `prune` has it in, where something else is cut, too
            choosing = c.phase("vocabulary" if memory_plan.job.viewed else "prune")
        with choosing:
            seen, data = vocabulary.of_run(
                teacher,
                folder,
                resolved.rows,
                data,
                config=resolved.pruning,
                source=source,
                run=opened.folder,
                files=opened.files,
            )
        c = replace(c, teacher=seen, data=data.train)
        return _stages(resolved, c, data)


def _stages(
    resolved: ResolvedRun,
    c: pipeline.Run,
    data: preparation.Data,
) -> tuple[str, dict[str, Any]]:
    """(what the screen shows, the result)."""
    folder = c.folder
    teacher = resolved.teacher
    student = resolved.settings.student
    rounding = resolved.rounding
    judging = measurement.judging_windows(c, data, teacher, resolved.recipe.eval_windows)
    run_loop.forget_text()
    if student is None:
        before = arch.params(teacher.config)
        pruned = compression.view(c) or compression.prune(c, resolved.pruning, before)
    else:
        pruned = compute_type.open_to_compute(student, teacher.precision)
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
        compression.quantize(c, rounding, dense)
    if rounding:
        models["4-bit"] = compute_type.open_to_compute(folder / "model", teacher.precision)
    with c.phase("measure"):
        answered = measurement.answered(c, models, resolved.settings.eval_prompts or 0)
        quality = measurement.quality(c, judging, models)
        languages = measurement.languages(c, models)
    measured = Measured(models=models, quality=quality, answered=answered, languages=languages)
    return _finish(resolved, c, measured)


def _finish(
    resolved: ResolvedRun, c: pipeline.Run, measured: Measured
) -> tuple[str, dict[str, Any]]:
    """Write the table and the result; (what the screen shows, the result)."""
    folder = c.folder
    models = measured.models
    answered = measured.answered
    student = list(models)[-1]
    sizes = []
    for name, model in models.items():
        sizes.append(Row(name, "params", arch.params(model.config) / 1e6))
        sizes.append(Row(name, "bytes", model.nbytes / 1e6))
    expected = summary.expectation(resolved.expected_loss, student, answered, measured.quality)
    sentence = ""
    far = False
    if expected:
        sentence = summary.expectation_sentence(expected, resolved.settings.lose)
        far = summary.is_far(
            expected=float(expected["expected_loss"]), reached=float(expected["reached_loss"])
        )

    def page(*, for_screen: bool) -> str:
        return summary.result_page(
            models,
            sizes,
            measured.quality,
            resolved.recipe.max_seq_length,
            answered=answered,
            for_screen=for_screen,
            # the first line of the screen has the loss and the target
            expectation="" if for_screen and answered and not far else sentence,
            lose=resolved.settings.lose,
            languages=measured.languages,
        )

    c.files.replace_text(folder / "table.md", page(for_screen=False) + "\n")
    figures = conversations.figures(answered) if answered else {}
    result = summary.result(folder, models, sizes, measured.quality)
    if measured.languages:
        result["languages"] = measured.languages
    result = c.finish({**figures, **result, **expected, "mode": c.plan.mode})
    # The answer first: what was won, then what the models say, then the tables.
    screen = page(for_screen=True)
    if not resolved.settings.keep_steps:
        for name in pipeline.TEMPORARY:
            c.files.discard(folder / name)
    return screen, result


if __name__ == "__main__":
    cli.main(Settings, run, several=True)
