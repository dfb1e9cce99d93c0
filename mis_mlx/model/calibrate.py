"""One streamed calibration pass: statistics of every axis that can shrink, for all batches.

Does not decide what is kept. One block is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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

    `reading()` is asked once per batch, as the batch enters the model: its T_b weighs that batch in AAIS,
    in every layer. If any batch has no T_b, all weigh 1, and `measured` is False.
    """
    s = shape_of(checkpoint.config)
    readings: list[Reading | None] = []
    gather = _look(s.heads)

    def look(i: int, b: int, *rest: Any) -> list[mx.array]:
        if i == 0:
            readings.append(reading())
        return gather(i, b, *rest)

    hidden, seen = stream.forward(checkpoint, batches, dtype, _tap, look)
    weights = [importance.weight_of(r, unit) for r in readings]
    measured = all(w is not None for w in weights)
    known = [r for r in readings if r is not None]
    out = Statistics(
        hidden=Sums.zeros(s.hidden),
        measured=measured,
        ambient_c=[r.ambient_c for r in known if r.ambient_c is not None],
        altitude_m=known[-1].altitude_m if known else None,
    )
    assert out.hidden is not None
    for i, layer in enumerate(seen):
        out.ffn[i], out.heads[i] = Sums.zeros(s.ffn), Sums.zeros(s.heads)
        out.block[i] = float(np.mean([float(found[2]) for found in layer]))
        for b, (ffn, heads, _, norm1, norm2) in enumerate(layer):
            weight = weights[b]
            w = weight if measured and weight is not None else 1.0
            out.ffn[i].add(np.array(ffn), w)
            out.heads[i].add(np.array(heads), w)
            out.hidden.add(np.array(norm1), w)
            out.hidden.add(np.array(norm2), w)
    return out, hidden
