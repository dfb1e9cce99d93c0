"""How many threads a matrix product on a CPU takes."""

import ctypes
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from mis_mlx.hardware.blas import THREADS

SETTERS = ("openblas_set_num_threads", "scipy_openblas_set_num_threads64_")


@cache
def _openblas() -> tuple[Any, int]:
    """(the BLAS that products run on, its threads at the start); (None, 1) if it is no OpenBLAS."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "openblas_set_num_threads"):
        return None, 1
    return library, library.openblas_get_num_threads()


def at_start() -> int:
    """The threads of a product when this process began; 1 where no OpenBLAS computes them."""
    _, threads = _openblas()
    return threads


def set_count(threads: int) -> None:
    """From now on every product takes so many threads. Call it only where `at_start` is above 1."""
    library, _ = _openblas()
    library.openblas_set_num_threads(threads)


def _setters() -> list[Callable[[int], object]]:
    """Functions that set the threads of each OpenBLAS in this process: numpy brings its own."""
    paths = set()
    with suppress(OSError):
        for line in Path("/proc/self/maps").read_text("utf-8").splitlines():
            path = line.partition("/")[2]
            if "openblas" in path:
                paths.add(f"/{path}")
    found = []
    for path in sorted(paths):
        library = ctypes.CDLL(path)
        found += [getattr(library, name) for name in SETTERS if hasattr(library, name)]
    return found


def name() -> str:
    """Whose matrix products MLX's CPU takes."""
    library, _ = _openblas()
    return "OpenBLAS" if library else "MLX's own"


def go_on_with(threads: int) -> str:
    """Take so many threads for every product, as when this process had begun with them.

    Another number adds up in another order, so the last bits differ. Nothing happens where no
    OpenBLAS computes, or where so many cores are not there: then each thread waits for others.
    Returns a sentence about a change; "" where there is none.
    """
    before = at_start()
    library, _ = _openblas()
    if sys.platform != "linux" or library is None or threads == before:
        return ""
    if threads > len(os.sched_getaffinity(0)):
        return ""
    for setter in _setters():
        setter(threads)
    os.environ[THREADS] = str(threads)  # for what this process starts or loads later
    _openblas.cache_clear()
    return f"{THREADS}={threads}, as when the run began, not {before}: so its bits stay the same"
