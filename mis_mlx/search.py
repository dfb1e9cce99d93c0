"""Search for the shape to prune to, by size, memory or speed: many as pruned, the best after a short distillation."""

import itertools
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from mis_mlx import cli
from mis_mlx.distillation import candidate_trials, run_loop
from mis_mlx.distillation.candidate_trials import CandidateTrials
from mis_mlx.distillation.pipeline import Run
from mis_mlx.hardware import memory
from mis_mlx.hardware.rates import Rates
from mis_mlx.hardware.thermal.run_monitor import ThermalFlags
from mis_mlx.maths.stats import interval
from mis_mlx.models.config import Shape, shape_of
from mis_mlx.models.policy import Computing
from mis_mlx.planner import estimates, phases
from mis_mlx.planner.recipe import DistillationConfig
from mis_mlx.pruning import shape_search, vocabulary
from mis_mlx.reporting import html, progress, text
from mis_mlx.storage import run_folder
from mis_mlx.types import MOST, Budget, Checkpoint, Count, MisError, Row, Whole, Within, duration, gib

# Settings that may differ when a search is resumed: none of them changes what is measured.
FREE = frozenset({"out", "resume", "dry_run", "config", "budget", "save_every", "governor", "thermal_replay"})
OFTEN = 0.1  # share of steps that the guard skips or clips, above which a training is not stable
METRICS = text.metrics("search")
UNDER = Path("runs") / "search"  # apart from distillations, so that --resume of one never finds the other


@dataclass(frozen=True)
class Settings(cli.Resumable, Computing, ThermalFlags, vocabulary.VocabularyConfig, DistillationConfig):
    """One of --params, --memory, --decode says what the student may cost; default: --params 0.667x."""

    params: str | None = None
    """parameters: a share of the teacher's, such as 0.667x, or a number, such as 90M"""
    memory: str | None = None
    """memory in use, such as 3GiB: weights in 4 bits, and keys and values of --max-kv-size tokens"""
    decode: str | None = None
    """decoding speed, such as 1.5x the teacher's here with --max-kv-size tokens in its cache: estimated from two
    timings of the teacher; finalists are timed"""
    tolerance: Annotated[float, Within(0.0, 0.49)] = 0.02
    """share of the teacher: params may be this much off, memory and time a token down to twice this below"""
    max_kv_size: Count = 2048
    """tokens of context in --memory and --decode"""
    teacher: str | None = None
    """folder, hub id (docs/families.md: of which families) or gemma-3-270m; default: SmolLM2-135M-Instruct"""
    data: str | None = None
    """folder with train.jsonl (valid.jsonl, test.jsonl), or hub data set; default: built-in text"""
    evaluations: Count = 24
    """candidates measured as pruned: all there are, if no more, else those that evolution finds"""
    finalists: Count = 3
    """the best of them, distilled for --iters steps"""
    iters: Count = 20
    """optimizer steps of each finalist; Minitron's rankings were stable after about 300, 20 are a first look"""
    repair_samples: Whole = 0
    """windows for the closed-form repair of every candidate before it is ranked; 0: ranked as pruned"""
    rank_windows: Count = 6
    """held-out windows that rank candidates"""
    eval_windows: Annotated[int, Within(2, MOST)] = 24
    """other held-out windows, that judge finalists"""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """type of the candidates' weights"""


def aim_of(
    s: Settings, teacher: Checkpoint, folder: Path | None, limit: Budget
) -> tuple[shape_search.Aim, shape_search.Decoding | None]:
    """What the student may cost; for --decode also the teacher's speed, timed now or when the run in `folder` began."""
    given = [f"--{name} {value}" for name in ("params", "memory", "decode") if (value := getattr(s, name))]
    if len(given) > 1:
        raise MisError(f"{' and '.join(given)} are two aims: give one")
    if s.memory:
        most_bytes = cli.parse_bytes(s.memory, "--memory")
        return shape_search.memory_aim(teacher.config, s.memory, most_bytes, s.tolerance, s.max_kv_size), None
    if not s.decode:
        return shape_search.params_aim(teacher.config, s.params or "0.667x", s.tolerance), None
    if folder:
        speed = shape_search.Decoding(**run_folder.stored_plan(folder))
    else:
        need = phases.timed_bytes(estimates.model_of(teacher).params)
        limit.need(need, "timing the teacher, whole in memory,", "give --params or --memory in place of --decode")
        cli.say("timing the teacher, whole and with half of its blocks")
        with memory.limited(limit):
            speed = candidate_trials.timed(teacher.path, s.max_kv_size)
    return shape_search.decode_aim(teacher.config, s.decode, s.tolerance, s.max_kv_size, speed), speed


def field_of(s: Settings, config: Mapping[str, Any], aim: shape_search.Aim) -> tuple[list[Shape], list[Shape]]:
    """(all shapes that meet the aim, those of them that have a name), and what is done with them said."""
    first = shape_search.scenarios(config, aim)
    shapes = list(dict.fromkeys([*shape_search.field(config, aim), *first]))
    how = f"evolution measures {s.evaluations} of them (seed {s.seed})"
    if len(shapes) <= s.evaluations:
        how = f"all are measured, no more than --evaluations {s.evaluations}"
    cli.say(f"shapes that meet {aim.flag}, {aim.words(aim.low)} to {aim.words(aim.high)}: {len(shapes)}; {how}")
    if stuck := shape_search.stuck(config):
        cli.say(f"this teacher cannot be cut along every axis: {stuck} stay as they are")
    return shapes, first


