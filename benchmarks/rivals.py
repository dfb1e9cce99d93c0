"""What a model loses in fewer bits, by everybody's programs: ours beside mlx_lm's and llama.cpp's.

    scripts/mis benchmarks/rivals.py --model FOLDER --name NAME --dry-run       # makes nothing
    scripts/mis benchmarks/rivals.py --model FOLDER --name NAME                 # hours: every row
    scripts/mis benchmarks/rivals.py --model FOLDER --name NAME --only "mlx_lm.convert, 4 bits"

A row is the whole model in fewer bits. All of them that learn learn from the same windows of our
text, and those that train, ours and mlx_lm.dwq, from as many tokens. Everything else is as each
program has it by default. Every row is judged by its weights as float32 numbers:

    effective_bits   of the file, scales and all, by the number of parameters; mb: 10^6 bytes
    kl, top1, ear    beside the unrounded model, on --eval-tokens tokens of held-out text, half of
                     it Polish: KL in nats, same top token, tokens that both can draw
    answers_excess   bits per byte of the unrounded model's answers to held-out prompts, above it
    loops, endless   percent of its own answers to them
    tools            with --tools N: its calls of tools in N prompts (judge/tasks/tool_tasks), and
                     how many more are right than of the unrounded model's
    seconds, cpu_seconds, peak_gib   of making it, the unrounded model's files being there

Writes benchmarks/results/<machine>/rivals-<name>.json after every row (with another seed than 0,
rivals-<name>-<seed>.json); finished rows are not made again, so the same command goes on.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import bits
import laboratory
import mlx.core as mx
import numpy as np
import other_quantizers
from laboratory import resumed, start, write

from mis_mlx import cli
from mis_mlx.hardware import memory
from mis_mlx.judge import answers, comparison
from mis_mlx.judge.tasks import answering, tool_tasks
from mis_mlx.maths import stats
from mis_mlx.models.architectures import arch
from mis_mlx.models.opening import compute_type
from mis_mlx.types import Checkpoint, Count

TARGETS = (4.5, 3.5, 2.5)  # bits per weight of ours: those of mlx_lm.convert at 4, 3 and 2 bits
CONVERTED = (4, 3, 2, 5, 6)
# Bits per weight, and the two formats that mlx_lm.dynamic_quant mixes.
DYNAMIC = ((4.5, 3, 5), (3.5, 2, 4))
LLAMA_CPP = ("Q4_K_M", "Q3_K_M", "IQ3_M", "IQ2_M")
DWQ_BITS = (4, 3)
FIGURES = ("answers_excess", "loops", "empty", "endless")
Make = Callable[[Path], dict[str, Any]]  # writes a folder, and says what is known of it


@dataclass(frozen=True)
class Settings:
    """Which model, and which rows."""

    model: str | None = None
    """folder or hub id; default: SmolLM2-135M-Instruct"""
    name: str | None = None
    """what to call it in the results; default: its folder's name"""
    only: tuple[str, ...] = ()
    """rows; default: all, the most telling ones first"""
    dry_run: bool = False
    """say which rows there are and which are done, and make none"""
    num_samples: Count = 32
    """windows of calibration, of 256 tokens"""
    q_iters: Count = 20
    """steps of two windows, ours and mlx_lm.dwq's"""
    eval_tokens: Count = 16384
    """tokens of held-out text"""
    prompts: Count = 60
    """held-out prompts that the models answer"""
    tools: int = 0
    """prompts with tools that the models answer; their chat template must know tools"""
    seed: int = 0
    """of our choice of windows and batches"""


