"""What MLX and numpy hold together, at the highest."""

from __future__ import annotations

import gc
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import mlx.core as mx
import pytest

from mis_mlx.hardware import memory
from mis_mlx.models.opening import load
from mis_mlx.types import Budget

PAGE_BYTES = 16 * 2**10
ARRAYS = 256  # of more than a page that live at a time in a small model's pass or step


def allocated(nbytes: int) -> int:
    """The most that MLX may count for arrays of so many bytes.

    Metal's allocator, which macOS has for the CPU, too, rounds a buffer up to whole pages, and
    takes a kept one that is up to two pages larger. Elsewhere a buffer is as large as its array.
    """
    if sys.platform != "darwin":
        return nbytes
    return nbytes + 2 * PAGE_BYTES * ARRAYS


class Peak:
    """The highest sum of MLX's arrays and numpy's since this was made, less MLX's at that time.

    Either has a peak of its own, so the work is cut into stretches: within a stretch both peaks are
    taken to come together, which is never too little.
    """

    def __init__(self) -> None:
        gc.collect()  # what an earlier test left would be freed during the work
        mx.clear_cache()
        self.nbytes = 0
        self._before = mx.get_active_memory()
        mx.reset_peak_memory()

    def cut(self) -> None:
        """End a stretch, and begin the next."""
        arrays = max(mx.get_peak_memory(), mx.get_active_memory()) - self._before
        self.nbytes = max(self.nbytes, arrays + tracemalloc.get_traced_memory()[1])
        mx.reset_peak_memory()
        tracemalloc.reset_peak()


@contextmanager
def of_mlx(limit_bytes: int | None = None) -> Iterator[Peak]:
    """The peak of MLX's arrays in the block, in bytes, where nothing that is freed is kept.

    limit_bytes: of MLX, above what it holds already.
    """
    peak = Peak()
    cache = mx.set_cache_limit(0)
    limit = (
        nullcontext() if limit_bytes is None else memory.limited(Budget(peak._before + limit_bytes))
    )
    try:
        with limit:
            yield peak
            peak.nbytes = mx.get_peak_memory() - peak._before
    finally:
        mx.set_cache_limit(cache)


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch, *functions: tuple[object, str]) -> Iterator[Peak]:
    """A peak of the block, cut before and after each call of the (owner, name)s."""
    load.mlx_lm("models.llama")  # what is imported on first use is no array
    peak = Peak()

    def cutting(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **settings: Any) -> Any:
            peak.cut()
            try:
                return function(*args, **settings)
            finally:
                peak.cut()

        return called

    tracemalloc.start()
    try:
        with monkeypatch.context() as patched:
            for owner, name in functions:
                patched.setattr(owner, name, cutting(getattr(owner, name)))
            yield peak
            peak.cut()
    finally:
        tracemalloc.stop()
