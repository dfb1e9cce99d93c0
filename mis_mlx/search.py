"""Find the smallest student for a loss, or the best within limits.

Layers, neurons, heads, vocabulary and bits are chosen together.
"""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from mis_mlx import cli
from mis_mlx.compute import precision
from mis_mlx.data import preparation
from mis_mlx.distillation import conversations, pipeline, plan_report, strategies
from mis_mlx.hardware import memory
from mis_mlx.hardware.thermal.run_monitor import ThermalFlags
from mis_mlx.judge import answers
from mis_mlx.models.architectures.shape import Shape
from mis_mlx.models.architectures.sizes import shape_of
from mis_mlx.pruning import vocabulary
from mis_mlx.reporting import progress, text
from mis_mlx.runs import run_loop
from mis_mlx.settings.recipe import ITERS, DistillationConfig
from mis_mlx.size_search import (
    candidates,
    finalists,
    known_losses,
    ranking,
    search_plan,
    search_scope,
    size_request,
)
from mis_mlx.size_search import limits as limiting
from mis_mlx.size_search.ranking import flags_of
from mis_mlx.size_search.shape_search import Choice
from mis_mlx.storage import run_folder
from mis_mlx.storage.files import json_sha256
from mis_mlx.types import FILE_ONLY, MOST, Budget, Checkpoint, Count, MisError, Whole, Within

# Settings that may differ when a search is resumed: none of them changes what is measured.
FREE = run_loop.FREE_ANYWHERE | {"save_every"}
# Apart from distillations, so that --resume of one never finds the other.
UNDER = Path("runs") / run_folder.SEARCH
TABLE = "table.md"  # the finalists, in its folder
PASSES = 3  # that measure a choice each: of a teacher that streams, and of tokens alone
Axis = Literal["layers", "ffn", "heads", "hidden", "vocab", "bits"]
TOKENS_AND_BITS: tuple[Axis, ...] = ("vocab", "bits")
ALL_BUT_HIDDEN: tuple[Axis, ...] = ("layers", "ffn", "heads", *TOKENS_AND_BITS)