class Rivals:
    """A model, ways to fewer bits, and the judge of what they cost."""

    def __init__(self, s: Settings):
        self.s = s
        making = bits.Settings(
            model=s.model, num_samples=s.num_samples, seed=s.seed, q_iters=s.q_iters, name=s.name
        )
        self.bench = bits.Bench(making)
        self.teacher = self.bench.teacher
        self.name = f"rivals-{s.name or self.teacher.path.name}"
        if s.seed:
            self.name += f"-{s.seed}"
        self.given = {
            "windows": s.num_samples,
            "steps": s.q_iters,
            "eval_tokens": s.eval_tokens,
            "prompts": s.prompts,
            "seed": s.seed,
        }
        if s.tools:
            self.given["tools"] = s.tools
        self.rows: dict[str, Any] = resumed(self.name, self.given, ["rows"]).get("rows", {})

    @cached_property
    def held_out(self) -> dict[str, Any]:
        """As many windows of every held-out text."""
        texts = self.bench.data.held_out
        count = self.s.eval_tokens // bits.LENGTH // len(texts)
        chosen = {}
        for text, windows in texts.items():
            chosen[text] = comparison.spread_windows(windows, count)
        return chosen

    @cached_property
    def hidden(self) -> dict[str, Any]:
        """The unrounded model's final states of these windows."""
        states = {}
        for text, windows in self.held_out.items():
            states[text] = comparison.final_hidden(self.teacher, windows)
        return states

    @cached_property
    def importance(self) -> other_quantizers.Importance:
        """The importance matrix of all files of llama.cpp."""
        return other_quantizers.importance(self.teacher, self.bench.batches)

    def agreement(self, model: Checkpoint) -> dict[str, Any]:
        """{metric: [mean, low, high]} over all windows, and the same of every text."""
        of_texts = {}
        for text, windows in self.held_out.items():
            models = {"teacher": self.teacher, "student": model}
            means = comparison.compare(models, windows, hidden=self.hidden[text])
            of_texts[text] = {metric: means["student", metric] for metric in comparison.METRICS}
        found: dict[str, Any] = {"texts": {}}
        for metric in comparison.METRICS:
            every = [values[metric] for values in of_texts.values()]
            found[metric] = with_bounds(stats.interval(np.concatenate(every)))
            for text, values in of_texts.items():
                row = found["texts"].setdefault(text, {})
                row[metric] = with_bounds(stats.interval(values[metric]))
        return found

    def answers(self, model: Checkpoint) -> dict[str, Any]:
        """Figures of its answers beside the unrounded model's; {} without a chat template."""
        models = {"teacher": self.teacher}
        if model.path != self.teacher.path:
            models["student"] = model
        asked = answers.prompts(self.s.prompts)
        judgement = answers.judged(models, asked, memory.budget(None))
        if judgement is None:
            return {}
        found: dict[str, Any] = {}
        for row in judgement.rows:
            if row.model == list(models)[-1] and row.metric in FIGURES:
                found[row.metric] = bits.digits(row.value)
                if row.low is not None and row.high is not None:
                    found[row.metric] = with_bounds((row.value, row.low, row.high))
        return found

    def calls(self, model: Checkpoint) -> dict[str, Any]:
        """Figures of its calls of tools beside the unrounded model's; {} without --tools."""
        if not self.s.tools:
            return {}
        (task,) = tool_tasks.tasks([tool_tasks.CALLS], self.s.tools)
        limit = memory.budget(None)
        sha256 = answering.sha256(model)
        marks = answering.scores(model, sha256, task, limit)
        base = answering.scores(self.teacher, answering.sha256(self.teacher), task, limit)
        found: dict[str, Any] = dict(tool_tasks.shares(task, answering.calls(sha256, task)))
        found["more_right"] = with_bounds(stats.interval(marks - base))
        return {"tools": found}

    def convert(self, width: int) -> Make:
        """`mlx_lm.convert -q`."""
        return self.bench.packed(width, other_quantizers.GROUP)

    def program(self, name: str, *given: Any) -> Make:
        """A program of mlx_lm that learns from the windows of calibration."""

        def make(out: Path) -> dict[str, Any]:
            function = getattr(other_quantizers, name)
            function(self.teacher.path, out, self.bench.batches, *given)
            return {}

        return make

    def dwq(self, width: int) -> Make:
        """`mlx_lm.dwq`, for as many steps as ours."""

        def make(out: Path) -> dict[str, Any]:
            folder = self.teacher.path
            other_quantizers.dwq(folder, out, self.bench.train, iters=self.s.q_iters, bits=width)
            return {}

        return make

    def llama_cpp(self, kind: str) -> Make:
        """llama.cpp's file of that type, with an importance matrix."""

        def make(out: Path) -> dict[str, Any]:
            nbytes = other_quantizers.llama_cpp(self.teacher, out, kind, self.importance)
            return {"nbytes": nbytes}

        return make

    def recipes(self) -> Iterator[tuple[str, Make]]:
        """(label, what makes it) of every row, cheapest and most telling first."""
        for target, width in zip(TARGETS, CONVERTED, strict=False):
            yield f"mlx_lm.convert, {width} bits", self.convert(width)
            yield f"ours, {target:g}", self.bench.ours(target, tunes=True)
        for target, low, high in DYNAMIC:
            yield (
                f"mlx_lm.dynamic_quant, {target:g}",
                self.program("dynamic_quant", target, low, high),
            )
        for kind in LLAMA_CPP:
            yield f"llama.cpp, {kind}", self.llama_cpp(kind)
        yield "mlx_lm.gptq, 4 bits", self.program("gptq")
        for width in CONVERTED[len(TARGETS) :]:
            yield f"mlx_lm.convert, {width} bits", self.convert(width)
        for width in DWQ_BITS:
            yield f"mlx_lm.dwq, {width} bits", self.dwq(width)
        yield "mlx_lm.awq, 4 bits", self.program("awq")

    def row(self, make: Make) -> dict[str, Any]:
        """One model made, judged and thrown away."""
        with tempfile.TemporaryDirectory() as temp:
            out = Path(temp) / "packed"
            mx.clear_cache()
            laboratory.count_anew()
            began = time.monotonic()
            worked = time.process_time()
            made = make(out)
            cost = {
                "seconds": round(time.monotonic() - began),
                "cpu_seconds": round(time.process_time() - worked),
                "peak_gib": round(laboratory.largest() / 2**30, 2),
            }
            checkpoint = compute_type.open_to_compute(out)
            nbytes = made.pop("nbytes", checkpoint.nbytes)
            wide = out
            if arch.is_quantized(checkpoint.tensors):
                wide = laboratory.unpacked(out, Path(temp) / "wide")
            model = compute_type.open_to_compute(wide)
            mx.clear_cache()
            return {
                "mb": round(nbytes / 1e6, 1),
                "effective_bits": round(8 * nbytes / arch.params(self.teacher.config), 3),
                **self.agreement(model),
                **self.answers(model),
                **self.calls(model),
                **cost,
                **made,
            }

    def keep(self) -> None:
        """Write what there is."""
        command = "scripts/mis benchmarks/rivals.py"
        defaults = Settings()
        if self.s.model is not None:
            command += f" --model FOLDER --name {self.s.name or self.teacher.path.name}"
        for flag in ("num_samples", "q_iters", "eval_tokens", "prompts", "tools", "seed"):
            value = getattr(self.s, flag)
            if value != getattr(defaults, flag):
                command += f" --{flag.replace('_', '-')} {value}"
        write(self.name, command, {"given": self.given, "rows": self.rows})

    def add(self, label: str, make: Make) -> None:
        """A row, if it is not there. Another program that fails here is said, and left out."""
        if label in self.rows:
            return
        cli.say(f"{label}: begins")
        try:
            found = self.row(make)
        except Exception as error:
            if label.startswith("ours"):
                raise
            cli.say(f"{label}: {type(error).__name__}: {error}")
            return
        self.rows[label] = found
        cli.say(f"{label}: {found}")
        self.keep()


def with_bounds(interval: tuple[float, float, float]) -> list[float | None]:
    """[mean, low, high] to four digits; None for a bound that is not known."""
    known = stats.bounds(interval)
    return [None if value is None else round(value, 4) for value in known]


def main(s: Settings) -> None:
    """Every row that is not there yet."""
    rivals = Rivals(s)
    if not s.dry_run and "unrounded" not in rivals.rows:
        rivals.rows["unrounded"] = {
            "mb": round(rivals.teacher.nbytes / 1e6, 1),
            "effective_bits": round(
                8 * rivals.teacher.nbytes / arch.params(rivals.teacher.config), 3
            ),
            **rivals.answers(rivals.teacher),
            **rivals.calls(rivals.teacher),
        }
        rivals.keep()
    for label, make in rivals.recipes():
        if s.dry_run:
            cli.say(f"{label}: {'done' if label in rivals.rows else 'to make'}")
        elif not s.only or label in s.only:
            rivals.add(label, make)


if __name__ == "__main__":
    start(Settings, main)
