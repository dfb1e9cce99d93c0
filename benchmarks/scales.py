"""How much and how fast the scales of a rounded model learn: one factor of the training at a time.

    scripts/mis benchmarks/scales.py --work FOLDER              # five minutes a row on a core
    scripts/mis benchmarks/scales.py --work FOLDER --targets 3.5 --only default "rate x 2"

SmolLM2-135M-Instruct is rounded once for each number of bits, by the usual choice of formats and
GPTQ. All rows of a number of bits have these integers. In the row "default" scales, biases and
norms learn as in `quantize --q-iters 20`: 20 steps of two windows of 256 tokens. Every other row
differs by what its name says:

    rate x 2         another peak of the learning rate
    4 windows        a step has 4 windows, or 1; as many tokens in all
    scales           only scales learn; or scales and biases
    constant, 80     so many steps at a constant rate, in the last quarter of which it falls; runs
                     of several lengths are branches of one
    seed 1           other windows of the same text

A row is judged by its weights as float32 numbers, beside the unrounded model: KL in nats a token,
and bits per byte above it, on 16 held-out windows of each text; rows named by --answers also by the
unrounded model's answers to --prompts held-out prompts. Writes
benchmarks/results/<machine>/scales.json after every row; finished rows are not made again.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import bits
import laboratory
import mlx.core as mx
import numpy as np
from laboratory import experiment, start

from mis_mlx import cli
from mis_mlx.data.token_windows import Windows
from mis_mlx.distillation import live_teacher, packed_student, pipeline
from mis_mlx.distillation.packed_student import PackedStudent
from mis_mlx.distillation.train_loop import MicroBatch, Update
from mis_mlx.hardware import memory
from mis_mlx.judge import comparison
from mis_mlx.models.opening import compute_type
from mis_mlx.quantization import learned_scales
from mis_mlx.settings.recipe import TUNE_ITERS, TUNE_RATE, DistillationConfig
from mis_mlx.storage.files import DISK
from mis_mlx.types import Checkpoint

# what bits cost in each matrix of the default teacher
KNOWN_COSTS = laboratory.ROOT / "mis_mlx/size_search/known/sensitivity.json"
CALIBRATION = 32  # windows that GPTQ sees
EVAL_WINDOWS = 16  # of each held-out text
FALLING = 4  # a constant rate falls in the last quarter of its steps
LAST = 5  # steps whose mean loss is kept
ALL = ("scales", "biases", "norms")


@dataclass(frozen=True)
class Trial:
    """What a row does otherwise than by default.

    rate: times the default's. learns: kinds of arrays.
    """

    rate: float = 1.0
    iters: int = TUNE_ITERS
    batch_size: int = DistillationConfig.batch_size
    learns: tuple[str, ...] = ALL
    constant: bool = False
    seed: int = 0


ROUNDED = "rounded"  # the row without any step
TRIALS = {
    "default": Trial(),
    "rate x 2": Trial(rate=2.0),
    "rate x 4": Trial(rate=4.0),
    "scales": Trial(learns=("scales",)),
    "scales and biases": Trial(learns=("scales", "biases")),
    "1 window": Trial(batch_size=1, iters=2 * TUNE_ITERS),
    "4 windows": Trial(batch_size=4, iters=TUNE_ITERS // 2),
    "default, seed 1": Trial(seed=1),
    "rate x 2, seed 1": Trial(rate=2.0, seed=1),
    "rate x 4, seed 1": Trial(rate=4.0, seed=1),
    "rate x 8": Trial(rate=8.0),
    "rate x 0.5": Trial(rate=0.5),
    "40 steps": Trial(iters=2 * TUNE_ITERS),
    "constant, 20": Trial(constant=True),
    "constant, 80": Trial(constant=True, iters=80),
    "constant, 160": Trial(constant=True, iters=160),
}


@dataclass(frozen=True)
class Settings:
    """Which rows."""

    work: str = "runs/scales"
    """folder for the rounded models"""
    targets: tuple[float, ...] = (3.0, 3.5)
    """bits per weight"""
    only: tuple[str, ...] = ()
    """rows; default: all"""
    answers: tuple[str, ...] = (ROUNDED, "default")
    """rows that are judged by answers, too"""
    prompts: int = 30
    """held-out prompts that the unrounded model has answered"""


@dataclass(frozen=True)
class ConstantRate(DistillationConfig):
    """A rate that stays after its warm-up, and falls to a tenth in the last steps."""

    def rate(self, step: int) -> float:
        """Learning rate of 0-based `step`."""
        risen = min(1.0, (step + 1) / self.WARMUP)
        left = (self.iters - step) / (self.iters // FALLING + 1)
        return self.learning_rate * risen * (0.1 + 0.9 * min(1.0, left))


class KnownTeacher(live_teacher.StreamedTeacher):
    """A teacher in memory, whose states of a window are made once for all rows."""

    def __init__(self, checkpoint: Checkpoint):
        super().__init__(checkpoint, None)
        self._states: dict[int, mx.array] = {}

    def micro_batches(
        self, batches: Sequence[live_teacher.Batch], windows: Sequence[np.ndarray] = ()
    ) -> list[MicroBatch]:
        """As `StreamedTeacher.micro_batches`."""
        found = []
        for (tokens, loss_mask), numbers in zip(batches, windows, strict=True):
            rows = {int(number): tokens[at : at + 1] for at, number in enumerate(numbers)}
            new = {number: row for number, row in rows.items() if number not in self._states}
            states = self.hidden(list(new.values())) if new else []
            mx.eval(states)
            self._states |= dict(zip(new, states, strict=True))
            hidden = mx.concatenate([self._states[int(number)][0] for number in numbers])
            found.append((tokens, loss_mask.reshape(-1), hidden))
        return found


class PartlyLearning(PackedStudent):
    """A packed student of which some kinds of arrays learn.

    AdamW leaves an array as it is whose gradient was always 0.
    """

    learns: tuple[str, ...] = ALL

    def apply(self, found: packed_student.FoundGradients, update: Update) -> Any:
        """As `PackedStudent.apply`."""
        if "norms" not in self.learns:
            found = replace(found, norm=mx.zeros_like(found.norm))
        return super().apply(found, update)

    def _by_name(self, i: int, vector: mx.array) -> dict[str, mx.array]:
        named = super()._by_name(i, vector)
        for name, gradient in named.items():
            ending = name.rpartition(".")[2]
            kind = ending if ending in ALL else "norms"
            if kind not in self.learns:
                named[name] = mx.zeros_like(gradient)
        return named


@dataclass
class Trunk:
    """A run at a constant rate so far: what a checkpoint of it holds."""

    steps: int = 0
    arrays: Mapping[str, Any] = field(default_factory=dict)
    memory: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Learning:
    """A student, what it learns from, and how."""

    student: PackedStudent
    source: live_teacher.StreamedTeacher
    train: Windows
    recipe: DistillationConfig

    def steps(self, begin: int, end: int) -> list[float]:
        """The losses of the steps from `begin` up to `end`."""
        if begin >= end:
            return []
        nats = []
        for step in live_teacher.steps(
            self.student, self.source, self.train, self.recipe, start=begin
        ):
            memory.give_back(cache=False)
            nats.append(step.loss)
            if step.number == end:
                break
        return nats

    def branch(self, trunk: Trunk) -> list[float]:
        """The losses of the trunk's further steps, and of those in which the rate falls."""
        falls = self.recipe.iters - self.recipe.iters // FALLING
        if trunk.steps:
            arrays = {name: dict(named) for name, named in trunk.arrays.items()}
            self.student.restore(arrays, dict(trunk.memory))
        nats = self.steps(trunk.steps, falls)
        trunk.steps = falls
        trunk.arrays = self.student.arrays()
        trunk.memory = self.student.memory()
        return nats + self.steps(falls, self.recipe.iters)


