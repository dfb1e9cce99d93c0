"""Make a small 4-bit student: prune, distill, quantize, measure."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from mis_mlx import bench, cli, plan, search, synthesize
from mis_mlx.data import preparation
from mis_mlx.distillation import (
    compression,
    conversations,
    measurement,
    pipeline,
    resolved_run,
    run_plan,
    run_text,
    strategies,
    summary,
)
from mis_mlx.distillation.distill_flags import DistillFlags
from mis_mlx.distillation.resolved_run import ResolvedRun
from mis_mlx.evaluation import answers, comparison, judging_cost
from mis_mlx.hardware.thermal.run_monitor import battery
from mis_mlx.models import arch, distributed, load, mlx_generate, opening
from mis_mlx.pruning import vocabulary
from mis_mlx.reporting import progress, text
from mis_mlx.runs import run_loop
from mis_mlx.size_search import shortfall, size_request
from mis_mlx.storage import run_folder
from mis_mlx.storage.files import DISK, json_sha256
from mis_mlx.types import Checkpoint, MisError, Row

# Settings that may differ when a run is resumed: none of them changes a weight.
FREE = frozenset(
    {
        "out",
        "resume",
        "dry_run",
        "config",
        "budget",
        "eval_windows",
        "eval_prompts",
        "bench_tokens",
        "report_to",
        "save_every",
        "governor",
        "thermal_replay",
        "spread",
        "keep_steps",
    }
)


@dataclass(frozen=True)
class Settings(DistillFlags):
    """Every default was measured to work. No flag is required."""

    RARE: ClassVar = frozenset(
        {
            "num_samples",
            "eval_windows",
            "eval_prompts",
            "heads",
            "targets",
            "train",
            "reconstruct_samples",
            "q_group_size",
            "q_method",
            "q_iters",
            "save_every",
            "keep_steps",
            "report_to",
            "compute_dtype",
            "altitude_m",
        }
    )
    # most are flags of `prune`, whose folder --student takes, or of `quantize`
    FILE_ONLY: ClassVar = frozenset(
        {
            "kv_heads",
            "ffn_widths",
            "importance",
            "hidden_by",
            "target",
            "temperature_unit",
            "experts_by",
            "thermal_replay",
            "vocab_text",
            "languages",
            "q_mode",
            "spread",
            "expected_loss",
        }
    )


def run(settings: Settings) -> dict[str, Any]:
    """The command: open, plan, prune, repair, distil, quantize, measure."""
    s, folder = run_loop.resumed(settings, FREE)
    resolved = _resolve(s, folder)
    cli.say(text.aligned(plan.table(resolved.plan, resolved.report.expected_loss)))
    resolved = _expecting_more(resolved)
    if s.dry_run:
        return _dry_run(resolved)
    if not resolved.plan.fits:
        raise MisError(strategies.remedy(resolved.plan))
    _write_text(resolved.text.written, resolved.teacher)
    source = conversations.source(resolved.teacher, resolved.text.wanted, resolved.budget)
    if folder is None:
        cli.say(progress.promise(sum(resolved.plan.planned.values())))
    with progress.run("distill", resolved.plan.planned):
        table, result = _begin(resolved, source, folder, s.out)
    if table:
        print(text.aligned(table))
        cli.say(summary.next_steps(Path(result["run"])))
    return result


def _resolve(s: Settings, folder: Path | None) -> ResolvedRun:
    """The run that the settings ask for, with its teacher and everything else decided.

    folder: of a run that goes on. Only a new run looks for sizes.
    """
    s.check()
    summary.trackers(s.report_to)
    teacher = run_loop.open_model(s, s.teacher, "teacher")
    sizes: Mapping[str, Any] = {}
    if folder is None:
        sizes = _chosen_sizes(s, teacher)
    return resolved_run.resolve(s, sizes, teacher, folder)


def _expecting_more(resolved: ResolvedRun) -> ResolvedRun:
    """The run, where its budget leaves something out with the loss that is to be expected of it."""
    expected = resolved.report.expected_loss
    if expected is None:
        return resolved
    more = round(expected * shortfall.loss_factor(resolved.plan), 4)
    return replace(resolved, report=replace(resolved.report, expected_loss=more))


def _dry_run(resolved: ResolvedRun) -> dict[str, Any]:
    """What a run would do before its first stage, said; its plan for machines."""
    if resolved.plan.fits:
        _write_text(resolved.text.written, resolved.teacher, dry_run=True)
        conversations.source(resolved.teacher, resolved.text.wanted, resolved.budget, dry_run=True)
    note = battery(resolved.student.pruning)  # a run says it when it begins
    if note:
        cli.say(note)
    return plan.outcome(resolved.plan, str(resolved.teacher.path))


def _chosen_sizes(s: Settings, teacher: Checkpoint) -> dict[str, Any]:
    """Settings of sizes and bits that a search chooses, and the loss that it expects.

    {} where sizes were given, or chosen before.
    """
    if s.expected_loss is not None:
        return {}
    request = size_request.request_of(s)
    loss = size_request.allowed_loss(request, teacher)
    flags = request.flags(loss)
    if not flags:
        return {}
    size_request.refuse_impossible(request, flags, teacher)
    cli.say(f"{flags}: a search chooses sizes and bits; the plan for the rest follows it")
    searched = _searched(s, teacher, loss)
    if s.dry_run:
        return {"lose": loss, **size_request.likely_sizes(teacher)}
    expected = max(0.0, searched["expected_bits"])
    return {"lose": loss, **searched["best"], "expected_loss": expected}


def _searched(s: Settings, teacher: Checkpoint, loss: float | None) -> dict[str, Any]:
    """The result of a search for this loss or --bytes; with --dry-run its plan.

    A search with the same settings that was stopped goes on; one that has ended is read.
    """
    names = {field.name for field in fields(search.Settings)} & {field.name for field in fields(s)}
    # A search has its own, and the minutes are the distillation's that follows it.
    names -= {"out", "resume", "iters", "eval_windows", "minutes"}
    given: dict[str, Any] = {name: getattr(s, name) for name in names}
    written = run_text.teacher_text(s, teacher)
    if written:
        _write_text(written, teacher, dry_run=s.dry_run)
        given["data"] = str(written.out)
    given["lose"] = loss
    if not s.quantize:
        given["axes"] = tuple(axis for axis in search.Settings.axes if axis != "bits")
    given |= {"finalists": 0, "student_iters": s.iters}
    asked = search.Settings(**given)
    if s.dry_run:
        return search.run(asked)
    same = {name: value for name, value in asdict(asked).items() if name not in search.FREE}
    out = search.UNDER / f"{teacher.path.name}-{json_sha256(same)[:8]}"
    begun = (out / run_folder.CONFIG).is_file()
    return search.run(search.Settings(**given, out=str(out), resume=begun))


def _write_text(
    written: run_text.TeacherText | None, teacher: Checkpoint, *, dry_run: bool = False
) -> None:
    """Have the teacher write the text of --data teacher, unless it is there."""
    if written is None:
        return
    if distributed.is_main() and not written.out.exists():
        cli.say(f"--data teacher: the teacher writes first, into {written.out}")
        synthesize.run(
            synthesize.Settings(
                model=str(teacher.path),
                out=str(written.out),
                num_samples=written.texts,
                budget=written.budget,
                compute_dtype=written.compute_dtype,
                seed=written.seed,
                dry_run=dry_run,
            )
        )
    if not dry_run:
        distributed.broadcast_folder(written.out, DISK)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the last stage measured of all models. answered: None: nobody was asked."""

    models: comparison.Models
    sizes: list[Row]
    quality: summary.Quality
    answered: answers.Judgement | None


