"""What the alignment commands share: a student opened, whole or with LoRA; its run, checkpoints, best one, result.

A run that was killed and resumed ends bit-equal to one that was not.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mis_mlx import cli
from mis_mlx.alignment import lora
from mis_mlx.alignment.alignment_plan import Alignment, AlignmentPlan
from mis_mlx.data import examples
from mis_mlx.data.examples import Sequenced
from mis_mlx.distillation import train_loop
from mis_mlx.distillation.checkpoints import Checkpoints
from mis_mlx.distillation.run_loop import open_run, retry_from_checkpoint, run_training
from mis_mlx.distillation.train_loop import Loss
from mis_mlx.gguf_export.model_card import name_of
from mis_mlx.hardware import memory
from mis_mlx.hardware.thermal.run_monitor import ThermalMonitor
from mis_mlx.maths.optimizer import GuardedAdamW
from mis_mlx.models import distributed, load, model_writer, policy, stream
from mis_mlx.planner import estimates
from mis_mlx.reporting import progress
from mis_mlx.storage import checkpoint as protocol
from mis_mlx.storage import run_folder
from mis_mlx.storage.files import Files, reported
from mis_mlx.types import Checkpoint, MisError, Step

STEPS, BEST, MODEL, ADAPTERS = "steps", "best", "model", "adapters"
HELD_OUT = "held_out.jsonl"


@dataclass
class AlignmentRun:
    """A student in memory and the folder of its run, locked. Made by `running`."""

    name: str  # of the command
    settings: Alignment
    folder: Path
    checkpoint: Checkpoint
    model: nn.Module
    optimizer: GuardedAdamW
    plan: AlignmentPlan
    weather: ThermalMonitor
    files: Files
    card: Mapping[str, Any]  # of the data: what it is, its licence
    peak: memory.Peak = field(default_factory=memory.Peak)
    judge: str = "loss"  # which of the held-out figures
    best: tuple[int, float] | None = None  # (step, its held-out `judge`)
    began_s: float = field(default_factory=time.monotonic)

    def train(
        self,
        micro_batches: Callable[[int], Any],
        loss: Loss,
        held_out: Callable[[], Mapping[str, float]],
        train: Callable[..., Iterator[Step]] = train_loop.train,
        judge: str = "loss",
    ) -> dict[str, Any]:
        """Train from wherever the run stands to its end, write the best student, return the run's result.

        micro_batches, loss: as of `train_loop.train`; pure functions of the step and of the model. held_out(): what is
        measured of `model` at every checkpoint; the one with the lowest `judge` is kept.
        train: called as `train_loop.train`, yields the steps; what `micro_batches` gives is between these two.
        """
        s, self.judge = self.settings, judge
        start = self._start(held_out)
        self.model.train()
        steps = partial(train, self.model, micro_batches, loss, self.optimizer, s.schedule)
        save = partial(self._save, held_out)

        def go(coming: Iterator[Step]) -> None:
            run_training(coming, self.folder, s.iters, s.save_every, save, self.weather, self.peak, self.files,
                      label=self.name, budget_bytes=self.plan.budget.limit_bytes)  # fmt: skip

        retry_from_checkpoint(go, steps, start, self._back, lambda: self.optimizer)
        return self._finish()

    def _start(self, held_out: Callable[[], Mapping[str, float]]) -> int:
        """Steps done: of the newest checkpoint, put back; or 0, and that measured and saved."""
        if (number := self._back()) is not None:
            return number
        for name in (STEPS, BEST):
            with reported(self.folder, "the folder of checkpoints"):
                self.files.make_folder(self.folder / name)
        self._kept.share()
        self._save(held_out, 0)
        return 0

    def _back(self) -> int | None:
        """Put the newest checkpoint back: its number; None when there is none."""
        newest = self._kept.back()
        if newest is None:
            return None
        self.best = newest[1]["best"][0], newest[1]["best"][1]
        return newest[0]

    @property
    def _kept(self) -> Checkpoints:
        mine = self.model, self.optimizer
        return Checkpoints(self.folder / STEPS, partial(train_loop.arrays_of, *mine), self.optimizer.memory,
                           partial(train_loop.restore, *mine), self.weather, self.files)  # fmt: skip

    def _save(self, held_out: Callable[[], Mapping[str, float]], number: int) -> None:
        """One checkpoint. Measured only where every run of these settings is: a stop does not change the best."""
        if not distributed.is_main():
            return
        s = self.settings
        if number % s.save_every == 0 or number == s.iters:
            self.model.eval()
            measured = {name: float(value) for name, value in held_out().items()}
            self.model.train()
            self.files.append(self.folder / HELD_OUT, json.dumps({"number": number, **measured}))
            cli.say(f"step {number}, held out: " + ", ".join(f"{name} {value:.4f}" for name, value in measured.items()))
            if not math.isfinite(value := measured[self.judge]):
                raise MisError(f"the held-out loss at step {number} is {value}: lower --learning-rate")
            if self.best is None or value < self.best[1]:
                self.best = (number, value)
                # 3 of them: as many checkpoints may be damaged or undone as the steps can lose. A run that was set
                # back comes here again with the same bits.
                if not (self.folder / BEST / f"step-{number:08d}").exists():
                    best = {"model": train_loop.arrays_of(self.model, self.optimizer)["model"]}
                    protocol.save_step(self.folder / BEST, number, best, measured, self.files, keep=3)
        self._kept.save(number, {"best": self.best})

    def _finish(self) -> dict[str, Any]:
        """The best student as an ordinary folder, or its adapters; and the run's JSON."""
        if not distributed.is_main():
            return {}
        s, c = self.settings, self.checkpoint
        best = protocol.newest(self.folder / BEST, self.files)
        if best is None or self.best is None:
            raise MisError(f"{self.folder / BEST} holds no whole checkpoint: start a new run")
        arrays = protocol.load_arrays(best, "model")
        if s.lora and not (self.folder / ADAPTERS).exists():
            lora.write(arrays, s.lora, self.folder / ADAPTERS, self.files)
        out = self.folder / (MODEL if s.fuse or not s.lora else ADAPTERS)
        if out.name == MODEL and not out.exists():
            take = lora.fused(c, arrays, s.lora) if s.lora else arrays.__getitem__
            config = {k: v for k, v in c.config.items() if not k.startswith("quantization")} | {"torch_dtype": s.dtype}
            extra = model_writer.keep_files(model_writer.read_keep(c.path)) | {run_folder.DATA: dict(self.card)}
            model_writer.write_model(config, take, c.path, out, s.dtype, self.files, extra)
        steps, measured = run_folder.metrics(self.folder), run_folder.records(self.folder / HELD_OUT)
        by_step = {r["number"]: r for r in measured}
        tokens, seconds = (sum(r[key] for r in steps) for key in ("tokens", "seconds"))
        result = {
            "model": str(c.path),
            "student": str(out),
            "run": str(self.folder),
            "params_trained": sum(math.prod(a.shape) for a in arrays.values()),
            "best_step": best.number,
            "held_out_start": by_step.get(0),
            "held_out_best": by_step.get(best.number),
            "tokens": tokens,
            "tokens_per_s": round(tokens / max(seconds, 1e-9), 1),
            "peak_bytes": self.peak.nbytes,
            "budget_bytes": self.plan.budget.limit_bytes,
            **self.weather.account(),
            "seconds": round(time.monotonic() - self.began_s, 1),
        }
        self.files.replace_text(self.folder / run_folder.RESULT, json.dumps(result, indent=2))
        return result


