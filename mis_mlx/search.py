"""Find the smallest student for a loss, or the best in so many bytes: the first phase of `distill`.

Tokens and bits are chosen together, and FFN neurons where --bytes asks for fewer.
"""

import math
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from mis_mlx import cli
from mis_mlx.data import preparation
from mis_mlx.distillation import answer_loss, conversations, plan_report, run_plan, strategies
from mis_mlx.distillation.distill_flags import DistillFlags
from mis_mlx.hardware import memory
from mis_mlx.hardware.stage_cost import StageCost, in_turn
from mis_mlx.judge import answers
from mis_mlx.models.opening.model_size import ModelSize
from mis_mlx.planner import estimates
from mis_mlx.pruning import vocabulary
from mis_mlx.pruning.calibrate import calibration_cost
from mis_mlx.quantization.bit_allocation import sensing_cost
from mis_mlx.quantization.stage import fitting_cost
from mis_mlx.reporting import progress, text
from mis_mlx.runs import run_loop
from mis_mlx.settings.recipe import ITERS, DistillationConfig
from mis_mlx.size_search import (
    candidates,
    known_losses,
    ranking,
    shape_search,
    size_request,
)
from mis_mlx.size_search.unwritten import passes_cost
from mis_mlx.storage import run_folder
from mis_mlx.storage.files import DISK, json_sha256
from mis_mlx.types import Budget, Checkpoint, MisError

# Settings that may differ when a run is resumed: none of them changes a weight.
FREE = run_loop.FREE_ANYWHERE | {
    "eval_windows",
    "eval_prompts",
    "save_every",
    "keep_steps",
}
TABLE = "table.md"  # bytes against expected loss, in the search's folder
EVALUATIONS = 10  # students measured after rounding, at most
PASSES = 3  # that measure a choice each: of a teacher that streams, and of tokens alone
# Students that a search by --lose measures before the smallest one by corrected sums is one that
# was measured: 1, 1, 1, 4 and 6 in five searches of three teachers.
SETTLED_AFTER = 4


@dataclass(frozen=True)
class Settings(DistillFlags):
    """The first phase of `distill`, stopped there: what each size should lose, in bytes and bits
    per byte. The same flags, the same text; `distill --resume` goes on from it.
    """

    BASIC: ClassVar = frozenset(
        {
            "teacher",
            "data",
            "budget",
            "out",
            "lose",
            "bytes",
            "iters",
            "target_bpw",
            "resume",
            "dry_run",
        }
    )
    INTERNAL: ClassVar = frozenset({"expected_loss"})
    # most are flags of `prune`, whose folder --student takes, or of `quantize`
    FILE_ONLY: ClassVar = frozenset(
        {
            "importance",
            "target",
            "vocab_text",
            "languages",
            "expected_loss",
        }
    )


@dataclass(frozen=True)
class Sought:
    """A search that nothing has been measured for yet.

    lose: bits a byte; None: the best within most_bytes. streams: every pass reads the teacher from
    disk. likely: settings of a student such as it may find; rest: the plan of the run that follows,
    by that one. takes: its time and memory; outcome: the same of a --dry-run. about: the identity
    of measurements that are perhaps kept; {}: none are.
    """

    asked: DistillFlags
    teacher: Checkpoint
    lose: float | None
    most_bytes: float
    sizes: shape_search.Sizes
    streams: bool
    evaluations: int
    limit: Budget
    likely: Mapping[str, Any]
    rest: strategies.MemoryPlan
    takes: plan_report.Search
    outcome: Mapping[str, Any]
    about: Mapping[str, Any]

    @property
    def flags(self) -> str:
        """What it keeps within: '--lose 0.1'."""
        return size_request.flags_of(self.lose, self.asked.bytes)


