"""Students measured as pruned and rounded, and what each axis costs by itself: in nats a byte of
text, which students of other vocabularies have in common.

Every measurement is a line in a log before the next begins, so a search that was killed goes on
from there.
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
from mis_mlx.distillation.run_loop import OpenRun
from mis_mlx.evaluation import comparison
from mis_mlx.evaluation.answer_likelihood import has_template
from mis_mlx.maths import rounding
from mis_mlx.maths.importance import Statistics
from mis_mlx.models import arch, load, model_writer, stream
from mis_mlx.models.config import Shape, shape_of
from mis_mlx.planner import compression_size, estimates
from mis_mlx.pruning import calibrate, select, shape_search, slicing, vocabulary
from mis_mlx.quantization import bit_allocation, packed_format
from mis_mlx.storage import run_folder
from mis_mlx.storage.hidden_spool import Spool
from mis_mlx.types import Checkpoint, MisError

PROBES = "probes.jsonl"
CANDIDATES = "candidates.jsonl"
# of the teacher's rows, that a search tries
VOCABULARIES = "0.75x", "0.5x", "0.375x", "0.25x", "0.125x"
# of a weight, scales included: sizes at which rounding is measured on answers
BITS_PROBED = 4.0, 5.0
WORST = 100.0  # nats a byte, of what has no loss that is a number


def split(held_out: Mapping[str, Windows], ranking: int, judging: int) -> tuple[Windows, Windows]:
    """(windows that rank candidates, others that judge finalists): what was selected on does not
    judge. Of the first text so many, of every other one a third.
    """
    parts = list[tuple[Windows, Windows]]()
    for name, windows in held_out.items():
        share = 3 if parts else 1
        count = len(windows.tokens)
        if count < 4:
            raise MisError(
                f"the text {name} has {count} windows held out, a search takes 4 or more: bring "
                f"more text"
            )
        at = np.unique(
            np.linspace(0, count - 1, min(-(-ranking // share), count // 2)).round().astype(int)
        )
        rest = np.setdiff1d(np.arange(count), at)
        parts.append(
            (windows.pick(at), comparison.chosen(windows.pick(rest), -(-judging // share)))
        )
    first, second = zip(*parts, strict=True)
    return token_windows.joined(first), token_windows.joined(second)


def vocabularies(teacher: Checkpoint) -> list[int]:
    """Numbers of rows that a student may have beside the teacher's own, as far as its tokenizer
    allows.
    """
    rows = set[int]()
    whole = shape_of(teacher.config).vocab
    for share in VOCABULARIES:
        with suppress(MisError):
            rows.add(vocabulary.size(share, teacher.path, whole))
    return sorted(rows - {whole})


class Reader(NamedTuple):
    """The teacher with the vocabulary of some students, and the texts in its tokens."""

    teacher: Checkpoint
    train: Windows
    ranking: Windows
    judging: Windows


class Passed(NamedTuple):
    """What a reader's pass over the windows that rank gave.

    hidden: its final states. nats: of a byte. lost: how many more these are than with the teacher's
    own vocabulary.
    """

    hidden: stream.Hidden
    nats: float
    lost: float


@dataclass
class Candidates:
    """What the measurements share. run: of the whole teacher. data: all text, in its tokens;
    source: whence it is.
    """

    run: pipeline.Run
    data: preparation.Data
    ranking: Windows
    judging: Windows
    settings: Any
    source: preparation.Source | str | None = None
    _readers: dict[int, Reader] = field(default_factory=dict)
    _passed: dict[int, Passed] = field(default_factory=dict)

    @cached_property
    def answers(self) -> answer_loss.AnswerLoss | None:
        """What loss is told on: the teacher's answers. None: there are none, it is told on text."""
        teacher = self.run.teacher
        return answer_loss.of_talks(teacher, self.data.talks) if has_template(teacher) else None

    @cached_property
    def samples(self) -> stream.Batches:
        """Windows of calibration."""
        return self.run.pick(self.run.recipe.num_samples, 1)

    def _states(self) -> stream.Hidden:
        """A place for hidden states of calibration: in a file, as far as memory does not hold
        them.
        """
        held = self.run.plan.held_windows("prune")
        return (
            list[mx.array]()
            if held >= len(self.samples)
            else Spool(self.run.folder, held, self.run.files)
        )

    @cached_property
    def statistics(self) -> Statistics:
        """One streamed calibration, for all candidates. Without the weather: shapes must not depend
        on the wind.
        """
        return calibrate.calibrate(self.run.teacher, self.samples, hidden=self._states())[0]

    @cached_property
    def sensitivity(self) -> dict[str, dict[int, float]]:
        """{module path: {bits: nats a token}} of the teacher; from the run's folder where it stands
        there.
        """
        run, path = self.run, self.run.folder / packed_format.SENSITIVITY
        if not path.exists():
            shape = shape_of(run.teacher.config)
            some = self.samples[: compression_size.SENSED]
            size, length = estimates.model_of(run.teacher), some[0].size
            held = (
                compression_size.sensitivity(size, length, run.plan.budget_bytes).held_tokens
                // length
            )
            states = (
                None if held >= len(some) else Spool(run.folder, held * shape.layers, run.files)
            )
            how = shape_search.group_of(shape), rounding.BITS, run.recipe.seed, states
            nats = bit_allocation.costs(run.teacher, some, *how)
            if not all(math.isfinite(cost) for costs in nats.values() for cost in costs.values()):
                why = "what bits cost this teacher is no number, its gradients are too large"
                raise MisError(f"{why}: leave bits out of the --axes of search, or limit --params")
            run.files.replace_text(path, json.dumps(nats))
        stored = json.loads(path.read_text("utf-8"))
        return {
            name: {int(bits): cost for bits, cost in costs.items()}
            for name, costs in stored.items()
        }

    @cached_property
    def _directions(self) -> slicing.Directions:
        """Of the stream, measured when the first candidate is narrower than the teacher."""
        return slicing.directions(self.run.teacher, self.samples, self._states)

    def reader(self, rows: int) -> Reader:
        """The teacher of so many rows, made once."""
        if rows in self._readers:
            return self._readers[rows]
        run, s, whole = self.run, self.settings, shape_of(self.run.teacher.config).vocab
        seen = run.teacher
        train = run.data
        ranking = self.ranking
        judging = self.judging
        if rows != whole:
            place = run.folder / f"{vocabulary.FOLDER}-{rows}"
            run.files.make_folder(place)
            seen, data = vocabulary.of_run(
                seen, None, rows, self.data, s, self.source, place, run.files
            )
            tokenizers = [load.tokenizer(model.path) for model in (run.teacher, seen)]
            train = data.train
            (ranking, judging) = (token_windows.reread(w, *tokenizers) for w in (ranking, judging))
        self._readers[rows] = Reader(seen, train, ranking, judging)
        return self._readers[rows]

    def passed(self, rows: int) -> Passed:
        """The pass of the teacher of so many rows over the windows that rank, made once."""
        if rows not in self._passed:
            reader = self.reader(rows)
            whole = shape_of(self.run.teacher.config).vocab
            hidden = comparison.final_hidden(reader.teacher, reader.ranking)
            figures = comparison.compare({"teacher": reader.teacher}, reader.ranking, hidden)
            nats = comparison.per_byte(figures["teacher", "nll"], reader.ranking)
            lost = 0.0 if rows == whole else nats - self.passed(whole).nats
            self._passed[rows] = Passed(hidden, nats, lost)
        return self._passed[rows]

    def lost(self, student: Checkpoint, rows: int) -> float:
        """Nats a byte that a student of so many rows loses: on the teacher's answers, or else on
        text.

        On text it is KL(teacher || student), the teacher having the student's vocabulary, and what
        that vocabulary costs the teacher. On answers it is what the student needs more than the
        whole teacher.
        """
        if self.answers is not None:
            return self.answers.excess(student)
        reader = self.reader(rows)
        passed = self.passed(rows)
        if student is reader.teacher:
            return passed.lost
        models = {"teacher": reader.teacher, "student": student}
        values = comparison.compare(models, reader.ranking, passed.hidden)
        return comparison.per_byte(values["student", "kl"], reader.ranking) + passed.lost

    def losses(self, sizes: shape_search.Sizes) -> shape_search.Losses:
        """What every axis costs by itself, measured; from the log where it stands there."""
        before = shape_of(self.run.teacher.config)
        points = {axis: list[tuple[float, float]]() for axis in shape_search.CUTS}
        wanted = [
            (axis, size)
            for axis in shape_search.CUTS[:-1]
            for size in shape_search.probed(sizes[axis])
        ]
        wanted += [("vocab", rows) for rows in sizes["vocab"] if rows != before.vocab]
        for axis, size in cli.counted("axis alone", wanted, len(wanted)):
            points[axis].append((size, self._probe(axis, size)))
        if self.settings.mixed:
            points["bits"] = self._bits_alone()
        left = shape_search.LEFT if self.answers is None else shape_search.ANSWERS_LEFT
        return shape_search.Losses(
            before, points, shape_search.left_after(self.settings.student_iters, left)
        )

    def _bits_alone(self) -> list[tuple[float, float]]:
        """(bits, nats a byte) of the teacher in so many bits a weight, by what each matrix costs on
        calibration text.

        On answers bits cost something else: some sizes are measured there, and the curve is
        stretched to these.
        """
        before = shape_of(self.run.teacher.config)
        tokens_a_byte = comparison.per_byte(np.ones(len(self.ranking.tokens)), self.ranking)
        curve = list[tuple[float, float]]()
        for bpw in np.arange(*shape_search.bpw_range(shape_search.group_of(before)), 0.125):
            bits = self._allocated(
                shape_search.Choice(before, float(bpw)), tuple(range(before.layers))
            )
            nats = sum(self.sensitivity[path][each] for path, each in bits.items())
            curve.append((float(bpw), nats * tokens_a_byte))
        if self.answers is None:
            return curve
        sizes, estimated = np.array(curve).T
        measured = np.array([self._rounded_teacher(bpw) for bpw in BITS_PROBED])
        stretch = measured / np.interp(BITS_PROBED, sizes, estimated)
        stretched = estimated * np.interp(sizes, BITS_PROBED, stretch)
        return list(zip(sizes.tolist(), stretched.tolist(), strict=True))

    def _rounded_teacher(self, bpw: float) -> float:
        """Nats a byte that the teacher loses, every weight rounded to its nearest value in so many
        bits in the mean.
        """
        run, before = self.run, shape_of(self.run.teacher.config)

        def measured() -> dict[str, Any]:
            bits = self._allocated(shape_search.Choice(before, bpw), tuple(range(before.layers)))
            lost, _ = self.lost_rounded(run.teacher, bits, shape_search.group_of(before))
            return {"nats": finite(lost)}

        nats = once(run, PROBES, {"axis": "bits", "size": bpw}, measured)["nats"]
        return WORST if nats is None else max(float(nats), 1e-6)

    def lost_rounded(
        self, model: Checkpoint, bits: Mapping[str, int], group: int
    ) -> tuple[float, int]:
        """(nats a byte that a model loses with every weight rounded to its nearest value, bytes of
        its file then).

        bits: of each matrix, by its path. group: weights that share a scale.
        """
        layout = {path: packed_format.Format(each, group) for path, each in bits.items()}
        with tempfile.TemporaryDirectory(prefix=".tmp-rounded-", dir=self.run.folder) as place:
            out = Path(place) / "model"
            packed_format.write_quantized(model, out, layout, self.run.files)
            rounded = load.open_checkpoint(out)
            return self.lost(rounded, shape_of(model.config).vocab), rounded.nbytes

    def _probe(self, axis: str, size: int) -> float:
        config = self.run.teacher.config
        fewer = axis == "vocab"
        shape = (
            replace(shape_of(config), vocab=size)
            if fewer
            else arch.target_shape(config, {}, **{axis: size})
        )

        def measured() -> dict[str, Any]:
            if fewer:
                return {"nats": finite(self.lost(self.reader(shape.vocab).teacher, shape.vocab))}
            with tempfile.TemporaryDirectory(
                prefix=".tmp-candidate-", dir=self.run.folder
            ) as place:
                student = self.prune(shape, Path(place) / "pruned")
                return {"nats": finite(self.lost(student, shape.vocab))}

        nats = once(
            self.run, PROBES, {"axis": axis, "size": size, "kv_heads": shape.kv_heads}, measured
        )["nats"]
        return WORST if nats is None else float(nats)

    def prune(self, shape: Shape, out: Path) -> Checkpoint:
        """The teacher cut to `shape` by plain importance, as the new folder `out`."""
        teacher = self.reader(shape.vocab).teacher
        cut = select.PruningConfig(scenario="none", importance="rms")
        _, keep = select.select_units(teacher.config, self.statistics, cut, shape)
        slicing.write_student(
            teacher, shape, keep, out, pipeline.DTYPE, self.run.files, lambda: self._directions
        )
        return load.open_checkpoint(out)

    def _allocated(self, choice: shape_search.Choice, layers: Sequence[int]) -> dict[str, int]:
        """{module path of the student: bits}: what its blocks cost in the teacher, by the weights
        that they still have. layers: the teacher's, that stay.
        """
        before = self.run.teacher.config
        config = arch.student_config(self.run.teacher.config, choice.shape, layers)
        whole = arch.tensors_of(before)
        sizes = dict[str, int]()
        costs = dict[str, dict[int, float]]()
        for name, size in arch.tensors_of(config).items():
            path = name.removesuffix(".weight")
            block = arch.block_of(name)
            source = path if block is None else path.replace(f".{block}.", f".{layers[block]}.", 1)
            if source in self.sensitivity:
                sizes[path] = math.prod(size)
                share = sizes[path] / math.prod(whole[f"{source}.weight"])
                costs[path] = {
                    bits: share * nats for bits, nats in self.sensitivity[source].items()
                }
        scales = packed_format.Format(0, shape_search.group_of(choice.shape)).bits_per_weight
        return bit_allocation.allocate(costs, sizes, choice.bpw - scales)

    def score(self, choice: shape_search.Choice, losses: shape_search.Losses) -> float:
        """Nats a byte that should be left of what the student loses as pruned and rounded; from the
        log where it stands there. What its axes cost together, over the sum of what each costs
        alone, is that of before it learns.
        """

        def measured() -> dict[str, Any]:
            group = shape_search.group_of(choice.shape)
            with tempfile.TemporaryDirectory(prefix=".tmp-candidate-", dir=self.run.folder) as temp:
                pruned = self.prune(choice.shape, Path(temp) / "pruned")
                keep = model_writer.read_keep(pruned.path)
                assert keep is not None
                usual = dict.fromkeys(
                    packed_format.layout(pruned.config, group), packed_format.BITS
                )
                bits = self._allocated(choice, keep.layers) if self.settings.mixed else usual
                lost, nbytes = self.lost_rounded(pruned, bits, group)
                sizes = {"params": arch.params(pruned.config), "bytes": nbytes}
                return {**sizes, "nats": finite(lost), "predicted": losses.raw(choice)}

        nats = once(self.run, CANDIDATES, choice.sizes, measured)["nats"]
        return (
            math.inf
            if nats is None
            else losses.expected(choice) * max(nats, 0.0) / max(losses.raw(choice), 1e-9)
        )


def once(
    run: OpenRun, log: str, sizes: Mapping[str, Any], measured: Callable[[], Mapping[str, Any]]
) -> dict[str, Any]:
    """The line of these sizes in a log of the run; where there is none yet it is measured, and
    written.
    """
    lines = run_folder.records(run.folder / log)
    record = next((line for line in lines if all(line.get(a) == n for a, n in sizes.items())), None)
    if record is None:
        record = {**sizes, **measured()}
        run.files.append(run.folder / log, json.dumps(record))
    return record


def finite(value: float) -> float | None:
    """The number; None, which JSON has, for what is none."""
    return float(value) if math.isfinite(value) else None
