"""Search for the student that loses least within limits on bytes, memory and time: layers, neurons,
heads, vocabulary and bits chosen together.
"""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from mis_mlx import cli
from mis_mlx.distillation import (
    candidates,
    conversations,
    finalists,
    frontier,
    known_losses,
    pipeline,
    run_loop,
)
from mis_mlx.hardware import memory
from mis_mlx.hardware.thermal.run_monitor import ThermalFlags
from mis_mlx.models import arch, families, policy
from mis_mlx.models.config import Shape, shape_of
from mis_mlx.planner import compression_size, estimates, phases
from mis_mlx.planner.recipe import ITERS, DistillationConfig, spec_of
from mis_mlx.pruning import limits as limiting
from mis_mlx.pruning import shape_search, vocabulary
from mis_mlx.pruning.limits import Limit, Timing
from mis_mlx.pruning.shape_search import Choice
from mis_mlx.reporting import figures, progress, text
from mis_mlx.storage import run_folder
from mis_mlx.types import FILE_ONLY, MOST, Budget, Checkpoint, Count, MisError, Whole, Within

# times the sum of what axes cost alone: between these they are taken to cost together
TOGETHER = 0.33, 3.0
CLOSE = 1.03  # times --lose that a student may be expected to lose
NEAR = 0.03  # of --lose: a student so near to it is not looked beyond
# Settings that may differ when a search is resumed: none of them changes what is measured.
FREE = frozenset(
    {"out", "resume", "dry_run", "config", "budget", "save_every", "governor", "thermal_replay"}
)
# apart from distillations, so that --resume of one never finds the other
UNDER = Path("runs") / "search"
GIVE_SIZES = "give sizes, such as --vocab 0.5x, and --target-bpw"  # where there is no search
Axis = Literal["layers", "ffn", "heads", "hidden", "vocab", "bits"]


@dataclass(frozen=True)
class Settings(
    cli.Resumable, policy.Computing, ThermalFlags, vocabulary.VocabularyConfig, DistillationConfig
):
    """What the student may lose (--lose), then it is the smallest that does; and what it may cost
    at the most: one or more of --bytes, --memory, --params, --decode, --ttft. Default: --params
    0.667x.
    """

    lose: Annotated[float | None, Within(0.0, MOST)] = None
    """bits a byte that the student, distilled and rounded, may be above the teacher: on the
    teacher's answers, where it has a chat template, else on text. The fewest bytes that should keep
    to it are looked for
    """
    bytes: str | None = None
    """weights on disk, such as 50MB"""
    memory: str | None = None
    """memory in use, such as 3GiB: weights, and keys and values of --max-kv-size tokens"""
    frontier: bool = False
    """draw bytes against loss: what students should lose, and beside them the teacher in 6, 4 and 3
    bits; --finalists of the curve are distilled for real
    """
    against: tuple[str, ...] = ()
    """other models for that picture, folders or hub ids: the teacher's next smaller sibling, or it
    as mlx_lm.dwq or mlx_lm.dynamic_quant wrote it
    """
    params: str | None = None
    """parameters: a share of the teacher's, such as 0.667x, or a number, such as 90M"""
    decode: str | None = None
    """decoding speed, such as 1.5x the teacher's here with --max-kv-size tokens in its cache:
    estimated from two timings of the teacher; finalists are timed
    """
    ttft: str | None = None
    """time to the first token of a prompt of --prompt-tokens, such as 1.5x the teacher's speed;
    estimated likewise
    """
    max_kv_size: Count = 2048
    """tokens of context in --memory and --decode"""
    prompt_tokens: Count = 512
    """tokens of the prompt in --ttft"""
    axes: tuple[Axis, ...] = ("layers", "ffn", "heads", "vocab", "bits")
    """what may be cut: layers, ffn, heads, hidden, vocab, bits; bits only where a limit is one of
    bytes
    """
    teacher: str | None = None
    """folder, hub id (docs/families.md: of which families) or gemma-3-270m; default:
    SmolLM2-135M-Instruct
    """
    data: str | None = None
    """folder with train.jsonl (valid.jsonl, test.jsonl), or hub data set; default: built-in text"""
    conversations: Annotated[float | None, Within(0.0, 0.95), FILE_ONLY] = None
    """share of the training text in which the teacher answers our prompts, as in distill"""
    evaluations: Count = 10
    """students measured as pruned and rounded: those that should lose least by what each axis costs
    alone
    """
    finalists: Whole = 3
    """the best of them, distilled for --iters steps and rounded; 0: the best as pruned is
    recommended
    """
    iters: Count = 20
    """optimizer steps of each finalist; Minitron's rankings were stable after about 300, 20 are a
    first look
    """
    student_iters: Annotated[Count | None, FILE_ONLY] = None
    """optimizer steps that the student gets in the end, on which depends what it should lose;
    default: 30
    """
    rank_windows: Count = 6
    """held-out windows that rank; a third as many of every other text"""
    eval_windows: Annotated[int, Within(2, MOST)] = 24
    """other held-out windows, that judge finalists; a third as many of every other text"""

    @property
    def mixed(self) -> bool:
        """Whether bits are chosen; else matrices are rounded to the usual ones."""
        free = self.lose is not None or self.frontier
        return "bits" in self.axes and (free or bool(self.bytes or self.memory))

    @property
    def timed_at(self) -> dict[str, tuple[int, int]]:
        """(tokens in the KV cache, tokens of the prompt) of every speed that is asked for, by its
        flag.
        """
        at = {"decode": (self.max_kv_size, 0), "ttft": (0, self.prompt_tokens)}
        return {flag: tokens for flag, tokens in at.items() if getattr(self, flag)}


