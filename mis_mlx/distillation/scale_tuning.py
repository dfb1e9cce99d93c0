"""Distil what rounding cost: scales, biases and norms of a packed model learn from a teacher, integers stay.

mlx-lm's DWQ learns from the same model before rounding; here the teacher may be another, bigger one. Does not round."""

from dataclasses import replace
from pathlib import Path

import mlx.nn as nn

from mis_mlx.data.token_windows import Windows
from mis_mlx.distillation import live_teacher, pipeline
from mis_mlx.maths.optimizer import GuardedAdamW
from mis_mlx.models import distributed, load
from mis_mlx.planner.recipe import DistillationConfig
from mis_mlx.quantization import grid
from mis_mlx.reporting import progress, text
from mis_mlx.types import Checkpoint


def recipe_of(asked: DistillationConfig, iters: int, learning_rate: float) -> DistillationConfig:
    """Steps and learning rate of this stage, no decay, for a scale has no reason to be small; batches, windows and seed
    as asked for."""
    return replace(asked, iters=iters, learning_rate=learning_rate, warmup=min(3, iters), weight_decay=0.0)


def learned(
    rounded: Checkpoint, source: live_teacher.TargetSource, data: Windows, recipe: DistillationConfig
) -> nn.Module:
    """The packed model in memory after its steps, in one go."""
    model = grid.resident(rounded)
    model.train()
    with progress.bar("tune", recipe.schedule.iters) as show:
        for step in live_teacher.steps(model, source, data, recipe, GuardedAdamW(weight_decay=recipe.weight_decay)):
            show(step.number, text.step_text(step))
    return model


def tune(c: pipeline.Run, rounded: Path, out: Path, recipe: DistillationConfig) -> None:
    """Write the folder `out`: `rounded` after its steps. Killed on the way, it goes on from its checkpoints."""
    checkpoint = load.open_checkpoint(rounded)
    model, source = grid.resident(checkpoint), pipeline.source_of(c)
    pipeline.train_whole(replace(c, recipe=recipe), model, source, lambda: None, tuned=True)
    if distributed.is_main():
        grid.write(checkpoint, model, out, c.files)