def work_table(planned: Sequence[estimates.StageCost], at: Rates) -> str:
    """Markdown: every phase, then all of them."""
    parts = [(p.name, p.read_bytes, p.written_bytes, p.peak_bytes, p.seconds(at)) for p in planned]
    _, read, written, peak, seconds = zip(*parts, strict=True)
    rows = [*parts, ("all", sum(read), sum(written), max(peak), sum(seconds))]
    lines = [[name, *map(gib, sizes), duration(time_s)] for name, *sizes, time_s in rows]
    return text.markdown_table(["phase", "read", "written", "peak memory", "time"], lines)


def rank(s: Settings, c: CandidateTrials, shapes: Sequence[Shape], first: Sequence[Shape]) -> list[Shape]:
    """The shapes that were measured, the best first; those whose loss is no number are left out."""
    count, numbers = min(s.evaluations, len(shapes)), itertools.count(1)
    with progress.phase("rank"), progress.bar("rank", count) as show:

        def score(shape: Shape) -> float:
            value = c.score(shape)
            show(next(numbers), f"{shape_search.label(shape)}  KL {value:.3f}")
            return value

        scores = shape_search.evolve(shapes, first, score, s.seed, s.evaluations)
    ranked = sorted((x for x, value in scores.items() if math.isfinite(value)), key=lambda x: scores[x])
    if not ranked:
        raise MisError(f"none of {count} candidates has a loss that is a number: ask for less")
    return ranked


def unstable(record: Mapping[str, Any]) -> str:
    """Why a finalist's training was not stable, or nothing."""
    if record["diverged"] or None in record["kl_distilled"] or None in record["nll_distilled"]:
        return "its loss became no number"
    meddled = record["skipped"] + record["clipped"]
    if meddled > OFTEN * record["steps"]:
        return f"the guard had to step in at {meddled} of {record['steps']} steps"
    before, after = (float(np.mean(record[f"kl_{m}"])) for m in ("pruned", "distilled"))
    return f"its KL rose from {before:.3f} to {after:.3f}" if after > before else ""


@dataclass(frozen=True)
class Verdict:
    """best: the stable finalist of least KL after distillation. gap: of the next one above it, (mean, low, high)
    over the same windows. None where there is none."""

    best: int | None
    second: int | None
    gap: tuple[float, float, float] | None

    @property
    def clear(self) -> bool:
        """Whether the best is better by more than the noise, or alone."""
        return self.best is not None and (self.gap is None or self.gap[1] > 0)


def best_candidate(records: Sequence[Mapping[str, Any]]) -> Verdict:
    """Which finalist, by its number in `records`, and how sure that is: the least sure of all comparisons counts."""
    stable = [i for i, record in enumerate(records) if not unstable(record)]
    kl: dict[int | None, np.ndarray] = {i: np.array(records[i]["kl_distilled"]) for i in stable}
    best = min(kl, key=lambda i: kl[i].mean(), default=None)
    gaps = {i: interval(kl[i] - kl[best]) for i in kl if i != best}
    second = min(gaps, key=lambda i: gaps[i][1], default=None)
    return Verdict(best, second, gaps.get(second))


def table(records: Sequence[Mapping[str, Any]], names: Sequence[str], teacher_s: float | None) -> str:
    """Markdown: a column for each finalist, means with 95 % intervals. teacher_s: its seconds a token, if timed."""
    rows = []
    for record, name in zip(records, names, strict=True):
        rows.append(Row(name, "params", record["params"] / 1e6))
        rows.append(Row(name, "meddled", record["skipped"] + record["clipped"]))
        if teacher_s and "decode_s" in record:
            rows.append(Row(name, "speed", teacher_s / record["decode_s"]))
        for metric, _, _ in METRICS:
            if isinstance(values := record.get(metric), list) and None not in values:
                rows.append(Row(name, metric, *interval(np.array(values)), len(values)))
    return text.table(rows, names, METRICS)


def advice(found: Verdict, records: Sequence[Mapping[str, Any]], names: Sequence[str], lines: Sequence[str]) -> str:
    """The recommendation. names, lines: of the finalists, for people, and the commands that make them."""
    best = {} if found.best is None else {**records[found.best], "name": names[found.best], "line": lines[found.best]}
    second = None if found.second is None else names[found.second]
    values = {"found": found, "best": best, "second": second, "why": zip(names, map(unstable, records), strict=True)}
    return html.document("search.md", values)


def _command_line(s: Settings, shape: Shape, before: Shape) -> str:
    """The `distill` that makes this student."""
    given = ("teacher", s.teacher), ("data", s.data), ("vocab", s.vocab)
    parts = ["scripts/mis distill", *(f"--{name} {shlex.quote(value)}" for name, value in given if value)]
    cut = {a: getattr(shape, a) for a in shape_search.AXES if getattr(shape, a) != getattr(before, a)}
    parts += ["--scenario none", *(f"--{axis} {size}" for axis, size in cut.items())]
    return " ".join(parts + {64: [], 32: ["--q-group-size 32"], 0: ["--quantize 0"]}[shape_search.group_of(shape)])


