"""One streamed calibration pass: statistics of every axis that can shrink, for all batches.

Does not decide what is kept. One block is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mis_mlx.maths import importance
from mis_mlx.maths.importance import Statistics, Sums
from mis_mlx.model import stream
from mis_mlx.model.config import shape_of
from mis_mlx.types import Checkpoint, Reading


def _tap(block: nn.Module) -> None:
    """Taps before down_proj (FFN neurons), o_proj (heads) and after both norms (hidden channels)."""
    block.mlp.down_proj = stream.Tap(block.mlp.down_proj)
    block.self_attn.o_proj = stream.Tap(block.self_attn.o_proj)
    block.self_attn.q_proj = stream.Tap(block.self_attn.q_proj)
    block.mlp.gate_proj = stream.Tap(block.mlp.gate_proj)


def _look(heads: int) -> Callable[..., list[mx.array]]:
    def look(_i: int, _b: int, block: nn.Module, into: mx.array, out: mx.array) -> list[mx.array]:
        return [
            importance.channel_sample(block.mlp.down_proj.take()),
            importance.head_sample(block.self_attn.o_proj.take(), heads),
            importance.block_sample(into, out),
            importance.channel_sample(block.self_attn.q_proj.take()),
            importance.channel_sample(block.mlp.gate_proj.take()),
        ]

    return look


def calibrate(
    checkpoint: Checkpoint,
    batches: Sequence[mx.array],
    dtype: mx.Dtype,
    reading: Callable[[], Reading | None] = lambda: None,
    unit: str = "kelvin",
) -> tuple[Statistics, list[mx.array]]:
    """Statistics of all layers over token ids [(B, T)], and the teacher's final hidden states [(B, T, D)].

    `reading()` is asked once per batch, while the batch runs: its T_b weighs that batch in AAIS. Batches
    without a T_b weigh 1, and then `measured` is False.
    """
    s = shape_of(checkpoint.config)
    weights: dict[tuple[int, int], float | None] = {}
    ambient: list[float] = []
    altitude: list[float] = []
    look = _look(s.heads)

    def timed(i: int, b: int, *rest: object) -> list[mx.array]:
        now = reading()
        weights[i, b] = importance.weight_of(now, unit)
        if now is not None:
            ambient.extend([now.ambient_c] if now.ambient_c is not None else [])
            altitude.extend([now.altitude_m] if now.altitude_m is not None else [])
        return look(i, b, *rest)

    hidden, seen = stream.forward(checkpoint, batches, dtype, _tap, timed)
    measured = all(w is not None for w in weights.values())
    out = Statistics(
        hidden=Sums.zeros(s.hidden), measured=measured, ambient_c=ambient, altitude_m=altitude[-1] if altitude else None
    )
    assert out.hidden is not None
    for i, layer in enumerate(seen):
        out.ffn[i], out.heads[i] = Sums.zeros(s.ffn), Sums.zeros(s.heads)
        out.block[i] = float(np.mean([float(found[2]) for found in layer]))
        for b, (ffn, heads, _, norm1, norm2) in enumerate(layer):
            w = weights[i, b]
            w = w if measured and w is not None else 1.0
            out.ffn[i].add(np.array(ffn), w)
            out.heads[i].add(np.array(heads), w)
            out.hidden.add(np.array(norm1), w)
            out.hidden.add(np.array(norm2), w)
    return out, hidden
