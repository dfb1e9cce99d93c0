"""A list of hidden states between two blocks: a few stay in memory, the others live in a file."""

import math
import os
import weakref
from collections.abc import MutableSequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mis_mlx.storage.files import DISK, as_mis_error
from mis_mlx.types import MisError

WHAT = "the spool of hidden states"


class Spool(MutableSequence[mx.array]):
    """Arrays of one shape and dtype, or narrower: `held` of them in memory, the others in a file.

    The file is in `folder` and has no name. An array that goes there is evaluated; reading it makes
    a new array. MisError when the disk is full.
    """

    def __init__(self, folder: Path, held: int):
        self._folder = folder
        self._held = held
        self._memory: dict[int, mx.array] = {}
        self._count = 0
        self._fd = -1
        # of the arrays in the file, each: its shape and type
        self._kinds: dict[int, tuple[tuple[int, ...], mx.Dtype]] = {}
        self._first: tuple[tuple[int, ...], mx.Dtype] = ((), mx.float32)
        self._nbytes = 0  # that each may have in the file, as many as the first of them

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, b: Any) -> Any:
        if isinstance(b, slice):
            return [self[i] for i in range(self._count)[b]]
        index = range(self._count)[b]  # counts from the end too; IndexError
        if index < self._held:
            return self._memory[index]
        shape, dtype = self._kinds[index]
        nbytes = math.prod(shape) * dtype.size
        with as_mis_error(self._folder, WHAT, nbytes):
            data = os.pread(self._fd, nbytes, self._offset(index))
        if len(data) < nbytes:
            raise MisError(f"{self._folder}: {WHAT} was cut short: check the disk and start again")
        raw = np.frombuffer(data, np.uint8)
        return mx.array(raw).view(dtype).reshape(shape)

    def __setitem__(self, b: Any, array: Any) -> None:
        index = range(self._count)[b]
        self._put(index, array)

    def _offset(self, index: int) -> int:
        """Where the array is in the file, in bytes."""
        return (index - self._held) * self._nbytes

    def insert(self, b: int, array: mx.array) -> None:
        """Only at the end: this is `append`."""
        assert b == self._count, "a spool grows at its end"
        self._put(b, array)
        self._count += 1

    def _put(self, b: int, array: mx.array) -> None:
        if b < self._held:
            self._memory[b] = array
            return
        shape = tuple(array.shape)
        if not self._kinds:
            self._nbytes = array.nbytes
            self._first = (shape, array.dtype)
        first_shape, dtype = self._first
        # the last norm makes one version of hidden states of several: fewer channels, no more
        fits = shape[:-1] == first_shape[:-1] and shape[-1] <= first_shape[-1]
        if array.dtype != dtype or not fits:
            raise ValueError(f"a spool of {self._first} was given {(shape, array.dtype)}")
        self._kinds[b] = (shape, dtype)
        raw: Any = mx.contiguous(array).view(mx.uint8)  # bytes: numpy has no bfloat16
        with as_mis_error(self._folder, WHAT, self._nbytes):
            if self._fd < 0:
                self._fd = DISK.scratch(self._folder)
                weakref.finalize(self, os.close, self._fd)
            data = memoryview(raw).cast("B")  # evaluates
            DISK.put(self._fd, self._offset(b), data)

    def __delitem__(self, b: Any) -> None:
        raise TypeError("a spool does not shrink")
