"""Search for the shape to prune to, by size, memory or speed: many as pruned, the best after a short distillation."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from mis_mlx import cli
from mis_mlx.data import preparation, token_windows
from mis_mlx.distillation import candidate_trials, search_report
from mis_mlx.distillation.candidate_trials import CandidateTrials
from mis_mlx.distillation.pipeline import Run
from mis_mlx.distillation.run_loop import open_run, resumed
from mis_mlx.hardware import memory
from mis_mlx.hardware.rates import Rates
from mis_mlx.hardware.thermal.run_monitor import ThermalFlags
from mis_mlx.models import load, policy, resolve
from mis_mlx.models.config import Shape, shape_of
from mis_mlx.models.policy import Computing
from mis_mlx.planner import estimates, phases
from mis_mlx.planner.estimates import StageCost
from mis_mlx.planner.job import spec_of
from mis_mlx.planner.recipe import DistillationConfig
from mis_mlx.pruning import shape_search
from mis_mlx.pruning.shape_search import Aim, Decoding
from mis_mlx.reporting import progress
from mis_mlx.reporting.text import markdown_table
from mis_mlx.storage import run_folder
from mis_mlx.storage.files import Files, need_place
from mis_mlx.types import MOST, Budget, Checkpoint, Count, MisError, Whole, Within, duration, gib

# Settings that may differ when a search is resumed: none of them changes what is measured.
FREE = frozenset({"out", "resume", "dry_run", "config", "budget", "save_every", "governor", "thermal_replay"})
UNDER = Path("runs") / "search"  # apart from distillations, so that --resume of one never finds the other


@dataclass(frozen=True)
class Settings(Computing, ThermalFlags, DistillationConfig):
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
    budget: str | None = None
    """memory this may take, such as 5GiB; default: 5GiB or 75 % of what is there"""
    evaluations: Count = 24
    """candidates measured as pruned: all there are, if no more, else those that evolution finds"""
    finalists: Count = 3
    """the best of them, distilled for --iters steps"""
    iters: Count = 20
    """optimizer steps of each finalist; Minitron's rankings were stable after about 300, 20 are a first look"""
    num_samples: Count = 32
    """calibration windows, read once for all candidates"""
    repair_samples: Whole = 0
    """windows for the closed-form repair of every candidate before it is ranked; 0: ranked as pruned"""
    rank_windows: Count = 6
    """held-out windows that rank candidates"""
    eval_windows: Annotated[int, Within(2, MOST)] = 24
    """other held-out windows, that judge finalists"""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """type of the candidates' weights"""
    out: str | None = None
    """run folder; default: the next free runs/search/NAME-00N"""
    resume: bool = False
    """continue the search in --out, or the newest unfinished one; nothing is measured twice"""
    dry_run: bool = False
    """say what it takes and stop"""
    config: cli.ConfigFile = None
    """YAML file with any of these flags"""


def check(s: Settings) -> None:
    """MisError where flags make no sense, or not together."""
    s.check()
    given = [f"--{name} {value}" for name in ("params", "memory", "decode") if (value := getattr(s, name))]
    if len(given) > 1:
        raise MisError(f"{' and '.join(given)} are two aims: give one")


def decoding(s: Settings, checkpoint: Checkpoint, limit: Budget) -> Decoding:
    """The teacher's speed, timed."""
    need = phases.timed_bytes(checkpoint.config)
    limit.need(need, "timing the teacher, whole in memory,", "give --params or --memory in place of --decode")
    cli.say("timing the teacher, whole and with half of its blocks")
    with memory.limited(limit):
        return candidate_trials.timed(checkpoint.path, s.max_kv_size)


