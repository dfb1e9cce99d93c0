"""Speed and memory of a training step: ours, beside what one would write with mlx and mlx-lm alone.

    scripts/mis benchmarks/training.py            # nothing else may run
    scripts/mis benchmarks/training.py --table

The default student (redyk) and its teacher in the same vocabulary, both of `prune`. A step is of 2
x 256, 1 x 1,024 or 4 x 512 tokens. `naive`: both models whole in float32, full logits, KL, mlx's
AdamW. `mlx_lm.lora`: the trainer of mlx-lm's command, as with --fine-tune-type full, on the same
student, whose target is the text, so no teacher takes part: the floor. Ours: the four ways of
`--train`; sharded trains half of the blocks at a time, the others stay on disk, and so does the
teacher.

Every cell is a process of its own, and all ways take turns in `--rounds`. Seconds are the median
step without the first; peaks are MLX's and the process's (its highest resident set, so libraries
and pages of files are in it). Writes benchmarks/results/<machine>/training.json after every cell.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from laboratory import busy, resumed, start, stored, write

from mis_mlx import cli, prune
from mis_mlx.data import preparation, token_windows
from mis_mlx.distillation import live_teacher, sharded
from mis_mlx.distillation.whole_model import WholeModel
from mis_mlx.hardware.clock import Clock
from mis_mlx.maths.optimizer import GuardedAdamW
from mis_mlx.models.opening import compute_type, load, resolve
from mis_mlx.models.passing import stream
from mis_mlx.models.writing import model_writer
from mis_mlx.reporting.text import markdown_table
from mis_mlx.settings.recipe import RATE, DistillationConfig
from mis_mlx.storage.files import DISK
from mis_mlx.types import Checkpoint, Step

SHAPES = ((2, 256), (1, 1024), (4, 512))  # windows, tokens of each
OURS = ("resident", "blocks", "sharded")
WAYS = ("naive", "mlx_lm.lora", *OURS)


@dataclass(frozen=True)
class Settings:
    """How much."""

    steps: int = 4
    """timed, after a first one"""
    rounds: int = 2
    """how often every way has its turn; seconds are the least of them, for noise only adds"""
    ways: tuple[str, ...] = WAYS
    """which"""
    table: bool = False
    """print what there is, and make nothing"""
    work: str | None = None
    """one cell, set by the program itself: way, windows, tokens, and the folder of models"""


Timed = Iterator[tuple[float, int]]  # seconds and MLX's peak bytes of every step


def naive(teacher: Path, student: Path, batches: list[mx.array]) -> Timed:
    """What one would write."""
    both = [load.mlx_lm("utils").load_model(folder)[0] for folder in (teacher, student)]
    for model in both:
        model.set_dtype(mx.float32)
    big, small = both
    optimizer = optim.AdamW(learning_rate=1e-4)

    def loss(model: nn.Module, tokens: mx.array) -> mx.array:
        theirs = big(tokens)[:, :-1]
        mine = model(tokens)[:, :-1]
        theirs, mine = (z - mx.logsumexp(z, axis=-1, keepdims=True) for z in (theirs, mine))
        return (mx.exp(theirs) * (theirs - mine)).sum(axis=-1).mean()

    gradients = nn.value_and_grad(small, loss)
    for tokens in batches:
        began = Clock().monotonic()
        mx.reset_peak_memory()
        value, found = gradients(small, tokens)
        optimizer.update(small, found)
        mx.eval(value, small.parameters(), optimizer.state)
        yield Clock().monotonic() - began, mx.get_peak_memory()


def mlx_lm_lora(
    student: Path, data: token_windows.Windows, windows: int, steps: int, adapters: Path
) -> Timed:
    """mlx-lm's own trainer, all weights learning."""
    trainer = load.mlx_lm("tuner.trainer")
    timed = list[tuple[float, int]]()

    class Callback(load.mlx_lm("tuner.callbacks").TrainingCallback):  # type: ignore[misc]
        """Keeps what it is told."""

        def on_train_loss_report(self, info: dict[str, float]) -> None:
            """After every step."""
            timed.append((1 / info["iterations_per_second"], int(info["peak_memory"] * 1e9)))

    model = load.mlx_lm("utils").load_model(student)[0]
    rows = [(window.tolist(), 0) for window in data.tokens]
    args = trainer.TrainingArgs(
        windows,
        steps,
        steps_per_report=1,
        max_seq_length=data.tokens.shape[1],
        adapter_file=str(adapters),
    )
    with redirect_stdout(sys.stderr):
        trainer.train(
            model, optim.AdamW(learning_rate=1e-5), rows, args=args, training_callback=Callback()
        )
    return iter(timed)


