"""What students of a search lose, measured: in nats a byte, several in one pass over the teacher.

On the teacher's answers it is what a student needs more than the teacher with all rows. On text,
and on answers that another model gave, it is KL(teacher || student), the teacher having the
student's vocabulary, and what that vocabulary costs the teacher. Every measurement is a line in a
log before the next pass begins, so a search that was killed goes on from there.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mis_mlx import cli
from mis_mlx.compute import precision
from mis_mlx.data import preparation, token_windows
from mis_mlx.data.token_windows import Windows
from mis_mlx.distillation import answer_loss
from mis_mlx.distillation.distill_flags import DistillFlags
from mis_mlx.hardware.stage_cost import WINDOWS
from mis_mlx.judge import answers, comparison, score
from mis_mlx.judge.prompts import Answer, Prompt
from mis_mlx.maths import rounding, stats
from mis_mlx.maths.importance import Statistics
from mis_mlx.models.architectures import arch
from mis_mlx.models.architectures.families import family, shape_of
from mis_mlx.models.architectures.shape import Shape
from mis_mlx.models.opening import load
from mis_mlx.models.opening.model_size import model_of
from mis_mlx.models.passing import stream
from mis_mlx.pruning import calibrate, select, vocabulary
from mis_mlx.quantization import bit_allocation, packed_format
from mis_mlx.runs.run_loop import OpenRun
from mis_mlx.size_search import shape_search
from mis_mlx.size_search.shape_search import Choice, Losses, Sizes
from mis_mlx.size_search.unwritten import Running, Student, at_once, passed
from mis_mlx.storage.files import DISK
from mis_mlx.storage.hidden_spool import Spool
from mis_mlx.storage.journal import Journal
from mis_mlx.types import Checkpoint, MisError

PROBES = "probes.jsonl"
CANDIDATES = "candidates.jsonl"
RANK_WINDOWS = 6  # held-out windows that rank; a third as many of every other text
WORST = 100.0  # nats a byte of a student whose loss is not a number
Costs = dict[str, dict[int, float]]  # module path: bits: nats
Curve = list[tuple[float, float]]  # (size, nats a byte)


def journal_of(folder: Path, log: str) -> Journal:
    """A log of a search in a folder, as a journal: a record for each student."""
    key = ("axis", "size") if log == PROBES else ("ffn", "vocab", "bits")
    return Journal(folder / log, key)


def bits_probed(fewest: float) -> tuple[float, float]:
    """Bits of a weight, scales included, at which rounding is measured. fewest: that there can be.

    4 and 5; more where a model has no student of 4.
    """
    low = max(4.0, fewest)
    return low, max(5.0, low + 0.5)


class Text(NamedTuple):
    """What a reader is measured on. windows: its loss_mask says what counts; batches [(1, T)].

    counts: of answers, how many tokens at the end of each text are the answer's; else empty.
    """

    windows: Windows
    batches: stream.Batches
    counts: Sequence[int]


@dataclass
class Candidates:
    """The students of a search, and what their measurements share.

    teacher: with all rows. data: all text, in its tokens. asked: the flags of the run, of which the
    search is a part. streams: whether every pass reads the teacher from disk; direct: past the page
    cache.
    """

    run: OpenRun
    teacher: Checkpoint
    data: preparation.Data
    asked: DistillFlags
    streams: bool = False
    direct: bool = False
    # by their rows: the teacher with fewer of them, its nats a byte
    trimmed_teachers: dict[int, Checkpoint] = field(default_factory=dict)
    reader_nats: dict[int, float] = field(default_factory=dict)

    @cached_property
    def ranking(self) -> Windows:
        """The windows that rank, in the teacher's own tokens: of the text to choose by, or of each
        held-out text.

        None more than half of a held-out text, for windows that chose a student do not judge it.
        """
        if self.data.choosing is not None:
            return comparison.spread_windows(self.data.choosing, RANK_WINDOWS)
        ranks = list[Windows]()
        for name, windows in self.data.held_out.items():
            share = 3 if ranks else 1
            held = len(windows.tokens)
            if held < 4:
                raise MisError(
                    f"the text {name} has {held} held-out windows, but a search needs 4 or more: "
                    f"add text"
                )
            most = min(math.ceil(RANK_WINDOWS / share), held // 2)
            ranks.append(windows.pick(stats.spread(held, most)))
        return token_windows.concatenated(ranks)

    @cached_property
    def own_answers(self) -> bool:
        """Whether the answers are the teacher's; else the package's, which another model gave.

        What is lost on those is told by the teacher's probabilities, not by what they cost.
        """
        return not self.streams or answers.shipped_for(self.teacher)

    @cached_property
    def answers(self) -> list[tuple[Prompt, Answer]]:
        """The answers on which losses are measured; []: they are measured on text."""
        if not score.has_template(self.teacher):
            return []
        most = answer_loss.MOST_ANSWERS if self.own_answers else answer_loss.MOST_ANSWERS_OF_OTHERS
        return answer_loss.last_answers(self.data.talks, most)

    @cached_property
    def samples(self) -> stream.Batches:
        """Windows (1, T) of calibration."""
        asked = self.asked
        return preparation.calibration(self.data.train, asked.num_samples, asked.seed, 1)

    @cached_property
    def before(self) -> Shape:
        """The teacher's shape."""
        return shape_of(self.teacher.config)

    @cached_property
    def statistics(self) -> Statistics:
        """One streamed calibration, for all students with fewer neurons.

        Without the weather: a student's shape must not depend on the machine's temperature.
        """
        cost = calibrate.calibration_cost(
            model_of(self.teacher),
            self.asked.num_samples,
            self.asked.max_seq_length,
            self.run.budget_bytes,
            rotation=False,
        )
        held = cost.stays[WINDOWS]
        states: stream.Hidden = list[mx.array]()
        if held < len(self.samples):
            states = Spool(self.run.folder, held)
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
            DISK.replace_text(path, json.dumps(nats))
        stored = json.loads(path.read_text("utf-8"))
        for name, costs in stored.items():  # JSON's keys are text
            stored[name] = {int(bits): cost for bits, cost in costs.items()}
        for name, fewest in family(self.teacher.config).bit_floors().items():
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
        cost = bit_allocation.sensing_cost(model_of(self.teacher), length, self.run.budget_bytes)
        held = cost.stays[WINDOWS]
        # What enters each block is kept: as many arrays for a window as the teacher has blocks.
        states = None
        if held < len(batches):
            arrays = held * self.before.layers
            states = Spool(run.folder, arrays)
        nats = bit_allocation.costs(
            self.teacher,
            batches,
            shape_search.group_of(self.before),
            rounding.CANDIDATE_BITS,
            seed=self.asked.seed,
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

    def trimmed_teacher(self, rows: int) -> Checkpoint:
        """The teacher with so many rows, made once."""
        if rows == self.before.vocab:
            return self.teacher
        if rows not in self.trimmed_teachers:
            run = self.run
            place = run.folder / f"{vocabulary.FOLDER}-{rows}"
            DISK.make_folder(place)
            self.trimmed_teachers[rows] = vocabulary.teacher_of_run(
                self.teacher,
                None,
                rows,
                self.data.train,
                config=self.asked,
                run=place,
            )
        return self.trimmed_teachers[rows]

    def student(
        self, shape: Shape, bits: Mapping[str, int] | None = None, *, fit: bool = True
    ) -> Student:
        """The student of this shape, in memory alone. bits: of each matrix; None: not rounded.

        FFN neurons stay by plain importance. fit: on fitted grids; else on MLX's own.
        """
        reader = self.trimmed_teacher(shape.vocab)
        keep = None
        if shape.ffn != self.before.ffn:
            cut = select.PruningConfig(scenario="none", importance="rms")
            _, keep = select.select_units(reader.config, self.statistics, cut, shape)
        group = shape_search.group_of(shape)
        formats = {path: packed_format.Format(n, group) for path, n in (bits or {}).items()}
        return Student(reader, shape, keep, formats, fit=fit)

    def allocated(self, choice: Choice) -> dict[str, int]:
        """{module path of the student: bits}, given to matrices where they pay.

        A matrix costs what it costs in the teacher, by the weights that it still has. MisError
        where the matrices need more bits.
        """
        before = arch.tensors_of(self.teacher.config)
        sizes = {}
        costs = Costs()
        after = arch.tensors_of(arch.student_config(self.teacher.config, choice.shape))
        for name, size in after.items():
            path = name.removesuffix(".weight")
            if path in self.sensitivity:
                sizes[path] = math.prod(size)
                share = sizes[path] / math.prod(before[name])
                costs[path] = {bits: share * nats for bits, nats in self.sensitivity[path].items()}
        scales = packed_format.Format(0, shape_search.group_of(choice.shape)).bits_per_weight
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

    def text_of(self, reader: Checkpoint) -> Text:
        """The answers or the windows that rank, in the tokens of a reader."""
        if not self.answers:
            windows = self.ranking
            if reader is not self.teacher:
                own = load.tokenizer(self.teacher.path)
                windows = token_windows.retokenized(windows, own, load.tokenizer(reader.path))
            return Text(windows, [mx.array(window[None]) for window in windows.tokens], ())
        prompts, given = zip(*self.answers, strict=True)
        texts, counts = score.tokens_of(reader, prompts, given)
        tokens = np.zeros((len(texts), max(map(len, texts))), np.int32)
        loss_mask = np.zeros(tokens.shape, np.float32)
        for number, (text, count) in enumerate(zip(texts, counts, strict=True)):
            tokens[number, : len(text)] = text
            last = len(text) - 1
            loss_mask[number, last - count : last] = 1  # a token is predicted one place before it
        nbytes = np.array([len(answer.text.encode()) for answer in given], np.float64)
        windows = Windows(tokens, loss_mask, text_bytes=nbytes)
        return Text(windows, [mx.array([text]) for text in texts], counts)

    def lost(self, students: Sequence[Student]) -> list[float]:
        """Nats a byte that students lose, each in the tokens of its reader. One streamed pass.

        Readers stand beside their students where these are compared with them, and where what they
        need themselves is not known yet.
        """
        compares = not self.answers or not self.own_answers
        changed = [student for student in students if student.changed]
        compared = {student.shape.vocab for student in changed if compares}
        wanted = sorted({self.before.vocab, *(student.shape.vocab for student in students)})
        rows = [n for n in wanted if n in compared or n not in self.reader_nats]
        texts = {n: self.text_of(self.trimmed_teacher(n)) for n in wanted}
        bare = [self.student(replace(self.before, vocab=n)) for n in rows]
        running = passed(
            self.teacher,
            [*bare, *changed],
            [texts[student.shape.vocab].batches for student in (*bare, *changed)],
            direct=self.direct,
        )
        of_reader = dict(zip(rows, running[: len(rows)], strict=True))
        of_changed = iter(running[len(rows) :])
        for n in rows:
            if n not in self.reader_nats:
                self.reader_nats[n] = _nats(texts[n], of_reader[n])
        base = self.reader_nats[self.before.vocab]
        lost = []
        for student in students:
            n = student.shape.vocab
            of_tokens = self.reader_nats[n] - base
            if not student.changed:
                lost.append(of_tokens)
            elif compares:
                windows = texts[n].windows
                _, _, divergence, *_ = comparison.window_means(
                    of_reader[n], next(of_changed), windows
                )
                lost.append(comparison.per_byte(divergence, windows) + of_tokens)
            else:
                lost.append(_nats(texts[n], next(of_changed)) - base)
        return lost

    def fitted_share(self, student: Student) -> float:
        """The share of its loss that fitted grids leave a student of nearest values.

        The loss is quadratic in the error that rounding makes, and of that error fitted grids leave
        a share, which some rows of each matrix tell, weighed by what it costs in its bits. Fitting
        takes 30 times as long. SmolLM2-135M in 4 and 5 bits, on its answers: 0.219 and 0.050 bits a
        byte so, 0.258 and 0.054 on fitted ones.
        """
        fitted = 0.0
        nearest = 0.0
        fused = precision.compiles()
        for path, kind in student.formats.items():
            cost = self.sensitivity[path][kind.bits]
            if not cost:
                continue
            name = f"{path}.weight"
            rows = load.dense_sample(student.reader, name)
            fitted += cost
            nearest += cost / rounding.fit_share(rows, kind.group, kind.bits, fused=fused)
        return fitted / nearest if nearest else 1.0

    def losses(self, sizes: Sizes) -> Losses:
        """What every axis costs by itself: measured, or read from the log."""
        probes: list[tuple[str, float]] = [*shape_search.probes_of(sizes)]
        if self.asked.quantize and (self.answers or self.streams):
            fewest, _ = shape_search.bpw_range(self.teacher.config, self.before)
            probes += [("bits", bpw) for bpw in bits_probed(fewest)]
        lines = []
        choices = []
        for axis, size in probes:
            lines.append({"axis": axis, "size": size})
            if axis == "bits":
                choices.append(Choice(self.before, size))
            elif axis == "ffn":
                shape = replace(self.before, ffn=int(size))
                choices.append(Choice(shape, shape_search.UNROUNDED))
            else:
                shape = replace(self.before, vocab=int(size))
                choices.append(Choice(shape, shape_search.UNROUNDED))
        points: dict[str, Curve] = {"ffn": [], "vocab": [], "bits": []}
        for line in self._logged_or_measured(PROBES, lines, choices):
            nats = WORST if line["nats"] is None else float(line["nats"])
            points[line["axis"]].append((line["size"], nats))
        measured = points.pop("bits")
        if self.asked.quantize:
            points["bits"] = self._bits_alone(measured)
        remaining = shape_search.REMAINING_LOSS
        if self.answers:
            remaining = shape_search.REMAINING_ANSWER_LOSS
        return Losses(
            self.before, points, shape_search.remaining_after(self.asked.iters, remaining)
        )

    def _bits_alone(self, measured: Curve) -> Curve:
        """(bits, nats a byte) of the teacher in so many bits a weight.

        They are sums of what each matrix costs on calibration text. What the answers lose, or other
        text, is something else: some sizes are measured, and the curve is stretched to these.
        """
        ones = np.ones(len(self.ranking.tokens))
        tokens_a_byte = comparison.per_byte(ones, self.ranking)
        sizes = np.arange(*shape_search.bpw_range(self.teacher.config, self.before), 0.125)
        estimated = np.zeros(len(sizes))
        for number, bpw in enumerate(sizes):
            chosen = self.allocated(Choice(self.before, float(bpw)))
            costs = [self.sensitivity[path][bits] for path, bits in chosen.items()]
            estimated[number] = sum(costs) * tokens_a_byte
        if measured:
            probed, nats = np.array(measured).T
            stretch = np.maximum(nats, 1e-6) / np.interp(probed, sizes, estimated)
            estimated = estimated * np.interp(sizes, probed, stretch)
        return list(zip(sizes.tolist(), estimated.tolist(), strict=True))

    def scores(self, choices: Sequence[Choice], expected: Losses) -> list[float]:
        """Nats a byte that should be left of each student's loss once it has learned.

        The loss as pruned and rounded is measured, or read from the log. Its ratio to the sum of
        what each axis costs alone is that of before learning; it corrects the expected loss.
        """
        lines = [choice.sizes | {"predicted": expected.raw(choice)} for choice in choices]
        found = []
        records = self._logged_or_measured(CANDIDATES, lines, choices)
        for choice, record in zip(choices, records, strict=True):
            nats = record["nats"]
            if nats is None:
                found.append(math.inf)
                continue
            alone = max(expected.raw(choice), 1e-9)
            found.append(expected.expected(choice) * max(nats, 0.0) / alone)
        return found

    def _logged_or_measured(
        self, log: str, lines: Sequence[dict[str, Any]], choices: Sequence[Choice]
    ) -> list[dict[str, Any]]:
        """The lines of these students in a log, with "nats"; those missing are measured now.

        Some of them in each pass. lines: what they have beside; no "nats" where a loss is none.
        """
        journal = journal_of(self.run.folder, log)
        known = journal.read()
        keys = [journal.key_of(line) for line in lines]
        missing = [number for number, key in enumerate(keys) if key not in known]
        some = 1  # students in a pass, within the budget
        if missing:
            length = self.asked.max_seq_length
            windows = len(self.answers) or len(self.ranking.tokens)
            t = model_of(self.teacher)
            some, _ = at_once(t, len(missing), windows, length, self.run.budget_bytes)
        parts = [missing[first : first + some] for first in range(0, len(missing), some)]
        # Of a teacher that streams bits alone are measured coarsely: what is chosen by that is not.
        fit = log == CANDIDATES or not self.streams
        shown = log == PROBES and missing
        for part in cli.show_progress("axes alone", parts) if shown else parts:
            students = []
            for number in part:
                choice = choices[number]
                bits = None
                if self.asked.quantize and choice.bpw != shape_search.UNROUNDED:
                    bits = self.allocated(choice)
                students.append(self.student(choice.shape, bits, fit=fit))
            for number, student, nats in zip(part, students, self.lost(students), strict=True):
                line = dict(lines[number])
                if log == CANDIDATES:
                    line |= {"params": arch.params(student.config), "bytes": student.nbytes}
                if not fit:
                    nats *= self.fitted_share(student)
                # JSON has no number for one that is infinite, or none
                line["nats"] = float(nats) if math.isfinite(nats) else None
                known[keys[number]] = line
                journal.add(line)
            self.run.account.keep_sometimes()
        return [known[key] for key in keys]


def _nats(text: Text, run: Running) -> float:
    """What a byte costs a student, in nats."""
    if text.counts:
        tokens: list[Any] = [batch[0].tolist() for batch in text.batches]
        found = score.after_pass(*run, tokens, text.counts)
        assert text.windows.text_bytes is not None
        return float(-sum(values.sum() for values in found) / text.windows.text_bytes.sum())
    nats, *_ = comparison.window_means(run, run, text.windows)
    return comparison.per_byte(nats, text.windows)