def limits_of(
    s: Settings, teacher: Checkpoint, folder: Path | None, budget: Budget
) -> tuple[list[Limit], dict[str, Timing]]:
    """What the student may cost; and the teacher's speed, timed now or when the run in `folder`
    began, by flag.
    """
    config = teacher.config
    limits = list[Limit]()
    if s.bytes:
        limits.append(limiting.bytes_limit(config, s.bytes))
    if s.memory:
        limits.append(limiting.memory_limit(config, s.memory, s.max_kv_size))
    if s.params or not (limits or s.timed_at or s.lose is not None or s.frontier):
        limits.append(limiting.params_limit(config, s.params or "0.667x"))
    speeds = _speeds(s, teacher, folder, budget) if s.timed_at else {}
    return limits + [
        limiting.time_limit(config, f"--{x}", getattr(s, x), timed) for x, timed in speeds.items()
    ], speeds


def _speeds(
    s: Settings, teacher: Checkpoint, folder: Path | None, budget: Budget
) -> dict[str, Timing]:
    if folder:
        return {
            flag: Timing(**timed)
            for flag, timed in run_folder.stored_settings(folder, run_folder.PLAN).items()
        }
    for flag in s.timed_at:
        limiting.speed(f"--{flag}", getattr(s, flag))
    need = phases.timed_bytes(estimates.model_of(teacher).params)
    budget.need(need, "timing the teacher, whole in memory,", "give limits of size alone")
    cli.say("timing the teacher, whole and with half of its blocks")
    with memory.limited(budget):
        return {flag: finalists.timed(teacher.path, *at) for flag, at in s.timed_at.items()}


def unknown(config: Mapping[str, Any]) -> str:
    """What a search does not know of a dense model of this config, and so refuses it; empty where
    it knows all.
    """
    of = families.family(config)
    return f"a search does not know what the tables of a {of.name} weigh" if of.per_layer else ""