def _means(record: Mapping[str, Any]) -> dict[str, Any]:
    """A finalist for a run's JSON: means in place of windows."""
    lists = {k: v for k, v in record.items() if isinstance(v, list)}
    means = {k: None if None in v else float(np.mean(v)) for k, v in lists.items()}
    return {**record, **means, "unstable": unstable(record)}


def report(
    s: Settings, c: CandidateTrials, aim: shape_search.Aim, finalists: Mapping[Shape, Mapping[str, Any]]
) -> dict[str, Any]:
    """Print the table and the sentence; write table.md and return what goes into the JSON line."""
    run, records = c.run, [*finalists.values()]
    candidates, before = run_folder.records(run.folder / candidate_trials.CANDIDATES), shape_of(run.teacher.config)
    verdict = best_candidate(records)
    names = [shape_search.words(x, before) for x in finalists]
    lines = [_command_line(s, x, before) for x in finalists]
    sentence = advice(verdict, records, names, lines)
    head = f"{len(names)} finalists of {len(candidates)} shapes measured, {aim.flag}: {s.iters} steps of distillation, "
    head += f"{len(c.judging.tokens)} windows of {s.max_seq_length} tokens held out, ± 95 %"
    page = f"{head}\n\n{table(records, names, aim.teacher if s.decode else None)}\n\n{sentence}"
    print(text.aligned(page))
    run.files.replace_text(run.folder / "table.md", page + "\n")
    return {
        "candidates": candidates,
        "finalists": [_means(r) for r in records],
        "clear": verdict.clear,
        "sentence": sentence,
        "command": None if verdict.best is None else lines[verdict.best],
    }


def run(settings: Settings) -> dict[str, Any]:
    """The command: aim, list, plan, calibrate once, rank, distil the best, judge."""
    s, folder = run_loop.resumed(settings, FREE, UNDER)
    s.check()
    teacher = run_loop.opened(s, s.teacher, "teacher", UNDER)
    limit = memory.budget(s.budget_bytes)
    aim, speed = aim_of(s, teacher, folder, limit)
    rows = vocabulary.rows_left(teacher, s)
    seen = vocabulary.first_rows(teacher, rows)
    shapes, first = field_of(s, seen.config, aim)
    work, made = candidate_trials.work(s, teacher, seen, shapes, limit)
    planned = [*work["rank"], *work["finalists"]]
    seconds = {name: sum(p.seconds(made.rates) for p in part) for name, part in work.items()}
    cli.say(f"{text.aligned(work_table(planned, made.rates))}\n{made.rates}")
    peak = max(p.peak_bytes for p in planned)
    result = {"teacher": str(teacher.path), "vocab": rows, "aim": aim.flag, "shapes": len(shapes),
              "evaluated": min(s.evaluations, len(shapes)), "peak_bytes": peak,
              "budget_bytes": limit.limit_bytes}  # fmt: skip
    if s.dry_run:
        moved = {f"{n}_bytes": sum(getattr(p, f"{n}_bytes") for p in planned) for n in ("read", "written")}
        failed = not made.fits or peak > limit.limit_bytes
        return {**result, **moved, "seconds": round(sum(seconds.values())), "check_failed": failed}
    if not made.fits:
        raise MisError(phases.remedy(made))
    estimates.fit(limit, *planned)
    if folder is None:
        cli.say(progress.promise(sum(seconds.values())))
    data, origin = run_loop.prepared(s, teacher)
    name, way = f"{UNDER.name}/{teacher.path.name}", asdict(speed) if speed else {}
    wired = made.peak_bytes if made.mode != "sharded" else 0
    opening = run_loop.open_run(s, folder, name, origin, way, limit, wired)
    with progress.run("search", seconds), opening as place:
        seen, data = vocabulary.of_run(teacher, None, rows, data, s, s.data, place.folder, place.files)
        ranking, judging = candidate_trials.split(next(iter(data.held_out.values())), s.rank_windows, s.eval_windows)
        course = Run(**vars(place), recipe=s, teacher=seen, data=data.train, plan=made)
        samples, repair = course.pick(s.num_samples, 1), course.pick(s.repair_samples, 2)
        c = CandidateTrials(course, s.dtype, samples, repair, ranking, judging)
        best, records = rank(s, c, shapes, first)[: s.finalists], {}
        with progress.phase("finalists"):
            for shape in cli.counted("finalist", best, len(best)):
                cli.say(f"finalist {shape_search.label(shape)}")
                records[shape] = c.final(shape, s.max_kv_size if s.decode else None)
        result |= report(s, c, aim, records)
        result |= {"run": str(course.folder), **course.account(limit.limit_bytes)}
        course.files.replace_text(course.folder / run_folder.RESULT, json.dumps(result, indent=2))
    return result


if __name__ == "__main__":
    cli.main(Settings, run)
