"""Search for the student that loses least within limits on bytes, memory and time: layers, neurons, heads, vocabulary
and bits chosen together."""

import itertools
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from mis_mlx import cli
from mis_mlx.distillation import candidates, finalists, run_loop
from mis_mlx.distillation.candidates import Candidates
from mis_mlx.distillation.pipeline import Run
from mis_mlx.hardware import memory
from mis_mlx.hardware.rates import Rates
from mis_mlx.hardware.thermal.run_monitor import ThermalFlags
from mis_mlx.models.config import Shape, shape_of
from mis_mlx.models.families import family
from mis_mlx.models.policy import Computing
from mis_mlx.planner import estimates, phases, search_size
from mis_mlx.planner.recipe import DistillationConfig
from mis_mlx.pruning import limits as limiting
from mis_mlx.pruning import shape_search, vocabulary
from mis_mlx.pruning.limits import Limit, Timing
from mis_mlx.pruning.shape_search import Choice
from mis_mlx.reporting import progress, text
from mis_mlx.storage import run_folder
from mis_mlx.types import MOST, Budget, Checkpoint, Count, MisError, Whole, Within, duration, gib

# Settings that may differ when a search is resumed: none of them changes what is measured.
FREE = frozenset({"out", "resume", "dry_run", "config", "budget", "save_every", "governor", "thermal_replay"})
OFTEN = 0.1  # share of steps that the guard skips or clips, above which a training is not stable
METRICS = text.metrics("search")
UNDER = Path("runs") / "search"  # apart from distillations, so that --resume of one never finds the other
LIMITS = "bytes", "memory", "params", "decode", "ttft"
Axis = Literal["layers", "ffn", "heads", "hidden", "vocab", "bits"]


@dataclass(frozen=True)
class Settings(cli.Resumable, Computing, ThermalFlags, vocabulary.VocabularyConfig, DistillationConfig):
    """What the student may cost at the most: one or more of --bytes, --memory, --params, --decode, --ttft; default:
    --params 0.667x."""

    bytes: str | None = None
    """weights on disk, such as 50MB"""
    memory: str | None = None
    """memory in use, such as 3GiB: weights, and keys and values of --max-kv-size tokens"""
    params: str | None = None
    """parameters: a share of the teacher's, such as 0.667x, or a number, such as 90M"""
    decode: str | None = None
    """decoding speed, such as 1.5x the teacher's here with --max-kv-size tokens in its cache: estimated from two
    timings of the teacher; finalists are timed"""
    ttft: str | None = None
    """time to the first token of a prompt of --prompt-tokens, such as 1.5x the teacher's speed; estimated likewise"""
    max_kv_size: Count = 2048
    """tokens of context in --memory and --decode"""
    prompt_tokens: Count = 512
    """tokens of the prompt in --ttft"""
    axes: tuple[Axis, ...] = ("layers", "ffn", "heads", "vocab", "bits")
    """what may be cut: layers, ffn, heads, hidden, vocab, bits; bits only where a limit is one of bytes"""
    teacher: str | None = None
    """folder, hub id (docs/families.md: of which families) or gemma-3-270m; default: SmolLM2-135M-Instruct"""
    data: str | None = None
    """folder with train.jsonl (valid.jsonl, test.jsonl), or hub data set; default: built-in text"""
    evaluations: Count = 10
    """students measured as pruned and rounded: those that should lose least by what each axis costs alone"""
    finalists: Whole = 3
    """the best of them, distilled for --iters steps and rounded; 0: the best as pruned is recommended"""
    iters: Count = 20
    """optimizer steps of each finalist; Minitron's rankings were stable after about 300, 20 are a first look"""
    rank_windows: Count = 6
    """held-out windows that rank; a third as many of every other text"""
    eval_windows: Annotated[int, Within(2, MOST)] = 24
    """other held-out windows, that judge finalists; a third as many of every other text"""


def limits_of(
    s: Settings, teacher: Checkpoint, folder: Path | None, budget: Budget
) -> tuple[list[Limit], dict[str, Any]]:
    """What the student may cost; and the teacher's speed, timed now or when the run in `folder` began, by flag."""
    config, limits = teacher.config, list[Limit]()
    stored: dict[str, Any] = run_folder.stored_plan(folder) if folder else {}
    if s.bytes:
        limits.append(limiting.bytes_limit(config, s.bytes, cli.parse_bytes(s.bytes, "--bytes")))
    if s.memory:
        most = cli.parse_bytes(s.memory, "--memory")
        limits.append(limiting.memory_limit(config, s.memory, most, s.max_kv_size))
    if s.params or not any(getattr(s, name) for name in LIMITS):
        limits.append(limiting.params_limit(config, s.params or "0.667x"))
    of_time = {"decode": (s.max_kv_size, limiting.decode_work), "ttft": (s.prompt_tokens, limiting.prompt_work)}
    speeds = dict[str, Any]()
    for name, (tokens, work) in of_time.items():
        if not (asked := getattr(s, name)):
            continue
        if name not in stored:
            need = phases.timed_bytes(estimates.model_of(teacher).params)
            budget.need(need, "timing the teacher, whole in memory,", "give limits of size alone")
            cli.say("timing the teacher, whole and with half of its blocks")
            with memory.limited(budget):
                at = (tokens, 0) if name == "decode" else (0, tokens)
                stored[name] = asdict(finalists.timed(teacher.path, *at))
        speeds[name], count = stored[name], partial(work, tokens=tokens)
        limits.append(limiting.time_limit(config, f"--{name}", asked, Timing(**speeds[name]), count))
    return limits, speeds


