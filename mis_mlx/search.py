"""Find the smallest student for a loss, or the best within limits.

Layers, neurons, heads, vocabulary and bits are chosen together.
"""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from mis_mlx import cli
from mis_mlx.compute import precision
from mis_mlx.distillation import conversations, pipeline
from mis_mlx.evaluation import judging_cost
from mis_mlx.hardware import memory
from mis_mlx.hardware.thermal.run_monitor import ThermalFlags
from mis_mlx.models import families
from mis_mlx.models.config import Shape, shape_of
from mis_mlx.models.model_size import model_of
from mis_mlx.pruning import vocabulary
from mis_mlx.reporting import progress, text
from mis_mlx.runs import run_loop
from mis_mlx.settings.recipe import ITERS, DistillationConfig
from mis_mlx.size_search import (
    candidates,
    finalists,
    frontier,
    known_losses,
    ranking,
    search_plan,
    shape_search,
    size_request,
)
from mis_mlx.size_search import limits as limiting
from mis_mlx.size_search.limits import Limit, Timing
from mis_mlx.size_search.ranking import flags_of
from mis_mlx.size_search.shape_search import Choice
from mis_mlx.storage import run_folder
from mis_mlx.types import FILE_ONLY, MOST, Budget, Checkpoint, Count, MisError, Whole, Within

# Settings that may differ when a search is resumed: none of them changes what is measured.
FREE = frozenset(
    {"out", "resume", "dry_run", "config", "budget", "save_every", "governor", "thermal_replay"}
)
# Apart from distillations, so that --resume of one never finds the other.
UNDER = Path("runs") / "search"
Axis = Literal["layers", "ffn", "heads", "hidden", "vocab", "bits"]


@dataclass(frozen=True)
class Settings(
    cli.Resumable,
    precision.Computing,
    ThermalFlags,
    vocabulary.VocabularyConfig,
    DistillationConfig,
):
    """Give the allowed loss (--lose) to find the smallest student; give limits (one or more of
    --bytes, --memory, --params, --decode, --ttft) to find the one that loses least. Default:
    --params 0.667x.
    """

    lose: Annotated[float | None, Within(0.0, MOST)] = None
    """bits per byte that the student may lose, distilled and rounded: on the teacher's answers if
    it has a chat template, otherwise on text. Finds the fewest bytes that should stay within it
    """
    bytes: str | None = None
    """limit for the weights on disk, such as 50MB"""
    memory: str | None = None
    """limit for memory in use, such as 3GiB: weights, plus keys and values of --max-kv-size tokens
    """
    frontier: bool = False
    """plot loss against bytes: the expected loss of students, next to the teacher in 6, 4 and 3
    bits; --finalists students of the curve are actually distilled
    """
    against: tuple[str, ...] = ()
    """other models for that plot, as folders or hub ids: the teacher's next smaller sibling, or the
    teacher as quantized by mlx_lm.dwq or mlx_lm.dynamic_quant
    """
    params: str | None = None
    """limit for parameters: a share of the teacher's, such as 0.667x, or a number, such as 90M"""
    decode: str | None = None
    """decoding speed, such as 1.5x the teacher's on this machine with --max-kv-size tokens in the
    cache: estimated from two timings of the teacher; finalists are timed
    """
    ttft: str | None = None
    """speed to the first token after --prompt-tokens, such as 1.5x the teacher's; estimated in the
    same way
    """
    max_kv_size: Count = 2048
    """context tokens for --memory and --decode"""
    prompt_tokens: Count = 512
    """prompt tokens for --ttft"""
    axes: tuple[Axis, ...] = ("layers", "ffn", "heads", "vocab", "bits")
    """what may be cut: layers, ffn, heads, hidden, vocab, bits; bits need a limit in bytes"""
    teacher: str | None = None
    """folder, hub id (docs/families.md lists the families) or gemma-3-270m; default:
    SmolLM2-135M-Instruct
    """
    data: str | None = None
    """folder with train.jsonl (valid.jsonl, test.jsonl), or hub data set; default: built-in text"""
    conversations: Annotated[float | None, Within(0.0, 0.95), FILE_ONLY] = None
    """share of the training text in which the teacher answers our prompts, as in distill"""
    evaluations: Count = 10
    """students measured after pruning and rounding: those with the lowest loss as predicted from
    each axis alone
    """
    finalists: Whole = 3
    """best students, distilled for --iters steps and rounded; 0: recommend the best one without
    distilling
    """
    iters: Count = 20
    """optimizer steps per finalist; Minitron's rankings were stable after about 300, 20 give a
    first impression
    """
    student_iters: Annotated[Count | None, FILE_ONLY] = None
    """optimizer steps of the final student, on which its expected loss depends; default: 30"""
    rank_windows: Count = 6
    """held-out windows for ranking; a third as many of every other text"""
    eval_windows: Annotated[int, Within(2, MOST)] = 24
    """further held-out windows, to judge finalists; a third as many of every other text"""

    @property
    def mixed(self) -> bool:
        """Whether bits are chosen; else matrices are rounded to the usual ones."""
        free = self.lose is not None or self.frontier
        return "bits" in self.axes and (free or bool(self.bytes or self.memory))

    @property
    def reuses(self) -> bool:
        """Whether measurements are kept, and used again by another search."""
        return self.lose is not None or self.frontier

    @property
    def timed_at(self) -> dict[str, tuple[int, int]]:
        """(tokens in the KV cache, tokens of the prompt) of every speed asked for, by its flag."""
        tokens = {"decode": (self.max_kv_size, 0), "ttft": (0, self.prompt_tokens)}
        return {flag: counts for flag, counts in tokens.items() if getattr(self, flag)}


