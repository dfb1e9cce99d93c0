"""Where what learns lives, with its moments: in memory, or on disk.

Either holds the same numbers, so what is learned does not depend on it. On disk every unit, a block
or the final norm, has a file, written anew at every step and never changed: a checkpoint links it,
and keeps its bytes when the next step's file takes its place.
"""

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import mlx.core as mx

from mis_mlx.compute import streams
from mis_mlx.hardware.stage_cost import StageCost
from mis_mlx.maths.optimizer import Named, Part
from mis_mlx.models.passing.stream import evaluate_now
from mis_mlx.storage.checkpoint import Written, write_once
from mis_mlx.storage.files import DISK, as_mis_error
from mis_mlx.storage.header_check import check
from mis_mlx.storage.safetensors import lazy

WHAT = "the state of scales that learn"


class LearnedState(Protocol):
    """Values and moments of every unit, evaluated.

    A unit is named by the prefix of its weights in the whole model, 'model.layers.3.'.
    """

    def values(self, unit: str) -> dict[str, mx.array]:
        """What a unit has learned so far, by name in it."""

    def value(self, unit: str, name: str) -> mx.array | None:
        """One of these; None where nothing of that name learns."""

    def part(self, unit: str) -> Part:
        """What a unit has learned, with its moments."""

    def put(self, unit: str, part: Part) -> None:
        """Replace a unit's values and moments, which may be lazy."""

    def entries(self) -> dict[str, Written]:
        """Checkpoint files that hold what `part` gives; {}: whoever saves must ask for it."""


class InMemory:
    """All of it in memory."""

    def __init__(self) -> None:
        self._parts: dict[str, Part] = {}

    def values(self, unit: str) -> dict[str, mx.array]:
        """As `LearnedState.values`."""
        return dict(self._parts[unit].weights)

    def value(self, unit: str, name: str) -> mx.array | None:
        """As `LearnedState.value`."""
        return self._parts[unit].weights.get(name)

    def part(self, unit: str) -> Part:
        """As `LearnedState.part`."""
        return self._parts[unit]

    def put(self, unit: str, part: Part) -> None:
        """As `LearnedState.put`.

        The old arrays go first, so that new ones may take their memory. As many weights at a time
        as there are streams: MLX makes room for all that it is asked for together, before the first
        of it is there.
        """
        self._parts[unit] = part
        names = list(part.weights)
        count = streams.count()
        for start in range(0, len(names), count):
            together = names[start : start + count]
            arrays = [[part.weights[name], part.moments.get(name, {})] for name in together]
            evaluate_now(arrays)

    def entries(self) -> dict[str, Written]:
        """As `LearnedState.entries`."""
        return {}


@contextmanager
def place(planned: StageCost, folder: Path) -> Iterator[LearnedState]:
    """Where scales learn as planned: in memory; or in files below `folder`, until the block ends.

    MisError where the disk has too little space for them.
    """
    if not planned.scratch_bytes:
        yield InMemory()
        return
    DISK.require_space(folder, planned.scratch_bytes, WHAT)
    own = folder / f".tmp-scales-{os.getpid()}"
    try:
        yield OnDisk(own)
    finally:
        DISK.discard(own)


class OnDisk:
    """Values and moments in a file a unit, in the new folder `folder`.

    MisError when the disk is full.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._written: dict[str, Written] = {}
        self._count = 0  # of files so far: no name is used twice
        with as_mis_error(folder.parent, WHAT):
            DISK.discard(folder)  # a process of the same number left it
            DISK.make_folder(folder)

    def values(self, unit: str) -> dict[str, mx.array]:
        """As `LearnedState.values`."""
        tensors, _ = check(self._written[unit].path)
        return self._read(unit, [name for name in tensors if not _of_moment(name, tensors)])

    def value(self, unit: str, name: str) -> mx.array | None:
        """As `LearnedState.value`."""
        tensors, _ = check(self._written[unit].path)
        return self._read(unit, [unit + name])[name] if unit + name in tensors else None

    def part(self, unit: str) -> Part:
        """As `LearnedState.part`."""
        return split(self._read(unit))

    def put(self, unit: str, part: Part) -> None:
        """As `LearnedState.put`. The old file goes once the new one is whole."""
        named = joined(part, before=unit)
        nbytes = sum(array.nbytes for array in named.values())
        self._count += 1
        path = self._folder / f"{_file_name(unit)}-{self._count:08d}.safetensors"
        old = self._written.get(unit)
        with as_mis_error(self._folder, WHAT, nbytes):
            self._written[unit] = write_once(path, named)
        if old:
            DISK.discard(old.path)

    def entries(self) -> dict[str, Written]:
        """As `LearnedState.entries`."""
        return {_file_name(unit): written for unit, written in sorted(self._written.items())}

    def _read(self, unit: str, wanted: Collection[str] | None = None) -> dict[str, mx.array]:
        """A unit's arrays by name in it, evaluated. wanted: of the file; None: all."""
        tensors, _ = check(self._written[unit].path)
        arrays = lazy(tensors, wanted or tensors)
        evaluate_now(arrays)
        return {name.removeprefix(unit): array for name, array in arrays.items()}


def _file_name(unit: str) -> str:
    """'model.layers.3.' -> 'model-layers-3'."""
    return unit.strip(".").replace(".", "-")


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
