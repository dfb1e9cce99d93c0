"""Windows that do not know of each other, side by side: on a CPU of two cores each has a core.

MLX's CPU back end computes everything but matrix products in one thread a stream, so that one of
two cores waits most of the time; here two windows go through two streams, each product in one
thread. A GPU has one lane, and so has a CPU of one core, or of many, whose products need them all.
"""

import ctypes
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from itertools import islice
from typing import Any

import mlx.core as mx

MANY = 4  # cores from which on there is one lane: not measured on so many
# blas.py sets it before MLX reads it: without it MLX evaluates one lane's work to its end, then the
# other's.
IN_TURN = "MLX_BFS_MAX_WIDTH"


@cache
def _blas() -> tuple[Any, int]:
    """(the BLAS that products run on, the threads that it was begun with); (None, 1) where it is no
    OpenBLAS.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "openblas_set_num_threads"):
        return None, 1
    return library, library.openblas_get_num_threads()


def count() -> int:
    """How many windows go side by side."""
    return (
        2
        if IN_TURN in os.environ and mx.default_device() == mx.cpu and 2 <= _blas()[1] < MANY
        else 1
    )


class _Streams(threading.local):
    """Of a thread, for MLX's streams belong to the one that made them, and the system gives a
    thread's number to another one after its end.
    """

    def __init__(self) -> None:
        self.all = mx.default_stream(mx.cpu), mx.new_stream(mx.cpu)


@cache
def _streams() -> _Streams:
    return _Streams()


def lane(i: int) -> AbstractContextManager[Any]:
    """Where the i-th of things side by side is made."""
    n = count()
    return mx.stream(_streams().all[i % n]) if n > 1 else nullcontext()


@contextmanager
def together(things: int) -> Iterator[None]:
    """What was made in lanes is evaluated in here, each matrix product in one thread, unless a
    thing is alone.
    """
    library, threads = _blas()
    if min(things, count()) < 2:
        yield
        return
    library.openblas_set_num_threads(1)
    try:
        yield
    finally:
        library.openblas_set_num_threads(threads)


def cut(x: mx.array) -> list[mx.array]:
    """x (B, ...) in as many pieces of its rows as there are lanes, or rows."""
    size = -(-len(x) // count())
    return [x[start : start + size] for start in range(0, len(x), size)]


def rows(work: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
    """work(x) of x (B, ...), whose rows do not know of each other; lazy."""
    pieces = []
    for i, piece in enumerate(cut(x)):
        with lane(i):
            pieces.append(work(piece))
    return mx.concatenate(pieces) if len(pieces) > 1 else pieces[0]


def each(work: Callable[..., Any], *items: Iterable[Any]) -> Iterator[Any]:
    """`work` of every item, or of the items of several lists, in order and evaluated: as many at a
    time as lanes.
    """
    coming = zip(*items, strict=True)
    while some := list(islice(coming, count())):
        results = []
        with together(len(some)):
            for i, arguments in enumerate(some):
                with lane(i):
                    results.append(work(*arguments))
            mx.eval(results)
        yield from (results.pop(0) for _ in some)  # who takes one holds it alone
