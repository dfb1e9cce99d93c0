"""Several machines on one job, started by `mlx.launch`: which one this is, and what they exchange.

The transport is `mx.distributed`. Every machine runs the same program; the first one writes the
run, and the others work in a temporary folder. On a machine that works alone, every function here
returns what it was given.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, MutableSequence, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mis_mlx import cli
from mis_mlx.hardware import sockets
from mis_mlx.models.passing import stream
from mis_mlx.storage.checkpoint import Arrays
from mis_mlx.storage.files import Files, as_mis_error
from mis_mlx.types import MisError, grouped

CHUNK_BYTES = 1 << 26  # of a file, sent in one go
GROUP_BYTES = 1 << 25  # of gradients, added up in one go
T = TypeVar("T")


class Lost(MisError):
    """Another machine is gone. From here on this one counts as alone."""


@dataclass
class _World:
    """Which machine this is, from 0, and how many there are: 1 once another one is lost."""

    rank: int
    size: int


@cache
def _world() -> _World:
    """The machines, which are connected at the first call."""
    if cli.rank() is None:
        return _World(rank=0, size=1)
    try:
        group = mx.distributed.init(strict=True)
    except (RuntimeError, ValueError) as error:
        raise MisError(
            f"the machines cannot reach each other ({error}): check the hosts and cables"
        ) from None
    sockets.notice_the_dead()
    return _World(group.rank(), group.size())


def size() -> int:
    """How many machines work together."""
    return _world().size


def rank() -> int:
    """Which of them this is, from 0."""
    return _world().rank


def is_main() -> bool:
    """Whether this is the machine that writes checkpoints, metrics and models, and speaks."""
    return rank() == 0


def shard(items: Any) -> Any:
    """This machine's part of a sequence: every `size`-th item, perhaps none.

    The items are what a step or a pass consists of.
    """
    return items[rank() :: size()]


def _settled(arrays: Any) -> Any:
    """`arrays`, evaluated; other machines take part in computing them. Lost when one is gone.

    Every exchange goes through here: MLX is lazy, so a failed exchange shows only now.
    """
    try:
        stream.evaluate_now(arrays)
    except RuntimeError as error:
        if size() == 1 or cli.device_trouble(error):  # this machine's own
            raise
        # No later call waits for the others.
        _world().size = 1
        raise Lost(f"another machine is gone ({error}): resume on the remaining machines") from None
    return arrays


def all_reduce_gradients(named: dict[str, mx.array]) -> None:
    """Arrays become their sums over the machines, in place, with the same bits on each machine.

    They are exchanged a few at a time, so that not all of them exist twice.
    """
    machines = size()
    if machines == 1:
        return
    for names in grouped(list(named), lambda name: named[name].nbytes, GROUP_BYTES):
        # MLX's function packs a group into one message; it divides by the number of machines.
        means = nn.average_gradients([named[name] for name in names])
        sums = {name: mean * machines for name, mean in zip(names, means, strict=True)}
        named.update(_settled(sums))


def all_reduce_sums(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Float64 arrays, of the same shapes everywhere, summed over the machines."""
    if size() == 1 or not arrays:
        return list(arrays)
    # One message for all. Float64 exists on the CPU only.
    flat = [np.asarray(array, np.float64).reshape(-1) for array in arrays]
    message = mx.array(np.concatenate(flat), mx.float64)
    del flat
    total = np.array(_settled(mx.distributed.all_sum(message, stream=mx.cpu)))
    ends = np.cumsum([np.size(array) for array in arrays])
    sums = []
    for array, part in zip(arrays, np.split(total, ends[:-1]), strict=True):
        sums.append(part.reshape(np.shape(array)))
    return sums


def all_gather(value: Any) -> list[Any]:
    """The `value` of every machine, in the machines' order. JSON must be able to hold it."""
    machines = size()
    if machines == 1:
        return [value]
    mine = np.frombuffer(json.dumps(value).encode(), np.uint8)
    # Gathered arrays have one shape: lengths go first, then all texts, padded to the longest.
    lengths = _settled(mx.distributed.all_gather(mx.array([len(mine)]))).tolist()
    padded = np.zeros(max(lengths), np.uint8)
    padded[: len(mine)] = mine
    gathered = _settled(mx.distributed.all_gather(mx.array(padded)))
    rows = np.array(gathered).reshape(machines, -1)
    return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]


def any_rank(flag: object) -> bool:
    """Whether `flag` is true on any machine."""
    return any(all_gather(bool(flag)))


