"""What the alignment commands share: flags, what a run with them takes, its checkpoints, its best
student, its result.

A run that was killed and resumed ends bit-equal to one that was not.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mis_mlx import cli
from mis_mlx.data import examples
from mis_mlx.distillation import run_loop, train_loop
from mis_mlx.gguf_export.model_card import name_of
from mis_mlx.hardware import memory
from mis_mlx.hardware.thermal.run_monitor import ThermalFlags
from mis_mlx.maths.optimizer import GuardedAdamW
from mis_mlx.models import arch, distributed, load, lora, model_writer, policy, stream
from mis_mlx.planner import compression_size, estimates, recipe
from mis_mlx.planner.phases import SAVED_BYTES
from mis_mlx.reporting import progress
from mis_mlx.storage import checkpoint as protocol
from mis_mlx.storage import run_folder
from mis_mlx.types import Checkpoint, Count, MisError, Positive, Step, Tokens, Within, gib

BEST = "best"
MODEL = "model"
ADAPTERS = "adapters"
HELD_OUT = "held_out.jsonl"
# Settings that may differ in a run that goes on: none changes a weight. By `save_every` the best is
# looked for.
FREE = frozenset({"out", "resume", "dry_run", "config", "budget", "governor", "thermal_replay"})
S = TypeVar("S", bound="Alignment")


@dataclass(frozen=True)
class Alignment(cli.Resumable, policy.Computing, ThermalFlags, recipe.TrainingConfig):
    """The flags that sft, dpo and grpo share."""

    batch_size: Count = 4
    """rows, pairs or answers in a micro-batch; cut into smaller ones, which change nothing, where
    memory is short
    """
    max_seq_length: Tokens = 512
    """most tokens of a row; what does not fit is cut off its end, and counted"""
    save_every: Count = 20
    """steps between checkpoints, at each of which the held-out rows are measured"""
    model: str | None = None
    """folder or hub id of the model to align; default: SmolLM2-135M-Instruct"""
    data: str | None = None
    """folder with train.jsonl and perhaps valid.jsonl; default: generated tasks"""
    data_licence: str | None = None
    """licence of the data, or the consent it was given with; default: what a LICENSE file beside it
    says
    """
    scrub_pii: bool = False
    """replace e-mail addresses, telephone numbers, PESEL and NIP in the data before training, and
    count them
    """
    eval_rows: Count = 64
    """held-out rows measured at every checkpoint; the best checkpoint becomes the result"""
    fine_tune_type: Literal["full", "lora"] = "full"
    """all weights, or mlx-lm's low-rank adapters beside frozen ones"""
    num_layers: Annotated[int, Within(-1, 10**4)] = -1
    """blocks that get adapters, counted from the last; -1: all"""
    rank: Count = 8
    """of the adapters"""
    scale: Positive = 20.0
    """factor on the adapters"""
    fuse: bool = True
    """add the adapters to the weights in the end; otherwise they are left beside the model, for
    --adapter-path
    """
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """type of the result's weights on disk"""

    @property
    def lora(self) -> lora.Lora | None:
        """The adapters asked for, if any."""
        return (
            lora.Lora(self.num_layers, self.rank, self.scale)
            if self.fine_tune_type == "lora"
            else None
        )


def opened(settings: S) -> tuple[S, Path | None, Checkpoint]:
    """(settings; folder, of a run that goes on; the model to align). MisError where it cannot be
    trained as asked.
    """
    s, folder = run_loop.resumed(settings, FREE)
    checkpoint = run_loop.opened(s, s.model)
    if s.lora:
        s.lora.check(int(checkpoint.config["num_hidden_layers"]))
    elif arch.is_quantized(checkpoint.tensors):
        raise MisError(
            f"{checkpoint.path} is quantized and cannot be trained whole: use --fine-tune-type lora"
        )
    if s.max_seq_length > (
        most := int(checkpoint.config.get("max_position_embeddings") or s.max_seq_length)
    ):
        raise MisError(
            f"--max-seq-length is {s.max_seq_length}, the model's window {most}: give {most} or "
            f"less"
        )
    return s, folder, checkpoint


def dtype_of(s: Alignment, checkpoint: Checkpoint) -> mx.Dtype:
    """What the model, and the reference beside it, compute in: float32 where the model is trained
    whole.
    """
    return policy.compute_dtype(checkpoint) if s.lora else mx.float32


def sizes(s: Alignment, checkpoint: Checkpoint) -> estimates.ModelSize:
    """The model in bytes, as it computes here."""
    return estimates.model_of(checkpoint, dtype=dtype_of(s, checkpoint))


def weight_bytes(m: estimates.ModelSize) -> int:
    """The model in memory, before anything is done with it."""
    return m.nbytes if m.packed and m.as_stored else m.params * m.item