def plan(asked: DistillFlags, teacher: Checkpoint, folder: Path | None) -> Sought | None:
    """The search that chooses sizes and bits; None where they were given, or chosen before.

    folder: of a run whose search was stopped: what that had decided stays. MisError where the
    search cannot be, or does not fit the budget.
    """
    if asked.expected_loss is not None:
        return None
    lose = size_request.asked_loss(asked, teacher)
    flags = size_request.flags_of(lose, asked.bytes)
    if not flags:
        return None
    aim = "the best" if lose is None else "the smallest"
    cli.say(f"student: {aim} within {flags}; a search chooses sizes and bits")
    limit = memory.budget(asked.budget_bytes)
    streams = 2 * teacher.nbytes > limit.limit_bytes
    begun = folder / run_folder.SEARCH if folder else None
    if begun and run_folder.is_decided(begun):
        streams = run_folder.stored_settings(begun, run_folder.PLAN)["streams"]
    sizes = size_request.sizes_of(asked, teacher, streams=streams)
    most_bytes = cli.parse_bytes(asked.bytes, "--bytes") if asked.bytes else math.inf
    evaluations = EVALUATIONS
    whole = len(sizes["ffn"]) == 1
    if streams or (whole and lose is None):  # bytes say the bits of each number of tokens
        evaluations = PASSES
    about = _identity_of_built_in(asked, teacher, streams=streams)
    if about and known_losses.all_known(about, shape_search.probes_of(sizes)):
        measured = 1
        probes = 0
    else:
        measured = evaluations if lose is None else min(evaluations, SETTLED_AFTER)
        probes = len(shape_search.probes_of(sizes)) + (2 if asked.quantize else 0)
    likely = size_request.likely_student(teacher.config, teacher.path, sizes, most_bytes)
    likely["lose"] = lose
    _, rest = run_plan.resolve(asked, likely, teacher, None)
    costs = search_cost(
        rest.job.whole_teacher,
        asked,
        sizes,
        probes=probes,
        measured=measured,
        streams=streams,
        limit=limit.limit_bytes,
    )
    tell = cli.say if asked.dry_run else cli.detail
    outcome = estimates.report_costs(costs, limit.limit_bytes, rest.rates, tell)
    if not asked.dry_run:
        if not rest.fits:
            raise MisError(strategies.remedy(rest))
        estimates.require_fit(limit, *costs)
    seconds = sum(cost.seconds(rest.rates) for cost in costs)
    return Sought(
        asked=asked,
        teacher=teacher,
        lose=lose,
        most_bytes=most_bytes,
        sizes=sizes,
        streams=streams,
        evaluations=evaluations,
        limit=limit,
        likely=likely,
        rest=rest,
        takes=plan_report.Search(seconds, outcome["peak_bytes"]),
        outcome=outcome,
        about=about,
    )


def _identity_of_built_in(
    asked: DistillFlags, teacher: Checkpoint, *, streams: bool
) -> dict[str, Any]:
    """The identity of measurements on the built-in text; {}: another text, which is not read yet.

    Without conversations losses are told on text: the built-in text is then another one.
    """
    if asked.data is not None or asked.conversations == 0:
        return {}
    words = "built-in"
    if streams and not answers.shipped_for(teacher):
        words = "built-in, with another teacher's answers"
    return known_losses.identity(teacher, words, asked, streams=streams)