def broadcast_json(make: Callable[[], T]) -> T:
    """The first machine's `make()`, on all machines; the others do not call it.

    JSON must be able to hold it.
    """
    if size() == 1:
        return make()
    value = make() if is_main() else None
    return all_gather(value)[0]


def broadcast_array(array: mx.array, root: int = 0) -> mx.array:
    """The array that `root` has, bit for bit, on all machines.

    Shape and dtype are the same everywhere; the values on the other machines do not matter.
    """
    if size() == 1:
        return array
    # A sum with zeros. It is one of bytes: a sum of floats would turn -0.0 into 0.
    raw = array.reshape(-1).view(mx.uint8)
    if rank() != root:
        raw = mx.zeros_like(raw)
    received = _settled(mx.distributed.all_sum(raw))
    return received.view(array.dtype).reshape(array.shape)


def send_to_next(arrays: Sequence[mx.array], i: int) -> None:
    """Send arrays[i] to the next machine, if there is one, which calls `receive_from_previous` now
    or later.

    Waits until most of it has left.
    """
    next_rank = rank() + 1
    if next_rank < size():
        _settled(mx.distributed.send(arrays[i], next_rank, stream=mx.cpu))


def receive_from_previous(arrays: MutableSequence[mx.array], i: int) -> None:
    """Put what the previous machine, if there is one, passes on into arrays[i].

    arrays[i] has its shape and dtype already.
    """
    if not is_main():
        like = arrays[i]
        source = rank() - 1
        received = mx.distributed.recv(like.shape, like.dtype, source, stream=mx.cpu)
        arrays[i] = _settled(received)


def broadcast_arrays(arrays: Callable[[], Arrays]) -> dict[str, dict[str, mx.array]]:
    """The first machine's arrays by file and name, bit for bit; the others do not call `arrays`.

    Only for several machines.
    """
    mine = arrays() if is_main() else {}
    # The others must know shapes and dtypes before they can take part in a broadcast.
    described = []
    for key, named in mine.items():
        for name, array in named.items():
            described.append((key, name, array.shape, str(array.dtype)))
    received: dict[str, dict[str, mx.array]] = {}
    for key, name, shape, dtype_name in broadcast_json(lambda: described):
        if is_main():
            array = mine[key][name]
        else:
            dtype = getattr(mx, dtype_name.removeprefix("mlx.core."))
            array = mx.zeros(shape, dtype)
        received.setdefault(key, {})[name] = broadcast_array(array)
    return received


def broadcast_file(path: Path, files: Files, root: int = 0) -> None:
    """Send a file that `root` has to all machines, which lack it."""
    own_bytes = path.stat().st_size if path.exists() else 0
    nbytes = all_gather(own_bytes)[root]
    starts = range(0, nbytes, CHUNK_BYTES)
    if rank() == root:
        for start in starts:  # chunks without a name: one is freed before the next is read
            broadcast_array(mx.array(np.fromfile(path, np.uint8, CHUNK_BYTES, offset=start)), root)
        return
    with as_mis_error(path.parent, path.name, nbytes), files.replacing(path) as temp:
        files.write(temp, b"")
        for start in starts:
            length = min(CHUNK_BYTES, nbytes - start)
            received = broadcast_array(mx.zeros((length,), mx.uint8), root)
            files.extend(temp, np.array(received).tobytes())
        files.fsync(temp)


def broadcast_folder(folder: Path, files: Files) -> None:
    """A folder of the first machine, where there are several, made on all others."""
    if size() == 1:
        return
    for name in broadcast_json(lambda: _files_under(folder)):
        files.make_folder((folder / name).parent)
        broadcast_file(folder / name, files)


def _files_under(folder: Path) -> list[str]:
    """Paths of all files in it, relative to it, in alphabetical order."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return sorted(str(path.relative_to(folder)) for path in paths)


@contextmanager
def workplace(folder: Path | None) -> Iterator[Path]:
    """The run's folder on the first machine; on the others a temporary one."""
    if folder and is_main():
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix=f"mis_mlx-{os.getpid()}-") as temporary:
        yield Path(temporary)


def check_same(what: Mapping[str, Any]) -> None:
    """MisError where machines have different values under one name."""
    everyone = all_gather(dict(what))
    for number, theirs in enumerate(everyone):
        for name, value in everyone[0].items():
            if theirs[name] != value:
                why = f"machine {number} has a different {name} from machine 0"
                both = f"{str(theirs[name])[:12]}, not {str(value)[:12]}"
                raise MisError(f"{why} ({both}): give all of them the same")
