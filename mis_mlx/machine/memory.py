"""Memory of this machine and this process: what is there, what a sensible budget is, the highest so far.

Does not know models. MLX is told the budget here and nowhere else.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import psutil

from mis_mlx.types import GIB, Budget, MisError, gib

DEFAULT_BYTES = 5 * GIB
SHARE = 0.75  # of what is there: macOS and the browser want to live too
WIRED_MARGIN_BYTES = 256 * 2**20  # beyond what a job needs, so that its last buffers are wired too


def room_bytes() -> int:
    """Most that a process should take: Metal's recommended working set, or the memory available now."""
    return _recommended(mx) or int(psutil.virtual_memory().available)


def _recommended(device: Any) -> int | None:
    """Metal's recommended working set in bytes; None where nothing is computed on Metal."""
    if device.default_device() != device.gpu:
        return None
    return device.device_info().get("max_recommended_working_set_size")


def budget(asked_bytes: int | None, room: int | None = None, default_bytes: int = DEFAULT_BYTES) -> Budget:
    """The user's budget, or min(5 GiB, 75 % of the room). Refuses more than there is.

    room: of another machine than this one, in bytes.
    """
    room = room_bytes() if room is None else room
    if asked_bytes is None:
        return Budget(min(default_bytes, int(SHARE * room)))
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


def cache_bytes(limit_bytes: int) -> int:
    """Freed memory that MLX may keep within a budget: it counts as used."""
    return min(128 * 2**20, limit_bytes // 16)


def process_bytes(limit_bytes: int) -> int:
    """What a process takes of a budget beside its arrays: MLX's cache, and what Python and libraries grow by.

    The growth was measured at 13 to 20 MiB, whatever the model; budgets of under 144 MiB are met in tests
    only, where a sixth of them does.
    """
    return cache_bytes(limit_bytes) + min(24 * 2**20, limit_bytes // 6)


@contextmanager
def limited(limit: Budget, need_bytes: int | None = None, device: Any = mx) -> Iterator[None]:
    """MLX throttles itself at the budget and keeps little freed memory; its own limits come back after.

    need_bytes: what the job is planned to take (default: the budget). On Metal that much is wired, so that
    macOS does not page it out between two passes. device: `mlx.core`, or what a test puts in its place.
    """
    memory = device.set_memory_limit(limit.limit_bytes)
    cache = device.set_cache_limit(cache_bytes(limit.limit_bytes))
    wired = _wire(limit.limit_bytes if need_bytes is None else need_bytes, device)
    try:
        yield
    finally:
        device.set_memory_limit(memory)
        device.set_cache_limit(cache)
        if wired is not None:
            device.set_wired_limit(wired)


def _wire(need_bytes: int, device: Any) -> int | None:
    """Let Metal wire what is needed, never more than it recommends (that would be fatal). Returns the limit
    that held before; None where there is none to set."""
    most = _recommended(device)
    if most is None or not hasattr(device, "set_wired_limit"):
        return None
    return device.set_wired_limit(min(most, need_bytes + WIRED_MARGIN_BYTES))
