"""A teacher with fewer tokens reads unusual splits: what that costs it, and whether it teaches
better with all of them.

    scripts/mis benchmarks/splits.py                 # the teacher alone: some minutes
    scripts/mis benchmarks/splits.py --students      # and default students of the folded ones: 20
    minutes each, 2 cores
    scripts/mis benchmarks/splits.py --table

SmolLM2-135M-Instruct with the default half of its tokens. `renormalised`: its probabilities over
the tokens that stay, which is what `distill` teaches. `folded`: the probability of every token that
is left out goes to its first piece. `folded, inner`: behind such a piece, the share that belongs to
tokens left out goes to their second pieces. The teacher reads the split text each time. Bits per
byte above the teacher that reads its own tokens, on the texts of teacher_text.py. Students are as
in minutes.py, whose row of 30 steps is that of the renormalised teacher. Writes
benchmarks/results/<machine>/splits.json after every row.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import minutes
import mlx.core as mx
import numpy as np
import teacher_text
from laboratory import resumed, start, write
from tokenizers import Tokenizer

from mis_mlx.data import preparation, token_windows
from mis_mlx.data.token_windows import Windows
from mis_mlx.distillation import live_teacher
from mis_mlx.judge import comparison
from mis_mlx.maths.losses import Logits
from mis_mlx.models.architectures import modules
from mis_mlx.models.opening import compute_type, load, resolve
from mis_mlx.models.opening.trimmed_tokenizer import Vocabulary
from mis_mlx.models.passing import stream
from mis_mlx.pruning import vocabulary
from mis_mlx.reporting.text import markdown_table
from mis_mlx.storage.files import DISK
from mis_mlx.types import Checkpoint

WAYS = ("renormalised", "folded", "folded, inner")
LENGTH = 256  # tokens of a window, and the positions whose logits are made at a time


@dataclass(frozen=True)
class Settings:
    """How much."""

    students: bool = False
    """distil the default student from the folded ones, too"""
    table: bool = False
    """print what there is, and make nothing"""


class Folded:
    """Log-probabilities (n, v) of the tokens in the folder `fewer`, from hidden states (n, D) of
    the whole teacher.
    """

    def __init__(self, teacher: Checkpoint, fewer: Path):
        rows = vocabulary.rows_of(fewer) or []
        texts = Vocabulary(teacher.path).texts
        count = int(teacher.config["vocab_size"])
        bpe = Tokenizer.from_file(str(fewer / "tokenizer.json")).model
        first = np.zeros(count, int)
        second = np.full(count, -1)
        first[rows] = np.arange(len(rows))
        for token in set(range(count)) - set(rows):
            one, two, *_ = bpe.tokenize(texts[token])
            first[token] = one.id
            second[token] = two.id
        order = np.argsort(first, kind="stable")
        self._starts = np.append(np.searchsorted(first[order], np.arange(len(rows))), count)
        self._second = second[order]
        self._head = modules.dense_weight(stream.Stream(teacher).head())[mx.array(order)]
        mx.eval(self._head)

    def __call__(self, hidden: mx.array, tokens: np.ndarray | None = None) -> mx.array:
        """tokens (n,): those that were read, for the pieces behind the first."""
        logits = hidden.astype(mx.float32) @ self._head.T
        p = np.array(mx.softmax(logits, axis=-1))
        q = np.add.reduceat(p, self._starts[:-1], axis=1)
        tokens = np.zeros(0, int) if tokens is None else tokens
        for i in range(1, len(tokens)):
            start, end = self._starts[tokens[i] : tokens[i] + 2]
            before = p[i - 1, start:end]
            second = self._second[start:end]
            gone = second >= 0
            mass = before[gone].sum()
            if mass > 0:
                whole = before.sum()
                q[i] *= 1 - mass / whole
                np.add.at(q[i], second[gone], before[gone] / whole)
        return mx.array(np.log(np.maximum(q, 1e-30)))


def teacher_row(
    teacher: Checkpoint, seen: Checkpoint, folded: Folded, windows: Windows
) -> dict[str, float]:
    """{"own": bits per byte of its own tokens, way: how many more}."""
    own = token_windows.retokenized(
        windows, load.tokenizer(seen.path), load.tokenizer(teacher.path)
    )
    of_own = comparison.compare({"": teacher}, own)["", "nll"]
    of_seen = comparison.compare({"": seen}, windows)["", "nll"]
    nats = {"own": comparison.per_byte(of_own, own)}
    nats[WAYS[0]] = comparison.per_byte(of_seen, windows)
    sums = np.zeros(2)
    nbytes = windows.text_bytes.sum()
    states = comparison.final_hidden(seen, windows)
    for tokens, loss_mask, hidden in zip(windows.tokens, windows.loss_mask, states, strict=True):
        at = np.flatnonzero(loss_mask[:-1])
        for k, read in enumerate((None, tokens)):
            log_p = np.array(folded(hidden[0], read))
            sums[k] -= log_p[at, tokens[at + 1]].sum()
    nats |= dict(zip(WAYS[1:], (sums / nbytes).tolist(), strict=True))
    bits = {name: value / math.log(2) for name, value in nats.items()}
    found = {name: round(value - bits["own"], 4) for name, value in bits.items()}
    return found | {"own": round(bits["own"], 4)}


class Teacher(live_teacher.StreamedTeacher):
    """The teacher of a run, folded."""

    whole: Checkpoint
    inner = False

    def micro_batches(self, batches: Any, windows: Any = ()) -> Any:
        """Remembers the windows, whose logits are asked for one by one."""
        self._coming = list[np.ndarray]()
        for tokens, _ in batches:
            self._coming += map(np.array, tokens)
        return super().micro_batches(batches, windows)

    @cached_property
    def logits(self) -> Logits:
        """Log-probabilities; they are logits, too."""
        folded = Folded(self.whole, self._source.checkpoint.path)

        def of(hidden: mx.array) -> mx.array:
            tokens = self._coming.pop(0)
            assert len(tokens) == len(hidden) == LENGTH
            return folded(hidden, tokens if self.inner else None)

        return of


def table(found: dict[str, Any]) -> str:
    """Markdown: of every text the teacher's own bits per byte, what each way adds, and its
    student.
    """
    students = found.get("students", {})
    head = ["", "own", *WAYS, *(f"student, {way}" for way in students)]
    body = []
    for text, row in found.get("teacher", {}).items():
        cells = [f"{row['own']:.3f}", *(f"{row[way]:+.3f}" for way in WAYS)]
        body.append([text, *cells, *(f"{s['distilled'][text]:+.3f}" for s in students.values())])
    return markdown_table(head, body)


def main(s: Settings) -> None:
    """Every row that is not there yet."""
    given = {"length": LENGTH, "eval_windows": minutes.EVAL_WINDOWS}
    found = resumed("splits", given, ["teacher", "students"])
    command = "scripts/mis benchmarks/splits.py --students"
    teacher = compute_type.open_to_compute(resolve.resolve_model(None).path)
    with tempfile.TemporaryDirectory() as temp:
        folders = {} if s.table else teacher_text.texts(Path(temp), None)
        if not s.table and "teacher" not in found:
            data = preparation.prepare(None, load.tokenizer(teacher.path), LENGTH)
            how = vocabulary.VocabularyConfig("0.5x")
            rows = vocabulary.size(how.vocab, teacher.path, int(teacher.config["vocab_size"]))
            seen, data = vocabulary.of_run(
                teacher,
                None,
                rows=rows,
                own=data,
                config=how,
                source=None,
                run=Path(temp),
                files=DISK,
            )
            folded = Folded(teacher, seen.path)
            texts = {own: data.held_out[name] for own, name in minutes.OWN.items()}
            for name, folder in folders.items():
                other = preparation.prepare(str(folder), load.tokenizer(seen.path), LENGTH)
                texts[name] = next(iter(other.held_out.values()))
            found["teacher"] = {}
            for name, windows in texts.items():
                chosen = comparison.spread_windows(windows, minutes.EVAL_WINDOWS)
                found["teacher"][name] = teacher_row(teacher, seen, folded, chosen)
            write("splits", command, {"given": given, **found})
        for way in WAYS[1:] if s.students and not s.table else ():
            if way not in found.setdefault("students", {}):
                Teacher.whole = teacher
                Teacher.inner = way == WAYS[2]
                live_teacher.StreamedTeacher = Teacher  # type: ignore[misc]
                run = Path(temp) / f"run-{WAYS.index(way)}"
                found["students"][way] = minutes.row(30, 0, run, folders)
                write("splits", command, {"given": given, **found})
    print(table(found))


if __name__ == "__main__":
    start(Settings, main)
