"""Fine-tune on conversations: all weights or LoRA; teacher optional."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

from mis_mlx import cli
from mis_mlx.alignment import alignment_run, sequence_packing
from mis_mlx.distillation import live_teacher
from mis_mlx.hardware import memory
from mis_mlx.hardware.stage_cost import BLOCKS, StageCost
from mis_mlx.judge import comparison
from mis_mlx.models.architectures.sizes import reads_in_order, softcap
from mis_mlx.models.opening import compute_type, resolve
from mis_mlx.models.opening.model_size import model_of
from mis_mlx.models.passing import pass_cost
from mis_mlx.types import Checkpoint, Off, Rate


@dataclass(frozen=True)
class Settings(alignment_run.Alignment):
    """Trains on rows of {"messages": [...]} or {"prompt", "completion"}."""

    learning_rate: Rate = 1e-4
    """peak learning rate; decays to a tenth along a cosine; for billions of parameters, try 2e-5"""
    mask_prompt: Annotated[bool, Off("train on prompts, too, not on answers alone")] = True
    """train on answers only: the completion, or every turn of the assistant"""
    packing: Annotated[bool, Off("give every row a window of its own")] = True
    """pack several rows into one window, where they do not see each other; off with --teacher,
    which reads row by row, and for Qwen 3.5
    """
    teacher: str | None = None
    """folder or hub id of a model with the same tokenizer, to learn from in addition to the text"""
    distill_weight: Rate = 0.5
    """share of the loss that is KL to --teacher; the rest is cross-entropy"""


def _phase(
    s: Settings,
    checkpoint: Checkpoint,
    beside: Checkpoint | None,
    length: int,
) -> StageCost:
    """The cost of training, with as much of the teacher `beside` in memory as the budget leaves."""
    alone = alignment_run.training_cost(s, checkpoint, s.batch_size, length, name="sft")
    if beside is None:
        return alone
    teacher = model_of(beside)
    tokens = s.batch_size * s.grad_accumulation_steps * length
    limit = memory.budget(s.budget_bytes).limit_bytes
    ledger = alignment_run.training_ledger(s, checkpoint, s.batch_size, length, limit)
    live_teacher.hold_teacher(ledger, teacher, tokens, s.batch_size * length, length=length)
    read_bytes = live_teacher.keep_blocks(ledger, teacher, s.iters)
    return replace(
        alone,
        peak_bytes=ledger.peak_bytes,
        flops=alone.flops + s.iters * pass_cost.forward_flops(teacher, tokens, length),
        read_bytes=alone.read_bytes + read_bytes,
        stays=ledger.filled,
    )


def _packs(s: Settings, checkpoint: Checkpoint) -> bool:
    """Whether rows share windows; a line says so where the model does not allow it."""
    if not s.packing or s.teacher:
        return False
    if reads_in_order(checkpoint.config):
        name = checkpoint.config["model_type"]
        cli.say(f"a {name} reads one text after the other, so every row has a window of its own")
        return False
    return True


def _source(
    s: Settings,
    checkpoint: Checkpoint,
    beside: Checkpoint | None,
    *,
    pinned: int,
    budget_bytes: int,
) -> live_teacher.TargetSource:
    """The targets: the text itself, or the teacher `beside` with `pinned` blocks in memory."""
    if beside is None:
        return live_teacher.TextTargets(softcap(checkpoint.config))
    teacher = model_of(beside)
    return live_teacher.StreamedTeacher(
        beside,
        headroom_bytes=pinned * teacher.block_work + teacher.head_work,
        direct=beside.nbytes > budget_bytes,
        cross_entropy=1.0 - s.distill_weight,
    )


def run(settings: Settings) -> dict[str, Any]:
    """The command: open, read and check the data, plan, train, write the best student."""
    s, folder, checkpoint = alignment_run.open_run_model(settings)
    beside = None
    if s.teacher is not None:
        teacher = compute_type.open_to_compute(resolve.resolve_model(s.teacher).path, s.precision)
        beside = comparison.same_vocabulary(checkpoint, teacher)
    train_rows, valid_rows, card = alignment_run.data(
        s,
        checkpoint,
        ("messages", "completion"),
        mask_prompt=s.mask_prompt,
    )
    room = s.max_seq_length if _packs(s, checkpoint) else 0
    train = sequence_packing.PackedDataset([row[0] for row in train_rows], room)
    valid = sequence_packing.PackedDataset([row[0] for row in valid_rows], room)
    length = max(train.lengths)
    cli.say(f"{len(train_rows)} rows in {len(train.windows)} windows of at most {length} tokens")
    parts = alignment_run.fit_micro_batches(
        s, folder, lambda parts: _phase(parts, checkpoint, beside, length)
    )
    phase = _phase(parts, checkpoint, beside, length)
    planned = alignment_run.report_plan(s, [phase])
    if s.dry_run:
        return {"model": str(checkpoint.path), "windows": len(train.windows), **planned}
    with alignment_run.start_run(
        s,
        folder,
        checkpoint,
        micro=parts.batch_size,
        planned=planned,
        card=card,
        name="sft",
    ) as alignment:
        source = _source(
            s,
            checkpoint,
            beside,
            pinned=phase.stays.get(BLOCKS, 0),
            budget_bytes=alignment.budget_bytes,
        )
        micro_batches = partial(train.micro_batches, source, parts)
        loss = partial(train.loss, source, s.lora is not None)
        held_out = partial(valid.measure, batch_size=parts.batch_size)
        return alignment.train(micro_batches, loss, held_out)


if __name__ == "__main__":
    cli.main(Settings, run, several=True)