def sizes_of(s: Settings, teacher: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Sizes of every axis that are tried, and what cannot be cut said."""
    if family(teacher.config).experts:
        raise MisError("a mixture of experts is cut by --experts of prune and distill: search chooses of dense models")
    config, whole = teacher.config, shape_of(teacher.config).vocab
    rows = candidates.vocabularies(teacher) if "vocab" in s.axes else []
    sizes = shape_search.axis_sizes(config, s.axes, rows)
    if s.vocab:
        sizes["vocab"] = (vocabulary.rows_left(teacher, s),)
    stuck = [f"{axis} {values[0]:,}" for axis, values in sizes.items() if axis in s.axes and len(values) == 1]
    if stuck and not (s.vocab and len(stuck) == 1 and sizes["vocab"] != (whole,)):
        cli.say(f"this teacher cannot be cut along every axis: {', '.join(stuck)} stay as they are")
    return sizes


def work_table(planned: Sequence[estimates.StageCost], at: Rates) -> str:
    """Markdown: every phase, then all of them."""
    parts = [(p.name, p.read_bytes, p.written_bytes, p.peak_bytes, p.seconds(at)) for p in planned]
    _, read, written, peak, seconds = zip(*parts, strict=True)
    rows = [*parts, ("all", sum(read), sum(written), max(peak), sum(seconds))]
    lines = [[name, *map(gib, sizes), duration(time_s)] for name, *sizes, time_s in rows]
    return text.markdown_table(["phase", "read", "written", "peak memory", "time"], lines)


def rank(s: Settings, c: Candidates, within: Sequence[Choice], sizes: Mapping[str, Sequence[int]]) -> list[Choice]:
    """The students that were measured, the best first; those whose loss is no number are left out."""
    with progress.phase("rank"):
        losses = c.losses(sizes)
        likely, numbers = shape_search.best(within, sizes, losses, s.evaluations), itertools.count(1)
        scores = dict[Choice, float]()
        with progress.bar("rank", len(likely)) as show:
            for choice in likely:
                scores[choice] = c.score(choice, losses)
                show(next(numbers), f"{choice.name}  {scores[choice] / math.log(2):.3f} bits a byte")
    ranked = sorted((x for x, value in scores.items() if math.isfinite(value)), key=lambda x: scores[x])
    if not ranked:
        raise MisError(f"none of {len(scores)} candidates has a loss that is a number: ask for less of a cut")
    return ranked


def flags_of(choice: Choice, before: Shape) -> dict[str, Any]:
    """Settings of `distill` that make this student."""
    group = shape_search.group_of(choice.shape)
    cut = {axis: getattr(choice.shape, axis) for axis in shape_search.CUTS}
    cut = {axis: size for axis, size in cut.items() if size != getattr(before, axis)}
    if "vocab" in cut:
        cut["vocab"] = str(cut["vocab"])
    return {"scenario": "none", **cut, "target_bpw": choice.bpw, **({"q_group_size": group} if group != 64 else {})}


def _command_line(s: Settings, choice: Choice, before: Shape) -> str:
    """The `distill` that makes this student."""
    parts = ["scripts/mis distill"]
    given = {"teacher": s.teacher, "data": s.data}
    for name, value in {**{k: v for k, v in given.items() if v}, **flags_of(choice, before)}.items():
        parts.append(f"--{name.replace('_', '-')} {shlex.quote(str(value))}")
    return " ".join(parts)


def report(
    s: Settings, c: Candidates, limits: Sequence[Limit], speeds: Mapping[str, Any],
    ranked: Sequence[Choice], records: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    """Print the table and the sentence; write table.md and return what goes into the JSON line."""
    run, before = c.run, shape_of(c.run.teacher.config)
    measured = run_folder.records(run.folder / candidates.CANDIDATES)
    names = [f"{shape_search.words(x.shape, before)}, {x.bpw:.2f} bits" for x in ranked]
    lines = [_command_line(s, x, before) for x in ranked]
    verdict = finalists.best_candidate(records)
    best = verdict.best if records else 0
    flags = " ".join(limit.flag for limit in limits)
    sentence = f"The best as pruned and rounded: {names[0]}: {lines[0]}"
    page = f"{len(measured)} students measured, {flags}\n\n{sentence}"
    if records:
        names, whole = names[: len(records)], {flag: sum_of(before, Timing(**t)) for flag, t in speeds.items()}
        sentence = finalists.advice(verdict, records, names, lines)
        head = f"{len(names)} finalists of {len(measured)} students measured, {flags}: {s.iters} steps each, "
        head += f"{len(c.judging.tokens)} windows of held-out text, ± 95 %; bits and KL are those of a byte of text"
        page = f"{head}\n\n{finalists.table(records, names, whole)}\n\n{sentence}"
    print(text.aligned(page))
    run.files.replace_text(run.folder / "table.md", page + "\n")
    return {
        "candidates": measured,
        "finalists": [finalists.means(r) for r in records],
        "clear": verdict.clear,
        "sentence": sentence,
        "best": None if best is None else flags_of(ranked[best], before),
        "command": None if best is None else lines[best],
    }


def sum_of(before: Shape, timed: Timing) -> float:
    """Seconds of the whole teacher."""
    return before.layers * timed.block_s + timed.rest_s


def run(settings: Settings) -> dict[str, Any]:
    """The command: limits, students within them, calibrate once, measure axes, rank, distil the best, judge."""
    s, folder = run_loop.resumed(settings, FREE, UNDER)
    s.check()
    teacher = run_loop.opened(s, s.teacher, "teacher", UNDER)
    limit = memory.budget(s.budget_bytes)
    sizes = sizes_of(s, teacher)
    limits, speeds = limits_of(s, teacher, folder, limit)
    bits = "bits" in s.axes
    within = list(shape_search.choices(teacher.config, sizes, limits, bits))
    if not within:
        shape_search.refuse(teacher.config, sizes, limits, bits)
    flags = " ".join(each.flag for each in limits)
    cli.say(f"students within {flags}: {len(within):,}; {min(s.evaluations, len(within))} are measured")
    most = max(within, key=lambda x: sum(limiting.weights_of(teacher.config, x.shape))).shape
    how = shape_search.rounding_of(Choice(most, shape_search.USUAL_BPW))
    probes = sum(len(shape_search.probed(sizes[axis])) for axis in shape_search.CUTS[:-1]) + len(sizes["vocab"]) - 1
    work, made = search_size.work(s, teacher, most, how, probes, limit)
    planned = [*work["rank"], *work["finalists"]]
    seconds = {name: sum(p.seconds(made.rates) for p in part) for name, part in work.items() if part}
    cli.say(f"{text.aligned(work_table(planned, made.rates))}\n{made.rates}")
    peak = max(p.peak_bytes for p in planned)
    result = {"teacher": str(teacher.path), "limits": [each.flag for each in limits], "students": len(within),
              "peak_bytes": peak, "budget_bytes": limit.limit_bytes}  # fmt: skip
    if s.dry_run:
        moved = {f"{n}_bytes": sum(getattr(p, f"{n}_bytes") for p in planned) for n in ("read", "written")}
        failed = not made.fits or peak > limit.limit_bytes
        return {**result, **moved, "seconds": round(sum(seconds.values())), "check_failed": failed}
    if not made.fits:
        raise MisError(phases.remedy(made))
    estimates.fit(limit, *planned)
    if folder is None:
        cli.say(progress.promise(sum(seconds.values())))
    return {**result, **_measure(s, folder, teacher, made, (within, sizes, limits, speeds), seconds, limit)}


def _measure(
    s: Settings, folder: Path | None, teacher: Checkpoint, made: phases.MemoryPlan, field: tuple[Any, ...],
    seconds: Mapping[str, float], limit: Budget,
) -> dict[str, Any]:  # fmt: skip
    """Open the run and measure. field: of `run`."""
    within, sizes, limits, speeds = field
    data, origin = run_loop.prepared(s, teacher)
    wired = made.peak_bytes if made.mode != "sharded" else 0
    opening = run_loop.open_run(s, folder, f"{UNDER.name}/{teacher.path.name}", origin, speeds, limit, wired)
    with progress.run("search", seconds), opening as place:
        ranking, judging = candidates.split(data.held_out, s.rank_windows, s.eval_windows)
        course = Run(**vars(place), recipe=s, teacher=teacher, data=data.train, plan=made)
        c = Candidates(course, data, ranking, judging, s)
        ranked, records = rank(s, c, within, sizes), list[dict[str, Any]]()
        if s.finalists:
            with progress.phase("finalists"):
                whole = {"decode": (s.max_kv_size, 0), "ttft": (0, s.prompt_tokens)}
                timed_at = {name: whole[name] for name in speeds}
                for choice in cli.counted("finalist", ranked[: s.finalists], min(s.finalists, len(ranked))):
                    cli.say(f"finalist {choice.name}")
                    records.append(finalists.final(c, choice, timed_at))
        result = report(s, c, limits, speeds, ranked, records)
        result |= {"run": str(course.folder), **course.account(limit.limit_bytes)}
        course.files.replace_text(course.folder / run_folder.RESULT, json.dumps(result, indent=2))
    return result


if __name__ == "__main__":
    cli.main(Settings, run)
