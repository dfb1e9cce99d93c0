"""What students lose, measured: in nats a byte, several in one pass over the teacher.

On the teacher's answers it is what a student needs more than the teacher with all rows. On text,
and on answers that another model gave, it is KL(teacher || student), the teacher having the
student's vocabulary, and what that vocabulary costs the teacher. Every measurement is a line in a
log before the next pass begins, so a search that was killed goes on from there.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from mis_mlx import cli
from mis_mlx.compute import precision
from mis_mlx.data.token_windows import Windows
from mis_mlx.judge import comparison, score
from mis_mlx.maths import rounding
from mis_mlx.models.architectures import arch
from mis_mlx.models.architectures.shape import Shape
from mis_mlx.models.architectures.sizes import shape_of
from mis_mlx.models.opening import load
from mis_mlx.models.passing.stream import Batches
from mis_mlx.size_search import candidates, shape_search, unwritten
from mis_mlx.size_search.candidates import CANDIDATES, PROBES, WORST, Candidates
from mis_mlx.size_search.shape_search import Choice, Losses, Sizes
from mis_mlx.size_search.unwritten import Running, Student
from mis_mlx.types import Checkpoint

Curve = list[tuple[float, float]]  # (size, nats a byte)
Record = dict[str, Any]  # a line of a log


@dataclass(frozen=True)
class Text:
    """What a reader is measured on. windows: its loss_mask says what counts; batches [(1, T)].

    counts: of answers, how many tokens at the end of each text are the answer's.
    """

    windows: Windows
    batches: Batches
    counts: Sequence[int] = ()


def text_of(c: Candidates, reader: Checkpoint) -> Text:
    """The answers or the windows that rank, in the tokens of a reader."""
    if c.answers is None:
        windows = c.trimmed_teacher(shape_of(reader.config).vocab).ranking
        return Text(windows, [mx.array(window[None]) for window in windows.tokens])
    texts, counts = score.tokens_of(reader, c.answers.prompts, c.answers.answers)
    tokens = np.zeros((len(texts), max(map(len, texts))), np.int32)
    loss_mask = np.zeros(tokens.shape, np.float32)
    for number, (text, count) in enumerate(zip(texts, counts, strict=True)):
        tokens[number, : len(text)] = text
        last = len(text) - 1
        loss_mask[number, last - count : last] = 1  # a token is predicted one place before it
    windows = Windows(tokens, loss_mask, text_bytes=c.answers.nbytes)
    return Text(windows, [mx.array([text]) for text in texts], counts)


def of_students(c: Candidates, students: Sequence[Student]) -> list[float]:
    """Nats a byte that students lose, each in the tokens of its reader. One streamed pass.

    Readers stand beside their students where these are compared with them, and where what they need
    themselves is not known yet.
    """
    compares = c.answers is None or not c.answers.own
    changed = [student for student in students if student.changed]
    compared = {student.shape.vocab for student in changed if compares}
    wanted = {c.before.vocab, *(student.shape.vocab for student in students)}
    rows = [n for n in sorted(wanted) if n in compared or n not in c.reader_nats]
    readers = [c.trimmed_teacher(n).teacher for n in sorted(wanted)]
    texts = {shape_of(reader.config).vocab: text_of(c, reader) for reader in readers}
    bare = [c.unwritten(replace(c.before, vocab=n)) for n in rows]
    running = unwritten.passed(
        c.teacher,
        [*bare, *changed],
        [texts[student.shape.vocab].batches for student in (*bare, *changed)],
        direct=c.direct,
    )
    of_reader = dict(zip(rows, running[: len(rows)], strict=True))
    of_changed = iter(running[len(rows) :])
    for n in rows:
        if n not in c.reader_nats:
            c.reader_nats[n] = _nats(texts[n], of_reader[n])
    base = c.reader_nats[c.before.vocab]
    lost = []
    for student in students:
        n = student.shape.vocab
        of_tokens = c.reader_nats[n] - base
        if not student.changed:
            lost.append(of_tokens)
        elif compares:
            lost.append(_divergence(texts[n], of_reader[n], next(of_changed)) + of_tokens)
        else:
            lost.append(_nats(texts[n], next(of_changed)) - base)
    return lost


def _nats(text: Text, run: Running) -> float:
    """What a byte costs a student, in nats."""
    if text.counts:
        tokens: list[Any] = [batch[0].tolist() for batch in text.batches]
        found = score.after_pass(*run, tokens, text.counts)
        assert text.windows.text_bytes is not None
        return float(-sum(values.sum() for values in found) / text.windows.text_bytes.sum())
    nats, *_ = comparison.window_means(run, run, text.windows)
    return comparison.per_byte(nats, text.windows)


def _divergence(text: Text, reader: comparison.Passed, student: comparison.Passed) -> float:
    """KL(reader || student), in nats a byte."""
    _, _, divergence, *_ = comparison.window_means(reader, student, text.windows)
    return comparison.per_byte(divergence, text.windows)


def of_coarse(c: Candidates, students: Sequence[Student]) -> list[float]:
    """`of_students`, where all will be rounded on fitted grids, and some are on MLX's own here.

    The loss is quadratic in the error that rounding makes, and of that error grids that are fitted
    leave a share, which some rows of each matrix tell. Fitting takes 30 times as long. SmolLM2-135M
    in 4 and 5 bits, on its answers: 0.219 and 0.050 bits a byte so, 0.258 and 0.054 on fitted ones.
    """
    shares = [1.0 if student.fit else _fitted_share(c, student) for student in students]
    return [lost * share for lost, share in zip(of_students(c, students), shares, strict=True)]


def _fitted_share(c: Candidates, student: Student) -> float:
    """The share of its loss that fitted grids leave, by what each matrix costs in its bits."""
    fitted = 0.0
    nearest = 0.0
    fused = precision.compiles()
    for path, kind in student.formats.items():
        cost = c.sensitivity[path][kind.bits]
        if not cost:
            continue
        name = f"{path}.weight"
        rows = load.dense_sample(student.reader, name, "float32", rounding.SAMPLED)
        fitted += cost
        nearest += cost / rounding.fit_share(rows, kind.group, kind.bits, fused=fused)
    return fitted / nearest if nearest else 1.0


def bits_probed(fewest: float) -> tuple[float, float]:
    """Bits of a weight, scales included, at which rounding is measured. fewest: that there can be.

    4 and 5; more where a model has no student of 4.
    """
    low = max(4.0, fewest)
    return low, max(5.0, low + 0.5)


def losses(c: Candidates, sizes: Sizes) -> Losses:
    """What every axis costs by itself: measured, or read from the log."""
    probes: list[tuple[str, float]] = [*shape_search.probes_of(sizes)]
    on_answers = c.answers is not None
    if c.rounds and (on_answers or c.streams):
        probes += [("bits", bpw) for bpw in bits_probed(c.bpw_range[0])]
    points: dict[str, Curve] = {"ffn": [], "vocab": []}
    bits = Curve()
    for (axis, size), nats in zip(probes, _probed(c, probes), strict=True):
        if axis == "bits":
            bits.append((size, max(nats, 1e-6)))
        else:
            points[axis].append((size, nats))
    if c.rounds:
        points["bits"] = _bits_alone(c, bits)
    remaining = shape_search.REMAINING_LOSS
    if on_answers:
        remaining = shape_search.REMAINING_ANSWER_LOSS
    return Losses(c.before, points, shape_search.remaining_after(c.recipe.iters, remaining))


def _bits_alone(c: Candidates, measured: Curve) -> Curve:
    """(bits, nats a byte) of the teacher in so many bits a weight.

    They are sums of what each matrix costs on calibration text. What the answers lose, or other
    text, is something else: some sizes are measured, and the curve is stretched to these.
    """
    ones = np.ones(len(c.ranking.tokens))
    tokens_a_byte = comparison.per_byte(ones, c.ranking)
    curve = Curve()
    for bpw in np.arange(*c.bpw_range, 0.125):
        chosen = c.allocated(Choice(c.before, float(bpw)))
        costs = [c.sensitivity[path][bits] for path, bits in chosen.items()]
        nats = sum(costs) * tokens_a_byte
        curve.append((float(bpw), nats))
    if not measured:
        return curve
    sizes, estimated = np.array(curve).T
    probed, nats_probed = np.array(measured).T
    stretch = nats_probed / np.interp(probed, sizes, estimated)
    stretched = estimated * np.interp(sizes, probed, stretch)
    return list(zip(sizes.tolist(), stretched.tolist(), strict=True))


def _probed(c: Candidates, probes: Sequence[tuple[str, float]]) -> list[float]:
    """Nats a byte that the teacher loses when one axis is cut to a size, for each of these."""
    asked = []
    for axis, size in probes:
        sizes = {"axis": axis, "size": size}
        if axis == "bits":
            asked.append(_Asked(sizes, c.before, size))
        elif axis == "ffn":
            asked.append(_Asked(sizes, replace(c.before, ffn=int(size)), None))
        else:
            asked.append(_Asked(sizes, replace(c.before, vocab=int(size)), None))
    records = _logged_or_measured(c, PROBES, asked, "axes alone")
    found = []
    for record in records:
        nats = record["nats"]
        found.append(WORST if nats is None else float(nats))
    return found


@dataclass(frozen=True)
class _Asked:
    """A student to be measured. sizes: of it, in a log. bpw: None: it is not rounded.

    predicted: nats that its axes should cost together; None: it is cut along one alone.
    """

    sizes: Mapping[str, Any]
    shape: Shape
    bpw: float | None
    predicted: float | None = None


def scores(c: Candidates, choices: Sequence[Choice], expected: Losses) -> list[float]:
    """Nats a byte that should be left of each student's loss once it has learned.

    The loss as pruned and rounded is measured, or read from the log. Its ratio to the sum of what
    each axis costs alone is that of before learning; it corrects the expected loss.
    """
    asked = []
    for choice in choices:
        bpw = choice.bpw if c.rounds else None
        asked.append(_Asked(choice.sizes, choice.shape, bpw, expected.raw(choice)))
    found = []
    for choice, record in zip(choices, _logged_or_measured(c, CANDIDATES, asked), strict=True):
        nats = record["nats"]
        if nats is None:
            found.append(math.inf)
            continue
        alone = max(expected.raw(choice), 1e-9)
        found.append(expected.expected(choice) * max(nats, 0.0) / alone)
    return found


def _logged_or_measured(
    c: Candidates, log: str, asked: Sequence[_Asked], shown: str = ""
) -> list[Record]:
    """The lines of these students in a log; those that are missing are measured now, some a pass.

    shown: a name for the bar; '': there is none.
    """
    journal = candidates.journal_of(c.run.folder, log, c.run.files)
    known = journal.read()
    found = [known.get(journal.key_of(one.sizes)) for one in asked]
    missing = [number for number, line in enumerate(found) if line is None]
    if not missing:
        return [line for line in found if line is not None]
    at_once = c.students_at_once
    parts = [missing[first : first + at_once] for first in range(0, len(missing), at_once)]
    for part in cli.show_progress(shown, parts, len(parts)) if shown else parts:
        for number, record in zip(part, _measured(c, [asked[n] for n in part]), strict=True):
            found[number] = record
            journal.add(record)
        c.run.account.keep_sometimes()
    return [line for line in found if line is not None]


def _measured(c: Candidates, asked: Sequence[_Asked]) -> list[Record]:
    """Lines of students for a log, from one pass."""
    students = []
    for one in asked:
        bits = None
        if one.bpw is not None:
            bits = c.allocated(Choice(one.shape, one.bpw))
        # Of a teacher that streams bits alone are measured coarsely: what is chosen by that is not.
        fit = not c.streams or one.predicted is not None
        students.append(c.unwritten(one.shape, bits, fit=fit))
    lost = of_coarse(c, students)
    records = []
    for one, student, nats in zip(asked, students, lost, strict=True):
        record = dict(one.sizes)
        if one.predicted is not None:
            record |= {"params": arch.params(student.config), "bytes": student.nbytes}
        record["nats"] = candidates.finite_or_none(nats)
        if one.predicted is not None:
            record["predicted"] = one.predicted
        records.append(record)
    return records
