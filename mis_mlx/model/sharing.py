"""Several rows in one window, one after the other, none of which sees another: the hidden states of that.

Does not know what the rows are, nor how they came into windows.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn


def forward(model: nn.Module, tokens: mx.array, rows: mx.array) -> mx.array:
    """Final hidden states (B, T, D) of a resident model; rows (B, T): which row each token of `tokens` is of.

    mlx-lm's Model takes no mask, its blocks do. Positions count on from row to row: rotary positions act through
    their differences alone, so every row gets what it would get at the beginning of a window of its own.
    """
    inner, at = model.model, mx.arange(tokens.shape[1])
    mask = (rows[:, :, None] == rows[:, None, :]) & (at[:, None] >= at[None])
    mask = mask[:, None]  # for all heads
    hidden = inner.embed_tokens(tokens)
    for block in inner.layers:
        near = at[:, None] < at[None] + model.args.sliding_window if getattr(block, "use_sliding", False) else None
        hidden = block(hidden, mask if near is None else mask & near)
    return inner.norm(hidden)
