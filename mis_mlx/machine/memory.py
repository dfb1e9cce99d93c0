"""Memory of this machine and this process: what is there, what a sensible budget is, the highest so far.

Does not know models. MLX is told the budget here and nowhere else.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import psutil

from mis_mlx.types import GIB, Budget, MisError, gib

DEFAULT_BYTES = 5 * GIB
SHARE = 0.75  # of what is there: macOS and the browser want to live too


def room_bytes() -> int:
    """Most that a process should take: Metal's recommended working set, or the memory available now."""
    if mx.default_device() == mx.gpu:
        return int(mx.device_info()["max_recommended_working_set_size"])
    return int(psutil.virtual_memory().available)


def budget(asked_bytes: int | None) -> Budget:
    """The user's budget, or min(5 GiB, 75 % of the room). Refuses more than there is."""
    room = room_bytes()
    if asked_bytes is None:
        return Budget(min(DEFAULT_BYTES, int(SHARE * room)))
    if asked_bytes > room:
        raise MisError(f"--budget {gib(asked_bytes)} is more than the {gib(room)} there are: ask for less")
    return Budget(asked_bytes)


def resident_peak_bytes() -> int:
    """Highest resident set of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


class Peak:
    """The most memory the work took: the larger of MLX's own count and the growth of the resident set."""

    def __init__(self) -> None:
        self._before = psutil.Process().memory_info().rss
        self._mlx = 0

    def note(self, mlx_peak_bytes: int) -> None:
        """Remember a peak that MLX counted before it was reset."""
        self._mlx = max(self._mlx, mlx_peak_bytes)

    @property
    def nbytes(self) -> int:
        """Bytes above what the process held when this was made."""
        return max(self._mlx, mx.get_peak_memory(), resident_peak_bytes() - self._before)


@contextmanager
def limited(limit: Budget) -> Iterator[None]:
    """MLX throttles itself at the budget and keeps little freed memory; its own limits come back after."""
    memory = mx.set_memory_limit(limit.limit_bytes)
    cache = mx.set_cache_limit(min(128 * 2**20, limit.limit_bytes // 16))
    try:
        yield
    finally:
        mx.set_memory_limit(memory)
        mx.set_cache_limit(cache)