def search_cost(
    t: ModelSize,
    recipe: DistillationConfig,
    sizes: shape_search.Sizes,
    *,
    probes: int,
    measured: int,
    streams: bool,
    limit: int,
) -> list[StageCost]:
    """What a search of teacher `t` takes.

    probes: students measured along one axis alone, or in bits alone. measured: students measured
    one after the other, for what was found corrects the next one's size. limit: bytes of memory.
    """
    length = recipe.max_seq_length
    windows = -(-4 * candidates.RANK_WINDOWS // 3)  # of two texts
    most = answer_loss.MOST_ANSWERS_OF_OTHERS if streams else answer_loss.MOST_ANSWERS
    texts = max(windows, most)
    costs = []
    if len(sizes["ffn"]) > 1:
        beside_text = max(0, limit - t.text_bytes)
        seen = calibration_cost(t, recipe.num_samples, length, beside_text, rotation=False)
        costs.append(replace(seen, name="calibrate"))
    costs.append(sensing_cost(t, length, limit))
    if len(sizes["vocab"]) > 1:
        costs.append(replace(vocabulary.vocabulary_cost(t, length), name="choose tokens"))
    if probes:
        alone = passes_cost(t, probes, texts, length, limit)
        costs.append(replace(alone, name=f"{probes} axes alone"))
    one = passes_cost(t, 1, texts, length, limit)
    costs.append(in_turn(f"rank {measured}", one, fitting_cost(t)).repeated(measured))
    return [cost.beside(t.text_bytes) for cost in costs]


def _source(sought: Sought) -> preparation.Source:
    """The text, which the teacher perhaps writes now; with a --dry-run what that would take.

    A teacher that streams writes nothing: where conversations are missing, those of the package
    are taken.
    """
    s = sought.asked
    visited = (s.iters or ITERS) * s.step_tokens
    source = preparation.Source(s.data, share=s.conversations, tokens=visited, seed=s.seed)
    if not sought.streams:
        return conversations.source(sought.teacher, source, sought.limit, dry_run=s.dry_run)
    if s.data is None or s.conversations == 0 or preparation.has_conversations(s.data, visited):
        return source
    return source._replace(answers=preparation.ANSWERS)


def carry_out(sought: Sought, place: run_loop.Account) -> dict[str, Any]:
    """Measure axes, rank, write the table; the result. place: of the run, whose part this is."""
    s = sought.asked
    teacher = sought.teacher
    data, origin = run_loop.prepare_text(teacher, _source(sought), s.max_seq_length)
    run_loop.forget_text()
    about = sought.about
    if not about:
        words = json_sha256([origin["data"], origin["held_out"]])
        about = known_losses.identity(teacher, words, s, streams=sought.streams)
    with place.part(run_folder.SEARCH) as part:
        part.decide(asdict(s), {"streams": sought.streams}, sought.limit)
        opening = run_loop.open_run(
            part,
            origin,
            same=tuple(run_folder.WORDS),
            thermal=s,
            limit=sought.limit,
        )
        with progress.run("search", {"rank": sought.takes.seconds}), opening as opened:
            lines = known_losses.copy_into_run(opened.folder, about)
            if lines:
                cli.say(f"search: {lines} saved measurements of this teacher are used")
            c = candidates.Candidates(
                run=opened,
                teacher=teacher,
                data=data,
                asked=s,
                streams=sought.streams,
                direct=memory.crowds_page_cache(teacher.nbytes, sought.limit),
            )
            with progress.phase("rank"):
                if sought.lose is None:
                    found = ranking.rank(
                        c, sought.sizes, sought.most_bytes, evaluations=sought.evaluations
                    )
                else:
                    found = ranking.smallest(
                        c,
                        sought.sizes,
                        sought.lose,
                        evaluations=sought.evaluations,
                        most_bytes=sought.most_bytes,
                    )
                cli.outcome(f"rank: {len(found.scores)} students measured")
            known_losses.keep_logs(opened.folder, about)
            result = opened.finish(_report(sought, c, found))
            # Teachers of fewer rows: nobody needs them once a search is done.
            for rows in opened.folder.glob(f"{vocabulary.FOLDER}-*"):
                DISK.remove_tree(rows)
            return result


def _report(sought: Sought, c: candidates.Candidates, found: ranking.Found) -> dict[str, Any]:
    """Write the table of bytes against expected loss; what goes into the JSON line."""
    best = found.best
    flags = best.flags(c.before)
    points = ranking.table(c, found, sought.sizes)
    rows = ["| weights on disk, MB | bits per byte it should lose | student |", "|---:|---:|---|"]
    for point in points:
        megabytes = point["bytes"] / 1e6
        rows.append(f"| {megabytes:.1f} | {point['loss']:.3f} | {point['student']} |")
    measured = run_folder.records(c.run.folder / candidates.CANDIDATES)
    head = f"{len(measured)} students measured, {sought.flags}: {best.words(c.before)} is chosen"
    DISK.replace_text(c.run.folder / TABLE, "\n".join([head, "", *rows, ""]))
    words = ["scripts/mis distill"]
    given = {"teacher": sought.asked.teacher, "data": sought.asked.data, **flags}
    for name, value in given.items():
        if value is not None:
            words.append(f"--{name.replace('_', '-')} {shlex.quote(str(value))}")
    return {
        "teacher": str(sought.teacher.path),
        "limits": sought.flags,
        "expected_bits": round(found.scores[best] / math.log(2), 4),
        "expected_bytes": round(shape_search.file_bytes(c.teacher.config, *best)),
        "table": points,
        "candidates": measured,
        "best": flags,
        "command": " ".join(words),
        "run": str(c.run.folder),
    }


def run(settings: Settings) -> dict[str, Any]:
    """The command: plan, enter the run folder, search."""
    s, folder = run_loop.resumed(settings, FREE)
    cli.check_ranges(s)
    teacher = run_loop.open_model(s, s.teacher, "teacher")
    sought = None
    if folder is None or not run_folder.is_decided(folder):
        sought = plan(s, teacher, folder)
    if sought is None:
        raise MisError(
            "there is nothing to search for: the student's sizes are given, or chosen already: "
            "leave the sizes out, or go on with `distill`"
        )
    if s.dry_run:
        _source(sought)
        return {"teacher": str(teacher.path), "limits": sought.flags, **sought.outcome}
    cli.say(plan_report.time_line({"search": sought.takes.seconds}))
    name = f"{teacher.path.name}-none"
    with run_loop.entered(folder, name, out=s.out, asked=s.given) as place:
        result = carry_out(sought, place)
        print(text.aligned((Path(result["run"]) / TABLE).read_text("utf-8").rstrip()))
        again = shlex.quote(str(place.folder))
        cli.say(f"next: scripts/mis distill --resume --out {again}, or {result['command']}")
        return result


if __name__ == "__main__":
    cli.main(Settings, run)
