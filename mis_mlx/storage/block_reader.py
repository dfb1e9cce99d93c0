"""Tensors from safetensors files into buffers that are used again and again: in parallel, in the
background, past the page cache if asked.
"""

import errno
import fcntl
import io
import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from operator import attrgetter
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mis_mlx.storage.header_check import DTYPES
from mis_mlx.storage.safetensors import files_of, unchanged
from mis_mlx.types import MisError, TensorAt, gib

# what reading past the page cache wants offsets, lengths and addresses to be multiples of
PAGE = 4096
# bytes per read: big enough for the disk, small enough that two threads share a block
PIECE = 8 << 20
GAP = 1 << 16  # bytes between two tensors of a block that are read along rather than skipped
F_NOCACHE = 48  # macOS; Python's fcntl has no name for it
_signature = attrgetter("st_ino", "st_size", "st_mtime_ns")  # of a file's stat


class Layout:
    """Where a group of tensors goes in one buffer of `nbytes`: each keeps its offset's remainder by
    PAGE. Neighbours in a file are merged into few extents, and those laid out page by page: (file,
    begin, end, at, until), of bytes [begin, end) of the file, which go to [at, until); all but end
    are multiples of PAGE.
    """

    def __init__(self, tensors: Mapping[str, TensorAt]):
        self.tensors = tensors
        self.at = dict[str, int]()
        self.nbytes = 0
        self.extents = list[tuple[Path, int, int, int, int]]()
        for name, t in sorted(tensors.items(), key=lambda item: (item[1].file, item[1].offset)):
            file, begin, end, at, _ = self.extents[-1] if self.extents else (None, 0, 0, 0, 0)
            if file == t.file and begin <= t.offset <= end + GAP:
                self.extents.pop()
                end = max(end, t.offset + t.nbytes)
            else:
                begin = t.offset // PAGE * PAGE
                end = t.offset + t.nbytes
                at = self.nbytes
            self.at[name] = at + t.offset - begin
            self.nbytes = at + -(-(end - begin) // PAGE) * PAGE
            self.extents.append((t.file, begin, end, at, self.nbytes))


class Reader:
    """Reads the files of `tensors`, and `also` others, which must stay as they were when this was
    made.

    direct: past the page cache (O_DIRECT, F_NOCACHE), where the file system can: for a model that
    the budget does not hold. On Linux it also takes less of the processor (0.1 instead of 0.4 to
    1.5 s for 2 GB).
    """

    def __init__(
        self, tensors: Mapping[str, TensorAt], direct: bool = False, also: Sequence[Path] = ()
    ):
        by_file = files_of(tensors, tensors)
        for path, names in by_file.items():
            unchanged(path, tensors, names)  # a sentence, too, when the file is gone
        self._signatures = {path: _signature(os.stat(path)) for path in (*by_file, *also)}
        self._direct = direct
        self._pool = ThreadPoolExecutor(2, "reader")
        self.nbytes = 0  # asked for so far

    def begin(self, wanted: Iterable[tuple[Path, int, int, memoryview]]) -> Callable[[], None]:
        """Start to read (file, begin, end) into views that are as long or, for whole pages, longer.

        Returns `wait`, which blocks until all is there; MisError when a file cannot be read or has
        changed. The views must stay alive and untouched until then.
        """
        jobs = []
        for path, begin, end, view in wanted:
            self.nbytes += end - begin
            for start in range(0, end - begin, PIECE):
                needed = min(PIECE, end - begin - start)
                jobs.append(
                    self._pool.submit(
                        self._read, path, begin + start, needed, view[start : start + PIECE]
                    )
                )

        def wait() -> None:
            failed = [error for job in jobs if (error := job.exception())]  # waits for all of them
            if failed:
                raise failed[0]

        return wait

    def rows(self, t: TensorAt, ids: np.ndarray) -> mx.array:
        """Rows `ids` (rising) of a stored matrix, or elements of a vector, in one new array."""
        size = t.nbytes // t.shape[0]
        found: Any = mx.zeros((len(ids) * size,), mx.uint8)
        mx.eval(found)
        view = memoryview(found)
        wanted = []
        starts = np.flatnonzero(np.diff(ids, prepend=-2) != 1)  # of runs of neighbours
        for a, b in zip(starts, [*starts[1:], len(ids)], strict=True):
            at = t.offset + int(ids[a]) * size
            wanted.append((t.file, at, at + int(b - a) * size, view[a * size : b * size]))
        self.begin(wanted)()
        return found.view(getattr(mx, DTYPES[t.dtype][0])).reshape(len(ids), *t.shape[1:])

    def _read(self, path: Path, offset: int, needed: int, view: memoryview) -> None:
        try:
            if self._direct and not (offset % PAGE or len(view) % PAGE):
                try:
                    return self._read_with(getattr(os, "O_DIRECT", 0), path, offset, needed, view)
                except OSError as error:
                    if error.errno != errno.EINVAL:  # file systems in memory do not know it
                        raise
            self._read_with(0, path, offset, needed, view)
        except OSError as error:
            raise MisError(
                f"{path} cannot be read ({error.strerror}): check the disk, then start again"
            ) from error

    def _read_with(self, flag: int, path: Path, offset: int, needed: int, view: memoryview) -> None:
        with io.FileIO(os.open(path, os.O_RDONLY | os.O_CLOEXEC | flag)) as file:
            if _signature(os.fstat(file.fileno())) != self._signatures[path]:
                raise MisError(f"{path} changed while it was in use: start again")
            if self._direct and sys.platform == "darwin":
                fcntl.fcntl(file.fileno(), F_NOCACHE, 1)
            file.seek(offset)
            done = 0
            while done < needed:
                got = file.readinto(view[done:])
                if not got:
                    raise MisError(
                        f"{path} ends {needed - done} bytes early: download the model again"
                    )
                done += got


class Slot:
    """A buffer that blocks are read into again and again; new memory for each would cost 4x the
    time.
    """

    def __init__(self, nbytes: int):
        if nbytes + PAGE >= 2**31:
            raise MisError(
                f"One block takes {gib(nbytes)} on disk, the most is 2 GiB: quantize the model "
                f"first"
            )
        self._whole = mx.zeros((nbytes + PAGE,), mx.uint8)
        mx.eval(self._whole)
        whole: Any = self._whole
        view = memoryview(whole)
        self._first = -np.frombuffer(view, np.uint8).ctypes.data % PAGE
        self.view = view[self._first : self._first + nbytes]

    def arrays(self, where: Layout) -> dict[str, mx.array]:
        """The tensors as stored. They share this buffer: all that reads them is evaluated before a
        refill.
        """
        arrays = {}
        for name, t in where.tensors.items():
            begin = self._first + where.at[name]
            raw = self._whole[begin : begin + t.nbytes]
            attribute, size = DTYPES[t.dtype]
            # Metal and vector units want whole elements at whole addresses: copy
            if t.offset % size:
                raw = raw * 1
            arrays[name] = raw.view(getattr(mx, attribute)).reshape(t.shape)
        mx.eval(arrays)
        return arrays


class Slots:
    """Groups of tensors read from disk one after the other, the next while one is used."""

    def __init__(self, reader: Reader, groups: Mapping[Any, dict[str, TensorAt]]):
        self._reader = reader
        self._layouts = {key: Layout(tensors) for key, tensors in groups.items()}
        self.nbytes = max(at.nbytes for at in self._layouts.values())
        self.free: list[Slot] = []

    def each(self, keys: Iterable[Any]) -> Generator[tuple[Any, Slot, dict[str, mx.array]]]:
        """(key, slot, its tensors as stored) in turn. Whoever is done with a slot puts it among
        those `free`.
        """
        todo = deque(keys)
        coming = self._begin(todo.popleft()) if todo else None
        try:
            while coming:
                key, slot, wait = coming
                coming = None
                wait()
                coming = self._begin(todo.popleft()) if todo else None
                yield key, slot, slot.arrays(self._layouts[key])
        finally:
            if coming:  # left in the middle: nobody may still be writing into a slot that is free
                coming[2]()
                self.free.append(coming[1])

    def _begin(self, key: Any) -> tuple[Any, Slot, Callable[[], None]]:
        slot = self.free.pop() if self.free else Slot(self.nbytes)
        extents = self._layouts[key].extents
        parts = [(file, begin, end, slot.view[at:until]) for file, begin, end, at, until in extents]
        return key, slot, self._reader.begin(parts)
