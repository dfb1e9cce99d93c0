"""Read tensors of safetensors files into buffers that are used again and again.

Reading is parallel, in the background and, if asked for, past the page cache.
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
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mis_mlx.storage.header_check import DTYPES
from mis_mlx.storage.safetensors import files_of, require_unchanged
from mis_mlx.types import MisError, TensorAt, gib

# Reads past the page cache need offsets, lengths and addresses that are multiples of this.
PAGE = 4096
# Bytes per read: big enough for the disk, small enough that two threads share a block.
PIECE = 8 << 20
GAP = 1 << 16  # bytes between two tensors of a block that are read along rather than skipped
F_NOCACHE = 48  # macOS; Python's fcntl has no name for it
_signature = attrgetter("st_ino", "st_size", "st_mtime_ns")  # of a file's stat


class Extent(NamedTuple):
    """Bytes [begin, end) of a file, which go to bytes [at, until) of a buffer, rounded up to pages.

    All but `end` are multiples of PAGE.
    """

    file: Path
    begin: int
    end: int
    buffer_begin: int
    buffer_end: int


class Layout:
    """Where a group of tensors goes in one buffer of `nbytes`.

    Neighbours in a file are merged into a few `extents`, one read each. offsets: the offset of each
    tensor in the buffer; it has the remainder by PAGE that the tensor's offset in the file has.
    """

    def __init__(self, tensors: Mapping[str, TensorAt]):
        self.tensors = tensors
        self.offsets = dict[str, int]()
        self.nbytes = 0
        self.extents = list[Extent]()
        in_file_order = sorted(tensors.items(), key=lambda item: (item[1].file, item[1].offset))
        for name, tensor in in_file_order:
            self._add(name, tensor)

    def _add(self, name: str, tensor: TensorAt) -> None:
        """Put the tensor behind those before it, into their last extent if it is near."""
        end = tensor.offset + tensor.nbytes
        last = self.extents[-1] if self.extents else None
        if last and last.file == tensor.file and tensor.offset <= last.end + GAP:
            self.extents.pop()
            begin = last.begin
            end = max(end, last.end)
            buffer_begin = last.buffer_begin
        else:
            begin = tensor.offset // PAGE * PAGE
            buffer_begin = self.nbytes
        pages = -(-(end - begin) // PAGE)
        self.nbytes = buffer_begin + pages * PAGE
        self.offsets[name] = buffer_begin + tensor.offset - begin
        self.extents.append(
            Extent(tensor.file, begin, end, buffer_begin=buffer_begin, buffer_end=self.nbytes)
        )


class Reader:
    """Reads the files of `tensors`, and the files `also`, as they were when it was made.

    A file that has changed since then is refused. direct: past the page cache (O_DIRECT,
    F_NOCACHE), where the file system can: for a model that the budget does not hold. On Linux it
    also takes less of the processor (0.1 instead of 0.4 to 1.5 s for 2 GB).
    """

    def __init__(
        self, tensors: Mapping[str, TensorAt], direct: bool = False, also: Sequence[Path] = ()
    ):
        by_file = files_of(tensors, tensors)
        for path, names in by_file.items():
            require_unchanged(path, tensors, names)  # also the MisError for a file that is gone
        self._signatures = {path: _signature(os.stat(path)) for path in (*by_file, *also)}
        self._direct = direct
        self._pool = ThreadPoolExecutor(2, "reader")
        self.nbytes = 0  # asked for so far

    def begin(self, wanted: Iterable[tuple[Path, int, int, memoryview]]) -> Callable[[], None]:
        """Start to read (file, begin, end) into views of that length or, for whole pages, longer.

        Returns `wait`, which blocks until all is there; MisError when a file cannot be read or has
        changed. The views must stay alive and untouched until then.
        """
        jobs = []
        for path, begin, end, view in wanted:
            self.nbytes += end - begin
            # Pieces, so that both threads of the pool work on one extent.
            for start in range(0, end - begin, PIECE):
                needed = min(PIECE, end - begin - start)
                piece = view[start : start + PIECE]
                offset = begin + start
                job = self._pool.submit(self._read, path, offset, needed=needed, view=piece)
                jobs.append(job)

        def wait() -> None:
            # All jobs end before an error is raised: none may write into a view afterwards.
            errors = [job.exception() for job in jobs]
            for error in errors:
                if error:
                    raise error

        return wait

    def rows(self, t: TensorAt, ids: np.ndarray) -> mx.array:
        """Rows `ids` (rising) of a stored matrix, or elements of a vector, in one new array."""
        row_bytes = t.nbytes // t.shape[0]
        raw: Any = mx.zeros((len(ids) * row_bytes,), mx.uint8)
        mx.eval(raw)  # the buffer exists from here on, and reads go into it
        view = memoryview(raw)
        # Neighbouring rows are read together: a run starts where an id is not its predecessor + 1.
        starts = np.flatnonzero(np.diff(ids, prepend=-2) != 1)
        stops = [*starts[1:], len(ids)]
        wanted = []
        for start, stop in zip(starts, stops, strict=True):
            begin = t.offset + int(ids[start]) * row_bytes
            end = begin + int(stop - start) * row_bytes
            target = view[start * row_bytes : stop * row_bytes]
            wanted.append((t.file, begin, end, target))
        self.begin(wanted)()
        dtype = getattr(mx, DTYPES[t.dtype][0])
        return raw.view(dtype).reshape(len(ids), *t.shape[1:])

    def _read(self, path: Path, offset: int, needed: int, view: memoryview) -> None:
        """One job: `needed` bytes of the file into the view, past the page cache where possible."""
        in_pages = offset % PAGE == 0 and len(view) % PAGE == 0
        try:
            if self._direct and in_pages:
                try:
                    flags = getattr(os, "O_DIRECT", 0)  # macOS has none: F_NOCACHE below
                    self._read_with(path, offset, needed, view, flags=flags)
                    return
                except OSError as error:
                    # EINVAL: file systems in memory do not know O_DIRECT.
                    if error.errno != errno.EINVAL:
                        raise
            self._read_with(path, offset, needed, view)
        except OSError as error:
            raise MisError(
                f"{path} cannot be read ({error.strerror}): check the disk, then start again"
            ) from error

    def _read_with(
        self, path: Path, offset: int, needed: int, view: memoryview, *, flags: int = 0
    ) -> None:
        with io.FileIO(os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)) as file:
            # Checked at every read: a file that was replaced meanwhile has other bytes at the
            # offsets of the header that was judged.
            if _signature(os.fstat(file.fileno())) != self._signatures[path]:
                raise MisError(f"{path} changed while it was in use: start again")
            if self._direct and sys.platform == "darwin":
                fcntl.fcntl(file.fileno(), F_NOCACHE, 1)
            file.seek(offset)
            done = 0
            # One read may return fewer bytes than asked for. The view may be longer than `needed`,
            # because direct reads take whole pages.
            while done < needed:
                count = file.readinto(view[done:])
                if not count:
                    raise MisError(
                        f"{path} ends {needed - done} bytes early: download the model again"
                    )
                done += count


class Slot:
    """A buffer that blocks are read into again and again.

    New memory for each block would cost 4x the time.
    """

    def __init__(self, nbytes: int):
        if nbytes + PAGE >= 2**31:
            raise MisError(
                f"One block takes {gib(nbytes)} on disk, but at most 2 GiB can be read: quantize "
                f"the model first"
            )
        # One page more than asked for: MLX does not align to pages, so the view begins at the first
        # page boundary inside the buffer.
        self._buffer = mx.zeros((nbytes + PAGE,), mx.uint8)
        mx.eval(self._buffer)
        buffer: Any = self._buffer
        view = memoryview(buffer)
        address = np.frombuffer(view, np.uint8).ctypes.data
        self._first = -address % PAGE
        self.view = view[self._first : self._first + nbytes]

    def arrays(self, where: Layout) -> dict[str, mx.array]:
        """The tensors as stored, as views of this buffer.

        Evaluate everything that reads them before the slot is filled again: a lazy array would
        compute with the next block's bytes.
        """
        arrays = {}
        for name, tensor in where.tensors.items():
            begin = self._first + where.offsets[name]
            raw = self._buffer[begin : begin + tensor.nbytes]
            attribute, size = DTYPES[tensor.dtype]
            # Metal and vector units want an element's address to be a multiple of its size: copy.
            if tensor.offset % size:
                raw = raw * 1
            arrays[name] = raw.view(getattr(mx, attribute)).reshape(tensor.shape)
        mx.eval(arrays)
        return arrays


class _Filling(NamedTuple):
    """A slot that a group of tensors is being read into."""

    key: Any
    slot: Slot
    wait: Callable[[], None]


class Slots:
    """Groups of tensors read from disk one after the other, the next while one is in use."""

    def __init__(self, reader: Reader, groups: Mapping[Any, dict[str, TensorAt]]):
        self._reader = reader
        self._layouts = {key: Layout(tensors) for key, tensors in groups.items()}
        self.nbytes = max(layout.nbytes for layout in self._layouts.values())
        self.free: list[Slot] = []

    def each(self, keys: Iterable[Any]) -> Generator[tuple[Any, Slot, dict[str, mx.array]]]:
        """(key, slot, its tensors as stored) in turn.

        The caller appends a slot to `free` when it is done with it; a slot that never comes back is
        replaced by a new buffer.
        """
        todo = deque(keys)
        coming = self._begin(todo)
        try:
            while coming:
                ready = coming
                coming = None
                ready.wait()
                # The disk works on the next group while the caller computes with this one.
                coming = self._begin(todo)
                yield ready.key, ready.slot, ready.slot.arrays(self._layouts[ready.key])
        finally:
            # The caller left in the middle. Threads may still write into the slot, so it is free
            # only once they are done.
            if coming:
                coming.wait()
                self.free.append(coming.slot)

    def _begin(self, todo: deque[Any]) -> _Filling | None:
        """Start to read the next group into a free slot, if necessary a new one; None: no more."""
        if not todo:
            return None
        key = todo.popleft()
        slot = self.free.pop() if self.free else Slot(self.nbytes)
        wanted = []
        for extent in self._layouts[key].extents:
            target = slot.view[extent.buffer_begin : extent.buffer_end]
            wanted.append((extent.file, extent.begin, extent.end, target))
        return _Filling(key, slot, self._reader.begin(wanted))
