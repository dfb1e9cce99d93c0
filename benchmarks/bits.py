"""What few bits cost on answers and text: the choice of formats before and now, beside mlx_lm's.

    scripts/mis benchmarks/bits.py --num-samples 32          # two minutes a row on a core
    scripts/mis benchmarks/bits.py --model gemma-3-270m --targets 3 4.5

A row is the whole teacher, all its tokens and blocks, in so many bits per weight, scales included.
"now": 2 to 8 bits in groups of 32, 64 and 128, chosen by measured costs and rounded by GPTQ on
fitted grids, without tuning. "tuned": scales and norms then learn, for 20 steps, from the model
itself or from --teacher (--q-iters 20). mlx_lm's rows are `mlx_lm.convert -q`; rivals.py has all
other programs.

Every row is judged by its float32 weights: bits per byte above the unrounded model, of the
teacher's own answers to held-out prompts and of the built-in held-out text. Writes
benchmarks/results/<machine>/bits-<model>.json after every row (with another seed than 0,
bits-<model>-<seed>.json); finished rows are not made again.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import laboratory
from laboratory import experiment, start

from mis_mlx import cli
from mis_mlx.data import preparation
from mis_mlx.hardware import memory
from mis_mlx.judge import answer_figures, answers, comparison
from mis_mlx.judge.score import has_template
from mis_mlx.maths import rounding
from mis_mlx.models.architectures import arch
from mis_mlx.models.opening import compute_type, load, resolve
from mis_mlx.quantization import (
    bit_allocation,
    format_costs,
    packed_format,
    stage,
)
from mis_mlx.settings.recipe import QuantizationConfig
from mis_mlx.types import Checkpoint

HOW = QuantizationConfig(q_groups="mixed", q_iters=0)
LENGTH = 256  # tokens of a window
PACKED = {"2 bits, groups of 32": (2, 32), "3 bits": (3, 64), "4 bits": (4, 64)}
TUNING_STEPS = 20
Made = dict[str, Any]  # what is known of a row before it is judged


@dataclass(frozen=True)
class Settings:
    """Which rows."""

    model: str | None = None
    """folder, hub id or gemma-3-270m; default: SmolLM2-135M-Instruct"""
    teacher: str | None = None
    """what a student learns from in the rows "tuned", and whose answers judge it; default: the
    model itself
    """
    targets: tuple[float, ...] = (4.5, 3.5, 3.0, 2.5)
    """bits per weight"""
    only: tuple[str, ...] = ()
    """rows; default: all"""
    num_samples: int = 8
    """windows of calibration"""
    prompts: int = 24
    """held-out prompts that the teacher has answered"""
    eval_windows: int = 6
    """held-out windows of every text"""
    seed: int = 0
    """of the choice of calibration windows, and of the batches that scales learn from"""
    name: str | None = None
    """what to call the model in the results; default: its folder's name"""
    q_iters: int = TUNING_STEPS
    """steps of the rows "tuned"; their name says it where it is another number"""
    sensitivity: str | None = None
    """sensitivity.json of a search: what fitted grids of 3 to 8 bits cost in each matrix; default:
    it is measured
    """