class Trials:
    """A teacher, its rounded models, and the judge of what these learn."""

    def __init__(self, s: Settings):
        self.s = s
        self.work = Path(s.work)
        self.work.mkdir(parents=True, exist_ok=True)
        self.bench = bits.Bench(
            bits.Settings(
                num_samples=CALIBRATION,
                eval_windows=EVAL_WINDOWS,
                prompts=s.prompts,
                sensitivity=str(KNOWN_COSTS),
            )
        )
        self.teacher = self.bench.teacher
        self.given = {"calibration": CALIBRATION, "eval": EVAL_WINDOWS, "prompts": s.prompts}
        self._trunks: dict[tuple[float, float], Trunk] = {}  # by bits and rate

    @cached_property
    def source(self) -> KnownTeacher:
        """What all rows learn from."""
        return KnownTeacher(self.teacher)

    @cached_property
    def hidden(self) -> dict[str, Any]:
        """The unrounded model's final states of the held-out windows."""
        states = {}
        for text, windows in self.bench.held_out.items():
            states[text] = comparison.final_hidden(self.teacher, windows)
        return states

    def rounded(self, target: float) -> Path:
        """The teacher in so many bits, made unless it is there."""
        out = self.work / f"rounded-{target:g}"
        if not out.exists():
            began = time.monotonic()
            self.bench.ours(target)(out)
            cli.say(f"{target:g} bits: rounded in {time.monotonic() - began:.0f} s")
        return out

    def recipe(self, trial: Trial, rounded: Checkpoint) -> DistillationConfig:
        """Steps, batches and rates of a row."""
        rate = trial.rate * TUNE_RATE
        asked = DistillationConfig(seed=trial.seed, batch_size=trial.batch_size)
        recipe = pipeline.tuning_recipe(asked, rounded, trial.iters, rate)
        if not trial.constant:
            return recipe
        return ConstantRate(**{given.name: getattr(recipe, given.name) for given in fields(recipe)})

    def learned(self, target: float, trial: Trial, out: Path) -> dict[str, Any]:
        """Write `out`: the rounded model after its steps. What is known of these."""
        rounded = compute_type.open_to_compute(self.rounded(target))
        recipe = self.recipe(trial, rounded)
        student = PartlyLearning(rounded, rounded.config["num_hidden_layers"])
        student.learns = trial.learns
        began = time.monotonic()
        worked = time.process_time()
        learning = Learning(student, self.source, self.bench.train, recipe)
        if trial.constant:
            trunk = self._trunks.setdefault((target, trial.rate), Trunk())
            nats = learning.branch(trunk)
        else:
            nats = learning.steps(0, recipe.iters)
        learned_scales.write_learned(rounded, student.learned(), out, DISK)
        return {
            "tokens": recipe.iters * recipe.step_tokens,
            "rate": recipe.learning_rate,
            "loss": round(float(np.mean(nats[-LAST:])), 4),
            "steps": len(nats),
            "seconds": round(time.monotonic() - began),
            "cpu_seconds": round(time.process_time() - worked),
        }

    def judged(self, model: Checkpoint, *, by_answers: bool) -> dict[str, Any]:
        """{"kl": {text: nats a token}, "lost": {text: bits per byte above the unrounded model}}."""
        kl = {}
        lost: dict[str, Any] = {}
        for text, windows in self.bench.held_out.items():
            models = {"teacher": self.teacher, "rounded": model}
            means = comparison.compare(models, windows, hidden=self.hidden[text])
            kl[text] = round(float(means["rounded", "kl"].mean()), 4)
            more = means["rounded", "nll"] - means["teacher", "nll"]
            lost[text] = round(comparison.per_byte(more, windows) / math.log(2), 4)
        if by_answers:
            lost["answers"] = self.bench.answers_lost(model)
        return {"kl": kl, "lost": lost}

    def row(self, target: float, label: str) -> dict[str, Any]:
        """Make a model and judge it."""
        packed = self.work / "learned"
        wide = self.work / "wide"
        for folder in (packed, wide):  # a row that was stopped left them
            shutil.rmtree(folder, ignore_errors=True)
        found: Mapping[str, Any] = {}
        if label == ROUNDED:
            packed = self.rounded(target)
        else:
            found = self.learned(target, TRIALS[label], packed)
        laboratory.unpacked(packed, wide)
        model = compute_type.open_to_compute(wide)
        row = {**found, **self.judged(model, by_answers=label in self.s.answers)}
        for folder in (self.work / "learned", wide):
            shutil.rmtree(folder, ignore_errors=True)
        mx.clear_cache()
        return row


def main(s: Settings) -> None:
    """Every row that is not there yet."""
    trials = Trials(s)
    rows = [
        (f"{target:g} bits, {label}", partial(trials.row, target, label))
        for label, target in product(s.only or (ROUNDED, *TRIALS), s.targets)
    ]
    experiment("scales", "scripts/mis benchmarks/scales.py", trials.given, rows)


if __name__ == "__main__":
    start(Settings, main)
