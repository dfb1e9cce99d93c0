"""What the measurements of a search share: text, readers, calibration, sensitivities, logs."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mis_mlx.data import preparation, token_windows
from mis_mlx.data.token_windows import Windows
from mis_mlx.distillation import answer_loss, pipeline
from mis_mlx.hardware.stage_cost import WINDOWS
from mis_mlx.judge import answers, comparison
from mis_mlx.judge.score import has_template
from mis_mlx.maths import rounding, stats
from mis_mlx.maths.importance import Statistics
from mis_mlx.models.architectures import arch, bit_floors
from mis_mlx.models.architectures.shape import Shape
from mis_mlx.models.architectures.sizes import shape_of
from mis_mlx.models.opening import compute_type, load
from mis_mlx.models.opening.model_size import model_of
from mis_mlx.models.passing import stream
from mis_mlx.pruning import calibrate, select, slicing, vocabulary
from mis_mlx.quantization import bit_allocation, packed_format
from mis_mlx.runs.run_loop import OpenRun
from mis_mlx.size_search import unwritten
from mis_mlx.size_search.shape_search import CUTS, Choice, group_of
from mis_mlx.storage.files import DISK, Files
from mis_mlx.storage.hidden_spool import Spool
from mis_mlx.storage.journal import Journal
from mis_mlx.types import Checkpoint, KeptUnits, MisError

PROBES = "probes.jsonl"
CANDIDATES = "candidates.jsonl"
# Shares of the teacher's rows that a search tries.
VOCABULARIES = "0.75x", "0.5x", "0.375x", "0.25x", "0.125x"
WORST = 100.0  # nats a byte of a student whose loss is not a number
Costs = dict[str, dict[int, float]]  # module path: bits: nats


def split_held_out(
    held_out: Mapping[str, Windows],
    ranking: int,
    judging: int,
    choosing: Windows | None = None,
) -> tuple[Windows, Windows]:
    """(windows that rank candidates, others that judge finalists).

    Windows that selected a student do not judge it. The numbers are of the first text; every other
    text gives a third as many. choosing: a text of its own to rank by; without it some of the
    held-out windows do.
    """
    if choosing is not None:
        judges = [comparison.spread_windows(windows, judging) for windows in held_out.values()]
        return comparison.spread_windows(choosing, ranking), token_windows.concatenated(judges)
    ranks = list[Windows]()
    judges = []
    for name, windows in held_out.items():
        share = 3 if ranks else 1
        count = len(windows.tokens)
        if count < 4:
            raise MisError(
                f"the text {name} has {count} held-out windows, but a search needs 4 or more: add "
                f"text"
            )
        # Evenly spread, and no more than half of the text.
        most = min(math.ceil(ranking / share), count // 2)
        picked = stats.spread(count, most)
        rest = np.setdiff1d(np.arange(count), picked)
        ranks.append(windows.pick(picked))
        others = windows.pick(rest)
        judges.append(comparison.spread_windows(others, math.ceil(judging / share)))
    return token_windows.concatenated(ranks), token_windows.concatenated(judges)


def vocabularies(config: Mapping[str, Any], folder: Path | None) -> list[int]:
    """Numbers of rows that a student may have, apart from the teacher's own.

    These are shares of the teacher's rows, as far as its tokenizer allows. folder: where it is;
    None: it allows all of them.
    """
    rows = set[int]()
    all_rows = shape_of(config).vocab
    for share in VOCABULARIES:
        with suppress(MisError):
            rows.add(vocabulary.size(share, folder, all_rows))
    return sorted(rows - {all_rows})


class TrimmedTeacher(NamedTuple):
    """The teacher with the vocabulary of some students, and held-out texts in its tokens."""

    teacher: Checkpoint
    ranking: Windows
    judging: Windows


@dataclass
class Candidates:
    """What the measurements share.

    run: of the teacher with all rows. data: all text, in its tokens; source: where the text is
    from.
    """

    run: pipeline.Run
    data: preparation.Data
    ranking: Windows
    judging: Windows
    settings: Any
    source: preparation.Source | str | None = None
    _trimmed_teachers: dict[int, TrimmedTeacher] = field(default_factory=dict)
    # nats a byte of readers, by their rows
    reader_nats: dict[int, float] = field(default_factory=dict)

    @cached_property
    def answers(self) -> answer_loss.AnswerLoss | None:
        """The answers on which losses are measured; None: they are measured on text.

        A teacher that streams has not written any: they came with the package.
        """
        if not has_template(self.teacher):
            return None
        own = not self.settings.streams or answers.shipped_for(self.teacher)
        return answer_loss.of_talks(self.teacher, self.data.talks, own=own)

    @cached_property
    def samples(self) -> stream.Batches:
        """Windows (1, T) of calibration."""
        return self.run.pick(self.run.recipe.num_samples, 1)

    @property
    def teacher(self) -> Checkpoint:
        """The teacher with all rows."""
        return self.run.teacher

    @cached_property
    def students_at_once(self) -> int:
        """How many students are measured in one pass, within the budget."""
        length = self.run.recipe.max_seq_length
        windows = len(self.answers.prompts) if self.answers else len(self.ranking.tokens)
        limit = self.run.plan.budget_bytes
        return unwritten.at_once(model_of(self.teacher), windows, length, limit)

    @cached_property
    def before(self) -> Shape:
        """The teacher's shape."""
        return shape_of(self.teacher.config)

    @cached_property
    def group(self) -> int:
        """Weights of the teacher that share a scale."""
        return group_of(self.before)

    def _states(self) -> stream.Hidden:
        """A place for calibration's hidden states: a file for those that memory does not hold."""
        held = self.run.plan.held_windows("prune")
        if held >= len(self.samples):
            return list[mx.array]()
        return Spool(self.run.folder, held, self.run.files)

    @cached_property
    def statistics(self) -> Statistics:
        """One streamed calibration, for all candidates.

        Without the weather: a student's shape must not depend on the machine's temperature.
        """
        states = self._states()
        statistics, _ = calibrate.calibrate(self.teacher, self.samples, hidden=states)
        return statistics

    @cached_property
    def sensitivity(self) -> Costs:
        """{module path: {bits: nats a token}} of the teacher.

        Read from the run's folder, where a search that was stopped left it.
        """
        path = self.run.folder / packed_format.SENSITIVITY
        if not path.exists():
            nats = self._measured_sensitivity()
            self.run.files.replace_text(path, json.dumps(nats))
        stored = json.loads(path.read_text("utf-8"))
        for name, costs in stored.items():  # JSON's keys are text
            stored[name] = {int(bits): cost for bits, cost in costs.items()}
        for name, fewest in bit_floors.delta_floors(self.teacher.config).items():
            stored[name] = {bits: cost for bits, cost in stored[name].items() if bits >= fewest}
        # Small matrices of fixed bits have no choice, but their bits count towards the mean.
        for name in packed_format.wide_projections(self.teacher.config):
            stored[name] = {packed_format.WIDE_BITS: 0.0}
        return stored

    def _measured_sensitivity(self) -> Costs:
        """`sensitivity`, measured. MisError where a cost is not a number."""
        run = self.run
        batches = self.samples[: bit_allocation.SENSED]
        length = batches[0].size
        size = model_of(run.teacher)
        cost = bit_allocation.sensing_cost(size, length, run.plan.budget_bytes)
        held = cost.stays[WINDOWS]
        # What enters each block is kept: as many arrays for a window as the teacher has blocks.
        states = None
        if held < len(batches):
            arrays = held * self.before.layers
            states = Spool(run.folder, arrays, run.files)
        seed = run.recipe.seed
        nats = bit_allocation.costs(
            run.teacher,
            batches,
            self.group,
            rounding.CANDIDATE_BITS,
            seed=seed,
            kept=states,
            fit=True,
        )
        for costs in nats.values():
            if not all(map(math.isfinite, costs.values())):
                raise MisError(
                    "the cost of bits cannot be measured, because this teacher's gradients are too "
                    "large: leave bits out of `search --axes`, or limit --params"
                )
        return nats

    @cached_property
    def _directions(self) -> slicing.Directions:
        """Of the stream, measured when the first candidate is narrower than the teacher."""
        return slicing.principal_directions(self.teacher, self.samples, self._states)

    def trimmed_teacher(self, rows: int) -> TrimmedTeacher:
        """The teacher with so many rows, made once."""
        if rows not in self._trimmed_teachers:
            self._trimmed_teachers[rows] = self._new_trimmed_teacher(rows)
        return self._trimmed_teachers[rows]

    def _new_trimmed_teacher(self, rows: int) -> TrimmedTeacher:
        run = self.run
        if rows == self.before.vocab:
            return TrimmedTeacher(run.teacher, self.ranking, self.judging)
        place = run.folder / f"{vocabulary.FOLDER}-{rows}"
        run.files.make_folder(place)
        teacher = vocabulary.teacher_of_run(
            run.teacher,
            None,
            rows,
            self.data.train,
            config=self.settings,
            run=place,
            files=run.files,
        )
        before = load.tokenizer(run.teacher.path)
        after = load.tokenizer(teacher.path)
        return TrimmedTeacher(
            teacher=teacher,
            ranking=token_windows.retokenized(self.ranking, before, after),
            judging=token_windows.retokenized(self.judging, before, after),
        )

    def training_text(self, rows: int) -> Windows:
        """The text of a student with so many rows, tokenized when a finalist learns from it."""
        if rows == self.before.vocab:
            return self.run.data
        tokenizer = load.tokenizer(self.trimmed_teacher(rows).teacher.path)
        length = self.run.data.tokens.shape[1]
        return preparation.prepare(self.source, tokenizer, length).train

    def unwritten(
        self, shape: Shape, bits: Mapping[str, int] | None = None, *, fit: bool = True
    ) -> unwritten.Student:
        """The student of this shape, in memory alone. bits: of each matrix; None: not rounded.

        fit: on fitted grids; else on MLX's own.
        """
        reader = self.trimmed_teacher(shape.vocab).teacher
        keep = None
        if replace(shape, vocab=self.before.vocab) != self.before:
            keep = self.kept(shape)
        group = group_of(shape)
        formats = {path: packed_format.Format(n, group) for path, n in (bits or {}).items()}
        return unwritten.Student(reader, shape, keep, formats, fit=fit)

    def kept(self, shape: Shape) -> KeptUnits:
        """What stays of the teacher in a student of this shape, by plain importance."""
        cut = select.PruningConfig(scenario="none", importance="rms")
        config = self.trimmed_teacher(shape.vocab).teacher.config
        _, keep = select.select_units(config, self.statistics, cut, shape)
        return keep

    def prune(self, shape: Shape, out: Path) -> Checkpoint:
        """The teacher cut to `shape` by plain importance, as the new folder `out`."""
        teacher = self.trimmed_teacher(shape.vocab).teacher
        keep = self.kept(shape)
        slicing.write_student(
            teacher,
            shape,
            keep,
            out,
            dtype=pipeline.DTYPE,
            files=self.run.files,
            directions=lambda: self._directions,
        )
        return compute_type.open_to_compute(out, teacher.precision)

    def allocated(self, choice: Choice, layers: Sequence[int]) -> dict[str, int]:
        """{module path of the student: bits}, given to matrices where they pay.

        A matrix costs what it costs in the teacher, by the weights that it still has. layers: the
        teacher's, that stay.
        """
        before = arch.tensors_of(self.teacher.config)
        config = arch.student_config(self.teacher.config, choice.shape, layers)
        sizes = {}
        costs = Costs()
        for name, size in arch.tensors_of(config).items():
            path = name.removesuffix(".weight")
            source = path  # in the teacher
            block = arch.block_of(name)
            if block is not None:
                source = path.replace(f".{block}.", f".{layers[block]}.", 1)
            if source in self.sensitivity:
                sizes[path] = math.prod(size)
                weights = math.prod(before[f"{source}.weight"])
                share = sizes[path] / weights
                in_teacher = self.sensitivity[source]
                costs[path] = {bits: share * nats for bits, nats in in_teacher.items()}
        group = group_of(choice.shape)
        scales = packed_format.Format(0, group).bits_per_weight
        return bit_allocation.allocate(costs, sizes, choice.bpw - scales)


def logged_or_measured(
    run: OpenRun,
    log: str,
    sizes: Mapping[str, Any],
    measured: Callable[[], Mapping[str, Any]],
) -> dict[str, Any]:
    """The record of these sizes in a log of the run; where there is none, `measured` makes it."""
    journal = journal_of(run.folder, log, run.files)
    known = journal.read().get(journal.key_of(sizes))
    if known is not None:
        return known
    record = {**sizes, **measured()}
    journal.add(record)
    run.account.keep_sometimes()
    return record


def journal_of(folder: Path, log: str, files: Files = DISK) -> Journal:
    """A log of a search in a folder, as a journal: a record for each student."""
    key = ("axis", "size", "kv_heads") if log == PROBES else (*CUTS, "kv_heads", "bits")
    return Journal(folder / log, key, files=files)


def finite_or_none(value: float) -> float | None:
    """The number; None, which JSON has, where it is infinite or not a number."""
    return float(value) if math.isfinite(value) else None