def _begin(
    resolved: ResolvedRun, source: preparation.Source, folder: Path | None, out: str | None
) -> tuple[str, dict[str, Any]]:
    """Read the data, enter the run folder, go through all stages."""
    teacher = resolved.teacher
    student = resolved.student
    memory_plan = resolved.plan
    length = resolved.recipe.max_seq_length
    data, origin = run_loop.prepare_text(teacher, source, length)
    with run_loop.open_run(
        resolved.settings.values,
        folder,
        resolved.name,
        origin,
        out=out,
        thermal=student.pruning,
        strategy=resolved.strategy,
        limit=resolved.budget,
        wired=memory_plan.peak_bytes if memory_plan.mode != "sharded" else 0,
    ) as place:
        run_plan.log(resolved.settings.given, place, memory_plan)
        reported = resolved.report.report_to if distributed.is_main() else None
        report = summary.reporter(reported, place.folder, resolved.settings.values)
        seen, data = vocabulary.of_run(
            teacher,
            student.folder,
            student.rows,
            data,
            config=student.pruning,
            source=source,
            run=place.folder,
            files=place.files,
        )
        c = pipeline.Run(
            **vars(place),
            recipe=resolved.recipe,
            teacher=seen,
            data=data.train,
            plan=memory_plan,
            report=report,
            shares=resolved.shares,
        )
        return _stages(resolved, c, data)


