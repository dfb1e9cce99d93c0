"""Students measured as pruned and rounded, and what each axis costs by itself.

The unit is nats a byte of text, which students of other vocabularies have in common. Every
measurement is a line in a log before the next one begins, so a search that was killed goes on from
there.
"""

import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mis_mlx import cli
from mis_mlx.data import preparation, token_windows
from mis_mlx.data.token_windows import Windows
from mis_mlx.distillation import answer_loss, pipeline
from mis_mlx.evaluation import comparison
from mis_mlx.evaluation.answer_likelihood import has_template
from mis_mlx.maths import rounding
from mis_mlx.maths.importance import Statistics
from mis_mlx.models import arch, load, model_writer, opening, stream
from mis_mlx.models.config import Shape, shape_of
from mis_mlx.models.model_size import model_of
from mis_mlx.pruning import calibrate, select, slicing, vocabulary
from mis_mlx.quantization import bit_allocation, packed_format, rounding_cost
from mis_mlx.runs.run_loop import OpenRun
from mis_mlx.size_search import shape_search
from mis_mlx.size_search.shape_search import CUTS, Choice, Losses, Sizes, group_of
from mis_mlx.storage import run_folder
from mis_mlx.storage.hidden_spool import Spool
from mis_mlx.types import Checkpoint, MisError

PROBES = "probes.jsonl"
CANDIDATES = "candidates.jsonl"
# Shares of the teacher's rows that a search tries.
VOCABULARIES = "0.75x", "0.5x", "0.375x", "0.25x", "0.125x"
# Bits of a weight, scales included, at which rounding is measured on answers.
BITS_PROBED = 4.0, 5.0
WORST = 100.0  # nats a byte of a student whose loss is not a number
Costs = dict[str, dict[int, float]]  # module path: bits: nats
Curve = list[tuple[float, float]]  # (size, nats a byte)


def split_held_out(
    held_out: Mapping[str, Windows], ranking: int, judging: int
) -> tuple[Windows, Windows]:
    """(windows that rank candidates, others that judge finalists).

    Windows that selected a student do not judge it. The numbers are of the first text; every other
    text gives a third as many.
    """
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
        spread = np.linspace(0, count - 1, most)
        picked = np.unique(spread.round().astype(int))
        rest = np.setdiff1d(np.arange(count), picked)
        ranks.append(windows.pick(picked))
        others = windows.pick(rest)
        judges.append(comparison.spread_windows(others, math.ceil(judging / share)))
    return token_windows.concatenated(ranks), token_windows.concatenated(judges)


def vocabularies(teacher: Checkpoint) -> list[int]:
    """Numbers of rows that a student may have, apart from the teacher's own.

    These are shares of the teacher's rows, as far as its tokenizer allows.
    """
    rows = set[int]()
    all_rows = shape_of(teacher.config).vocab
    for share in VOCABULARIES:
        with suppress(MisError):
            rows.add(vocabulary.size(share, teacher.path, all_rows))
    return sorted(rows - {all_rows})


class TrimmedTeacher(NamedTuple):
    """The teacher with the vocabulary of some students, and the texts in its tokens."""

    teacher: Checkpoint
    train: Windows
    ranking: Windows
    judging: Windows