def data(
    s: Alignment, checkpoint: Checkpoint, shapes: Sequence[str], answers: Sequence[str] = (), mask_prompt: bool = True
) -> tuple[list[list[Sequenced]], list[list[Sequenced]], dict[str, Any]]:
    """(rows to train on, held-out ones, encoded; what is known of the data); every row is checked."""
    rows = examples.load(s.data, shapes, s.data_licence, s.scrub_pii)
    tokenizer = load.tokenizer(checkpoint.path)
    train, cut = examples.encode(rows.train, tokenizer, s.max_seq_length, answers, mask_prompt)
    valid, _ = examples.encode(rows.valid, tokenizer, s.max_seq_length, answers, mask_prompt)
    what = "answers" if answers else "rows"
    for note in [*rows.notes, *([f"{cut} {what} are cut at {s.max_seq_length} tokens"] if cut else [])]:
        cli.say(note)
    return train, valid[: s.eval_rows], rows.card(examples.fingerprint([*train, *valid]))


@contextmanager
def running(
    s: Alignment, folder: Path | None, checkpoint: Checkpoint, plan: AlignmentPlan, card: Mapping[str, Any], name: str
) -> Iterator[AlignmentRun]:
    """The run, new or continued (`folder`), with its student in memory. `card`: of the data, with its "fingerprint".

    MisError with both numbers where the plan does not fit the budget.
    """
    worst = max(plan.phases, key=lambda p: p.peak_bytes)
    remedy = f"give --budget {estimates.flag(plan.peak_bytes)} or more, lower --batch-size or --max-seq-length, "
    remedy += "or use --fine-tune-type lora; alignment trains whole models in memory"
    plan.budget.need(plan.peak_bytes, worst.name, remedy)
    if folder is None:
        cli.say(progress.promise(plan.seconds))
    files, origin = Files(), run_folder.origin(checkpoint, card["fingerprint"])

    def new() -> Path:
        stored = {k: v for k, v in asdict(s).items() if k not in run_folder.NOT_STORED}
        way = {"mode": "resident", "micro": plan.micro_batch}
        return run_folder.create(s.out, f"{name_of(checkpoint.path)}-{name}", stored, origin, way, files)

    with (
        progress.run(name, {name: plan.seconds}),
        open_run(folder, new, origin, plan.budget, plan.peak_bytes, s, files) as (place, weather),
    ):
        if not (place / run_folder.DATA).exists():
            files.replace_text(place / run_folder.DATA, json.dumps(dict(card), indent=2, ensure_ascii=False))
        model = load.resident(checkpoint, policy.compute_dtype(checkpoint) if s.lora else mx.float32)
        stream.load_checked(model, f"{checkpoint.path}: ")
        if s.lora:
            lora.insert(model, s.lora, s.seed)
            mx.eval(model.parameters())
        optimizer = GuardedAdamW(weight_decay=s.weight_decay)
        yield AlignmentRun(name, s, place, checkpoint, model, optimizer, plan, weather, files, card)
