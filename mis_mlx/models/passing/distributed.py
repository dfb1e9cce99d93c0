"""Several machines that train one model, started by `mlx.launch`: their gradients become one sum.

Every machine runs the whole command in a folder of its own, with the same flags and files, and
takes its part of each step's windows. A machine that works alone exchanges nothing.
"""

import hashlib
from collections.abc import Mapping
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mis_mlx import cli
from mis_mlx.hardware import sockets
from mis_mlx.models.passing import stream
from mis_mlx.types import MisError


@cache
def machines() -> tuple[int, int]:
    """(which machine this is, from 0; how many there are). They connect at the first call."""
    if cli.rank() is None:
        return 0, 1
    try:
        group = mx.distributed.init(strict=True)
    except (RuntimeError, ValueError) as error:
        raise MisError(
            f"the machines cannot reach each other ({error}): check the hosts and cables"
        ) from None
    sockets.notice_the_dead()
    return group.rank(), group.size()


def shard(items: Any) -> Any:
    """This machine's part of the items of a step: every `size`-th, perhaps none."""
    rank, size = machines()
    return items[rank::size]


def _received(total: mx.array) -> mx.array:
    """A sum over the machines, evaluated. MisError when another machine is gone."""
    try:
        stream.evaluate_now(total)  # MLX is lazy, so a failed exchange shows only now
    except RuntimeError as error:
        if cli.device_trouble(error):  # this machine's own
            raise
        raise MisError(
            f"another machine is gone ({error}): resume on all machines, or on one alone"
        ) from None
    return total


def sum_gradients(named: dict[str, mx.array]) -> None:
    """Arrays become their sums over the machines, in place, with the same bits on each machine.

    Small ones travel together.
    """
    size = machines()[1]
    if size > 1:
        means = nn.average_gradients(list(named.values()))
        for name, mean_of in zip(list(named), means, strict=True):
            named[name] = _received(mean_of * size)


def sums(*values: float) -> list[float]:
    """The sum of each value over the machines, in float64."""
    if machines()[1] == 1:
        return list(values)
    total = mx.distributed.all_sum(mx.array(values, mx.float64), stream=mx.cpu)
    return [float(value) for value in np.array(_received(total))]


def mean(value: float) -> float:
    """The mean of a value over the machines: what they decide by must be alike everywhere."""
    (total,) = sums(value)
    return total / machines()[1]


def check_same(what: Mapping[str, bytes]) -> None:
    """MisError where machines have different values under one name."""
    rank, size = machines()
    for name, value in what.items():
        own = hashlib.sha256(value).digest()[:8]
        if sums(*own) != [size * number for number in own]:
            raise MisError(
                f"machine {rank} of {size} has a {name} that others do not have ({own.hex()}): "
                f"give all machines the same files, flags and --budget"
            )
