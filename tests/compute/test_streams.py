"""Two streams: the same results as one, products in one thread as long as both are computed."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import mlx.core as mx
import pytest

from mis_mlx.compute import streams
from mis_mlx.hardware import blas_threads


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Two streams, whatever BLAS there is; the numbers of threads that it is told."""
    calls: list[int] = []
    monkeypatch.setenv(streams.WIDTH_VARIABLE, "100000")
    library = SimpleNamespace(openblas_set_num_threads=calls.append)
    monkeypatch.setattr(blas_threads, "_openblas", lambda: (library, 2))
    if streams.count() != 2:
        pytest.skip("a GPU has one lane")
    return calls


def test_each_gives_all_in_order_and_evaluated(told: list[int]) -> None:
    """Five items through two streams, three turns; the last one alone, whose products keep all
    threads.
    """
    items = [mx.full((3,), float(i)) for i in range(5)]
    seen = list[mx.Stream]()

    def work(a: mx.array, b: int) -> tuple[mx.array, mx.array]:
        seen.append(mx.default_stream(mx.cpu))
        return a * 2, a + b

    found = list(streams.parallel_map(work, items, range(5)))

    assert len(found) == 5
    for i, (double, more) in enumerate(found):
        assert double.tolist() == [2.0 * i] * 3
        assert more.tolist() == [2.0 * i] * 3
    assert told == [1, 2] * 2
    assert seen[0] == seen[2] == seen[4]
    assert seen[1] == seen[3]
    assert seen[0] != seen[1]


def test_uneven_lists_are_a_mistake() -> None:
    """Nothing is left out without a word."""
    with pytest.raises(ValueError, match="shorter|longer"):
        list(streams.parallel_map(lambda a, b: a, [mx.array(1)] * 3, [1] * 4))


def test_a_cpu_of_many_cores_has_one_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its products need them all; and so has one whose BLAS is no OpenBLAS, or whose MLX ends one
    stream first.
    """
    monkeypatch.setenv(streams.WIDTH_VARIABLE, "100000")
    for threads, count in ((1, 1), (2, 2), (3, 2), (4, 1), (16, 1)):
        monkeypatch.setattr(blas_threads, "_openblas", lambda threads=threads: (None, threads))
        assert streams.count() == (count if mx.default_device() == mx.cpu else 1)
    monkeypatch.setattr(blas_threads, "_openblas", lambda: (None, 2))
    monkeypatch.delenv(streams.WIDTH_VARIABLE)
    assert streams.count() == 1


def test_a_thread_has_streams_of_its_own(told: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the system gives it the number of one that is gone: a stream belongs to the thread
    that made it.
    """
    monkeypatch.setattr(streams, "get_ident", lambda: 7, raising=False)
    found = list[object]()

    def work() -> None:
        items = [mx.ones((2,))] * 3
        try:
            found.append([out.tolist() for out in streams.parallel_map(lambda x: x * 2, items)])
        except RuntimeError as error:
            found.append(error)

    for _ in range(2):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert found == [[[2.0, 2.0]] * 3] * 2
