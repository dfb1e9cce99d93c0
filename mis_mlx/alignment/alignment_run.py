"""What the alignment commands share: a student opened, whole or with LoRA; its run, checkpoints, best one, result.

A run that was killed and resumed ends bit-equal to one that was not."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mis_mlx import cli
from mis_mlx.alignment.alignment_plan import Alignment, AlignmentPlan, dtype_of
from mis_mlx.data import examples
from mis_mlx.distillation import train_loop
from mis_mlx.distillation.run_loop import CheckpointedTraining, OpenRun, open_run
from mis_mlx.gguf_export.model_card import name_of
from mis_mlx.maths.optimizer import GuardedAdamW
from mis_mlx.models import distributed, load, lora, model_writer, stream
from mis_mlx.planner import estimates
from mis_mlx.reporting import progress
from mis_mlx.storage import checkpoint as protocol
from mis_mlx.storage import run_folder
from mis_mlx.types import Checkpoint, MisError, Step

BEST, MODEL, ADAPTERS = "best", "model", "adapters"
HELD_OUT = "held_out.jsonl"


@dataclass
class AlignmentRun(OpenRun):
    """A student in memory and the folder of its run. Made by `running`."""

    name: str  # of the command
    settings: Alignment
    checkpoint: Checkpoint
    model: nn.Module
    optimizer: GuardedAdamW
    plan: AlignmentPlan
    card: Mapping[str, Any]  # of the data: what it is, its licence
    best: tuple[int, float] | None = None  # (step, its held-out figure)

    def train(
        self, micro_batches: Callable[[int], Any], loss: train_loop.Loss, held_out: Callable[[], Mapping[str, float]],
        train: Callable[..., Iterator[Step]] = train_loop.train, judge: str = "loss",
    ) -> dict[str, Any]:  # fmt: skip
        """Train from wherever the run stands to its end, write the best student, return the run's result.
        micro_batches, loss: as of `train_loop.train`; pure functions of the step and of the model. held_out(): what is
        measured of `model` at every checkpoint; the one with the lowest `judge` is kept. train: called as
        `train_loop.train`, yields the steps; what `micro_batches` gives is between these two."""
        s, mine = self.settings, (self.model, self.optimizer)

        def remember(number: int) -> dict[str, Any]:
            # Measured only where every run of these settings is: a stop does not change the best.
            if distributed.is_main() and (number % s.save_every == 0 or number == s.iters):
                self._measure(number, held_out, judge)
            return {"best": self.best}

        def recall(state: dict[str, Any]) -> None:
            self.best = state["best"][0], state["best"][1]

        training = CheckpointedTraining(
            self, partial(train_loop.arrays_of, *mine), self.optimizer.memory, partial(train_loop.restore, *mine),
            remember, recall, label=self.name, budget_bytes=self.plan.budget.limit_bytes,
        )  # fmt: skip
        start = training.start(lambda: None)
        self.model.train()
        steps = partial(train, self.model, micro_batches, loss, self.optimizer, s.schedule)
        training.finish(steps, start, s.iters, s.save_every, self.optimizer)
        return self._finish() if distributed.is_main() else {}

    def _measure(self, number: int, held_out: Callable[[], Mapping[str, float]], judge: str) -> None:
        """Log what is held out; if the model is the best so far, keep its weights."""
        self.model.eval()
        measured = {name: float(value) for name, value in held_out().items()}
        self.model.train()
        self.files.append(self.folder / HELD_OUT, json.dumps({"number": number, **measured}))
        cli.say(f"step {number}, held out: " + ", ".join(f"{name} {value:.4f}" for name, value in measured.items()))
        if not math.isfinite(value := measured[judge]):
            raise MisError(f"the held-out loss at step {number} is {value}: lower --learning-rate")
        if self.best is None or value < self.best[1]:
            self.best = (number, value)
            # 3 of them: as many checkpoints may be damaged or undone as the steps can lose. A run that was set
            # back comes here again with the same bits.
            if not (self.folder / BEST / f"step-{number:08d}").exists():
                best = {"model": train_loop.arrays_of(self.model, self.optimizer)["model"]}
                protocol.save_step(self.folder / BEST, number, best, measured, self.files, keep=3)

    def _finish(self) -> dict[str, Any]:
        """The best student as an ordinary folder, or its adapters; and the run's JSON."""
        s, c = self.settings, self.checkpoint
        best = protocol.newest(self.folder / BEST, self.files)
        if best is None:
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
        steps = run_folder.metrics(self.folder)
        by_step = {record["number"]: record for record in run_folder.records(self.folder / HELD_OUT)}
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
            **self.account(self.plan.budget.limit_bytes),
        }
        self.files.replace_text(self.folder / run_folder.RESULT, json.dumps(result, indent=2))
        return result


def data(
    s: Alignment, checkpoint: Checkpoint, shapes: Sequence[str], answers: Sequence[str] = (), mask_prompt: bool = True
) -> tuple[list[list[examples.Sequenced]], list[list[examples.Sequenced]], dict[str, Any]]:
    """(rows to train on, held-out ones, encoded; what is known of the data); every row is checked."""
    rows = examples.load(s.data, shapes, s.data_licence, s.scrub_pii)
    tokenizer = load.tokenizer(checkpoint.path)
    train, cut = examples.encode(rows.train, tokenizer, s.max_seq_length, answers, mask_prompt)
    valid, _ = examples.encode(rows.valid, tokenizer, s.max_seq_length, answers, mask_prompt)
    what = "answers" if answers else "rows"
    cli.say(*rows.notes, *([f"{cut} {what} are cut at {s.max_seq_length} tokens"] if cut else []))
    return train, valid[: s.eval_rows], rows.card(examples.fingerprint([*train, *valid]))


@contextmanager
def running(
    s: Alignment, folder: Path | None, checkpoint: Checkpoint, plan: AlignmentPlan, card: Mapping[str, Any], name: str
) -> Iterator[AlignmentRun]:
    """The run, new or continued (`folder`), with its student in memory. `card`: of the data, with its "fingerprint".
    MisError with both numbers where the plan does not fit the budget."""
    remedy = f"give --budget {estimates.flag(plan.peak_bytes)} or more, lower --batch-size or --max-seq-length, "
    remedy += "or use --fine-tune-type lora; alignment trains whole models in memory"
    plan.budget.need(plan.peak_bytes, plan.largest, remedy)
    if folder is None:
        cli.say(progress.promise(plan.seconds))
    way, origin = {"mode": "resident", "micro": plan.micro_batch}, run_folder.origin(checkpoint, card["fingerprint"])
    with (
        progress.run(name, {name: plan.seconds}),
        open_run(s, folder, f"{name_of(checkpoint.path)}-{name}", origin, way, plan.budget, plan.peak_bytes) as place,
    ):
        if not (place.folder / run_folder.DATA).exists():
            about = json.dumps(dict(card), indent=2, ensure_ascii=False)
            place.files.replace_text(place.folder / run_folder.DATA, about)
        model = load.resident(checkpoint, dtype_of(s, checkpoint))
        stream.load_checked(model, f"{checkpoint.path}: ")
        if s.lora:
            lora.insert(model, s.lora, s.seed)
            mx.eval(model.parameters())
        optimizer = GuardedAdamW(weight_decay=s.weight_decay)
        yield AlignmentRun(
            **vars(place), name=name, settings=s, checkpoint=checkpoint, model=model, optimizer=optimizer, plan=plan,
            card=card,
        )  # fmt: skip
