"""What a student should learn from: every token, those that it is unsure of, or text that it writes
itself; how fast.

    scripts/mis benchmarks/objectives.py --seed 0    # then 1 and 2: 20 minutes each, 2 cores
    scripts/mis benchmarks/objectives.py --table

The default student of SmolLM2-135M-Instruct, pruned and repaired once a seed; from there every row
trains it whole, by distill's defaults but for what its name says. `everywhere`: KL to the teacher
at every token, the default. `unsure`: at the fifth of a step's tokens at which the student's own
entropy is highest (SE-KD). `own text`: as the default, but in the last fifth of the steps the
student goes on after the first 32 tokens of each window itself, by its own probabilities, and only
what it wrote is graded (GKD). `rate 2e-4`: the default at twice its learning rate. Bits per byte
above the teacher's on the texts of teacher_text.py and on held-out windows of the training text;
seconds are of the processor, one thread, of the steps and a look at two windows. Nothing is
quantized. Writes benchmarks/results/<machine>/objectives-<seed>.json after every row.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import teacher_text
from laboratory import resumed, start, stored, write

from mis_mlx import cli, distill
from mis_mlx.compute import host_losses
from mis_mlx.data import token_windows
from mis_mlx.distillation import live_teacher
from mis_mlx.maths import losses
from mis_mlx.models.writing.draws import Draws, Sampling
from mis_mlx.models.writing.text_writer import TextWriter
from mis_mlx.reporting.text import markdown_table
from mis_mlx.settings import recipe

# share of tokens; of steps, the last ones; tokens of a window that are given
UNSURE = 0.2
OWN = 0.2
PROMPT = 32
WINDOWS = 6  # of each text


@dataclass(frozen=True)
class Row:
    """What is done otherwise than by default."""

    way: Callable[[], AbstractContextManager[None]] = nullcontext
    learning_rate: float = recipe.RATE


def entropies(hidden: mx.array, head: mx.array) -> np.ndarray:
    """(n,) of a student's predictions, in nats, from its hidden states (n, D)."""

    def of(z: np.ndarray) -> np.ndarray:
        p = z.copy()
        lse = host_losses.softmax(p)
        return lse - np.einsum("ij,ij->i", p, z)

    rows = losses.chunk_rows(head.shape[0])
    found = []
    for at in range(0, len(hidden), rows):
        logits = (hidden[at : at + rows] @ head.T).astype(mx.float32)
        found.append(host_losses.by_rows(of, host_losses.view(logits)))
    return np.concatenate(found)


@contextmanager
def unsure() -> Iterator[None]:
    """KL and its gradients at a part of the tokens, weighted so that their mean has the place of
    the mean of all.
    """
    whole: Callable[..., Any] = host_losses.kl_gradients

    def some(
        student: mx.array,
        head: mx.array,
        teacher: mx.array,
        logits: Any,
        loss_mask: mx.array,
        **further: Any,
    ) -> Any:
        counts = np.array(loss_mask, np.float32)
        known = np.where(counts > 0, entropies(student, head), -1.0)
        at = np.sort(np.argsort(known)[-round(UNSURE * np.count_nonzero(counts)) :])
        weights = mx.array(counts[at] * (counts.sum() / counts[at].sum()))
        rows = mx.array(at)
        loss, below, of_head = whole(
            student[rows], head, teacher[rows], logits, loss_mask=weights, **further
        )
        host_gradients = mx.zeros_like(student)
        host_gradients[rows] = below
        return loss, host_gradients, of_head

    host_losses.kl_gradients = some  # type: ignore[assignment]
    try:
        yield
    finally:
        host_losses.kl_gradients = whole


