"""Time a training step at the default run's width, and compare MLX's peak with the plan's.

Four blocks of the default student's width under half of its vocabulary, 25 million parameters, are
trained whole in float32 on two windows of 256 tokens, against a teacher's states and head in the
type that models compute in here.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mis_mlx.checks import engine
from mis_mlx.checks.kernels import Found, random_normal
from mis_mlx.compute import precision
from mis_mlx.compute.token_losses import Footprint
from mis_mlx.distillation import train_loop, whole_model
from mis_mlx.distillation.whole_model import WholeModel
from mis_mlx.hardware import rates
from mis_mlx.hardware.stage_cost import StageCost
from mis_mlx.maths import losses
from mis_mlx.maths.optimizer import GuardedAdamW
from mis_mlx.models.opening import load
from mis_mlx.models.opening.model_size import model_of
from mis_mlx.models.passing import pass_cost
from mis_mlx.settings import recipe

BASE = json.loads((Path(__file__).parent / "model.json").read_text("utf-8"))
CONFIG: dict[str, Any] = {
    **BASE,
    "hidden_size": 576,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 24_576,
}
WINDOWS = 2
LENGTH = 256
STEPS = 2  # the first one compiles


def make(folder: Path) -> Path:
    """Write the random model in bfloat16 into the new `folder` and return the folder."""
    return engine.write_random(folder, CONFIG, scale=0.04)


def _loss(
    teacher_states: mx.array,
    teacher_head: mx.array,
    student: nn.Module,
    tokens: mx.array,
    loss_mask: mx.array,
) -> tuple[mx.array, mx.array]:
    """(KL summed over positions, number of positions)."""
    hidden = student.model(tokens).reshape(-1, CONFIG["hidden_size"])
    logits = partial(losses.wide_product, head=teacher_head)
    head = load.head_weight(student)
    return losses.kl_sum(hidden, head, teacher_states, logits, loss_mask=loss_mask), loss_mask.sum()


def planned_bytes(dtype: mx.Dtype) -> int:
    """Sum the plan's peak, in bytes.

    Student, gradients, moments, activations, logits; the teacher's head and states in `dtype`."""
    size = model_of(CONFIG, gpu=precision.keeps_packed(), dtype=dtype)
    student = whole_model.holdings(size, WINDOWS, LENGTH, loss=Footprint(gpu=size.gpu))
    states = WINDOWS * LENGTH * size.shape.hidden * size.item
    return student.peak_bytes + size.head_work + size.widened_bytes + states


def planned_seconds(machine: rates.Rates) -> float:
    """Seconds of a step on a machine with these rates, by the planner's operations."""
    size = model_of(CONFIG, gpu=machine.gpu)
    tokens = WINDOWS * LENGTH
    passes = 3 * pass_cost.forward_flops(size, tokens, LENGTH)
    flops = passes + 2.0 * WINDOWS * LENGTH * size.head_params
    cost = StageCost(
        name="step",
        flops=flops,
        updated=size.params,
    )
    return cost.seconds(machine)


def measured(folder: Path) -> tuple[Found, float]:
    """Train STEPS steps of a model in the new `folder`, by a teacher in the usual type.

    Returns ((MLX's peak as a share of the plan's, the largest share that passes), seconds of the
    quickest step)."""
    mx.clear_cache()
    before = mx.get_active_memory()
    student = load.resident_model(load.open_checkpoint(make(folder)), mx.float32)
    mx.eval(student.parameters())
    dtype = precision.usual_dtype()
    tokens = mx.array(np.random.default_rng(0).integers(0, CONFIG["vocab_size"], (WINDOWS, LENGTH)))
    teacher_states = random_normal(7, tokens.size, CONFIG["hidden_size"], dtype=dtype)
    noise = random_normal(8, CONFIG["vocab_size"], CONFIG["hidden_size"])
    teacher_head = (noise / 24).astype(dtype)
    del noise  # else the peak counts it
    mx.eval(tokens, teacher_states, teacher_head)
    settings = recipe.TrainingConfig(iters=STEPS, learning_rate=1e-4)
    batch = (tokens, mx.ones(tokens.size))
    loss = partial(_loss, teacher_states, teacher_head)
    trained = WholeModel(student, GuardedAdamW())
    steps = list(train_loop.steps(trained, lambda step: [batch], loss, settings))
    peak_bytes = max(step.peak_bytes for step in steps) - before
    seconds = min(step.seconds for step in steps)
    return (peak_bytes / planned_bytes(dtype), 1.05), seconds
