"""Time what decoding takes a token, and what one fit of grids takes: many small kernels in a row.

Both say what command buffers cost, of which nobody has seen a Mac's.
"""

from pathlib import Path

import mlx.core as mx

from mis_mlx.checks import training_step
from mis_mlx.checks.kernels import random_normal
from mis_mlx.compute import precision
from mis_mlx.hardware import rates
from mis_mlx.maths import rounding
from mis_mlx.models.opening import compute_type, load
from mis_mlx.models.opening.model_size import model_of

TOKENS = 32
GRID = (1536, 1, 64)  # groups of 64 columns of a matrix, as GPTQ fits them at a time


def decoded_tokens_per_s(folder: Path) -> float:
    """Tokens a second of mlx-lm's own loop, on the training step's model in the new `folder`."""
    checkpoint = compute_type.open_to_compute(training_step.make(folder))
    model = load.resident_model(checkpoint, precision.dtype_of(checkpoint))
    mx.eval(model.parameters())
    step = load.mlx_lm("generate").generate_step
    prompt = mx.arange(8)

    def write() -> None:
        for _ in step(prompt, model, max_tokens=TOKENS):
            pass

    return TOKENS / rates.quickest(write, 0.5)


def planned_tokens_per_s(machine: rates.Rates) -> float:
    """Tokens a second if fetching the weights from memory were all that takes time."""
    size = model_of(training_step.CONFIG, gpu=machine.gpu)
    return machine.memory_bytes_per_s / size.whole_work


def grid_fit_s() -> float:
    """Seconds of one fit of grids in 4 bits, as GPTQ does it for 64 columns at a time."""
    groups = random_normal(3, *GRID)
    mx.eval(groups)
    fused = precision.compiles()
    return rates.quickest(lambda: mx.eval(rounding.fit_grids(groups, 4, fused=fused)), 0.5)