@contextmanager
def own_text() -> Iterator[None]:
    """The last steps are on what the student writes."""
    steps = live_teacher.steps
    usual = live_teacher.step_micro_batches

    def with_student(student: Any, source: Any, data: Any, r: Any, *more: Any, **named: Any) -> Any:
        def written(source: Any, data: Any, r: Any, step: int) -> Any:
            if step < round((1 - OWN) * r.iters):
                return usual(source, data, r, step)
            at = token_windows.order(
                len(data.tokens), r.batch_size * r.grad_accumulation_steps, step, r.seed
            )
            length = data.tokens.shape[1]
            prompts = data.tokens[at, :PROMPT].tolist()
            seeds = np.random.SeedSequence([r.seed, step]).generate_state(len(prompts)).tolist()
            draws = Draws(Sampling(1.0), seeds)
            said = TextWriter(student.model).write(prompts, length - PROMPT, stop=(), draws=draws)
            tokens = np.array(
                [[*prompt, *ids] for prompt, ids in zip(prompts, said, strict=True)], np.int32
            )
            loss_mask = np.zeros(tokens.shape, np.float32)
            loss_mask[:, PROMPT - 1 : -1] = 1
            parts = np.array_split(np.arange(len(at)), r.grad_accumulation_steps)
            return source.micro_batches(
                [(mx.array(tokens[p]), mx.array(loss_mask[p])) for p in parts], parts
            )

        live_teacher.step_micro_batches = written  # type: ignore[assignment]
        return steps(student, source, data, r, *more, **named)

    live_teacher.steps = with_student  # type: ignore[assignment]
    try:
        yield
    finally:
        live_teacher.steps = steps
        live_teacher.step_micro_batches = usual


ROWS = {
    "everywhere": Row(),
    "unsure": Row(unsure),
    "own text": Row(own_text),
    "rate 2e-4": Row(learning_rate=2e-4),
}


@dataclass(frozen=True)
class Settings:
    """How much."""

    seed: int = 0
    """of windows and batches"""
    rows: tuple[str, ...] = tuple(ROWS)
    """which"""
    table: bool = False
    """print what there is, and make nothing"""


def row(name: str, seed: int, begun: Path, out: Path, folders: dict[str, Path]) -> dict[str, Any]:
    """{"seconds", "bits": {text: above the teacher}}."""
    began = time.process_time()
    how = ROWS[name]
    with how.way():
        distill.run(
            distill.Settings(
                student=str(begun),
                out=str(out),
                seed=seed,
                iters=recipe.ITERS,
                learning_rate=how.learning_rate,
                reconstruct_samples=0,
                quantize=0,
                bench_tokens=0,
                eval_windows=1,
            )
        )
    seconds = round(time.process_time() - began, 1)
    judged = teacher_text.judged(
        None, out / "model", {**folders, teacher_text.BUILT_IN: None}, WINDOWS
    )
    return {
        "seconds": seconds,
        "bits": {name: round(of["student"] - of["teacher"], 4) for name, of in judged.items()},
    }


def table(seeds: list[dict[str, Any]]) -> str:
    """Markdown: a column for each row that all seeds have."""
    names = list(ROWS) if seeds else []
    for rows in seeds:
        names = [name for name in names if name in rows]
    texts = list(seeds[0][names[0]]["bits"]) if names else []

    def bits(name: str, text: str) -> str:
        return ", ".join(f"{rows[name]['bits'][text]:.3f}" for rows in seeds)

    def seconds(name: str) -> str:
        return ", ".join(f"{rows[name]['seconds']:.0f}" for rows in seeds)

    body = []
    for text in texts:
        body.append([text, *(bits(name, text) for name in names)])
    body.append(["seconds", *map(seconds, names)])
    return markdown_table(["", *names], body)


def main(s: Settings) -> None:
    """Every row that is not there yet."""
    given = {"windows": WINDOWS, "seed": s.seed}
    name = f"objectives-{s.seed}"
    rows = resumed(name, given, ["rows"]).get("rows", {})
    missing = [each for each in s.rows if each not in rows and not s.table]
    with tempfile.TemporaryDirectory() as temp:
        begun = Path(temp) / "begun"
        folders = teacher_text.texts(Path(temp), None) if missing else {}
        if missing:  # one step too small to move a weight
            distill.run(
                distill.Settings(
                    out=str(begun),
                    seed=s.seed,
                    iters=1,
                    learning_rate=1e-12,
                    quantize=0,
                    bench_tokens=0,
                    eval_windows=1,
                )
            )
        for at, each in enumerate(missing):
            rows[each] = row(
                each, s.seed, begun=begun / "model", out=Path(temp) / f"run-{at}", folders=folders
            )
            cli.say(f"{each}: {rows[each]}")
            write(
                name,
                f"scripts/mis benchmarks/objectives.py --seed {s.seed}",
                {"given": given, "rows": rows},
            )
    found = [stored(f"objectives-{seed}").get("rows", {}) for seed in range(3)]
    print(table([each for each in found if each]))


if __name__ == "__main__":
    start(Settings, main)