def _stages(
    resolved: ResolvedRun, c: pipeline.Run, data: preparation.Data
) -> tuple[str, dict[str, Any]]:
    """(what the screen shows, the result); ("", {}) on machines beside the first one."""
    folder = c.folder
    teacher = resolved.teacher
    student = resolved.student
    rounding = student.rounding
    judging = measurement.judging_windows(c, data, teacher, resolved.recipe.eval_windows)
    load.opened_tokenizer.cache_clear()  # else every phase would hold them, too
    if student.folder is None:
        pruned = compression.prune(c, student.pruning, data, arch.params(teacher.config))
    else:
        pruned = opening.open_to_compute(student.folder, teacher.precision)
    models = {"teacher": teacher, "pruned": pruned}
    distilled = folder / ("distilled" if rounding else "model")
    pipeline.distil(c, pruned, distilled)
    main = distributed.is_main()
    if main:
        models["distilled"] = opening.open_to_compute(distilled, teacher.precision)
    if rounding:
        compression.quantize(c, rounding, models.get("distilled"))
    # Other machines are needed only for a teacher whose blocks are shared.
    if not main and not c.shares:
        return "", {}
    if main and rounding:
        models["4-bit"] = opening.open_to_compute(folder / "model", teacher.precision)
    with c.phase("measure"):
        answered = measurement.answered(c, models, resolved.report.eval_prompts) if main else None
        quality = measurement.quality(c, judging, models)
        sizes = _sizes(c, models, resolved.report.bench_tokens) if main else []
    if not main:
        return "", {}
    measured = Measured(models=models, sizes=sizes, quality=quality, answered=answered)
    return _finish(resolved, c, measured)


def _sizes(c: pipeline.Run, models: comparison.Models, tokens: int) -> list[Row]:
    """Rows of size and speed. The models that are timed also write samples, for the report.

    tokens: timed; 0: none.
    """
    sizes = []
    fitting = {}
    for name, model in models.items():
        params = arch.params(model.config)
        sizes.append(Row(name, "params", params / 1e6))
        if judging_cost.timed_bytes(params) <= c.plan.budget_bytes:
            fitting[name] = model
    sizes += [Row(name, "bytes", model.nbytes / 1e6) for name, model in models.items()]
    if tokens:
        cli.say(f"measure: speed of {', '.join(fitting) or 'none: no model fits the budget whole'}")
        sizes += bench.measure(
            fitting,
            prompt_tokens=2 * tokens,
            tokens=tokens,
            count=2,
            limit_bytes=c.plan.peak_bytes,
        )
        samples = mlx_generate.samples(fitting, 2 * tokens)
        lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples]
        c.files.replace_text(c.folder / run_folder.SAMPLES, "".join(lines))
    return sizes


def _finish(
    resolved: ResolvedRun, c: pipeline.Run, measured: Measured
) -> tuple[str, dict[str, Any]]:
    """Write the table and the result; (what the screen shows, the result)."""
    folder = c.folder
    report = resolved.report
    models = measured.models
    answered = measured.answered
    student = list(models)[-1]
    expected = summary.expectation(report.expected_loss, student, answered, measured.quality)
    sentence = ""
    if expected:
        sentence = summary.expectation_sentence(expected, report.lose)

    def page(*, for_screen: bool) -> str:
        return summary.result_page(
            models,
            measured.sizes,
            measured.quality,
            resolved.recipe.max_seq_length,
            answered=answered,
            for_screen=for_screen,
            expectation=sentence,
        )

    c.files.replace_text(folder / "table.md", page(for_screen=False) + "\n")
    figures = conversations.figures(answered) if answered else {}
    result = summary.result(folder, models, measured.sizes, measured.quality)
    result = c.finish({**figures, **result, **expected, "mode": c.plan.mode})
    # The answer first: what was won, then what the models say, then the tables.
    screen = page(for_screen=True)
    if not report.keep_steps:
        for name in pipeline.TEMPORARY:
            c.files.discard(folder / name)
    return screen, result


if __name__ == "__main__":
    cli.main(Settings, run, several=True)
