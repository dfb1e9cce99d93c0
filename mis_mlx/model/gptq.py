"""Round a model's blocks one by one, each on what the rounded blocks before it deliver. Streamed.

GPTQ (arXiv 2210.17323): every matrix is rounded so that its output changes least on the inputs that calibration
sees (maths/rounding); those are gathered once a block, with its own weights as they were. Does not write.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mis_mlx.maths import rounding
from mis_mlx.model import load, stream
from mis_mlx.model.calibrate import READERS, TAPS
from mis_mlx.types import Checkpoint, MisError

ENOUGH_BITS = 8  # rounding costs nothing there: such matrices get their nearest values


def rounded_blocks(
    checkpoint: Checkpoint,
    batches: Sequence[mx.array],
    plan: Mapping[str, tuple[int, int]],
    hidden: stream.Hidden | None = None,
) -> Iterator[dict[str, rounding.Packed]]:
    """Per block, in order, {module path: packed matrix}, calibrated on token ids [(B, T)].

    plan: {module path: (bits, group size)}. hidden: a place for the hidden states other than memory.
    """
    source = stream.Stream(checkpoint, load.compute_dtype(), direct=hidden is not None)
    hidden = source.embed(batches, hidden)
    for i, block in source.blocks():
        prefix = f"model.layers.{i}."
        paths = {axis: [f"{prefix}{part}.{name}" for name in READERS[axis]] for axis, (part, _) in TAPS.items()}
        tapped = [axis for axis in TAPS if plan[paths[axis][0]][0] < ENOUGH_BITS]
        grams = _grams(block, source.args, hidden, tapped, f"{checkpoint.path}: {prefix}")
        done: dict[str, rounding.Packed] = {}
        for axis, (part, _) in TAPS.items():
            linears = [block[part][name] for name in READERS[axis]]
            bits, group = plan[paths[axis][0]]
            if (gram := grams.pop(axis, None)) is None:
                made = [rounding.nearest(load.dense_weight(linear), group, bits) for linear in linears]
            else:
                made = _together([load.dense_weight(linear) for linear in linears], gram, group, bits)
            for path, linear, packed in zip(paths[axis], linears, made, strict=True):
                linear.weight = rounding.values(packed, group, bits).astype(linear.weight.dtype)
                stream.settle(packed, linear.weight)
                done[path] = packed
        yield done
        if i + 1 < source.layers:
            source.through(block, hidden)


def _grams(
    block: nn.Module, args: Any, hidden: stream.Hidden, axes: Sequence[str], where: str = ""
) -> dict[str, np.ndarray]:
    """{axis: sum of a a^T (in, in) float64 over all tokens} of what goes into the matrices that read it.

    Products of one batch are float32 (on a CPU 5x quicker), sums over batches float64. MisError when one of them
    overflows, with `where` before the name.
    """
    taps = {}
    for axis in axes:
        part, name = TAPS[axis]
        block[part][name] = taps[axis] = stream.Tap(block[part][name])
    sums = {axis: np.zeros((tap.inner.weight.shape[1],) * 2) for axis, tap in taps.items()}
    for into in hidden:
        block(into, load.mask(args, block, into))
        seen = {axis: tap.take().astype(mx.float32) for axis, tap in taps.items()}
        products = {axis: (flat := a.reshape(-1, a.shape[-1])).T @ flat for axis, a in seen.items()}
        stream.settle(products)
        for axis, product in products.items():
            if not mx.isfinite(product).all().item():
                raise MisError(f"{where}{'.'.join(TAPS[axis])} meets values that are not finite: use plain rounding")
            sums[axis] += np.array(product)
    for axis, tap in taps.items():
        part, name = TAPS[axis]
        block[part][name] = tap.inner
    return sums


def _together(weights: Sequence[mx.array], gram: np.ndarray, group: int, bits: int) -> list[rounding.Packed]:
    """Matrices [(out, in)] with the same inputs, rounded in one go: rows do not know of each other."""
    parts = rounding.compensated(np.concatenate([np.array(w) for w in weights]), gram, group, bits)
    ends = np.cumsum([len(w) for w in weights])[:-1].tolist()
    return list(zip(*(mx.split(part, ends) for part in parts), strict=True))  # type: ignore[arg-type]