@dataclass(frozen=True)
class Settings(
    cli.Resumable,
    precision.Computing,
    ThermalFlags,
    vocabulary.VocabularyConfig,
    DistillationConfig,
):
    """Give the allowed loss (--lose) to find the smallest student; give limits (--bytes, --params,
    or both) to find the one that loses least. Default: --params 0.667x.
    """

    lose: Annotated[float | None, Within(0.0, MOST)] = None
    """bits per byte that the student may lose, distilled and rounded: on the teacher's answers if
    it has a chat template, otherwise on text. Finds the fewest bytes that should stay within it
    """
    bytes: str | None = None
    """limit for the weights on disk, such as 50MB"""
    params: str | None = None
    """limit for parameters: a share of the teacher's, such as 0.667x, or a number, such as 90M"""
    axes: tuple[Axis, ...] = ()
    """what may be cut: layers, ffn, heads, hidden, vocab, bits (with --lose or --bytes); default:
    vocab and bits, and all but hidden where a limit is below what these reach
    """
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
    streams: Annotated[bool, FILE_ONLY] = False
    """the teacher is read from disk in every pass, and has written nothing
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
        chosen = not self.axes or "bits" in self.axes
        return chosen and (self.lose is not None or bool(self.bytes))

    @property
    def reuses(self) -> bool:
        """Whether measurements are kept, and used again by another search."""
        return self.lose is not None


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
    scope: search_scope.Scope,
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
        names = names[: len(records)]
        sentence = finalists.advice(verdict, records, names, lines)
        head = (
            f"{len(names)} finalists of {told}: {c.settings.iters} steps each, "
            f"{len(c.judging.tokens)} windows of held-out text, ± 95 %; bits and KL are per byte "
            f"of text"
        )
        table = finalists.table(records, names)
        page = f"{head}\n\n{table}\n\n{sentence}"
    else:
        sentence = f"The best after pruning and rounding: {names[0]}: {lines[0]}"
        page = f"{told}\n\n{sentence}"
    run.files.replace_text(run.folder / TABLE, page + "\n")
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
    text = "built-in"
    if s.streams and not answers.shipped_for(teacher):
        text = "built-in, with another teacher's answers"
    return known_losses.identity(teacher, text, s)


def _found(s: Settings, c: candidates.Candidates, scope: search_scope.Scope) -> dict[str, Any]:
    """Measure, distil the finalists, print the result, and return what goes into the JSON line."""
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


@dataclass(frozen=True)
class PlannedSearch:
    """A search that nothing has been measured for yet.

    plan: of its largest finalist. seconds: of its phases. outcome: of a --dry-run. known: the
    identity of measurements that are perhaps kept; {}: none are.
    """

    settings: Settings
    teacher: Checkpoint
    scope: search_scope.Scope
    limit: Budget
    plan: strategies.MemoryPlan
    seconds: Mapping[str, float]
    outcome: Mapping[str, Any]
    known: Mapping[str, Any]

    @property
    def takes(self) -> plan_report.Search:
        """Its time and memory."""
        return plan_report.Search(sum(self.seconds.values()), self.outcome["peak_bytes"])

    @property
    def result(self) -> dict[str, Any]:
        """The beginning of its result."""
        return {
            "teacher": str(self.teacher.path),
            "limits": self.scope.flags,
            "students": len(self.scope.within),
        }

    def source(self) -> preparation.Source:
        """The text, which the teacher perhaps writes now; with a --dry-run what that would take."""
        s = self.settings
        visited = (s.student_iters or ITERS) * s.step_tokens
        if s.streams:
            return _packaged_text(s, visited)
        wanted = conversations.wanted_of(s.data, s.conversations, visited=visited, seed=s.seed)
        return conversations.source(self.teacher, wanted, self.limit, dry_run=s.dry_run)


def _packaged_text(s: Settings, visited: int) -> preparation.Source:
    """Text that no teacher has to write: where conversations are missing, those of the package."""
    text = preparation.Source(s.data, share=s.conversations, tokens=visited)
    if s.data is None or s.conversations == 0 or preparation.has_conversations(s.data, visited):
        return text
    return text._replace(answers=preparation.ANSWERS)


@dataclass(frozen=True)
class SearchText:
    """The text that a search measures on: where it is from, in windows, and its fingerprints."""

    source: preparation.Source
    data: preparation.Data
    origin: dict[str, str]


def plan(s: Settings, teacher: Checkpoint, folder: Path | None) -> PlannedSearch:
    """Limits, students within them, and what the search takes.

    folder: of a run that goes on. MisError where the search cannot be, or does not fit the budget.
    """
    why = size_request.unsearchable(teacher.config)
    if why:
        raise MisError(f"{why}: {size_request.GIVE_SIZES}")
    limit = memory.budget(s.budget_bytes)
    if folder is None:
        s = _of_teacher(s, teacher, limit)
    scope = search_scope.scope_of(s, teacher)
    known = _identity_of_built_in(s, teacher) if s.reuses else {}
    largest, seconds, outcome = search_plan.plan_search(
        s, teacher, scope.within, scope.sizes, limit=limit, known=known
    )
    return PlannedSearch(
        settings=s,
        teacher=teacher,
        scope=scope,
        limit=limit,
        plan=largest,
        seconds=seconds,
        outcome=outcome,
        known=known,
    )


def _of_teacher(s: Settings, teacher: Checkpoint, limit: Budget) -> Settings:
    """The settings of a search that finds sizes for this teacher in this budget."""
    streams = size_request.streams(teacher, limit)
    axes = s.axes or _usual_axes(s, teacher, limit)
    # of tokens alone: bytes say the bits of each number of them
    few = streams or (not s.axes and axes == TOKENS_AND_BITS and not s.reuses)
    evaluations = min(s.evaluations, PASSES) if few else s.evaluations
    return replace(s, streams=streams, axes=axes, evaluations=evaluations)


def unrounded_axes(teacher: Checkpoint, limit: Budget) -> tuple[Axis, ...]:
    """What may be cut of a student whose bits nobody chooses: blocks too, where any are cut."""
    axes = TOKENS_AND_BITS if _keeps_blocks(teacher, limit) else ALL_BUT_HIDDEN
    return tuple(axis for axis in axes if axis != "bits")


def _keeps_blocks(teacher: Checkpoint, limit: Budget) -> bool:
    """Whether no search cuts blocks of this teacher unasked, which is said."""
    why = size_request.why_whole_blocks(teacher, limit)
    if why:
        cli.say(f"every block stays whole, tokens and bits are chosen: {why}")
    return bool(why)


def _usual_axes(s: Settings, teacher: Checkpoint, limit: Budget) -> tuple[Axis, ...]:
    """What may be cut where nobody says it: blocks only where tokens and bits are not enough.

    What a cut block loses after training was measured on one model, and runs lost 1.4 to 1.9 times
    as much; of tokens and bits the expectation held (benchmarks/README.md).
    """
    if not s.mixed:
        return ALL_BUT_HIDDEN
    if _keeps_blocks(teacher, limit):
        return TOKENS_AND_BITS
    if not search_scope.is_reached(replace(s, axes=TOKENS_AND_BITS), teacher):
        cli.say("tokens and bits alone do not get that small: blocks may be cut, too")
        return ALL_BUT_HIDDEN
    return TOKENS_AND_BITS


def text_of(planned: PlannedSearch) -> SearchText:
    """The text of a search, prepared."""
    source = planned.source()
    length = planned.settings.max_seq_length
    data, origin = run_loop.prepare_text(planned.teacher, source, length)
    return SearchText(source, data, origin)


def carry_out(planned: PlannedSearch, read: SearchText, place: run_loop.Place) -> dict[str, Any]:
    """Calibrate once, measure axes, rank, distil the best, judge; the result."""
    s = planned.settings
    data = read.data
    teacher = planned.teacher
    place.decide(asdict(s), {}, planned.limit)
    opening = run_loop.open_run(
        place,
        read.origin,
        same=tuple(run_folder.WORDS),
        thermal=s,
        limit=planned.limit,
        wired=planned.plan.peak_bytes if planned.plan.mode != "sharded" else 0,
    )
    with progress.run("search", planned.seconds), opening as opened:
        about = planned.known or known_losses.identity(teacher, _text_sha256(read.origin), s)
        if s.reuses:
            _lay_out(opened, about)
        ranks, judges = candidates.split_held_out(
            data.held_out, s.rank_windows, s.eval_windows, data.choosing
        )
        course = pipeline.Run(
            **vars(opened), recipe=s, teacher=teacher, data=data.train, plan=planned.plan
        )
        c = candidates.Candidates(course, data, ranks, judges, settings=s, source=read.source)
        found = _found(s, c, planned.scope)
        if s.reuses:
            known_losses.keep_logs(opened.folder, about)
        result = course.finish({**planned.result, **found, "run": str(course.folder)})
        # Teachers of fewer rows: nobody needs them once a search is done.
        for rows in course.folder.glob(f"{vocabulary.FOLDER}-*"):
            course.files.remove_tree(rows)
    return result


def _text_sha256(origin: Mapping[str, str]) -> str:
    """Of the text to learn from and of that which measures."""
    return json_sha256([origin["data"], origin["held_out"]])


def run(settings: Settings) -> dict[str, Any]:
    """The command: plan, enter the run folder, search."""
    s, folder = run_loop.resumed(settings, FREE, UNDER)
    s.check()
    teacher = run_loop.open_model(s, s.teacher, "teacher", UNDER)
    decided = folder if folder and run_folder.is_decided(folder) else None
    planned = plan(s, teacher, decided)
    if s.dry_run:
        planned.source()
        return {**planned.result, **planned.outcome}
    if folder is None:
        held = plan_report.memory_line(planned.plan, planned.takes)
        cli.say(plan_report.time_line(planned.seconds), held)
    name = f"{UNDER.name}/{teacher.path.name}"
    with run_loop.entered(folder, name, out=s.out, asked=s.given) as place:
        place.decide(asdict(s), {}, planned.limit)
        result = carry_out(planned, text_of(planned), place)
        print(text.aligned((place.folder / TABLE).read_text("utf-8").rstrip()))
        return result


def _lay_out(place: run_loop.OpenRun, about: Mapping[str, Any]) -> None:
    """Begin with the measurements of earlier searches. about: their identity."""
    lines = known_losses.copy_into_run(place.folder, about, place.files)
    if lines:
        cli.say(f"search: {lines} saved measurements of this teacher are used")


if __name__ == "__main__":
    cli.main(Settings, run)
