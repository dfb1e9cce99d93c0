"""Where the bytes of a training step go: MLX's arrays by kind, of the student whole and block by
block.

    scripts/mis benchmarks/step_bytes.py    # 3 minutes on 2 cores

The default student and its teacher in the same vocabulary, as in training.py; 2 x 256 tokens,
float32. What is held is read from MLX after each kind is made: the teacher and its head, the
student's weights, its moments after a first step. `gradients`: as many numbers as are trained, of
which `blocks` has those of a block at a time. The rest is what the second step holds beside these
at its highest point: activations, logits, work space. Writes
benchmarks/results/<machine>/step_bytes.json.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import training
from laboratory import start, write

from mis_mlx.data import preparation
from mis_mlx.distillation import live_teacher
from mis_mlx.models.architectures import arch
from mis_mlx.models.opening import compute_type, load
from mis_mlx.reporting.text import markdown_table

WINDOWS = 2
LENGTH = 256


@dataclass(frozen=True)
class Settings:
    """Nothing to choose."""


def held() -> int:
    """Bytes of arrays, now."""
    mx.clear_cache()
    return mx.get_active_memory()


def kinds(way: str, teacher: Path, student: Path) -> dict[str, int]:
    """{kind: bytes} and the sum, the peak of the second step."""
    data = preparation.prepare(None, load.tokenizer(teacher), LENGTH).train
    small = compute_type.open_to_compute(student)
    before = held()
    found = dict[str, int]()
    source = live_teacher.StreamedTeacher(compute_type.open_to_compute(teacher), None)
    mx.eval(source.logits(source.hidden([mx.array(data.tokens[:1])])[0][0, :1]))
    found["teacher"] = held() - before
    with tempfile.TemporaryDirectory() as temp:
        steps = training.begun(
            way, source, small=small, data=data, windows=WINDOWS, steps=2, temp=Path(temp)
        )
    found["student's weights"] = held() - before - sum(found.values())
    next(steps)
    found["moments"] = held() - before - sum(found.values())
    peak = next(steps).peak_bytes - before
    block = sum(math.prod(shape) for shape in arch.layer_tensors(small.config).values())
    found["gradients"] = 4 * (arch.params(small.config) if way == "resident" else block)
    found["activations, logits, work space"] = peak - sum(found.values())
    return found | {"at the peak": peak}


def main(s: Settings) -> None:
    """Both ways, one after the other."""
    with tempfile.TemporaryDirectory() as temp:
        training.models(place := Path(temp) / "models")
        found = {
            way: kinds(way, place / "teacher", place / "student") for way in ("resident", "blocks")
        }
    write("step_bytes", "scripts/mis benchmarks/step_bytes.py", {"kinds": found})
    body = []
    for name in found["resident"]:
        body.append([name, *(f"{of[name] / 1e6:,.0f}" for of in found.values())])
    print(markdown_table(["MB", *found], body))


if __name__ == "__main__":
    start(Settings, main)
