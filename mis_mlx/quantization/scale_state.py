"""Where the scales that learn live, with their moments and gradients: in memory, or on disk.

Either holds the same numbers, so what is learned does not depend on it. On disk every block has a
file, written anew at every step and never changed: a checkpoint links it, and keeps its bytes when
the next step's file takes its place.
"""

import os
from collections.abc import Collection, Iterator, MutableSequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import mlx.core as mx

from mis_mlx.hardware.stage_cost import GRADIENTS, StageCost
from mis_mlx.maths import optimizer
from mis_mlx.maths.optimizer import Named, Part
from mis_mlx.models.architectures import arch
from mis_mlx.models.passing.stream import evaluate_now
from mis_mlx.storage.checkpoint import Written, write_once
from mis_mlx.storage.files import Files, as_mis_error
from mis_mlx.storage.header_check import check
from mis_mlx.storage.hidden_spool import Spool
from mis_mlx.storage.safetensors import lazy

WHAT = "the state of scales that learn"
MOMENTS = tuple(f".{moment}" for moment in optimizer.MOMENTS)


class ScaleState(Protocol):
    """Values and moments of every block, evaluated; gradients of the step under way."""

    def values(self, i: int) -> dict[str, mx.array]:
        """What block i has learned so far, by name in the block."""

    def value(self, i: int, name: str) -> mx.array:
        """One of these."""

    def part(self, i: int) -> Part:
        """What block i has learned, with its moments."""

    def put(self, i: int, part: Part) -> None:
        """Replace block i's values and moments, which may be lazy."""

    def new_gradients(self) -> MutableSequence[mx.array]:
        """An empty list for a step's gradients: one vector (n,) a block, all of the same length."""

    def entries(self) -> dict[str, Written]:
        """Checkpoint files that hold what `part` gives; {}: whoever saves must ask for it."""


class InMemory:
    """All of it in memory."""

    def __init__(self) -> None:
        self._parts: dict[int, Part] = {}

    def values(self, i: int) -> dict[str, mx.array]:
        """As `ScaleState.values`."""
        return dict(self._parts[i].weights)

    def value(self, i: int, name: str) -> mx.array:
        """As `ScaleState.value`."""
        return self._parts[i].weights[name]

    def part(self, i: int) -> Part:
        """As `ScaleState.part`."""
        return self._parts[i]

    def put(self, i: int, part: Part) -> None:
        """As `ScaleState.put`."""
        evaluate_now(part)
        self._parts[i] = part

    def new_gradients(self) -> MutableSequence[mx.array]:
        """As `ScaleState.new_gradients`."""
        return []

    def entries(self) -> dict[str, Written]:
        """As `ScaleState.entries`."""
        return {}


@contextmanager
def place(planned: StageCost, folder: Path, files: Files) -> Iterator[ScaleState]:
    """Where scales learn as planned: in memory; or in files below `folder`, until the block ends.

    MisError where the disk has too little space for them.
    """
    if not planned.scratch_bytes:
        yield InMemory()
        return
    files.require_space(folder, planned.scratch_bytes, WHAT)
    own = folder / f".tmp-scales-{os.getpid()}"
    try:
        yield OnDisk(own, planned.stays[GRADIENTS], files)
    finally:
        files.discard(own)


class OnDisk:
    """Values and moments in a file a block, in the new folder `folder`.

    held: of how many blocks the gradients stay in memory during a step; those of the others go to a
    file without a name. MisError when the disk is full.
    """

    def __init__(self, folder: Path, held: int, files: Files):
        self._folder = folder
        self._held = held
        self._files = files
        self._written: dict[int, Written] = {}
        self._count = 0  # of files so far: no name is used twice
        with as_mis_error(folder.parent, WHAT):
            files.discard(folder)  # a process of the same number left it
            files.make_folder(folder)

    def values(self, i: int) -> dict[str, mx.array]:
        """As `ScaleState.values`."""
        tensors, _ = check(self._written[i].path)
        return self._read(i, [name for name in tensors if not _of_moment(name, tensors)])

    def value(self, i: int, name: str) -> mx.array:
        """As `ScaleState.value`."""
        return self._read(i, [arch.block_prefix(i) + name])[name]

    def part(self, i: int) -> Part:
        """As `ScaleState.part`."""
        return split(self._read(i))

    def put(self, i: int, part: Part) -> None:
        """As `ScaleState.put`. The old file goes once the new one is whole."""
        named = joined(part, before=arch.block_prefix(i))
        nbytes = sum(array.nbytes for array in named.values())
        self._count += 1
        path = self._folder / f"block-{i:05d}-{self._count:08d}.safetensors"
        old = self._written.get(i)
        with as_mis_error(self._folder, WHAT, nbytes):
            self._written[i] = write_once(path, named, self._files)
        if old:
            self._files.discard(old.path)

    def new_gradients(self) -> MutableSequence[mx.array]:
        """As `ScaleState.new_gradients`."""
        return Spool(self._folder, self._held, self._files, WHAT)

    def entries(self) -> dict[str, Written]:
        """As `ScaleState.entries`."""
        return {f"block-{i:05d}": written for i, written in sorted(self._written.items())}

    def _read(self, i: int, wanted: Collection[str] | None = None) -> dict[str, mx.array]:
        """A block's arrays by name in the block, evaluated. wanted: of the file; None: all."""
        tensors, _ = check(self._written[i].path)
        arrays = lazy(tensors, wanted or tensors)
        evaluate_now(arrays)
        return {name.removeprefix(arch.block_prefix(i)): array for name, array in arrays.items()}


def joined(part: Part, before: str = "") -> dict[str, mx.array]:
    """Values and moments in one mapping: the moments of `a` are `a.m` and `a.v`.

    before: of all names.
    """
    named = {}
    for name, array in part.weights.items():
        named[before + name] = array
    for name, moments in part.moments.items():
        for moment, array in moments.items():
            named[f"{before}{name}.{moment}"] = array
    return named


def split(named: Named) -> Part:
    """What `joined` has put together."""
    weights = {}
    moments: dict[str, dict[str, mx.array]] = {}
    for name, array in named.items():
        if _of_moment(name, named):
            value, _, moment = name.rpartition(".")
            moments.setdefault(value, {})[moment] = array
        else:
            weights[name] = array
    return Part(weights, moments)


def _of_moment(name: str, names: Collection[str]) -> bool:
    """Whether one of `joined`'s names is of a moment: then it has its value's name before it."""
    return name.rpartition(".")[0] in names
