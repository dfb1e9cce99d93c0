"""How fast this machine multiplies matrices: a fraction of a second's measurement for time estimates.

Does not know models.
"""

from __future__ import annotations

import time

import mlx.core as mx


def matmul_flops(size: int = 1024, repeats: int = 4) -> float:
    """Float operations per second of a float32 matrix product here and now, the best of `repeats`."""
    a = mx.random.normal((size, size), key=mx.random.key(0))
    best = float("inf")
    for _ in range(repeats + 1):  # the first one also draws `a`
        began = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best
