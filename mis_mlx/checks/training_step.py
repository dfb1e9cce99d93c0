"""Time a training step at the default run's width, and compare MLX's peak with the plan's.

Four blocks of the default student's width under half of its vocabulary, 25 million parameters, are
trained whole in float32 on two windows of 256 tokens.
"""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mis_mlx.alignment import whole_model
from mis_mlx.alignment.whole_model import WholeModel
from mis_mlx.checks import engine
from mis_mlx.checks.kernels import Found
from mis_mlx.compute import precision
from mis_mlx.distillation import train_loop
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


def _loss(student: nn.Module, tokens: mx.array) -> tuple[mx.array, mx.array]:
    """(minus log-probabilities of all tokens, summed, and their count)."""
    hidden = student.model(tokens).reshape(-1, CONFIG["hidden_size"])
    logps = losses.token_logps(hidden, load.head_weight(student), tokens.reshape(-1))
    return -logps.sum(), mx.array(float(tokens.size))


def planned_bytes() -> int:
    """Sum the plan's peak, in bytes: student, gradients, moments, activations, logits."""
    size = model_of(CONFIG, gpu=precision.keeps_packed(), dtype=mx.float32)
    return whole_model.step_bytes(size, WINDOWS, LENGTH)


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
    """Train STEPS steps of a model in the new `folder`.

    Returns ((MLX's peak as a share of the plan's, the largest share that passes), seconds of the
    quickest step)."""
    mx.clear_cache()
    before = mx.get_active_memory()
    student = load.resident_model(load.open_checkpoint(make(folder)), mx.float32)
    mx.eval(student.parameters())
    tokens = mx.array(np.random.default_rng(0).integers(0, CONFIG["vocab_size"], (WINDOWS, LENGTH)))
    mx.eval(tokens)
    settings = recipe.TrainingConfig(iters=STEPS, learning_rate=1e-4)
    trained = WholeModel(student, GuardedAdamW())
    steps = list(train_loop.steps(trained, lambda step: [(tokens,)], _loss, settings))
    peak_bytes = max(step.peak_bytes for step in steps) - before
    seconds = min(step.seconds for step in steps)
    return (peak_bytes / planned_bytes(), 1.05), seconds