def training(
    s: Alignment, checkpoint: Checkpoint, rows: int, length: int, name: str = "align"
) -> estimates.StageCost:
    """What training takes with `rows` sequences of `length` tokens in a micro-batch."""
    m = sizes(s, checkpoint)
    more = s.grad_accumulation_steps > 1
    trained = m.params
    peak = compression_size.training_bytes(m.config, rows, length, 0, more, gpu=m.gpu)
    if s.lora:
        trained = s.lora.params(m.config)
        peak = weight_bytes(m) + compression_size.STATE_BYTES * trained
        kept = estimates.activation_bytes(m.config, rows, length)
        peak += kept + m.in_flight(kept)
        peak += estimates.logit_bytes(m.shape.vocab, rows * length, gpu=m.gpu) + m.widened_bytes
    written = (s.iters // s.save_every + 2) * (SAVED_BYTES + 4) * trained + policy.DTYPES[
        s.dtype
    ].size * m.params
    flops = (
        s.iters * 3 * estimates.forward_flops(m, s.grad_accumulation_steps * rows * length, length)
    )
    return estimates.StageCost(name, m.nbytes, written, peak, flops, updated=s.iters * trained)


def planned(s: Alignment, phases: Sequence[estimates.StageCost]) -> dict[str, Any]:
    """What a --dry-run says of these phases under the budget asked for, told in a line each."""
    limit = memory.budget(s.budget_bytes).limit_bytes
    result = estimates.told(phases, limit, estimates.machine_rates(), memory.process_bytes(limit))
    fits = "does not fit" if result["check_failed"] else "fits"
    cli.say(f"peak {gib(result['peak_bytes'])} {fits} the budget of {gib(limit)}")
    return result


def cut(s: S, folder: Path | None, phase: Callable[[S], estimates.StageCost]) -> S:
    """`s` with its steps in the largest micro-batches with which `phase(s)` fits; of a run in
    `folder`, in its own. A micro-batch divides the one asked for, and a step stays what it was.
    """
    limit = memory.budget(s.budget_bytes).limit_bytes

    def in_parts(size: int) -> S:
        return replace(
            s,
            batch_size=size,
            grad_accumulation_steps=s.grad_accumulation_steps * s.batch_size // size,
        )

    def fitting() -> int:
        if folder:
            return int(
                run_folder.stored_settings(folder, run_folder.PLAN).get("micro", s.batch_size)
            )
        divisors = [n for n in range(s.batch_size, 0, -1) if s.batch_size % n == 0]
        return next(
            (
                n
                for n in divisors
                if phase(in_parts(n)).peak_bytes <= limit - memory.process_bytes(limit)
            ),
            1,
        )

    return in_parts(distributed.broadcast_json(fitting))


