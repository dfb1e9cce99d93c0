"""Where the bytes of a training step go: MLX's arrays by kind, of the student whole and block by block.

    scripts/mis benchmarks/step_bytes.py    # 3 minutes on 2 cores

The default student and its teacher in the same vocabulary, as in training.py; 2 x 256 tokens, float32. What is held is
read from MLX after each kind is made: the teacher and its head, the student's weights, its moments after a first step.
`gradients`: as many numbers as are trained, of which `blocks` has those of a block at a time. The rest is what the
second step holds beside these at its highest point: activations, logits, work space.
Writes benchmarks/results/<machine>/step_bytes.json.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import training
from laboratory import start, write
from mlx.utils import tree_flatten

from mis_mlx.data import preparation
from mis_mlx.distillation import live_teacher, sharded
from mis_mlx.maths.optimizer import GuardedAdamW
from mis_mlx.models import load, stream
from mis_mlx.planner.recipe import RATE, DistillationConfig
from mis_mlx.reporting.text import markdown_table
from mis_mlx.storage.files import DISK

WINDOWS, LENGTH, STEPS = 2, 256, 2


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
    recipe = DistillationConfig(iters=STEPS, batch_size=WINDOWS, max_seq_length=LENGTH, learning_rate=RATE)
    small, before, found = load.open_checkpoint(student), held(), dict[str, int]()
    source = live_teacher.StreamedTeacher(load.open_checkpoint(teacher), None)
    mx.eval(source.logits(source.hidden([mx.array(data.tokens[:1])])[0][0, :1]))
    found["teacher"] = held() - before
    if way == "resident":
        model = load.resident(small, mx.float32)
        stream.load_checked(model)
        found["student's weights"] = held() - before - sum(found.values())
        trained = sum(array.size for array in dict[str, mx.array](tree_flatten(model.trainable_parameters())).values())
        steps = live_teacher.steps(model, source, data, recipe, GuardedAdamW())
    else:
        layers = int(small.config["num_hidden_layers"])
        whole = sharded.Sharded(small, layers, STEPS, recipe.weight_decay, DISK)
        whole.begin()
        found["student's weights"] = held() - before - sum(found.values())
        trained = sum(t.size for name, t in load.weights(small, "model.layers.0.", mx.float32))
        slopes = source.frozen_slopes()
        steps = whole.steps(lambda step: live_teacher.step_micro_batches(source, data, recipe, step),
                            lambda *a: source.kl_sum(*a, frozen_head=True), recipe, slopes=slopes)  # fmt: skip
    next(steps)
    found["moments"] = held() - before - sum(found.values())
    peak = next(steps).peak_bytes - before
    found["gradients"] = 4 * trained
    found["activations, logits, work space"] = peak - sum(found.values())
    return found | {"at the peak": peak}


def main(s: Settings) -> None:
    """Both ways, one after the other."""
    with tempfile.TemporaryDirectory() as temp:
        training.models(place := Path(temp) / "models")
        found = {way: kinds(way, place / "teacher", place / "student") for way in ("resident", "blocks")}
    write("step_bytes", "scripts/mis benchmarks/step_bytes.py", {"kinds": found})
    names = list(found["resident"])
    print(markdown_table(["MB", *found], [[n, *(f"{of[n] / 1e6:,.0f}" for of in found.values())] for n in names]))


if __name__ == "__main__":
    start(Settings, main)