def begun(
    way: str,
    source: live_teacher.StreamedTeacher,
    small: Checkpoint,
    data: token_windows.Windows,
    windows: int,
    steps: int,
    temp: Path,
) -> Iterator[Step]:
    """Steps of a way of `--train`, without what a run does beside: no checkpoint, no repair. The
    student is in memory, as far as it will be, once this returns.
    """
    length = data.tokens.shape[1]
    recipe = DistillationConfig(
        iters=steps, batch_size=windows, max_seq_length=length, learning_rate=RATE
    )
    if way == "resident":
        model = load.resident_model(small, mx.float32)
        stream.load_checked(model)
        return live_teacher.steps(WholeModel(model, GuardedAdamW()), source, data, recipe)
    layers = int(small.config["num_hidden_layers"])
    if way == "sharded":
        small = model_writer.by_block(small, temp / "parts", DISK)
        layers = -(-layers // 2)
    trained = sharded.Sharded(small, layers, steps_per_shard=steps, weight_decay=0.01, files=DISK)
    trained.begin()
    return live_teacher.steps(trained, source, data, recipe)


def ours(
    way: str, teacher: Path, student: Path, data: token_windows.Windows, windows: int, steps: int
) -> Timed:
    """A way of `--train`."""
    source = live_teacher.StreamedTeacher(
        compute_type.open_to_compute(teacher), 0 if way == "sharded" else None
    )
    with tempfile.TemporaryDirectory() as temp:
        taken = begun(
            way,
            source,
            small=compute_type.open_to_compute(student),
            data=data,
            windows=windows,
            steps=steps,
            temp=Path(temp),
        )
        yield from ((s.seconds, s.peak_bytes) for s in taken)


def cell(work: str, steps: int) -> dict[str, Any]:
    """In a process of its own: seconds of every step and the highest peak of MLX."""
    way, windows, length, place = json.loads(work)
    teacher = Path(place) / "teacher"
    student = Path(place) / "student"
    data = preparation.prepare(None, load.tokenizer(teacher), length).train
    if way == "naive":
        timed = naive(
            teacher, student, [mx.array(data.tokens[i * windows :][:windows]) for i in range(steps)]
        )
    elif way == "mlx_lm.lora":
        timed = mlx_lm_lora(
            student,
            data,
            windows=windows,
            steps=steps,
            adapters=Path(place) / "adapters.safetensors",
        )
    else:
        timed = ours(way, teacher, student=student, data=data, windows=windows, steps=steps)
    seconds, peaks = zip(*timed, strict=True)
    return {"seconds": seconds, "peak_bytes": max(peaks)}


def measured(s: Settings, place: Path, way: str, windows: int, length: int) -> dict[str, Any]:
    """A cell: {"seconds", "peak_bytes", "process_bytes"}."""
    command = [
        __file__,
        f"--steps={s.steps + 1}",
        f"--work={json.dumps([way, windows, length, str(place)])}",
    ]
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        output = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(
            f"{way}, {windows} x {length}: its process ended with {process.returncode}"
        )
    one = json.loads(output.splitlines()[-1])
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "seconds": round(statistics.median(one["seconds"][1:]), 3),
        "peak_bytes": one["peak_bytes"],
        "process_bytes": used.ru_maxrss * unit,
    }


def models(place: Path) -> None:
    """The teacher of the default student's vocabulary, and that student."""
    place.mkdir()
    name = str(resolve.resolve_model(None).path)
    teacher = str(place / "teacher")
    prune.run(
        prune.Settings(model=name, mlx_path=teacher, scenario="none", vocab="0.5x", num_samples=16)
    )
    student = prune.Settings(
        model=teacher, mlx_path=str(place / "student"), scenario="none", layers=29, ffn=1024
    )
    prune.run(replace(student, num_samples=16))
    # mlx-lm computes in what is written, half of it emulated here
    for model in (place / "teacher", place / "student"):
        load.mlx_lm("convert").convert(str(model), str(place / "float32"), dtype="float32")
        DISK.remove_tree(model)
        (place / "float32").rename(model)


def table(cells: dict[str, dict[str, Any]]) -> str:
    """Markdown: tokens a second and peaks, and both beside the naive step's."""
    lines = []
    for name, one in cells.items():
        way, _, shape = name.partition(", ")
        tokens = math.prod(map(int, shape.split(" x ")))
        naive_step = cells[f"naive, {shape}"]
        lines.append(
            [
                shape,
                way,
                f"{tokens / one['seconds']:.0f}",
                f"{naive_step['seconds'] / one['seconds']:.2f}x",
                f"{one['peak_bytes'] / 1e6:,.0f}",
                f"{one['peak_bytes'] / naive_step['peak_bytes']:.2f}x",
                f"{one['process_bytes'] / 1e6:,.0f}",
            ]
        )
    head = ["tokens", "", "tokens/s", "speed", "MLX's peak, MB", "of the naive", "process, MB"]
    return markdown_table(head, sorted(lines, key=lambda line: line[0]))


def main(s: Settings) -> None:
    """All cells, in turns."""
    if s.work:
        print(json.dumps(cell(s.work, s.steps)))
        return
    given = {"steps": s.steps, "rounds": s.rounds}
    before = stored("training") if s.table else resumed("training", given, ["cells", "busy"])
    cells = before.get("cells", {})
    noted = before.get("busy", [])
    with tempfile.TemporaryDirectory() as temp:
        for number, (windows, length), way in product(
            range(s.rounds * (not s.table)), SHAPES, s.ways
        ):
            name = f"{way}, {windows} x {length}"
            known = cells.get(name, {})
            if known.get("turns", s.rounds if known else 0) > number:
                continue
            if not (place := Path(temp) / "models").exists():
                models(place)
            noted += busy(f"{name}, round {number + 1}")
            one = measured(s, place, way=way, windows=windows, length=length)
            cli.say(f"{name}: {one}")
            cells[name] = {
                **{key: min(value, known.get(key, value)) for key, value in one.items()},
                "turns": number + 1,
            }
            write(
                "training",
                "scripts/mis benchmarks/training.py",
                {"given": given, "busy": noted, "cells": cells},
            )
    print(table(cells))


if __name__ == "__main__":
    start(Settings, main)
