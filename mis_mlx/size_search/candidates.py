"""What the measurements of a search share: text, readers, calibration, sensitivities, logs."""

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from mis_mlx.data import preparation, token_windows
from mis_mlx.data.token_windows import Windows
from mis_mlx.distillation import answer_loss
from mis_mlx.hardware.stage_cost import WINDOWS
from mis_mlx.judge import answers, comparison
from mis_mlx.judge.score import has_template
from mis_mlx.maths import rounding, stats
from mis_mlx.maths.importance import Statistics
from mis_mlx.models.architectures import arch, bit_floors
from mis_mlx.models.architectures.shape import Shape
from mis_mlx.models.architectures.sizes import shape_of
from mis_mlx.models.opening import load
from mis_mlx.models.opening.model_size import model_of
from mis_mlx.models.passing import stream
from mis_mlx.pruning import calibrate, select, vocabulary
from mis_mlx.quantization import bit_allocation, packed_format
from mis_mlx.runs.run_loop import OpenRun
from mis_mlx.settings.recipe import DistillationConfig
from mis_mlx.size_search import unwritten
from mis_mlx.size_search.shape_search import Choice, bpw_range, group_of
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


def ranking_windows(data: preparation.Data, count: int) -> Windows:
    """The windows that rank students: of the text to choose by, or of each held-out text.

    count: of the first text; every other text gives a third as many, and none more than half of
    its own, for windows that chose a student do not judge it.
    """
    if data.choosing is not None:
        return comparison.spread_windows(data.choosing, count)
    ranks = list[Windows]()
    for name, windows in data.held_out.items():
        share = 3 if ranks else 1
        held = len(windows.tokens)
        if held < 4:
            raise MisError(
                f"the text {name} has {held} held-out windows, but a search needs 4 or more: add "
                f"text"
            )
        most = min(math.ceil(count / share), held // 2)
        ranks.append(windows.pick(stats.spread(held, most)))
    return token_windows.concatenated(ranks)


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
    """The teacher with the vocabulary of some students, and windows that rank in its tokens."""

    teacher: Checkpoint
    ranking: Windows


@dataclass
class Candidates:
    """What the measurements share.

    teacher: with all rows. data: all text, in its tokens. recipe: of the training that follows.
    vocab: how tokens are chosen. limit_bytes: of memory. streams: whether every pass reads the
    teacher from disk; direct: past the page cache. rounds: whether bits are chosen.
    """

    run: OpenRun
    teacher: Checkpoint
    data: preparation.Data
    ranking: Windows
    recipe: DistillationConfig
    vocab: vocabulary.VocabularyConfig
    limit_bytes: int
    streams: bool = False
    direct: bool = False
    rounds: bool = True
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
        own = not self.streams or answers.shipped_for(self.teacher)
        return answer_loss.of_talks(self.teacher, self.data.talks, own=own)

    @cached_property
    def samples(self) -> stream.Batches:
        """Windows (1, T) of calibration."""
        recipe = self.recipe
        return preparation.calibration(self.data.train, recipe.num_samples, recipe.seed, 1)

    @cached_property
    def students_at_once(self) -> int:
        """How many students are measured in one pass, within the budget."""
        length = self.recipe.max_seq_length
        windows = len(self.answers.prompts) if self.answers else len(self.ranking.tokens)
        return unwritten.at_once(model_of(self.teacher), windows, length, self.limit_bytes)

    @cached_property
    def before(self) -> Shape:
        """The teacher's shape."""
        return shape_of(self.teacher.config)

    @cached_property
    def bpw_range(self) -> tuple[float, float]:
        """(fewest, most) bits of a weight of the teacher."""
        return bpw_range(group_of(self.before), self.teacher.config, self.before)

    @cached_property
    def statistics(self) -> Statistics:
        """One streamed calibration, for all students with fewer neurons.

        Without the weather: a student's shape must not depend on the machine's temperature.
        """
        recipe = self.recipe
        cost = calibrate.calibration_cost(
            model_of(self.teacher),
            recipe.num_samples,
            recipe.max_seq_length,
            self.limit_bytes,
            rotation=False,
        )
        held = cost.stays[WINDOWS]
        states: stream.Hidden = list[mx.array]()
        if held < len(self.samples):
            states = Spool(self.run.folder, held, self.run.files)
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
        cost = bit_allocation.sensing_cost(model_of(self.teacher), length, self.limit_bytes)
        held = cost.stays[WINDOWS]
        # What enters each block is kept: as many arrays for a window as the teacher has blocks.
        states = None
        if held < len(batches):
            arrays = held * self.before.layers
            states = Spool(run.folder, arrays, run.files)
        nats = bit_allocation.costs(
            self.teacher,
            batches,
            group_of(self.before),
            rounding.CANDIDATE_BITS,
            seed=self.recipe.seed,
            kept=states,
            fit=True,
        )
        for costs in nats.values():
            if not all(map(math.isfinite, costs.values())):
                raise MisError(
                    "the cost of bits cannot be measured, because this teacher's gradients are too "
                    "large: give sizes, such as --vocab 0.5x, and --target-bpw"
                )
        return nats

    def trimmed_teacher(self, rows: int) -> TrimmedTeacher:
        """The teacher with so many rows, made once."""
        if rows not in self._trimmed_teachers:
            self._trimmed_teachers[rows] = self._new_trimmed_teacher(rows)
        return self._trimmed_teachers[rows]

    def _new_trimmed_teacher(self, rows: int) -> TrimmedTeacher:
        run = self.run
        if rows == self.before.vocab:
            return TrimmedTeacher(self.teacher, self.ranking)
        place = run.folder / f"{vocabulary.FOLDER}-{rows}"
        run.files.make_folder(place)
        teacher = vocabulary.teacher_of_run(
            self.teacher,
            None,
            rows,
            self.data.train,
            config=self.vocab,
            run=place,
            files=run.files,
        )
        before = load.tokenizer(self.teacher.path)
        after = load.tokenizer(teacher.path)
        return TrimmedTeacher(teacher, token_windows.retokenized(self.ranking, before, after))

    def unwritten(
        self, shape: Shape, bits: Mapping[str, int] | None = None, *, fit: bool = True
    ) -> unwritten.Student:
        """The student of this shape, in memory alone. bits: of each matrix; None: not rounded.

        fit: on fitted grids; else on MLX's own.
        """
        reader = self.trimmed_teacher(shape.vocab).teacher
        keep = None
        if shape.ffn != self.before.ffn:
            keep = self._kept(shape)
        group = group_of(shape)
        formats = {path: packed_format.Format(n, group) for path, n in (bits or {}).items()}
        return unwritten.Student(reader, shape, keep, formats, fit=fit)

    def _kept(self, shape: Shape) -> KeptUnits:
        """What stays of the teacher in a student of this shape, by plain importance."""
        cut = select.PruningConfig(scenario="none", importance="rms")
        config = self.trimmed_teacher(shape.vocab).teacher.config
        _, keep = select.select_units(config, self.statistics, cut, shape)
        return keep

    def allocated(self, choice: Choice) -> dict[str, int]:
        """{module path of the student: bits}, given to matrices where they pay.

        A matrix costs what it costs in the teacher, by the weights that it still has. MisError
        where the matrices need more bits.
        """
        before = arch.tensors_of(self.teacher.config)
        sizes = {}
        costs = Costs()
        for name, size in arch.tensors_of(
            arch.student_config(self.teacher.config, choice.shape)
        ).items():
            path = name.removesuffix(".weight")
            if path in self.sensitivity:
                sizes[path] = math.prod(size)
                share = sizes[path] / math.prod(before[name])
                costs[path] = {bits: share * nats for bits, nats in self.sensitivity[path].items()}
        scales = packed_format.Format(0, group_of(choice.shape)).bits_per_weight
        chosen = bit_allocation.allocate(costs, sizes, choice.bpw - scales)
        if not chosen:
            # Else nothing would be rounded, and a loss of 0 be taken for that of so many bits.
            least = sum(min(costs[path]) * size for path, size in sizes.items())
            fewest = least / sum(sizes.values()) + scales
            raise MisError(
                f"{choice.bpw:g} bits a weight are too few for this model: it has {fewest:.2f} "
                f"where each matrix has its fewest; ask for more"
            )
        return chosen


def journal_of(folder: Path, log: str, files: Files = DISK) -> Journal:
    """A log of a search in a folder, as a journal: a record for each student."""
    key = ("axis", "size") if log == PROBES else ("ffn", "vocab", "bits")
    return Journal(folder / log, key, files=files)


def finite_or_none(value: float) -> float | None:
    """The number; None, which JSON has, where it is infinite or not a number."""
    return float(value) if math.isfinite(value) else None