@dataclass(frozen=True)
class Scope:
    """The students of a search. limits: what they may cost. speeds: the teacher's, by flag."""

    sizes: shape_search.Sizes
    limits: list[Limit]
    speeds: dict[str, Timing]
    within: list[Choice]
    flags: list[str]


def scope_of(s: Settings, teacher: Checkpoint, folder: Path | None, budget: Budget) -> Scope:
    """The students that the settings ask for. folder: of a run that goes on."""
    sizes = tried_sizes(s, teacher)
    limits, speeds = limits_of(s, teacher, folder, budget)
    flags = [limit.flag for limit in limits]
    if s.lose is not None:
        flags.insert(0, f"--lose {s.lose:g}")
    if s.frontier:
        flags.insert(0, "--frontier")
    within = _within(s, teacher, sizes, limits)
    measured = min(s.evaluations, len(within))
    cli.say(f"students within {' '.join(flags)}: {len(within):,}; {measured} are measured")
    return Scope(
        sizes=sizes,
        limits=limits,
        speeds=speeds,
        within=within,
        flags=flags,
    )


def limits_of(
    s: Settings, teacher: Checkpoint, folder: Path | None, budget: Budget
) -> tuple[list[Limit], dict[str, Timing]]:
    """(what the student may cost; the teacher's speed by flag).

    The speed is timed now, or read where it was timed when the run in `folder` began.
    """
    config = teacher.config
    limits = []
    if s.bytes:
        limits.append(limiting.bytes_limit(config, s.bytes))
    if s.memory:
        limits.append(limiting.memory_limit(config, s.memory, s.max_kv_size))
    if s.params or not (limits or s.timed_at or s.lose is not None or s.frontier):
        limits.append(limiting.params_limit(config, s.params or "0.667x"))
    speeds = _speeds(s, teacher, folder, budget) if s.timed_at else {}
    for flag, timing in speeds.items():
        asked = getattr(s, flag)
        limits.append(limiting.time_limit(config, f"--{flag}", asked, timing))
    return limits, speeds


def _speeds(
    s: Settings, teacher: Checkpoint, folder: Path | None, budget: Budget
) -> dict[str, Timing]:
    """The teacher's speed by flag."""
    if folder:
        stored = run_folder.stored_settings(folder, run_folder.PLAN)
        return {flag: Timing(**timing) for flag, timing in stored.items()}
    family = families.family(teacher.config)
    if family.per_layer:
        flags = " and ".join(f"--{flag}" for flag in s.timed_at)
        raise MisError(
            f"{flags} cannot be estimated for a {family.name}, whose blocks are not alike: limit "
            f"--bytes, --memory or --params"
        )
    for flag in s.timed_at:
        limiting.speed(f"--{flag}", getattr(s, flag))  # refuses before the timing, not after
    need = judging_cost.timed_bytes(model_of(teacher).params)
    budget.need(need, "timing the teacher, whole in memory,", "give limits of size alone")
    cli.say("timing the teacher, whole and with half of its blocks")
    speeds = {}
    with memory.limited(budget):
        for flag, (cached, prompt) in s.timed_at.items():
            speeds[flag] = finalists.timed_token(teacher, cached, prompt)
    return speeds


