"""Does `--lose` keep its word: runs for several losses and seeds, beside the teacher in MLX's bits.

    scripts/mis benchmarks/lose.py                          # a run takes 10 minutes on 2 cores
    scripts/mis benchmarks/lose.py --teacher gemma-3-270m
    scripts/mis benchmarks/lose.py --losses 0.2 --seeds 1

Every run is `distill --lose LOSS --seed SEED` with distill's defaults. It is judged by the run
itself: bits per byte above the teacher of the teacher's answers to held-out prompts, and how many
of the student's own greedy answers repeat themselves; a teacher without a chat template is judged
on text. The baselines are the whole teacher as `mlx_lm.convert -q` rounds it, judged on the same
prompts. Finished rows are not made again. Writes benchmarks/results/<machine>/lose-<teacher>.json
after every row.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from laboratory import experiment, packed, start, unpacked

from mis_mlx import distill
from mis_mlx.hardware import memory
from mis_mlx.judge import answers, repetition
from mis_mlx.judge.score import has_template
from mis_mlx.models.opening import compute_type, resolve
from mis_mlx.reporting import run_reader
from mis_mlx.settings import recipe

PACKED_BITS = 4, 3
KEPT_RESULTS = (
    "params_student",
    "bytes_4-bit",
    "expected_loss",
    "reached_loss",
    "loss_of",
    "loops_teacher",
    "loops_4-bit",
    "answers_excess_distilled",
    "peak_bytes",
)


@dataclass(frozen=True)
class Settings:
    """Which rows."""

    teacher: str | None = None
    """folder, hub id or gemma-3-270m; default: SmolLM2-135M-Instruct"""
    losses: tuple[float, ...] = (0.1, 0.03, 0.2)
    """values of --lose"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """of batches and windows; the first seed of every loss comes first"""


def run_row(teacher: str | None, loss: float, seed: int) -> dict[str, Any]:
    """One run, from the search to the measurement, without its timed part."""
    with tempfile.TemporaryDirectory() as temp:
        out = Path(temp) / "run"
        settings = distill.Settings(teacher=teacher, lose=loss, seed=seed, out=str(out))
        result = distill.run(settings)
        seconds = run_reader.read(out).took()
    row = {name: result[name] for name in KEPT_RESULTS if name in result}
    row["seconds"] = {name: round(took, 1) for name, took in seconds.items()}
    return row


def packed_row(teacher: str | None, bits: int) -> dict[str, Any]:
    """The teacher in MLX's bits, judged as a run judges its student."""
    whole = compute_type.open_to_compute(resolve.resolve_model(teacher).path)
    with tempfile.TemporaryDirectory() as temp:
        rounded = compute_type.open_to_compute(packed(whole.path, Path(temp) / "packed", bits))
        row: dict[str, Any] = {"bytes_4-bit": round(rounded.nbytes / 1e6, 3)}
        if has_template(whole):
            wide = unpacked(rounded.path, Path(temp) / "wide")
            models = {"teacher": whole, "rounded": compute_type.open_to_compute(wide)}
            judgement = answers.judged(
                models, answers.prompts(recipe.EVAL_PROMPTS), memory.budget(None)
            )
            assert judgement is not None  # both have a template
            figures = {(r.metric, r.model): round(r.value, 4) for r in judgement.rows}
            row["reached_loss"] = figures["answers_excess", "rounded"]
            row["loops_teacher"] = figures["loops", "teacher"]
            row["loops_4-bit"] = figures["loops", "rounded"]
    return row


def rows(s: Settings) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Labels of all rows, and what measures each."""
    for seed in s.seeds:
        for loss in s.losses:
            yield f"--lose {loss}, seed {seed}", partial(run_row, s.teacher, loss, seed)
    for bits in PACKED_BITS:
        yield f"teacher in MLX's {bits} bits", partial(packed_row, s.teacher, bits)


def main(s: Settings) -> None:
    """Every row that is not there yet."""
    name = "lose" if s.teacher is None else f"lose-{Path(s.teacher).name}"
    given = {"loops_version": repetition.VERSION}
    command = "scripts/mis benchmarks/lose.py"
    if s.teacher is not None:
        command += f" --teacher {s.teacher}"
    experiment(name, command, given, rows(s))


if __name__ == "__main__":
    start(Settings, main)
