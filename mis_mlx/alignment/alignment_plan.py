"""The flags that sft, dpo and grpo share, and what a run with these takes: bytes, hours, memory."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import mlx.core as mx

from mis_mlx import cli
from mis_mlx.distillation import run_loop
from mis_mlx.hardware import memory
from mis_mlx.hardware.thermal.run_monitor import ThermalFlags
from mis_mlx.models import arch, distributed, lora, policy
from mis_mlx.planner import estimates, recipe, training_size
from mis_mlx.planner.phases import SAVED_BYTES
from mis_mlx.storage import run_folder
from mis_mlx.types import Budget, Checkpoint, Count, MisError, Positive, Tokens, Within, gib

# Settings that may differ when a run is resumed: none of them changes a weight. `save_every` does: by it the best
# checkpoint is looked for.
FREE = frozenset({"out", "resume", "dry_run", "config", "budget", "governor", "thermal_replay"})
S = TypeVar("S", bound="Alignment")


@dataclass(frozen=True)
class Alignment(cli.Resumable, policy.Computing, ThermalFlags, recipe.TrainingConfig):
    """The flags that sft, dpo and grpo share."""

    batch_size: Count = 4
    """rows, pairs or answers in a micro-batch; cut into smaller ones, which change nothing, where memory is short"""
    max_seq_length: Tokens = 512
    """most tokens of a row; what does not fit is cut off its end, and counted"""
    save_every: Count = 20
    """steps between checkpoints, at each of which the held-out rows are measured"""
    model: str | None = None
    """folder or hub id of the model to align; default: SmolLM2-135M-Instruct"""
    data: str | None = None
    """folder with train.jsonl and perhaps valid.jsonl; default: generated tasks"""
    data_licence: str | None = None
    """licence of the data, or the consent it was given with; default: what a LICENSE file beside it says"""
    scrub_pii: bool = False
    """replace e-mail addresses, telephone numbers, PESEL and NIP in the data before training, and count them"""
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
    """add the adapters to the weights in the end; otherwise they are left beside the model, for --adapter-path"""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """type of the result's weights on disk"""

    @property
    def lora(self) -> lora.Lora | None:
        """The adapters asked for, if any."""
        return lora.Lora(self.num_layers, self.rank, self.scale) if self.fine_tune_type == "lora" else None


def opened(settings: S) -> tuple[S, Path | None, Checkpoint]:
    """(settings and folder of the run, which may be one that goes on; the model to align, through the gate). MisError
    where it cannot be trained as asked for."""
    s, folder = run_loop.resumed(settings, FREE)
    checkpoint = run_loop.opened(s, s.model)
    if s.lora:
        s.lora.check(int(checkpoint.config["num_hidden_layers"]))
    elif arch.is_quantized(checkpoint.tensors):
        raise MisError(f"{checkpoint.path} is quantized and cannot be trained whole: use --fine-tune-type lora")
    if s.max_seq_length > (most := int(checkpoint.config.get("max_position_embeddings") or s.max_seq_length)):
        raise MisError(f"--max-seq-length is {s.max_seq_length}, the model's window {most}: give {most} or less")
    return s, folder, checkpoint


def dtype_of(s: Alignment, checkpoint: Checkpoint) -> mx.Dtype:
    """What the model, and the reference beside it, compute in: float32 where the model is trained whole."""
    return policy.compute_dtype(checkpoint) if s.lora else mx.float32


def sizes(s: Alignment, checkpoint: Checkpoint) -> estimates.ModelSize:
    """The model in bytes, as it computes here."""
    return estimates.model_of(checkpoint, dtype=dtype_of(s, checkpoint))


def weight_bytes(m: estimates.ModelSize) -> int:
    """The model in memory, before anything is done with it."""
    return m.nbytes if m.packed and m.as_stored else m.params * m.item


def training(s: Alignment, checkpoint: Checkpoint, rows: int, length: int, name: str = "align") -> estimates.StageCost:
    """What training takes with `rows` sequences of `length` tokens in a micro-batch."""
    m = sizes(s, checkpoint)
    trained, peak = m.params, training_size.training_bytes(m.config, rows, length)
    if s.lora:
        trained = s.lora.params(m.config)
        peak = weight_bytes(m) + training_size.STATE_BYTES * trained
        peak += training_size.activation_bytes(m.config, rows, length)
        peak += training_size.logit_bytes(m.shape.vocab, rows * length)
    written = (s.iters // s.save_every + 2) * (SAVED_BYTES + 4) * trained + estimates.SIZES[s.dtype] * m.params
    flops = s.iters * 3 * estimates.forward_flops(m, s.grad_accumulation_steps * rows * length, length)
    return estimates.StageCost(name, m.nbytes, written, peak, flops, True, updated=s.iters * trained)


@dataclass(frozen=True)
class AlignmentPlan:
    """What a run takes on this machine, and may take."""

    budget: Budget
    micro_batch: int  # rows, pairs or answers
    largest: str  # phase
    peak_bytes: int  # of that phase, with the process's own share
    seconds: float  # of all phases
    result: dict[str, Any]  # of a --dry-run


def plan(s: Alignment, *phases: estimates.StageCost) -> AlignmentPlan:
    """The plan of these phases under the budget asked for, told in a line each. s: with the micro-batches to come."""
    budget, rates = memory.budget(s.budget_bytes), estimates.machine_rates()
    limit, seconds = budget.limit_bytes, sum(p.seconds(rates) for p in phases)
    result = estimates.told(phases, limit, rates, memory.process_bytes(limit))
    fits, largest = "does not fit" if result["check_failed"] else "fits", max(phases, key=lambda p: p.peak_bytes)
    cli.say(f"peak {gib(result['peak_bytes'])} {fits} the budget of {gib(limit)}")
    return AlignmentPlan(budget, s.batch_size, largest.name, result["peak_bytes"], seconds, result)


def cut(s: S, folder: Path | None, phase: Callable[[S], estimates.StageCost]) -> S:
    """`s` with its steps in the largest micro-batches with which `phase(s)` fits; of a run in `folder`, in its own. A
    micro-batch divides the one asked for, and a step stays what it was."""
    limit = memory.budget(s.budget_bytes).limit_bytes

    def in_parts(size: int) -> S:
        return replace(s, batch_size=size, grad_accumulation_steps=s.grad_accumulation_steps * s.batch_size // size)

    def fitting() -> int:
        if folder:
            return int(run_folder.stored_settings(folder, run_folder.PLAN).get("micro", s.batch_size))
        room = limit - memory.process_bytes(limit)
        divisors = [n for n in range(s.batch_size, 0, -1) if s.batch_size % n == 0]
        return next((n for n in divisors if phase(in_parts(n)).peak_bytes <= room), 1)

    return in_parts(distributed.broadcast_json(fitting))