class Bench:
    """A teacher, its text, and its measured costs."""

    def __init__(self, s: Settings):
        self.s = s
        self.teacher = compute_type.open_to_compute(resolve.resolve_model(s.model).path)
        self.taught_by = self.teacher
        if s.teacher is not None:
            self.taught_by = compute_type.open_to_compute(resolve.resolve_model(s.teacher).path)
        self.name = f"bits-{s.name or self.teacher.path.name}"
        self.given = {"windows": s.num_samples, "prompts": s.prompts, "eval": s.eval_windows}
        if s.seed:
            self.name += f"-{s.seed}"
            self.given["seed"] = s.seed
        data = preparation.prepare(None, load.tokenizer(self.teacher.path), LENGTH)
        self.data = data
        self.train = data.train
        self.batches = preparation.calibration(data.train, s.num_samples, s.seed)
        self.held_out = {}
        self.teacher_nats: dict[str, float] = {}
        for text, windows in data.held_out.items():
            self.held_out[text] = comparison.spread_windows(windows, s.eval_windows)

    def command(self) -> str:
        """What makes the same rows again."""
        command = "scripts/mis benchmarks/bits.py"
        if self.s.name is not None:
            # whoever repeats this has the run's folder elsewhere
            command += f" --model RUN/distilled --name {self.s.name}"
        elif self.s.model is not None:
            command += f" --model {self.s.model}"
        if self.s.teacher is not None:
            command += f" --teacher {self.s.teacher}"
        if self.s.num_samples != Settings.num_samples:
            command += f" --num-samples {self.s.num_samples}"
        if self.s.seed:
            command += f" --seed {self.s.seed}"
        if self.s.sensitivity is not None:
            command += f" --sensitivity {self.s.sensitivity}"
        return command

    @cached_property
    def costs(self) -> dict[str, format_costs.FormatCosts]:
        """{module path: {format: nats per token}} of the teacher."""
        began = time.monotonic()
        nats: dict[str, dict[int, float]] = {}
        if self.s.sensitivity is None:
            nats = bit_allocation.costs(
                self.teacher, self.batches, HOW.q_group_size, rounding.CANDIDATE_BITS
            )
        else:
            stored_nats = json.loads(Path(self.s.sensitivity).read_text("utf-8"))
            for path, costs in stored_nats.items():
                nats[path] = {int(bits): cost for bits, cost in costs.items()}
        fitted = self.s.sensitivity is not None
        found = format_costs.of_formats(self.teacher, nats, HOW, fitted=fitted)
        cli.say(f"costs of all formats: {time.monotonic() - began:.0f} s")
        return found

    def ours(self, target: float, *, tunes: bool = False) -> Callable[[Path], Made]:
        """The teacher in so many bits per weight, on fitted grids, by GPTQ.

        tunes: then scales learn.
        """

        def make(out: Path) -> Made:
            layout, report = bit_allocation.chosen_layout(self.teacher.config, self.costs, target)
            began = time.monotonic()
            rounded = stage.rounded_blocks(self.teacher, self.batches, layout)
            untuned = out.with_name("untuned") if tunes else out
            packed_format.write_quantized(self.teacher, untuned, layout, rounded=rounded, fit=True)
            made = {
                "predicted_nats": round(report["predicted_nats"], 4),
                "formats": shares(self.teacher, layout),
                "rounding_s": round(time.monotonic() - began),
            }
            if tunes:
                began = time.monotonic()
                laboratory.tuned(
                    untuned,
                    out,
                    taught_by=self.taught_by,
                    train=self.train,
                    q_iters=self.s.q_iters,
                    seed=self.s.seed,
                )
                made["tuning_s"] = round(time.monotonic() - began)
            return made

        return make

    def packed(self, bits: int, group: int) -> Callable[[Path], Made]:
        """`mlx_lm.convert -q`."""

        def make(out: Path) -> Made:
            laboratory.packed(self.teacher.path, out, bits, group)
            return {}

        return make

    def judge(self, wide: Checkpoint) -> dict[str, list[float]]:
        """{text: (bits per byte above the unrounded model, low, high)}; intervals are 95 %.

        "answers" are those of the model that teaches; the other texts have no interval.
        """
        found = {}
        if has_template(self.teacher):
            found["answers"] = self.answers_lost(wide)
        for text, windows in self.held_out.items():
            if text not in self.teacher_nats:
                figures = comparison.compare({"teacher": self.teacher}, windows)
                self.teacher_nats[text] = comparison.per_byte(figures["teacher", "nll"], windows)
            figures = comparison.compare({"rounded": wide}, windows)
            nats = comparison.per_byte(figures["rounded", "nll"], windows)
            found[text] = digits((nats - self.teacher_nats[text]) / math.log(2))
        return found

    def answers_lost(self, wide: Checkpoint) -> list[float]:
        """Bits per byte above the unrounded model, of the answers of the model that teaches.

        With the ends of their 95 % interval.
        """
        models = {"taught by": self.taught_by, "unrounded": self.teacher, "rounded": wide}
        asked = answers.prompts(self.s.prompts)
        silent = ["unrounded", "rounded"]
        judgement = answers.judged(models, asked, memory.budget(None), silent=silent)
        assert judgement is not None  # all have a template
        rounded = judgement.models["rounded"].bits
        more = rounded.nats - judgement.models["unrounded"].bits.nats
        return digits(*answer_figures.bits_per_byte(more, rounded.nbytes))

    def row(self, make: Callable[[Path], Made]) -> dict[str, Any]:
        """Make a model's folder, and judge it."""
        with tempfile.TemporaryDirectory() as temp:
            out = Path(temp) / "packed"
            made = make(out)
            checkpoint = compute_type.open_to_compute(out)
            wide = out
            if arch.is_quantized(checkpoint.tensors):
                made = {"nbytes": checkpoint.nbytes, **made}
                wide = laboratory.unpacked(out, Path(temp) / "wide")
            return {
                "bits_per_weight": 8 * made["nbytes"] / arch.params(checkpoint.config),
                "lost": self.judge(compute_type.open_to_compute(wide)),
                **made,
            }


def digits(*values: float) -> list[float]:
    """Four digits of each."""
    return [round(value, 4) for value in values]


def shares(checkpoint: Checkpoint, layout: packed_format.Formats) -> dict[str, float]:
    """{"bits/group": share of the weights} of a layout."""
    shapes = arch.tensors_of(checkpoint.config)
    weights = Counter[str]()
    for path, kind in layout.items():
        weights[f"{kind.bits}/{kind.group}"] += math.prod(shapes[f"{path}.weight"])
    together = weights.total()
    return {name: round(weights[name] / together, 3) for name in sorted(weights)}


def rows_of(bench: Bench) -> Iterator[tuple[str, Callable[[Path], Made]]]:
    """(label, what makes it) of every row, in order."""
    for target in bench.s.targets:
        yield f"now, {target:g}", bench.ours(target)
    tuned = "tuned"
    if bench.s.q_iters != TUNING_STEPS:
        tuned += f" in {bench.s.q_iters} steps"
    for target in bench.s.targets:
        yield f"{tuned}, {target:g}", bench.ours(target, tunes=True)
    for label, (bits, group) in PACKED.items():
        yield f"mlx_lm.convert, {label}", bench.packed(bits, group)


def main(s: Settings) -> None:
    """Every row that is not there yet."""
    bench = Bench(s)
    rows = [
        (label, partial(bench.row, make))
        for label, make in rows_of(bench)
        if not s.only or label in s.only
    ]
    experiment(bench.name, bench.command(), bench.given, rows)


if __name__ == "__main__":
    start(Settings, main)
