"""Supervised fine-tuning: a model learns the answers of conversations, whole or with LoRA, perhaps
beside a teacher.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from mis_mlx import cli
from mis_mlx.alignment import alignment_run, sequence_packing
from mis_mlx.distillation import live_teacher
from mis_mlx.evaluation import comparison
from mis_mlx.hardware import memory
from mis_mlx.models import load, resolve
from mis_mlx.models.config import softcap
from mis_mlx.planner import estimates
from mis_mlx.types import Checkpoint, Rate


@dataclass(frozen=True)
class Settings(alignment_run.Alignment):
    """One run. Rows: {"messages": [...]} or {"prompt", "completion"}."""

    learning_rate: Rate = 1e-4
    """peak; falls to a tenth along a cosine; 2e-5 suits a model of billions"""
    mask_prompt: bool = True
    """learn answers only: the completion, or every turn of the assistant; otherwise all tokens"""
    packing: bool = True
    """several rows in a window, none of which sees another; off beside a teacher, which reads row
    by row
    """
    teacher: str | None = None
    """folder or hub id of a model with the same tokenizer to learn from beside the text"""
    distill_weight: Rate = 0.5
    """share of the loss that is KL to the teacher, if there is one; the rest is cross-entropy"""


def _phase(
    s: Settings, checkpoint: Checkpoint, beside: Checkpoint | None, length: int
) -> estimates.StageCost:
    """The training, with as much of its teacher in memory as the budget leaves."""
    alone = alignment_run.training(s, checkpoint, s.batch_size, length, "sft")
    if beside is None:
        return alone
    t = estimates.model_of(beside)
    tokens = s.batch_size * s.grad_accumulation_steps * length
    peak = alone.peak_bytes + t.slots_bytes + t.head_work + tokens * t.shape.hidden * t.item
    keeps = estimates.pins(t, estimates.room(memory.budget(s.budget_bytes).limit_bytes, peak))
    flops = alone.flops + s.iters * estimates.forward_flops(t, tokens, length)
    read = alone.read_bytes + t.block_bytes * (keeps + s.iters * (t.shape.layers - keeps))
    return replace(
        alone, peak_bytes=peak + keeps * t.block_work, flops=flops, read_bytes=read, pinned=keeps
    )


def run(settings: Settings) -> dict[str, Any]:
    """The command: open, read and check the data, plan, train, write the best student."""
    s, folder, checkpoint = alignment_run.opened(settings)
    beside = None
    if s.teacher is not None:
        beside = comparison.same_vocabulary(
            checkpoint, load.open_checkpoint(resolve.resolve_model(s.teacher).path)
        )
    *splits, card = alignment_run.data(
        s, checkpoint, ("messages", "completion"), mask_prompt=s.mask_prompt
    )
    room = s.max_seq_length if s.packing and not s.teacher else 0
    train, valid = (
        sequence_packing.PackedDataset([row[0] for row in rows], room) for rows in splits
    )
    length = max(train.lengths)
    cli.say(f"{len(splits[0])} rows in {len(train.windows)} windows of at most {length} tokens")
    parts = alignment_run.cut(s, folder, lambda parts: _phase(parts, checkpoint, beside, length))
    phase = _phase(parts, checkpoint, beside, length)
    planned = alignment_run.planned(s, [phase])
    if s.dry_run:
        return {"model": str(checkpoint.path), "windows": len(train.windows), **planned}
    with alignment_run.running(s, folder, checkpoint, parts.batch_size, [phase], card, "sft") as r:
        source: live_teacher.TargetSource = live_teacher.TextTargets(softcap(checkpoint.config))
        if beside is not None:
            t = estimates.model_of(beside)
            direct = beside.nbytes > r.budget_bytes
            room = phase.pinned * t.block_work + t.head_work
            source = live_teacher.StreamedTeacher(
                beside, room, direct, cross_entropy=1.0 - s.distill_weight
            )
        each = partial(train.micro_batches, source, parts)
        loss = partial(train.loss, source, s.lora is not None)
        return r.train(each, loss, lambda: valid.measure(r.model, parts.batch_size))


if __name__ == "__main__":
    cli.main(Settings, run, several=True)
