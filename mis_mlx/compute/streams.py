"""Windows that do not depend on each other, side by side: on a CPU of two cores each has a core.

MLX's CPU back end computes everything but matrix products in one thread a stream, so that one of
two cores waits most of the time; here two windows go through two streams, each product in one
thread. A GPU has one stream, and so has a CPU of one core, or of many, whose products need them
all.
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from itertools import islice
from typing import Any

import mlx.core as mx

from mis_mlx.hardware import blas_threads, rates

MANY_CORES = 4  # cores from which on there is one stream: not measured on so many
# blas.py sets it before MLX reads it: without it MLX evaluates one stream's work to its end, then
# the other's.
WIDTH_VARIABLE = "MLX_BFS_MAX_WIDTH"


def count() -> int:
    """How many windows go side by side: 2, or 1."""
    # Without WIDTH_VARIABLE two streams would be computed one after the other.
    if WIDTH_VARIABLE not in os.environ or rates.on_gpu():
        return 1
    return 2 if 2 <= blas_threads.at_start() < MANY_CORES else 1


class _Streams(threading.local):
    """The two streams of a thread.

    MLX's streams belong to the thread that made them, and the system gives a thread's number to
    another one after its end: a table by number would hand out a stream of a thread that is gone.
    """

    def __init__(self) -> None:
        self.all = mx.default_stream(mx.cpu), mx.new_stream(mx.cpu)


@cache
def _streams() -> _Streams:
    """The streams, made when the first stream is asked for and not on import."""
    return _Streams()


def stream(i: int) -> AbstractContextManager[Any]:
    """Enter the stream in which the i-th of things side by side is built."""
    streams = count()
    if streams == 1:
        return nullcontext()
    return mx.stream(_streams().all[i % streams])


@contextmanager
def single_threaded_blas(things: int) -> Iterator[None]:
    """Evaluate within what was built in streams: each matrix product runs in one thread.

    things: how many were built; one alone keeps all threads of its products.
    """
    if min(things, count()) < 2:
        yield
        return
    # Two products at a time with two threads each would fight for the two cores.
    blas_threads.set_count(1)
    try:
        yield
    finally:  # also where the evaluation raises: later products need all threads
        blas_threads.set_count(blas_threads.at_start())


def parallel_map(work: Callable[..., Any], *items: Iterable[Any]) -> Iterator[Any]:
    """Yield `work` of every item, or of the items of several lists, in order and evaluated.

    As many at a time as there are streams. ValueError where the lists differ in length.
    """
    arguments = zip(*items, strict=True)
    while batch := list(islice(arguments, count())):
        results = []
        with single_threaded_blas(len(batch)):
            for i, values in enumerate(batch):
                with stream(i):
                    results.append(work(*values))
            mx.eval(results)  # one call for all, or the streams would run one after the other
        for _ in batch:
            yield results.pop(0)  # the caller alone holds it, and may free it before the next one
