"""What fitted grids leave of the squared error of MLX's own rounding, on the matrices of a model.

    scripts/mis benchmarks/grids.py                        # SmolLM2: a minute on a core
    scripts/mis benchmarks/grids.py --model gemma-3-270m   # with MIS_MLX_ACCEPT=gemma
    scripts/mis benchmarks/grids.py --model normal         # normal numbers, no model

Writes benchmarks/results/MACHINE/grids-MODEL.json: {bits: share}, the mean over all matrices of the
blocks and over bits' groups of 64, and the embedding's share.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from laboratory import start, write

from mis_mlx import cli
from mis_mlx.maths import rounding
from mis_mlx.models.architectures import arch
from mis_mlx.models.opening import compute_type, load, resolve
from mis_mlx.types import Checkpoint

GROUP = 64
NORMAL = "normal"


@dataclass(frozen=True)
class Settings:
    """Which model."""

    model: str | None = None
    """folder, hub id or gemma-3-270m; normal: numbers of a normal distribution. Default:
    SmolLM2-135M-Instruct
    """


def shares_of(weight: mx.array) -> dict[int, float]:
    """{bits: share of the squared error that is left} of one matrix."""
    return {bits: rounding.fit_share(weight, GROUP, bits) for bits in rounding.CANDIDATE_BITS}


def of_normal_numbers() -> dict[str, dict[int, float]]:
    """The shares of a matrix of independent normal numbers."""
    numbers = np.random.default_rng(0).normal(size=(256, 512))
    return {"blocks": shares_of(mx.array(numbers.astype(np.float32)))}


def of_model(checkpoint: Checkpoint) -> dict[str, dict[int, float]]:
    """The mean shares of a model's blocks, and those of its embedding."""
    blocks = []
    found = {}
    for name, shape in arch.tensors_of(checkpoint.config).items():
        if len(shape) < 2 or shape[-1] % GROUP:
            continue
        shares = shares_of(next(load.dense_parts(checkpoint, name, "float32")))
        if arch.block_of(name) is None:
            found[name.removesuffix(".weight")] = shares
        else:
            blocks.append(shares)
    means = {}
    for bits in rounding.CANDIDATE_BITS:
        means[bits] = float(np.mean([shares[bits] for shares in blocks]))
    return {"blocks": means, **found}


def main(s: Settings) -> None:
    """Measure, print and store."""
    if s.model == NORMAL:
        name = NORMAL
        found = of_normal_numbers()
    else:
        checkpoint = compute_type.open_to_compute(resolve.resolve_model(s.model).path)
        name = checkpoint.path.name
        found = of_model(checkpoint)
    rounded = {}
    for part, shares in found.items():
        rounded[part] = {str(bits): round(share, 3) for bits, share in shares.items()}
        cli.say(f"{name}, {part}: {rounded[part]}")
    command = " ".join(["scripts/mis", "benchmarks/grids.py", *sys.argv[1:]])
    write(f"grids-{name}", command, {"group": GROUP, "shares": rounded})


if __name__ == "__main__":
    start(Settings, main)
