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
from mis_mlx.model import load, stream
from mis_mlx.model.config import shape_of
from mis_mlx.types import Checkpoint, Reading


def _tap(block: nn.Module) -> None:
    """Taps before down_proj (FFN neurons), o_proj (heads) and after both norms (hidden channels)."""
    block.mlp.down_proj = stream.Tap(block.mlp.down_proj)
    block.self_attn.o_proj = stream.Tap(block.self_attn.o_proj)
    block.self_attn.q_proj = stream.Tap(block.self_attn.q_proj)
    block.mlp.gate_proj = stream.Tap(block.mlp.gate_proj)


def _look(block: nn.Module, heads: int, into: mx.array, out: mx.array) -> list[mx.array]:
    """What one batch says of one block, lazy: FFN neurons, heads, the block itself, hidden channels twice."""
    return [
        importance.channel_sample(block.mlp.down_proj.take()),
        importance.head_sample(block.self_attn.o_proj.take(), heads),
        importance.block_sample(into, out),
        importance.channel_sample(block.self_attn.q_proj.take()),
        importance.channel_sample(block.mlp.gate_proj.take()),
    ]


def calibrate(
    checkpoint: Checkpoint,
    batches: Sequence[mx.array],
    dtype: mx.Dtype,
    reading: Callable[[], Reading | None] = lambda: None,
    unit: str = "kelvin",
    hidden: stream.Hidden | None = None,
) -> tuple[Statistics, stream.Hidden]:
    """Statistics of all layers over token ids [(B, T)], and the teacher's final hidden states [(B, T, D)].

    `reading()` is asked once per batch, as the batch enters the model: its T_b weighs that batch in AAIS,
    in every layer. If any batch has no T_b, all weigh 1, and `measured` is False. hidden: a place for the
    hidden states other than memory.
    """
    s = shape_of(checkpoint.config)
    readings: list[Reading | None] = []
    out = Statistics(hidden=Sums.zeros(s.hidden), measured=False)
    assert out.hidden is not None
    source = stream.Stream(checkpoint, dtype, direct=hidden is not None)
    hidden = source.embed(batches, hidden)
    for i, block in source.blocks():
        _tap(block)
        layer = []
        for b, into in enumerate(hidden):
            if i == 0:
                readings.append(reading())
            after = block(into, load.mask(source.args, block, into))
            found = _look(block, s.heads, into, after)
            stream.settle(after, found)
            hidden[b] = after
            layer.append([np.array(f) for f in found])
        weights = [importance.weight_of(r, unit) for r in readings]
        out.measured = None not in weights
        out.ffn[i], out.heads[i] = Sums.zeros(s.ffn), Sums.zeros(s.heads)
        out.block[i] = float(np.mean([distance for _, _, distance, _, _ in layer]))
        for (ffn, heads, _, norm1, norm2), weight in zip(layer, weights, strict=True):
            w = weight if out.measured and weight is not None else 1.0
            out.ffn[i].add(ffn, w)
            out.heads[i].add(heads, w)
            out.hidden.add(norm1, w)
            out.hidden.add(norm2, w)
    known = [r for r in readings if r is not None]
    out.ambient_c = [r.ambient_c for r in known if r.ambient_c is not None]
    out.altitude_m = known[-1].altitude_m if known else None
    return out, source.norm(hidden)
