"""Several machines on one job, started by `mlx.launch`: which one this is, and what all of them do
together.

The transport is `mx.distributed`. Every machine runs the same program; the first one writes the
run, the others work in a folder that goes with them. Alone, all of this gives back what it was
given.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, MutableSequence, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mis_mlx import cli
from mis_mlx.hardware import sockets
from mis_mlx.models import stream
from mis_mlx.storage.checkpoint import Arrays
from mis_mlx.storage.files import Files, reported
from mis_mlx.types import MisError, grouped

CHUNK_BYTES = 1 << 26  # of a file, sent in one go
GROUP_BYTES = 1 << 25  # of gradients, added up in one go
T = TypeVar("T")


class Lost(MisError):
    """A machine beside this one is gone. From here on this one counts as alone."""


@cache
def _world() -> list[int]:
    """[which of the machines this is, from 0; how many there are, 1 once another one is lost]."""
    if cli.rank() is None:
        return [0, 1]
    try:
        group = mx.distributed.init(strict=True)
    except (RuntimeError, ValueError) as error:
        raise MisError(
            f"the machines do not reach each other ({error}): look at the hosts and cables"
        ) from None
    sockets.notice_the_dead()
    return [group.rank(), group.size()]


def size() -> int:
    """How many machines work together."""
    return _world()[1]


def rank() -> int:
    """Which of them this is, from 0."""
    return _world()[0]


def is_main() -> bool:
    """Whether this is the machine that writes checkpoints, metrics and models, and speaks."""
    return rank() == 0


def shard(items: Any) -> Any:
    """This machine's part of a sequence, what a step or a pass is made of: every `size`-th item;
    perhaps none.
    """
    return items[rank() :: size()]


def _settled(arrays: Any) -> Any:
    """`arrays`, which others have a part in, evaluated. Lost when one of them is gone."""
    try:
        stream.evaluate_now(arrays)
    except RuntimeError as error:
        if size() == 1 or cli.device_trouble(error):  # this machine's own
            raise
        _world()[1] = 1
        raise Lost(
            f"a machine beside this one is gone ({error}): resume on as many as there are"
        ) from None
    return arrays


def all_reduce_gradients(named: dict[str, mx.array]) -> None:
    """Arrays become their sums over the machines, in place, the same bits on each: a few at a time,
    not all twice.
    """
    n = size()
    for names in (
        grouped(list(named), lambda name: named[name].nbytes, GROUP_BYTES) if n > 1 else ()
    ):
        means = nn.average_gradients([named[name] for name in names])
        named.update(_settled({name: mean * n for name, mean in zip(names, means, strict=True)}))


def all_reduce_sums(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Float64 arrays, of the same shapes everywhere, summed over the machines."""
    if size() == 1 or not arrays:
        return list(arrays)
    flat = mx.array(
        np.concatenate([np.asarray(a, np.float64).reshape(-1) for a in arrays]), mx.float64
    )
    whole = np.array(_settled(mx.distributed.all_sum(flat, stream=mx.cpu)))
    ends = np.cumsum([np.size(a) for a in arrays])[:-1]
    return [
        part.reshape(np.shape(a)) for part, a in zip(np.split(whole, ends), arrays, strict=True)
    ]


def all_gather(value: Any) -> list[Any]:
    """A value that JSON holds, of every machine, in their order."""
    if (n := size()) == 1:
        return [value]
    mine = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = _settled(mx.distributed.all_gather(mx.array([len(mine)]))).tolist()
    padded = np.zeros(max(lengths), np.uint8)
    padded[: len(mine)] = mine
    everyone = np.array(_settled(mx.distributed.all_gather(mx.array(padded)))).reshape(n, -1)
    return [
        json.loads(row[:length].tobytes()) for row, length in zip(everyone, lengths, strict=True)
    ]


def any_rank(flag: object) -> bool:
    """Whether `flag` is true on any machine."""
    return any(all_gather(bool(flag)))