def tried_sizes(s: Settings, teacher: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Sizes of every axis that are tried, and what cannot be cut said."""
    if families.family(teacher.config).experts:
        raise MisError(
            "a mixture of experts is cut by --experts of prune and distill: search chooses of "
            "dense models"
        )
    config, whole = teacher.config, shape_of(teacher.config).vocab
    if s.mixed and not shape_search.group_of(shape_of(config)):
        why = (
            "32 does not divide the rows of this teacher's matrices, so what bits cost cannot "
            "be "
            "measured"
        )
        raise MisError(f"{why}: leave bits out of the --axes of search, or limit --params")
    sizes = shape_search.axis_sizes(
        config, s.axes, candidates.vocabularies(teacher) if "vocab" in s.axes else []
    )
    if s.vocab:
        sizes["vocab"] = (vocabulary.rows_left(teacher, s),)
    stuck = [
        f"{axis} {values[0]:,}"
        for axis, values in sizes.items()
        if axis in s.axes and len(values) == 1
    ]
    if stuck and not (s.vocab and len(stuck) == 1 and sizes["vocab"] != (whole,)):
        cli.say(f"this teacher cannot be cut along every axis: {', '.join(stuck)} stay as they are")
    return sizes


def rank(
    s: Settings,
    c: candidates.Candidates,
    within: Sequence[Choice],
    sizes: shape_search.Sizes,
) -> tuple[list[Choice], dict[Choice, float]]:
    """(the students that were measured, the best first; nats a byte that each of them should lose).

    Those whose loss is no number are left out."""
    with progress.phase("rank"):
        losses = c.losses(sizes)
        likely = shape_search.best(within, sizes, losses, s.evaluations)
        scores = dict[Choice, float]()
        with progress.bar("rank", len(likely)) as show:
            for number, choice in enumerate(likely, 1):
                scores[choice] = c.score(choice, losses)
                show(number, f"{choice.name}  {scores[choice] / math.log(2):.3f} bits a byte")
    ranked = sorted(
        (x for x, value in scores.items() if math.isfinite(value)), key=lambda x: scores[x]
    )
    if not ranked:
        raise MisError(
            f"none of {len(scores)} candidates has a loss that is a number: ask for less of a cut"
        )
    return ranked, scores


def _within(
    s: Settings, teacher: Checkpoint, sizes: shape_search.Sizes, limits: list[Limit]
) -> list[Choice]:
    """The students that come into question. With --lose these are all shapes, whose bits are chosen
    later.
    """
    if s.lose is None and not s.frontier:
        return shape_search.choices(teacher.config, sizes, limits, "bits" in s.axes)
    shapes = shape_search.shapes(teacher.config, sizes)
    return [
        Choice(shape, shape_search.USUAL_BPW) for shape in shapes if shape_search.group_of(shape)
    ]


def smallest(
    s: Settings,
    c: candidates.Candidates,
    within: Sequence[Choice],
    sizes: shape_search.Sizes,
    limits: Sequence[Limit],
) -> tuple[list[Choice], dict[Choice, float]]:
    """(students that should lose --lose or less, the smallest first; nats a byte that each of them
    should lose).

    What axes cost together is not what they cost alone. So the smallest student by the sum is
    measured, and the sums are corrected by what was found, until the smallest one by corrected sums
    is one that was measured.
    """
    assert s.lose is not None
    lose = s.lose * math.log(2)
    shapes = [choice.shape for choice in within]
    config = c.run.teacher.config
    scores = dict[Choice, float]()
    with progress.phase("rank"):
        losses = c.losses(sizes)
        together = 1.0
        with progress.bar("rank", s.evaluations) as show:
            for number in range(1, s.evaluations + 1):
                fitting = shape_search.smallest(config, shapes, losses, lose / together, limits)
                if not fitting and not scores:
                    raise MisError(_nearest(s, config, shapes, losses, limits))
                if not fitting or fitting[0] in scores:
                    break
                choice = fitting[0]
                scores[choice] = c.score(choice, losses)
                show(number, f"{choice.name}  {scores[choice] / math.log(2):.3f} bits a byte")
                if abs(scores[choice] - lose) <= NEAR * lose:
                    break
                if math.isfinite(scores[choice]):
                    together = float(np.clip(scores[choice] / losses.expected(choice), *TOGETHER))
                else:
                    together = TOGETHER[1]
    ranked = sorted(
        scores,
        key=lambda choice: (scores[choice] > CLOSE * lose, limiting.file_bytes(config, *choice)),
    )
    if scores[ranked[0]] > CLOSE * lose:  # none keeps to it: the nearest first
        ranked.sort(key=lambda choice: scores[choice])
    return ranked, scores


def _nearest(
    s: Settings,
    config: Mapping[str, Any],
    shapes: Sequence[Shape],
    losses: shape_search.Losses,
    limits: Sequence[Limit],
) -> str:
    """The sentence on a --lose that no student keeps to: what the best one within the other limits
    should lose.
    """
    beside = "".join(f" and {limit.flag}" for limit in limits)
    least = 0.002  # bits a byte
    while not (found := shape_search.smallest(config, shapes, losses, least * math.log(2), limits)):
        if least > candidates.WORST:
            return (
                f"--lose {s.lose:g}{beside}: no student within reach keeps to it: ask for less "
                f"of a cut"
            )
        least *= 1.1
    nbytes = limiting.file_bytes(config, *found[0])
    what = f"the nearest student should lose {least:.2g} bits a byte, in {nbytes / 1e6:.4g} MB"
    remedy = f"give --lose {_rounded_up(least)}" + (
        f", or leave out {limits[0].flag}" if limits else ""
    )
    return f"--lose {s.lose:g}{beside} cannot be kept: {what}: {remedy}"


def drawn(
    s: Settings,
    c: candidates.Candidates,
    within: Sequence[Choice],
    sizes: shape_search.Sizes,
    limits: Sequence[Limit],
) -> dict[str, Any]:
    """Print the table of --frontier, write its page, and return what goes into the JSON line."""
    with progress.phase("rank"):
        losses = c.losses(sizes)
        points, chosen = frontier.curve(c, losses, [choice.shape for choice in within], limits)
        if not points:
            raise MisError("no student of this teacher is within the limits: ask for less of a cut")
        measured = [*frontier.converted(c), *frontier.others(c, s.against)]
    spread = np.linspace(0, len(chosen) - 1, min(s.finalists, len(chosen))).round().astype(int)
    numbers = np.unique(spread)
    records = _distilled(c, [chosen[number] for number in numbers])
    names = [points[number].name for number in numbers]
    every_point = [*points, *measured, *frontier.distilled(records, names)]
    on = "text" if c.answers is None else "the teacher's answers"
    table = frontier.page(c.run.folder, c.run.teacher.path.name, on, every_point, c.run.files)
    print(text.aligned(table))
    cli.say(f"page: {c.run.folder / frontier.NAME}.html")
    return {"loss_of": on, "points": [asdict(point) for point in every_point]}


def _distilled(c: candidates.Candidates, choices: Sequence[Choice]) -> list[dict[str, Any]]:
    """The records of these students, trained and rounded one after the other; none where there are
    none.
    """
    records = list[dict[str, Any]]()
    if choices:
        with progress.phase("finalists"):
            for choice in cli.counted("finalist", choices, len(choices)):
                cli.say(f"finalist {choice.name}")
                records.append(finalists.final(c, choice))
    return records


def _rounded_up(value: float) -> str:
    """To two digits that are not zero."""
    scale = 10 ** (1 - math.floor(math.log10(value)))
    return f"{math.ceil(value * scale) / scale:g}"


def flags_of(choice: Choice, before: Shape) -> dict[str, Any]:
    """Settings of `distill` that make this student."""
    group = shape_search.group_of(choice.shape)
    sizes = {
        a: n for a in shape_search.CUTS if (n := getattr(choice.shape, a)) != getattr(before, a)
    }
    cut = {a: str(n) if a == "vocab" else n for a, n in sizes.items()}
    return {
        "scenario": "none",
        **cut,
        "target_bpw": choice.bpw,
        **({"q_group_size": group} if group != 64 else {}),
    }


def report(
    c: candidates.Candidates,
    flags: Sequence[str],
    speeds: Mapping[str, Timing],
    ranked: Sequence[Choice],
    records: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Print the table and the sentence; write table.md and return what goes into the JSON line."""
    run, s, before = c.run, c.settings, shape_of(c.run.teacher.config)
    measured = run_folder.records(run.folder / candidates.CANDIDATES)
    names = [f"{shape_search.words(x.shape, before)}, {x.bpw:.2f} bits" for x in ranked]
    lines = list[str]()  # each a `distill` that makes the student
    for given in ({"teacher": s.teacher, "data": s.data, **flags_of(x, before)} for x in ranked):
        set_to = [
            f"--{k.replace('_', '-')} {shlex.quote(str(v))}"
            for k, v in given.items()
            if v is not None
        ]
        lines.append(" ".join(["scripts/mis distill", *set_to]))
    verdict = finalists.best_candidate(records)
    best = verdict.best if records else 0
    told = f"{len(measured)} students measured, {' '.join(flags)}"
    sentence = f"The best as pruned and rounded: {names[0]}: {lines[0]}"
    page = f"{told}\n\n{sentence}"
    if records:
        whole = {flag: timed.seconds(before.layers) for flag, timed in speeds.items()}
        names = names[: len(records)]
        sentence = finalists.advice(verdict, records, names, lines)
        head = (
            f"{len(names)} finalists of {told}: {s.iters} steps each, {len(c.judging.tokens)} "
            f"windows of held-out "
        )
        head += "text, ± 95 %; bits and KL are those of a byte of text"
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


def planned(
    s: Settings,
    teacher: Checkpoint,
    within: Sequence[Choice],
    sizes: shape_search.Sizes,
    limit: Budget,
    known: Mapping[str, Any],
) -> tuple[phases.MemoryPlan, dict[str, float], dict[str, Any]]:
    """(plan of the largest finalist; seconds by phase of the run; what a --dry-run says), told in a
    line a stage.

    known: the identity of measurements that are perhaps kept; {}: none are.
    """
    most = max(within, key=lambda x: sum(limiting.weights_of(teacher.config, x.shape))).shape
    how = shape_search.rounding_of(Choice(most, shape_search.USUAL_BPW))
    probes = sum(len(shape_search.probed(sizes[axis])) for axis in shape_search.CUTS[:-1])
    fewer = sum(rows != shape_of(teacher.config).vocab for rows in sizes["vocab"])
    counted = s
    if known and probes + fewer <= len(known_losses.known(known, candidates.PROBES)):
        probes = fewer = 0
        counted = replace(s, evaluations=1)
    whole, small = (
        estimates.model_of(m) for m in (teacher, arch.student_config(teacher.config, most))
    )
    made = phases.make(spec_of(whole, small, s, how), limit.limit_bytes, estimates.machine_rates())
    work = compression_size.search(
        counted, made.job, made.phases, probes + fewer, fewer > 0, limit.limit_bytes
    )
    stages = [stage for part in work.values() for stage in part]
    seconds = {
        name: sum(stage.seconds(made.rates) for stage in part)
        for name, part in work.items()
        if part
    }
    outcome = estimates.told(stages, limit.limit_bytes, made.rates)
    cli.say(str(made.rates))
    if not s.dry_run:
        if not made.fits:
            raise MisError(phases.remedy(made))
        peak, worst = max((p.peak_bytes, p.name) for p in stages)  # with what the process takes
        remedy = (
            f"give --budget {estimates.flag(peak)} or more, or lower --max-seq-length or "
            f"--batch-size"
        )
        limit.need(peak, worst, remedy)
    return made, seconds, outcome | {"check_failed": outcome["check_failed"] or not made.fits}


def _identity_of_built_in(s: Settings, teacher: Checkpoint) -> dict[str, Any]:
    """The identity of what was measured on the built-in text; {} of any other text, which has to be
    read first.

    Without conversations losses are told on text: the built-in text is then another one.
    """
    if s.data is not None or s.conversations == 0:
        return {}
    return known_losses.identity(teacher, "built-in", s)


def _found(
    s: Settings,
    c: candidates.Candidates,
    within: Sequence[Choice],
    sizes: shape_search.Sizes,
    limits: Sequence[Limit],
    speeds: Mapping[str, Timing],
    flags: Sequence[str],
) -> dict[str, Any]:
    """Measure, distil the finalists, print what was found, and return what goes into the JSON
    line.
    """
    if s.frontier:
        return drawn(s, c, within, sizes, limits)
    if s.lose is None:
        ranked, expected = rank(s, c, within, sizes)
    else:
        ranked, expected = smallest(s, c, within, sizes, limits)
    records = _distilled(c, ranked[: s.finalists])
    return {
        "expected_bits": round(expected[ranked[0]] / math.log(2), 4),
        "expected_bytes": round(limiting.file_bytes(c.run.teacher.config, *ranked[0])),
        **report(c, flags, speeds, ranked, records),
    }


def run(settings: Settings) -> dict[str, Any]:
    """The command: limits, students within them, calibrate once, measure axes, rank, distil the
    best, judge.
    """
    s, folder = run_loop.resumed(settings, FREE, UNDER)
    s.check()
    if s.frontier:
        figures.need()
    teacher = run_loop.opened(s, s.teacher, "teacher", UNDER)
    if why := unknown(teacher.config):
        raise MisError(f"{why}: {GIVE_SIZES}")
    limit = memory.budget(s.budget_bytes)
    sizes = tried_sizes(s, teacher)
    limits, speeds = limits_of(s, teacher, folder, limit)
    within = _within(s, teacher, sizes, limits)
    flags = [each.flag for each in limits]
    if s.lose is not None:
        flags.insert(0, f"--lose {s.lose:g}")
    if s.frontier:
        flags.insert(0, "--frontier")
    cli.say(
        f"students within {' '.join(flags)}: {len(within):,}; {min(s.evaluations, len(within))} "
        f"are measured"
    )
    again = s.lose is not None or s.frontier  # whose measurements are kept, and used again
    known = _identity_of_built_in(s, teacher) if again else {}
    made, seconds, outcome = planned(s, teacher, within, sizes, limit, known)
    result = {"teacher": str(teacher.path), "limits": flags, "students": len(within)}
    wanted = conversations.wanted_of(s, s.data, s.student_iters or ITERS)
    source = conversations.source(teacher, wanted, limit, dry_run=s.dry_run)
    if s.dry_run:
        return {**result, **outcome}
    if folder is None:
        cli.say(progress.promise(sum(seconds.values())))
    data, origin = run_loop.prepared(s, teacher, source)
    wired = made.peak_bytes if made.mode != "sharded" else 0
    way = {flag: timed._asdict() for flag, timed in speeds.items()}
    opening = run_loop.open_run(
        s, folder, f"{UNDER.name}/{teacher.path.name}", origin, way, limit, wired
    )
    with progress.run("search", seconds), opening as place:
        about = known or known_losses.identity(teacher, origin["data"], s)
        lines = known_losses.lay_out(place.folder, about, place.files) if again else 0
        if lines:
            cli.say(
                f"{lines} measurements of this teacher are known from before, or came with the "
                f"package"
            )
        ranking, judging = candidates.split(data.held_out, s.rank_windows, s.eval_windows)
        course = pipeline.Run(**vars(place), recipe=s, teacher=teacher, data=data.train, plan=made)
        c = candidates.Candidates(course, data, ranking, judging, s, source)
        result |= _found(s, c, within, sizes, limits, speeds, flags)
        if again:
            known_losses.keep(place.folder, about)
        result = course.done({**result, "run": str(course.folder)})
        # nobody needs them once a search is done
        for rows in course.folder.glob(f"{vocabulary.FOLDER}-*"):
            course.files.remove_tree(rows)
    return result


if __name__ == "__main__":
    cli.main(Settings, run)