@dataclass
class AlignmentRun(run_loop.OpenRun):
    """A student in memory and the folder of its run. Made by `running`."""

    name: str  # of the command
    settings: Alignment
    checkpoint: Checkpoint
    model: nn.Module
    optimizer: GuardedAdamW
    card: Mapping[str, Any]  # of the data: what it is, its licence
    best: tuple[int, float] | None = None  # (step, its held-out figure)

    def train(
        self,
        micro_batches: Callable[[int], Any],
        loss: train_loop.Loss,
        held_out: Callable[[], Mapping[str, float]],
        train: Callable[..., Iterator[Step]] = train_loop.train,
        judge: str = "loss",
    ) -> dict[str, Any]:
        """Train from wherever the run stands to its end, write the best student, return the run's
        result. micro_batches, loss: as of `train_loop.train`; pure functions of the step and of the
        model. held_out(): what is measured of `model` at every checkpoint; the one with the lowest
        `judge` is kept. train: called as `train_loop.train`, yields the steps; what `micro_batches`
        gives is between these two.
        """
        s = self.settings

        def remember(number: int) -> dict[str, Any]:
            # Measured only where every run of these settings is: a stop does not change the best.
            if distributed.is_main() and (number % s.save_every == 0 or number == s.iters):
                self._measure(number, held_out, judge)
            return {"best": self.best}

        def recall(state: dict[str, Any]) -> None:
            self.best = state["best"][0], state["best"][1]

        training = run_loop.CheckpointedTraining(
            self, train_loop.Whole(self.model, self.optimizer), remember, recall, label=self.name
        )
        start = training.start(lambda: None)
        self.model.train()
        steps = partial(train, self.model, micro_batches, loss, self.optimizer, s)
        training.finish(steps, start, s.iters, s.save_every)
        return self._finish() if distributed.is_main() else {}

    def _measure(
        self, number: int, held_out: Callable[[], Mapping[str, float]], judge: str
    ) -> None:
        """Log what is held out; if the model is the best so far, keep its weights."""
        self.model.eval()
        measured = {name: float(value) for name, value in held_out().items()}
        self.model.train()
        self.files.append(self.folder / HELD_OUT, json.dumps({"number": number, **measured}))
        cli.say(
            f"step {number}, held out: "
            + ", ".join(f"{name} {value:.4f}" for name, value in measured.items())
        )
        if not math.isfinite(value := measured[judge]):
            raise MisError(f"the held-out loss at step {number} is {value}: lower --learning-rate")
        if self.best is None or value < self.best[1]:
            self.best = (number, value)
            # 3 of them: as many checkpoints may be damaged or undone as the steps can lose. A run
            # that was set back comes here again with the same bits.
            if not (self.folder / BEST / f"step-{number:08d}").exists():
                best = {"model": dict(tree_flatten(self.model.trainable_parameters()))}
                protocol.save_step(self.folder / BEST, number, best, measured, self.files, keep=3)

    def _finish(self) -> dict[str, Any]:
        """The best student as an ordinary folder, or its adapters; and the run's JSON."""
        s = self.settings
        c = self.checkpoint
        best = protocol.newest(self.folder / BEST, self.files)
        if best is None:
            raise MisError(f"{self.folder / BEST} holds no whole checkpoint: start a new run")
        arrays = protocol.load_arrays(best, "model")
        if s.lora and not (self.folder / ADAPTERS).exists():
            lora.write(arrays, s.lora, self.folder / ADAPTERS, self.files)
        out = self.folder / (MODEL if s.fuse or not s.lora else ADAPTERS)
        if out.name == MODEL and not out.exists():
            take = lora.fused(c, arrays, s.lora) if s.lora else arrays.__getitem__
            config = {k: v for k, v in c.config.items() if not k.startswith("quantization")} | {
                "torch_dtype": s.dtype
            }
            extra = model_writer.keep_files(model_writer.read_keep(c.path)) | {
                run_folder.DATA: dict(self.card)
            }
            model_writer.write_model(config, take, c.path, out, s.dtype, self.files, extra)
        steps = run_folder.metrics(self.folder)
        by_step = {
            record["number"]: record for record in run_folder.records(self.folder / HELD_OUT)
        }
        tokens, seconds = (sum(r[key] for r in steps) for key in ("tokens", "seconds"))
        return self.done(
            {
                "model": str(c.path),
                "student": str(out),
                "run": str(self.folder),
                "params_trained": sum(math.prod(a.shape) for a in arrays.values()),
                "best_step": best.number,
                "held_out_start": by_step.get(0),
                "held_out_best": by_step.get(best.number),
                "tokens": tokens,
                "tokens_per_s": round(tokens / max(seconds, 1e-9), 1),
            }
        )


def data(
    s: Alignment,
    checkpoint: Checkpoint,
    shapes: Sequence[str],
    answers: Sequence[str] = (),
    mask_prompt: bool = True,
) -> tuple[list[list[examples.Sequenced]], list[list[examples.Sequenced]], dict[str, Any]]:
    """(rows to train on, held-out ones, encoded; what is known of the data); every row is
    checked.
    """
    rows = examples.load(s.data, shapes, s.data_licence, s.scrub_pii)
    tokenizer = load.tokenizer(checkpoint.path)
    train, cut = examples.encode(rows.train, tokenizer, s.max_seq_length, answers, mask_prompt)
    valid, _ = examples.encode(rows.valid, tokenizer, s.max_seq_length, answers, mask_prompt)
    what = "answers" if answers else "rows"
    cli.say(*rows.notes, *([f"{cut} {what} are cut at {s.max_seq_length} tokens"] if cut else []))
    return (
        train,
        valid[: s.eval_rows],
        {**rows.card, "fingerprint": examples.fingerprint([*train, *valid])},
    )


@contextmanager
def running(
    s: Alignment,
    folder: Path | None,
    checkpoint: Checkpoint,
    micro: int,
    phases: Sequence[estimates.StageCost],
    card: Mapping[str, Any],
    name: str,
) -> Iterator[AlignmentRun]:
    """The run, new or continued (`folder`), with its student in memory. micro: rows, pairs or
    answers in a micro-batch. card: of the data, with its "fingerprint". MisError with both numbers
    where a phase does not fit the budget.
    """
    budget = memory.budget(s.budget_bytes)
    rates = estimates.machine_rates()
    seconds = sum(p.seconds(rates) for p in phases)
    largest = max(phases, key=lambda p: p.peak_bytes)
    peak = largest.peak_bytes + memory.process_bytes(budget.limit_bytes)
    other = ", lower --batch-size or --max-seq-length, or use --fine-tune-type lora"
    estimates.fit(budget, largest, other=f"{other}; alignment trains whole models in memory")
    if folder is None:
        cli.say(progress.promise(seconds))
    way = {"mode": "resident", "micro": micro}
    origin = run_folder.origin(checkpoint, card["fingerprint"])
    with (
        progress.run(name, {name: seconds}),
        run_loop.open_run(
            s, folder, f"{name_of(checkpoint.path)}-{name}", origin, way, budget, peak
        ) as place,
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
            **vars(place),
            name=name,
            settings=s,
            checkpoint=checkpoint,
            model=model,
            optimizer=optimizer,
            card=card,
        )