def aim_of(s: Settings, config: Mapping[str, Any], timed: Decoding | None) -> Aim:
    """What the student may cost. timed: the teacher's speed, for --decode."""
    if s.decode and timed:
        return shape_search.decode_aim(config, s.decode, s.tolerance, s.max_kv_size, timed)
    if s.memory:
        limit = cli.parse_bytes(s.memory, "--memory")
        return shape_search.memory_aim(config, s.memory, limit, s.tolerance, s.max_kv_size)
    return shape_search.params_aim(config, s.params or "0.667x", s.tolerance)


def work_table(found: Sequence[StageCost], at: Rates) -> str:
    """Markdown: every phase, then all of them."""
    parts = [(p.name, p.read_bytes, p.written_bytes, p.peak_bytes, p.seconds(at)) for p in found]
    _, read, written, peak, seconds = zip(*parts, strict=True)
    rows = [*parts, ("all", sum(read), sum(written), max(peak), sum(seconds))]
    lines = [[name, *map(gib, sizes), duration(time_s)] for name, *sizes, time_s in rows]
    return markdown_table(["phase", "read", "written", "peak memory", "time"], lines)


def rank(s: Settings, c: CandidateTrials, shapes: Sequence[Shape], first: Sequence[Shape]) -> list[Shape]:
    """The shapes that were measured, the best first; those whose loss is no number are left out."""
    count, done = min(s.evaluations, len(shapes)), 0
    with progress.bar("rank", count) as show:

        def score(shape: Shape) -> float:
            nonlocal done
            value, done = c.score(shape), done + 1
            show(done, f"{shape_search.label(shape)}  KL {value:.3f}")
            return value

        scores = shape_search.evolve(shapes, first, score, s.seed, s.evaluations)
    return sorted((x for x, value in scores.items() if math.isfinite(value)), key=lambda x: scores[x])


def judge(s: Settings, c: CandidateTrials, course: Run, shape: Shape) -> dict[str, Any]:
    """The record of one finalist, distilled now or read."""
    cli.say(f"finalist {shape_search.label(shape)}")
    small = estimates.model_of(shape_search.config_of(c.teacher.config, shape))
    job, plan = spec_of(estimates.model_of(c.teacher), small, s), course.plan
    made = phases.make(job, plan.budget_bytes, plan.rates)
    return c.final(shape, s, made, course, s.max_kv_size if s.decode else None)


def report(
    s: Settings, c: CandidateTrials, aim: Aim, measured: int, records: Mapping[Shape, Mapping[str, Any]]
) -> dict[str, Any]:
    """Print the table and the sentence; write table.md and return what goes into the JSON line."""
    shapes, before = list(records), shape_of(c.teacher.config)
    found = search_report.best_candidate([*records.values()])
    names = [search_report.words(x, before) for x in shapes]
    lines = [search_report.command_line(x, before, s.teacher, s.data) for x in shapes]
    said = search_report.sentence(found, [*records.values()], names, lines)
    teacher_s = aim.teacher if s.decode else None
    head = f"{len(names)} finalists of {measured} shapes measured, {aim.flag}: {s.iters} steps of distillation, "
    head += f"{len(c.judging.tokens)} windows of {s.max_seq_length} tokens held out, ± 95 %"
    page = "\n\n".join([head, search_report.table([*records.values()], names, teacher_s), said])
    print(page)
    c.files.replace_text(c.folder / "table.md", page + "\n")
    return {
        "candidates": run_folder.records(c.folder / candidate_trials.CANDIDATES),
        "finalists": [search_report.summary(r) for r in records.values()],
        "clear": found.clear,
        "sentence": said,
        "command": None if found.best is None else lines[found.best],
    }


def field_of(s: Settings, config: Mapping[str, Any], aim: Aim) -> tuple[list[Shape], list[Shape]]:
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


