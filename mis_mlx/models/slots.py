"""Groups of tensors from disk, one after the other through buffers that are used again and again."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from mis_mlx.storage.block_reader import PAGE, Layout, Reader, pages
from mis_mlx.storage.header_check import DTYPES
from mis_mlx.types import MisError, TensorAt, gib


class Slot:
    """A buffer that blocks are read into again and again; new memory for each would cost 4x the time."""

    def __init__(self, nbytes: int):
        if nbytes + PAGE >= 2**31:
            raise MisError(f"One block takes {gib(nbytes)} on disk, the most is 2 GiB: quantize the model first")
        self._whole = mx.zeros((nbytes + PAGE,), mx.uint8)
        mx.eval(self._whole)
        whole: Any = self._whole
        view = memoryview(whole)
        self._first = -np.frombuffer(view, np.uint8).ctypes.data % PAGE
        self.view = view[self._first : self._first + nbytes]

    def arrays(self, tensors: dict[str, TensorAt], where: Layout) -> dict[str, mx.array]:
        """The tensors as stored. They share this buffer: all that reads them is evaluated before a refill."""
        arrays = {}
        for name, t in tensors.items():
            begin = self._first + where.at[name]
            raw = self._whole[begin : begin + t.nbytes]
            attribute, size = DTYPES[t.dtype]
            if t.offset % size:  # Metal and vector units want whole elements at whole addresses: copy
                raw = raw * 1
            arrays[name] = raw.view(getattr(mx, attribute)).reshape(t.shape)
        mx.eval(arrays)
        return arrays


class Slots:
    """Groups of tensors read from disk one after the other, the next while one is used."""

    def __init__(self, reader: Reader, groups: Mapping[Any, dict[str, TensorAt]]):
        self._reader, self._groups = reader, groups
        self._layouts = {key: Layout(tensors) for key, tensors in groups.items()}
        self.nbytes = max(at.nbytes for at in self._layouts.values())
        self.free: list[Slot] = []

    def each(self, keys: Iterable[Any]) -> Generator[tuple[Any, Slot, dict[str, mx.array]]]:
        """(key, slot, its tensors as stored) in turn. Whoever is done with a slot puts it among those `free`."""
        todo = deque(keys)
        coming = self._begin(todo.popleft()) if todo else None
        try:
            while coming:
                key, slot, wait = coming
                coming = None
                wait()
                coming = self._begin(todo.popleft()) if todo else None
                yield key, slot, slot.arrays(self._groups[key], self._layouts[key])
        finally:
            if coming:  # left in the middle: nobody may still be writing into a slot that is free
                coming[2]()
                self.free.append(coming[1])

    def _begin(self, key: Any) -> tuple[Any, Slot, Callable[[], None]]:
        slot = self.free.pop() if self.free else Slot(self.nbytes)
        parts = []
        for e in self._layouts[key].extents:
            parts.append((e.file, e.begin, e.end, slot.view[e.at : e.at + pages(e.end - e.begin)]))
        return key, slot, self._reader.begin(parts)


def rows(reader: Reader, t: TensorAt, ids: np.ndarray) -> mx.array:
    """Rows `ids` (rising) of a stored matrix, or elements of a vector, in one new array."""
    size = t.nbytes // t.shape[0]
    found: Any = mx.zeros((len(ids) * size,), mx.uint8)
    mx.eval(found)
    view, wanted = memoryview(found), []
    starts = np.flatnonzero(np.diff(ids, prepend=-2) != 1)  # of runs of neighbours
    for a, b in zip(starts, [*starts[1:], len(ids)], strict=True):
        at = t.offset + int(ids[a]) * size
        wanted.append((t.file, at, at + int(b - a) * size, view[a * size : b * size]))
    reader.begin(wanted)()
    return found.view(getattr(mx, DTYPES[t.dtype][0])).reshape(len(ids), *t.shape[1:])
