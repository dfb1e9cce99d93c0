"""Training steps at the default run's width: how long one takes, and MLX's peak as a share of the
plan's.

Four blocks of the default student's width under half of its vocabulary, 25 million parameters,
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

from mis_mlx.checks.kernels import Found, drawn
from mis_mlx.distillation.train_loop import train
from mis_mlx.hardware import rates
from mis_mlx.maths import losses
from mis_mlx.maths.optimizer import GuardedAdamW
from mis_mlx.models import arch, load, policy
from mis_mlx.planner import compression_size, estimates, recipe
from mis_mlx.storage import files, safetensors

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
    """The model's folder, random, in bfloat16."""
    folder.mkdir()
    shapes = arch.tensors_of(CONFIG)
    made = ((name, _random(name, seed, shape)) for seed, (name, shape) in enumerate(shapes.items()))
    safetensors.write_tensors(
        folder, {name: ("BF16", shape) for name, shape in shapes.items()}, made, files.DISK
    )
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def _random(name: str, seed: int, shape: tuple[int, ...]) -> mx.array:
    x = drawn(seed, *shape)
    return (1 + 0.1 * x if "norm" in name else 0.04 * x).astype(mx.bfloat16)


def _loss(
    teacher: mx.array, theirs: mx.array, student: nn.Module, tokens: mx.array, learn: mx.array
) -> tuple[mx.array, mx.array]:
    hidden = student.model(tokens).reshape(-1, CONFIG["hidden_size"])
    logits = partial(losses.wide_product, head=theirs)
    return losses.kl_sum(hidden, load.head_weight(student), teacher, logits, learn), learn.sum()


def planned_bytes() -> int:
    """The plan's peak: student, gradients, moments, activations, logits; and the teacher's head and
    states.
    """
    m = estimates.model_of(CONFIG, gpu=policy.keeps_packed(), dtype=policy.usual_dtype())
    student = compression_size.training_bytes(CONFIG, WINDOWS, LENGTH, gpu=m.gpu)
    states = WINDOWS * LENGTH * m.shape.hidden * m.item
    return student + m.head_work + m.widened_bytes + states


def planned_seconds(at: rates.Rates) -> float:
    """What a machine of these rates takes for a step, by the planner's operations."""
    m = estimates.model_of(CONFIG, gpu=at.gpu)
    flops = (
        3 * estimates.forward_flops(m, WINDOWS * LENGTH, LENGTH)
        + 2.0 * WINDOWS * LENGTH * m.head_params
    )
    return estimates.StageCost("step", 0, 0, 0, flops, updated=m.params).seconds(at)


def measured(folder: Path) -> tuple[Found, float]:
    """(MLX's peak as a share of the plan's, and the most that is right; seconds of the quickest
    step).
    """
    mx.clear_cache()
    before = mx.get_active_memory()
    student = load.resident(load.open_checkpoint(make(folder)), mx.float32)
    mx.eval(student.parameters())
    dtype = policy.usual_dtype()
    tokens = mx.array(np.random.default_rng(0).integers(0, CONFIG["vocab_size"], (WINDOWS, LENGTH)))
    teacher = drawn(7, tokens.size, CONFIG["hidden_size"], dtype=dtype)
    theirs = (drawn(8, CONFIG["vocab_size"], CONFIG["hidden_size"]) / 24).astype(dtype)
    mx.eval(tokens, teacher, theirs)
    how = recipe.TrainingConfig(iters=STEPS, learning_rate=1e-4, warmup=0)
    batch = (tokens, mx.ones(tokens.size))
    loss = partial(_loss, teacher, theirs)
    steps = list(train(student, lambda step: [batch], loss, GuardedAdamW(), how))
    peak = max(step.peak_bytes for step in steps) - before
    return (peak / planned_bytes(), 1.05), min(step.seconds for step in steps)