def _run(
    s: Settings, c: CandidateTrials, course: Run, aim: Aim, shapes: Sequence[Shape], first: Sequence[Shape]
) -> dict:
    with progress.phase("rank"):
        ranked = rank(s, c, shapes, first)
    if not ranked:
        raise MisError(
            f"none of {min(s.evaluations, len(shapes))} candidates has a loss that is a number: ask for less"
        )
    best = ranked[: s.finalists]
    with progress.phase("finalists"):
        records = {shape: judge(s, c, course, shape) for shape in cli.counted("finalist", best, len(best))}
    return report(s, c, aim, len(run_folder.records(c.folder / candidate_trials.CANDIDATES)), records)


def run(settings: Settings) -> dict[str, Any]:
    """The command: aim, list, plan, calibrate once, rank, distil the best, judge."""
    s, folder = settings, None
    if s.resume:
        s, folder = resumed(s, FREE, UNDER)
    policy.use(s.compute_dtype)
    check(s)
    need_place("--out", s.out or UNDER)
    began, files = time.monotonic(), Files()
    found = resolve.resolve_model(s.teacher)
    cli.say(f"teacher: {found.source}")
    checkpoint = load.open_checkpoint(found.path)
    limit = memory.budget(None if s.budget is None else cli.parse_bytes(s.budget))
    timed = None
    if s.decode:
        timed = Decoding(**run_folder.stored_plan(folder)) if folder else decoding(s, checkpoint, limit)
    aim = aim_of(s, checkpoint.config, timed)
    shapes, first = field_of(s, checkpoint.config, aim)
    planned, made = candidate_trials.work(s, checkpoint, shapes, limit)
    cli.say(f"{work_table(planned, made.rates)}\n{made.rates}")
    peak, seconds = max(p.peak_bytes for p in planned), candidate_trials.seconds(planned, made.rates)
    result = {"teacher": str(found.path), "aim": aim.flag, "shapes": len(shapes),
              "evaluated": min(s.evaluations, len(shapes)), "peak_bytes": peak,
              "budget_bytes": limit.limit_bytes}  # fmt: skip
    fits = made.fits and peak <= limit.limit_bytes
    if s.dry_run:
        moved = {f"{n}_bytes": sum(getattr(p, f"{n}_bytes") for p in planned) for n in ("read", "written")}
        return {**result, **moved, "seconds": round(sum(seconds.values())), "check_failed": not fits}
    if not made.fits:
        raise MisError(phases.remedy(made))
    estimates.fit(limit, *planned)
    if folder is None:
        cli.say(progress.promise(sum(seconds.values())))
    data = preparation.prepare(s.data, load.tokenizer(found.path), s.max_seq_length)
    for note in data.notes:
        cli.say(note)
    ranking, judging = candidate_trials.split(next(iter(data.held_out.values())), s.rank_windows, s.eval_windows)
    origin = run_folder.origin(checkpoint, token_windows.fingerprint(data.train))

    def new() -> Path:
        values = {k: v for k, v in asdict(s).items() if k not in ("out", "resume", "dry_run", "config")}
        name = f"{UNDER.name}/{checkpoint.path.name}"
        return run_folder.create(s.out, name, values, origin, asdict(timed) if timed else {}, files)

    wired = made.peak_bytes if made.mode != "sharded" else 0
    run_ = open_run(folder, new, origin, limit, wired, s, files)
    with progress.run("search", seconds), run_ as (place, weather):
        course = Run(s, place, checkpoint, data.train, made, files, memory.Peak(), weather)
        repair = course.pick(s.repair_samples, 2)
        c = CandidateTrials(place, checkpoint, course.pick(s.num_samples, 1), repair, ranking, judging, s.dtype, files,
                    made.held_windows("prune"))  # fmt: skip
        result = {**result, **_run(s, c, course, aim, shapes, first), "run": str(place),
                  "peak_bytes": course.peak.nbytes, **weather.account(),
                  "seconds": round(time.monotonic() - began, 1)}  # fmt: skip
        files.replace_text(place / run_folder.RESULT, json.dumps(result, indent=2))
    return result


if __name__ == "__main__":
    cli.main(Settings, run)
