"""Fine-tune on conversations: all weights, LoRA, or the scales of a packed model."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

from mis_mlx import cli
from mis_mlx.alignment import alignment_run, packed_run, padded_rows
from mis_mlx.hardware.stage_cost import StageCost
from mis_mlx.types import Off, Rate


@dataclass(frozen=True)
class Settings(alignment_run.Alignment):
    """Trains on rows of {"messages": [...]}, {"prompt", "completion"} or {"text"}."""

    fine_tune_type: Literal["full", "lora", "scales"] = "full"  # type: ignore[assignment]
    """train all weights, or mlx-lm's low-rank adapters on frozen weights, or the scales, biases and
    norms of a packed model, which stays as large as it is
    """
    # a float wherever steps are made
    learning_rate: Rate | None = None  # type: ignore[assignment]
    """peak learning rate; decays to a tenth along a cosine; default: 1e-4, for billions of
    parameters try 2e-5; of scales 2e-3, relative to what learns
    """
    mask_prompt: Annotated[bool, Off("train on prompts, too, not on answers alone")] = True
    """train on answers only: the completion, or every turn of the assistant"""


def run(settings: Settings) -> dict[str, Any]:
    """The command: open, read and check the data, plan, train, write the best student."""
    s, folder, checkpoint = alignment_run.open_run_model(settings)
    of_scales = s.fine_tune_type == alignment_run.SCALES
    if s.learning_rate is None:
        s = s.with_values(learning_rate=packed_run.RATE if of_scales else 1e-4)
    train_rows, valid_rows, card = alignment_run.data(
        s,
        checkpoint,
        ("messages", "completion", "text"),
        mask_prompt=s.mask_prompt,
    )
    train = padded_rows.Rows([row[0] for row in train_rows])
    valid = padded_rows.Rows([row[0] for row in valid_rows])
    length = max(train.lengths)
    cli.say(f"{len(train_rows)} rows of at most {length} tokens")

    def training(parts: Settings) -> StageCost:
        if of_scales:
            return packed_run.training_cost(parts, checkpoint, length, len(valid_rows))
        return alignment_run.training_cost(parts, checkpoint, parts.batch_size, length, name="sft")

    parts = alignment_run.fit_micro_batches(s, folder, training)
    planned = alignment_run.report_plan(s, [training(parts)])
    if s.dry_run:
        return {"model": str(checkpoint.path), "rows": len(train_rows), **planned}
    with alignment_run.start_run(
        s,
        folder,
        checkpoint,
        micro=parts.batch_size,
        planned=planned,
        card=card,
        name="sft",
    ) as alignment:
        if of_scales:
            return packed_run.train(alignment, parts, training(parts), train=train, valid=valid)
        micro_batches = partial(train.micro_batches, parts)
        loss = partial(train.loss, s.lora is not None)
        held_out = partial(valid.measure, batch_size=parts.batch_size)
        return alignment.train(micro_batches, loss, held_out)


if __name__ == "__main__":
    cli.main(Settings, run, several=True)