def tried_sizes(s: Settings, teacher: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Sizes of every axis that are tried. Axes that cannot be cut are said."""
    config = teacher.config
    if families.family(config).experts:
        raise MisError(
            "search supports dense models only, and --experts of prune and distill cuts a mixture "
            "of experts"
        )
    if s.mixed and not shape_search.group_of(shape_of(config)):
        why = (
            "the rows of this teacher's matrices are not divisible by 32, so the cost of bits "
            "cannot be measured"
        )
        raise MisError(f"{why}: leave bits out of `search --axes`, or limit --params")
    rows = candidates.vocabularies(teacher) if "vocab" in s.axes else []
    sizes = shape_search.axis_sizes(config, s.axes, rows)
    if s.vocab:
        sizes["vocab"] = (vocabulary.rows_left(teacher, s),)
    stuck = []
    for axis, values in sizes.items():
        if axis in s.axes and len(values) == 1:
            stuck.append(f"{axis} {values[0]:,}")
    # With --vocab the vocabulary has the one size that was asked for.
    all_rows = shape_of(config).vocab
    asked_vocab = s.vocab and sizes["vocab"] != (all_rows,)
    if stuck and not (asked_vocab and len(stuck) == 1):
        cli.say(f"this teacher cannot be cut along every axis: {', '.join(stuck)} stay unchanged")
    return sizes


def _within(
    s: Settings, teacher: Checkpoint, sizes: shape_search.Sizes, limits: list[Limit]
) -> list[Choice]:
    """The students that come into question.

    With --lose and --frontier these are all shapes, whose bits are chosen later.
    """
    if s.lose is None and not s.frontier:
        return shape_search.choices(teacher.config, sizes, limits, "bits" in s.axes)
    shapes = shape_search.shapes(teacher.config, sizes)
    bpw = shape_search.USUAL_BPW
    return [Choice(shape, bpw) for shape in shapes if shape_search.group_of(shape)]


def drawn(s: Settings, c: candidates.Candidates, scope: Scope) -> dict[str, Any]:
    """Print the table of --frontier, write its page, and return what goes into the JSON line."""
    with progress.phase("rank"):
        losses = c.losses(scope.sizes)
        shapes = [choice.shape for choice in scope.within]
        points, chosen = frontier.expected_curve(c, losses, shapes, scope.limits)
        if not points:
            raise MisError("no student of this teacher is within the limits: ask for a smaller cut")
        measured = [*frontier.converted_teachers(c), *frontier.other_models(c, s.against)]
    # Evenly spread students of the curve.
    count = min(s.finalists, len(chosen))
    spread = np.linspace(0, len(chosen) - 1, count)
    numbers = np.unique(spread.round().astype(int))
    records = _distilled(c, [chosen[number] for number in numbers])
    names = [points[number].name for number in numbers]
    every_point = [*points, *measured, *frontier.distilled(records, names)]
    on = "text" if c.answers is None else "the teacher's answers"
    table = frontier.write_page(
        c.run.folder,
        c.teacher.path.name,
        on,
        every_point,
        files=c.run.files,
    )
    print(text.aligned(table))
    cli.say(f"page: {c.run.folder / frontier.NAME}.html")
    return {"loss_of": on, "points": [asdict(point) for point in every_point]}


def _distilled(c: candidates.Candidates, choices: Sequence[Choice]) -> list[dict[str, Any]]:
    """The records of these students, trained and rounded one after the other."""
    records = list[dict[str, Any]]()
    if choices:
        with progress.phase("finalists"):
            for choice in cli.show_progress("finalist", choices, len(choices)):
                cli.say(f"finalist {choice.name}")
                records.append(finalists.measured_finalist(c, choice))
    return records


def report(
    c: candidates.Candidates,
    scope: Scope,
    ranked: Sequence[Choice],
    records: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Print the table and the sentence; write table.md and return what goes into the JSON line."""
    run = c.run
    before = shape_of(c.teacher.config)
    measured = run_folder.records(run.folder / candidates.CANDIDATES)
    names = ranking.named(ranked, before)
    lines = [_command(c.settings, choice, before) for choice in ranked]
    verdict = finalists.best_candidate(records)
    best = verdict.best if records else 0
    told = f"{len(measured)} students measured, {' '.join(scope.flags)}"
    if records:
        teacher_seconds = {}
        for flag, timing in scope.speeds.items():
            teacher_seconds[flag] = timing.seconds(before.layers)
        names = names[: len(records)]
        sentence = finalists.advice(verdict, records, names, lines)
        head = (
            f"{len(names)} finalists of {told}: {c.settings.iters} steps each, "
            f"{len(c.judging.tokens)} windows of held-out text, ± 95 %; bits and KL are per byte "
            f"of text"
        )
        table = finalists.table(records, names, teacher_seconds)
        page = f"{head}\n\n{table}\n\n{sentence}"
    else:
        sentence = f"The best after pruning and rounding: {names[0]}: {lines[0]}"
        page = f"{told}\n\n{sentence}"
    print(text.aligned(page))
    run.files.replace_text(run.folder / "table.md", page + "\n")
    return {
        "candidates": measured,
        "finalists": [finalists.means(record) for record in records],
        "clear": verdict.clear,
        "sentence": sentence,
        "best": None if best is None else flags_of(ranked[best], before),
        "command": None if best is None else lines[best],
    }


def _command(s: Settings, choice: Choice, before: Shape) -> str:
    """The `distill` that makes a student."""
    words = ["scripts/mis distill"]
    given = {"teacher": s.teacher, "data": s.data, **flags_of(choice, before)}
    for name, value in given.items():
        if value is not None:
            flag = name.replace("_", "-")
            words.append(f"--{flag} {shlex.quote(str(value))}")
    return " ".join(words)


def _identity_of_built_in(s: Settings, teacher: Checkpoint) -> dict[str, Any]:
    """The identity of measurements on the built-in text; {}: another text, which is not read yet.

    Without conversations losses are told on text: the built-in text is then another one.
    """
    if s.data is not None or s.conversations == 0:
        return {}
    return known_losses.identity(teacher, "built-in", s)


def _found(s: Settings, c: candidates.Candidates, scope: Scope) -> dict[str, Any]:
    """Measure, distil the finalists, print the result, and return what goes into the JSON line."""
    if s.frontier:
        return drawn(s, c, scope)
    if s.lose is None:
        ranked, expected = ranking.rank(c, scope.within, scope.sizes)
    else:
        ranked, expected = ranking.smallest(c, scope.within, scope.sizes, scope.limits)
    records = _distilled(c, ranked[: s.finalists])
    best = ranked[0]
    return {
        "expected_bits": round(expected[best] / math.log(2), 4),
        "expected_bytes": round(limiting.file_bytes(c.teacher.config, *best)),
        **report(c, scope, ranked, records),
    }


def run(settings: Settings) -> dict[str, Any]:
    """The command: limits, students within them, calibrate once, measure axes, rank, distil the
    best, judge.
    """
    s, folder = run_loop.resumed(settings, FREE, UNDER)
    s.check()
    teacher = run_loop.open_model(s, s.teacher, "teacher", UNDER)
    why = size_request.unsearchable(teacher.config)
    if why:
        raise MisError(f"{why}: {size_request.GIVE_SIZES}")
    limit = memory.budget(s.budget_bytes)
    scope = scope_of(s, teacher, folder, limit)
    known = _identity_of_built_in(s, teacher) if s.reuses else {}
    plan, seconds, outcome = search_plan.plan_search(
        s, teacher, scope.within, scope.sizes, limit=limit, known=known
    )
    result = {
        "teacher": str(teacher.path),
        "limits": scope.flags,
        "students": len(scope.within),
    }
    visited = (s.student_iters or ITERS) * s.step_tokens
    wanted = conversations.wanted_of(s.data, s.conversations, visited=visited, seed=s.seed)
    source = conversations.source(teacher, wanted, limit, dry_run=s.dry_run)
    if s.dry_run:
        return {**result, **outcome}
    if folder is None:
        planned_s = sum(seconds.values())
        cli.say(progress.promise(planned_s))
    data, origin = run_loop.prepare_text(teacher, source, s.max_seq_length)
    opening = run_loop.open_run(
        asdict(s),
        folder,
        f"{UNDER.name}/{teacher.path.name}",
        origin,
        out=s.out,
        thermal=s,
        strategy={flag: timing._asdict() for flag, timing in scope.speeds.items()},
        limit=limit,
        wired=plan.peak_bytes if plan.mode != "sharded" else 0,
    )
    with progress.run("search", seconds), opening as place:
        about = known or known_losses.identity(teacher, origin["data"], s)
        if s.reuses:
            _lay_out(place, about)
        ranks, judges = candidates.split_held_out(
            data.held_out, s.rank_windows, s.eval_windows, data.choosing
        )
        course = pipeline.Run(**vars(place), recipe=s, teacher=teacher, data=data.train, plan=plan)
        c = candidates.Candidates(course, data, ranks, judges, settings=s, source=source)
        result |= _found(s, c, scope)
        if s.reuses:
            known_losses.keep_logs(place.folder, about)
        result = course.finish({**result, "run": str(course.folder)})
        # Teachers of fewer rows: nobody needs them once a search is done.
        for rows in course.folder.glob(f"{vocabulary.FOLDER}-*"):
            course.files.remove_tree(rows)
    return result


def _lay_out(place: run_loop.OpenRun, about: Mapping[str, Any]) -> None:
    """Begin with the measurements of earlier searches. about: their identity."""
    lines = known_losses.copy_into_run(place.folder, about, place.files)
    if lines:
        cli.say(
            f"{lines} measurements of this teacher are reused from earlier runs or came with "
            f"the package"
        )


if __name__ == "__main__":
    cli.main(Settings, run)
