"""How many threads a matrix product on a CPU takes."""

import ctypes
from functools import cache
from typing import Any


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