def broadcast_json(make: Callable[[], T]) -> T:
    """What `make()` gives on the first machine, to all; nobody else calls it. JSON holds it."""
    return make() if size() == 1 else all_gather(make() if is_main() else None)[0]


def broadcast_array(array: mx.array, root: int = 0) -> mx.array:
    """The array that `root` has, bit for bit; shape and dtype are the same everywhere, what others
    have is not.
    """
    if size() == 1:
        return array
    raw = array.reshape(-1).view(mx.uint8)
    whole = _settled(mx.distributed.all_sum(raw if rank() == root else mx.zeros_like(raw)))
    return whole.view(array.dtype).reshape(array.shape)


def pass_on(arrays: Sequence[mx.array], i: int) -> None:
    """arrays[i] to the next machine, if any, which says `receive` now or later; waits until most of
    it has left.
    """
    if rank() + 1 < size():
        _settled(mx.distributed.send(arrays[i], rank() + 1, stream=mx.cpu))


def receive(arrays: MutableSequence[mx.array], i: int) -> None:
    """What the machine before this one, if there is one, passes on becomes arrays[i], of the same
    shape and dtype.
    """
    if not is_main():
        like = arrays[i]
        arrays[i] = _settled(mx.distributed.recv(like.shape, like.dtype, rank() - 1, stream=mx.cpu))


def broadcast_arrays(arrays: Callable[[], Arrays]) -> dict[str, dict[str, mx.array]]:
    """The arrays of the first machine, bit for bit; where there are several."""
    mine = arrays() if is_main() else {}
    listed = [
        (key, name, a.shape, str(a.dtype))
        for key, named in mine.items()
        for name, a in named.items()
    ]
    everyones: dict[str, dict[str, mx.array]] = {}
    for key, name, shape, kind in broadcast_json(lambda: listed):
        array = (
            mine[key][name]
            if is_main()
            else mx.zeros(shape, getattr(mx, kind.removeprefix("mlx.core.")))
        )
        everyones.setdefault(key, {})[name] = broadcast_array(array)
    return everyones


def broadcast_file(path: Path, files: Files, root: int = 0) -> None:
    """A file that `root` has, and others lack, to all."""
    nbytes = all_gather(path.stat().st_size if path.exists() else 0)[root]
    starts = range(0, nbytes, CHUNK_BYTES)
    if rank() == root:
        for at in starts:
            broadcast_array(mx.array(np.fromfile(path, np.uint8, CHUNK_BYTES, offset=at)), root)
        return
    with reported(path.parent, path.name, nbytes), files.replacing(path) as temp:
        files.write(temp, b"")
        for at in starts:
            piece = broadcast_array(mx.zeros((min(CHUNK_BYTES, nbytes - at),), mx.uint8), root)
            files.extend(temp, np.array(piece).tobytes())
        files.fsync(temp)


def broadcast_folder(folder: Path, files: Files) -> None:
    """A folder of the first machine, where there are several, made on all others."""
    if size() == 1:
        return
    for name in broadcast_json(
        lambda: sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    ):
        files.make_folder((folder / name).parent)
        broadcast_file(folder / name, files)


@contextmanager
def workplace(folder: Path | None) -> Iterator[Path]:
    """The run's folder, on the first machine; on others one of their own that goes when they are
    done.
    """
    if folder and is_main():
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix=f"mis_mlx-{os.getpid()}-") as place:
        yield Path(place)


def check_same(what: Mapping[str, Any]) -> None:
    """MisError where machines have different things under one name."""
    everyone = all_gather(dict(what))
    for number, other in enumerate(everyone):
        for name, value in everyone[0].items():
            if other[name] != value:
                why = f"machine {number} has another {name} than machine 0"
                both = f"{str(other[name])[:12]}, not {str(value)[:12]}"
                raise MisError(f"{why} ({both}): give all of them the same")