class RankingPass(NamedTuple):
    """The result of a reader's pass over the windows that rank.

    hidden: its final states [(B, T, D)]. nats: of a byte. lost: how many more these are than with
    the teacher's own vocabulary.
    """

    hidden: stream.Hidden
    nats: float
    lost: float


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
    _ranking_passes: dict[int, RankingPass] = field(default_factory=dict)

    @cached_property
    def answers(self) -> answer_loss.AnswerLoss | None:
        """The teacher's answers, on which losses are measured; None: they are measured on text."""
        if not has_template(self.teacher):
            return None
        return answer_loss.of_talks(self.teacher, self.data.talks)

    @cached_property
    def samples(self) -> stream.Batches:
        """Windows (1, T) of calibration."""
        return self.run.pick(self.run.recipe.num_samples, 1)

    @property
    def teacher(self) -> Checkpoint:
        """The teacher with all rows."""
        return self.run.teacher

    @cached_property
    def _before(self) -> Shape:
        """The teacher's shape."""
        return shape_of(self.teacher.config)

    @cached_property
    def _group(self) -> int:
        """Weights of the teacher that share a scale."""
        return group_of(self._before)

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
        # Small matrices of fixed bits have no choice, but their bits count towards the mean.
        for name in packed_format.wide_projections(self.teacher.config):
            stored[name] = {packed_format.WIDE_BITS: 0.0}
        return stored

    def _measured_sensitivity(self) -> Costs:
        """`sensitivity`, measured. MisError where a cost is not a number."""
        run = self.run
        batches = self.samples[: rounding_cost.SENSED]
        length = batches[0].size
        size = model_of(run.teacher)
        cost = rounding_cost.sensitivity_cost(size, length, run.plan.budget_bytes)
        held = cost.held_tokens // length
        # What enters each block is kept: as many arrays for a window as the teacher has blocks.
        states = None
        if held < len(batches):
            arrays = held * self._before.layers
            states = Spool(run.folder, arrays, run.files)
        seed = run.recipe.seed
        nats = bit_allocation.costs(
            run.teacher,
            batches,
            self._group,
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
        if rows == self._before.vocab:
            return TrimmedTeacher(run.teacher, run.data, self.ranking, self.judging)
        place = run.folder / f"{vocabulary.FOLDER}-{rows}"
        run.files.make_folder(place)
        teacher, data = vocabulary.of_run(
            run.teacher,
            None,
            rows,
            self.data,
            config=self.settings,
            source=self.source,
            run=place,
            files=run.files,
        )
        before = load.tokenizer(run.teacher.path)
        after = load.tokenizer(teacher.path)
        return TrimmedTeacher(
            teacher=teacher,
            train=data.train,
            ranking=token_windows.retokenized(self.ranking, before, after),
            judging=token_windows.retokenized(self.judging, before, after),
        )

    def ranking_pass(self, rows: int) -> RankingPass:
        """The pass of the teacher with so many rows over the windows that rank, made once."""
        if rows not in self._ranking_passes:
            reader = self.trimmed_teacher(rows)
            hidden = comparison.final_hidden(reader.teacher, reader.ranking)
            figures = comparison.compare({"teacher": reader.teacher}, reader.ranking, hidden)
            nats = comparison.per_byte(figures["teacher", "nll"], reader.ranking)
            all_rows = self._before.vocab
            lost = 0.0
            if rows != all_rows:
                lost = nats - self.ranking_pass(all_rows).nats
            self._ranking_passes[rows] = RankingPass(hidden, nats, lost)
        return self._ranking_passes[rows]

    def excess_loss(self, student: Checkpoint, rows: int) -> float:
        """Nats a byte that a student with so many rows loses, on answers or else on text.

        On the teacher's answers it is what the student needs more than the teacher with all rows.
        On text it is KL(teacher || student), the teacher having the student's vocabulary, and what
        that vocabulary costs the teacher.
        """
        if self.answers is not None:
            return self.answers.excess(student)
        reader = self.trimmed_teacher(rows)
        passed = self.ranking_pass(rows)
        if student is reader.teacher:
            return passed.lost
        models = {"teacher": reader.teacher, "student": student}
        figures = comparison.compare(models, reader.ranking, passed.hidden)
        divergence = comparison.per_byte(figures["student", "kl"], reader.ranking)
        return divergence + passed.lost

    def losses(self, sizes: Sizes) -> Losses:
        """What every axis costs by itself: measured, or read from the log."""
        probes = shape_search.probes_of(sizes, self._before.vocab)
        points: dict[str, Curve] = {axis: [] for axis in CUTS}
        for axis, size in cli.show_progress("axis alone", probes, len(probes)):
            nats = self._probe(axis, size)
            points[axis].append((size, nats))
        if self.settings.mixed:
            points["bits"] = self._bits_alone()
        remaining = shape_search.REMAINING_LOSS
        if self.answers is not None:
            remaining = shape_search.REMAINING_ANSWER_LOSS
        remaining = shape_search.remaining_after(self.settings.student_iters, remaining)
        return Losses(self._before, points, remaining)

    def _bits_alone(self) -> Curve:
        """(bits, nats a byte) of the teacher in so many bits a weight.

        They are sums of what each matrix costs on calibration text. On answers bits cost something
        else: there some sizes are measured, and the curve is stretched to these.
        """
        ones = np.ones(len(self.ranking.tokens))
        tokens_a_byte = comparison.per_byte(ones, self.ranking)
        fewest, most = shape_search.bpw_range(self._group, self.teacher.config, self._before)
        curve = Curve()
        for bpw in np.arange(fewest, most, 0.125):
            chosen = self._teacher_bits(float(bpw))
            costs = [self.sensitivity[path][bits] for path, bits in chosen.items()]
            nats = sum(costs) * tokens_a_byte
            curve.append((float(bpw), nats))
        if self.answers is None:
            return curve
        sizes, estimated = np.array(curve).T
        measured = [self._rounded_teacher(bpw) for bpw in BITS_PROBED]
        stretch = np.array(measured) / np.interp(BITS_PROBED, sizes, estimated)
        stretched = estimated * np.interp(sizes, BITS_PROBED, stretch)
        return list(zip(sizes.tolist(), stretched.tolist(), strict=True))

    def _teacher_bits(self, bpw: float) -> dict[str, int]:
        """{module path: bits} of the teacher in so many bits a weight."""
        choice = Choice(self._before, bpw)
        return self._allocated(choice, range(self._before.layers))

    def _rounded_teacher(self, bpw: float) -> float:
        """Nats a byte that the teacher loses when it is rounded to so many bits on average.

        Every weight goes to its nearest value.
        """

        def measured() -> dict[str, Any]:
            bits = self._teacher_bits(bpw)
            lost, _ = self.rounded_excess_loss(self.teacher, bits, self._group)
            return {"nats": finite_or_none(lost)}

        sizes = {"axis": "bits", "size": bpw}
        record = logged_or_measured(self.run, PROBES, sizes, measured)
        nats = record["nats"]
        return WORST if nats is None else max(float(nats), 1e-6)

    def rounded_excess_loss(
        self, model: Checkpoint, bits: Mapping[str, int], group: int, *, fit: bool = True
    ) -> tuple[float, int]:
        """(nats a byte that a model loses when it is rounded, bytes of its file then).

        Every weight goes to its nearest value. bits: of each matrix, by its path. group: weights
        that share a scale. fit: on fitted grids; else on MLX's own.
        """
        layout = {path: packed_format.Format(width, group) for path, width in bits.items()}
        with self._temporary("rounded") as place:
            out = Path(place) / "model"
            packed_format.write_quantized(model, out, layout, self.run.files, fit=fit)
            rounded = opening.open_to_compute(out, model.precision)
            rows = shape_of(model.config).vocab
            return self.excess_loss(rounded, rows), rounded.nbytes

    def _temporary(self, name: str) -> tempfile.TemporaryDirectory[str]:
        """A folder in the run's, which goes at the end of its `with`."""
        return tempfile.TemporaryDirectory(prefix=f".tmp-{name}-", dir=self.run.folder)

    def _probe(self, axis: str, size: int) -> float:
        """Nats a byte that the teacher loses when one axis is cut to a size."""
        if axis == "vocab":
            shape = replace(self._before, vocab=size)
        else:
            shape = arch.target_shape(self.teacher.config, {}, **{axis: size})

        def measured() -> dict[str, Any]:
            if axis == "vocab":
                teacher = self.trimmed_teacher(size).teacher
                return {"nats": finite_or_none(self.excess_loss(teacher, size))}
            with self._temporary("candidate") as place:
                student = self.prune(shape, Path(place) / "pruned")
                return {"nats": finite_or_none(self.excess_loss(student, shape.vocab))}

        sizes = {"axis": axis, "size": size, "kv_heads": shape.kv_heads}
        record = logged_or_measured(self.run, PROBES, sizes, measured)
        nats = record["nats"]
        return WORST if nats is None else float(nats)

    def prune(self, shape: Shape, out: Path) -> Checkpoint:
        """The teacher cut to `shape` by plain importance, as the new folder `out`."""
        teacher = self.trimmed_teacher(shape.vocab).teacher
        cut = select.PruningConfig(scenario="none", importance="rms")
        _, keep = select.select_units(teacher.config, self.statistics, cut, shape)
        slicing.write_student(
            teacher,
            shape,
            keep,
            out,
            dtype=pipeline.DTYPE,
            files=self.run.files,
            directions=lambda: self._directions,
        )
        return opening.open_to_compute(out, teacher.precision)

    def _allocated(self, choice: Choice, layers: Sequence[int]) -> dict[str, int]:
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

    def score(self, choice: Choice, losses: Losses) -> float:
        """Nats a byte that should be left of the student's loss once it has learned.

        The loss as pruned and rounded is measured, or read from the log. Its ratio to the sum of
        what each axis costs alone is that of before learning; it corrects the expected loss.
        """

        def measured() -> dict[str, Any]:
            group = group_of(choice.shape)
            with self._temporary("candidate") as place:
                pruned = self.prune(choice.shape, Path(place) / "pruned")
                keep = model_writer.read_keep(pruned.path)
                assert keep is not None
                if self.settings.mixed:
                    bits = self._allocated(choice, keep.layers)
                else:
                    paths = packed_format.formats_of(pruned.config, group)
                    bits = dict.fromkeys(paths, packed_format.USUAL_BITS)
                lost, nbytes = self.rounded_excess_loss(pruned, bits, group)
                return {
                    "params": arch.params(pruned.config),
                    "bytes": nbytes,
                    "nats": finite_or_none(lost),
                    "predicted": losses.raw(choice),
                }

        record = logged_or_measured(self.run, CANDIDATES, choice.sizes, measured)
        nats = record["nats"]
        if nats is None:
            return math.inf
        alone = max(losses.raw(choice), 1e-9)
        return losses.expected(choice) * max(nats, 0.0) / alone


def logged_or_measured(
    run: OpenRun,
    log: str,
    sizes: Mapping[str, Any],
    measured: Callable[[], Mapping[str, Any]],
) -> dict[str, Any]:
    """The line of these sizes in a log of the run; where there is none, `measured` makes it."""
    path = run.folder / log
    for line in run_folder.records(path):
        if sizes == {axis: line.get(axis) for axis in sizes}:
            return line
    record = {**sizes, **measured()}
    run.files.append(path, json.dumps(record))
    run.account.keep_sometimes()
    return record


def finite_or_none(value: float) -> float | None:
    """The number; None, which JSON has, where it is infinite or not a number."""
    return float(value) if math.isfinite(value) else None
