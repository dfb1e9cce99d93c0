"""A sweep: all windows through the blocks of a model, one block in memory, and someone who looks.

    for turn in source.sweep(hidden):
        ...     # the block, and every window's states before it; the block may be changed here

Then all windows go through the block, and the next one comes. Who wants to see them on their way
says so: `turn.through(look)`. Calibration, GPTQ's sums, repair, likelihoods and plain passes are
such visitors; what goes back from the last block to the first is models/passing/backward_pass.

In which form a device takes windows is known here alone: a GPU several of one shape in one pass, a
CPU one each, side by side in its streams.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableSequence, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from mis_mlx.compute import precision, streams
from mis_mlx.models.architectures import modules
from mis_mlx.models.architectures.experts import Visit
from mis_mlx.models.passing import residency
from mis_mlx.types import Checkpoint

# hidden states (B, T, D) of every window; a list, or a storage.hidden_spool.Spool
Hidden = MutableSequence[mx.array]
Places = Mapping[Any, tuple[str, ...]]  # modules of a block, by a name: ("mlp", "down_proj")
NOWHERE: Places = {}


class Source(Protocol):
    """A model whose blocks come one after the other: models/passing/stream."""

    checkpoint: Checkpoint
    layers: int

    @property
    def mixture(self) -> bool:
        """Whether blocks have experts, each of which is read when it is needed."""

    def blocks(self, order: Sequence[int] | None = None) -> Iterator[tuple[int, nn.Module]]:
        """(i, block i), the next one read meanwhile."""

    def run(self, i: int, block: nn.Module, b: int, hidden: mx.array) -> mx.array:
        """Windows from number b on, (n B, T, D), through block i; lazy."""

    def run_experts(
        self, block: nn.Module, hidden: Hidden, visit: Visit | None = None
    ) -> Iterator[mx.array]:
        """Every window through a block that has experts, evaluated."""

    def finite(self, out: mx.array) -> mx.array:
        """`out`, or NotNumbers."""


@dataclass(frozen=True)
class Window:
    """A window's states (B, T, D) before and behind a block, lazy.

    taken: inputs (B, T, n) of the modules that are looked at, by name.
    """

    into: mx.array
    out: mx.array
    taken: Mapping[Any, mx.array]


@dataclass(frozen=True)
class Stack:
    """Windows that go through a block in one pass: their numbers, and the same of all of them.

    into, out, taken: as of a `Window`, the windows one after the other.
    """

    numbers: range
    windows: Sequence[mx.array]  # into, apart
    into: mx.array
    out: mx.array
    taken: Mapping[Any, mx.array]

    def apart(self) -> Iterator[Window]:
        """The windows one by one."""
        count = len(self.windows)
        outs = split(self.out, count)
        parts = {name: split(array, count) for name, array in self.taken.items()}
        for k, into in enumerate(self.windows):
            yield Window(into, outs[k], {name: arrays[k] for name, arrays in parts.items()})


Look = Callable[[Stack], Any]  # what is to be kept of a stack: arrays, lazy, and what else it likes


class BlockTurn:
    """A block of a sweep, and the windows before it; behind it once they went through.

    hidden: their states, which change in place. number: of the block. first: where the states of
    the windows begin in `hidden`; where it is not None, their outputs are added to the end.
    """

    def __init__(
        self,
        source: Source,
        number: int,
        block: nn.Module,
        hidden: Hidden,
        first: int | None = None,
    ):
        self.source = source
        self.number = number
        self.block = block
        self.hidden = hidden
        self.done = False
        self._first = first
        self._count = len(hidden) - (first or 0)

    def look(self, look: Look, places: Places = NOWHERE) -> Iterator[Any]:
        """What `look` makes of every stack, evaluated. The windows stay before the block.

        Nothing of the block is computed that `look` does not ask for.
        """

        def work(stack: tuple[int, list[mx.array]]) -> Any:
            return look(self._stack(*stack, recorders))

        with recorded(self.block, places) as recorders:
            yield from streams.parallel_map(work, stacks(self.source, self._windows()))

    def through(
        self,
        look: Look | None = None,
        places: Places = NOWHERE,
        *,
        visit: Visit | None = None,
    ) -> Iterator[tuple[range, Any]]:
        """(numbers of windows, what `look` makes of them), evaluated; they are behind the block.

        visit: sees what every expert of a mixture does (`Stream.run_experts`).
        """
        self.done = True
        with recorded(self.block, places) as recorders:
            passed = self._experts if self.source.mixture else self._stacks
            for numbers, outs, found in passed(look, recorders, visit):
                self._put(numbers, outs)
                del outs  # the caller alone holds what it is given
                yield numbers, found

    def go(self) -> Hidden:
        """All windows through the block, with nobody looking; their states behind it."""
        for _ in self.through():
            pass
        return self.hidden

    def _windows(self) -> Iterable[mx.array]:
        """The states of every window before the block."""
        first = self._first or 0
        return (self.hidden[first + b] for b in range(self._count))

    def _stack(
        self,
        first: int,
        windows: list[mx.array],
        recorders: Mapping[Any, modules.InputRecorder],
    ) -> Stack:
        """Windows from number `first` on, in one pass."""
        into = joined(windows)
        out = self.source.run(self.number, self.block, first, into)
        numbers = range(first, first + len(windows))
        return Stack(numbers, windows, into, out, _taken(recorders))

    def _stacks(
        self, look: Look | None, recorders: Mapping[Any, modules.InputRecorder], visit: object
    ) -> Iterator[tuple[range, list[mx.array], Any]]:
        """(numbers, states behind the block, what `look` makes of them) of every stack."""

        def work(item: tuple[int, list[mx.array]]) -> tuple[list[mx.array], Any]:
            stack = self._stack(*item, recorders)
            found = look(stack) if look else None
            return split(stack.out, len(stack.windows)), found

        end = 0
        for outs, found in streams.parallel_map(work, stacks(self.source, self._windows())):
            first = end
            end += len(outs)
            yield range(first, end), outs, found
            del outs, found

    def _experts(
        self,
        look: Look | None,
        recorders: Mapping[Any, modules.InputRecorder],
        visit: Visit | None,
    ) -> Iterator[tuple[range, list[mx.array], Any]]:
        """The same of a mixture, whose windows go through its experts together."""
        hidden = self.hidden
        if self._first is not None:
            hidden = hidden[self._first :]
        for b, out in enumerate(self.source.run_experts(self.block, hidden, visit)):
            numbers = range(b, b + 1)
            found = None
            if look:
                into = hidden[b]
                found = look(Stack(numbers, [into], into, out, _taken(recorders)))
                mx.eval(found)
            yield numbers, [out], found

    def _put(self, numbers: Iterable[int], outs: Sequence[mx.array]) -> None:
        """The states of some windows behind the block."""
        for b, out in zip(numbers, outs, strict=True):
            if b == 0:  # one window tells whether the block's values are numbers
                self.source.finite(out)
            if self._first is None:
                self.hidden[b] = out
            else:
                self.hidden.append(out)


def sweep(
    source: Source,
    hidden: Hidden,
    order: Sequence[int] | None = None,
    *,
    keep: bool = False,
    last: bool = True,
) -> Iterator[BlockTurn]:
    """Every block, with the windows before it; they go through it before the next one comes.

    hidden: their states (B, T, D) before the first block. order: of the blocks; default: all. keep:
    the states before every block stay in `hidden`, those behind a block come after them. last: the
    windows go through the last block, too; else nobody wants what it gives.
    """
    count = len(hidden)
    for i, block in source.blocks(order):
        turn = BlockTurn(source, i, block, hidden, len(hidden) - count if keep else None)
        yield turn
        if not turn.done and (last or i + 1 < source.layers):
            turn.go()


def stacks(source: Source, windows: Iterable[mx.array]) -> Iterator[tuple[int, list[mx.array]]]:
    """(number of the first, windows of one shape), as many windows as one pass takes."""
    first = 0
    stack = list[mx.array]()
    for window in windows:
        if stack:
            full = len(stack) == _at_once(source, stack[0])
            if full or window.shape != stack[0].shape:
                yield first, stack
                first += len(stack)
                stack = []
        stack.append(window)
    if stack:
        yield first, stack


def _at_once(source: Source, window: mx.array) -> int:
    """The number of windows like this one that go forward together."""
    if not precision.stacks():
        return 1
    texts, length, _ = window.shape
    return residency.batches_per_pass(source.checkpoint.config, texts * length, length)


def back_at_once(source: Source, window: mx.array) -> int:
    """The number of windows like this one that go back through a block together.

    They are as many as streams on a CPU, half a stack on a GPU.
    """
    if not precision.stacks():
        return streams.count()
    return max(1, _at_once(source, window) // 2)


@contextmanager
def recorded(block: nn.Module, places: Places) -> Iterator[Mapping[Any, modules.InputRecorder]]:
    """Within, the modules at these places remember their inputs."""
    recorders = {}
    for name, (*path, attribute) in places.items():
        owner = _within(block, path)
        recorders[name] = modules.InputRecorder(owner[attribute])
        owner[attribute] = recorders[name]
    try:
        yield recorders
    finally:
        for name, (*path, attribute) in places.items():
            _within(block, path)[attribute] = recorders[name].inner


def _within(block: nn.Module, path: Sequence[str]) -> Any:
    """The module that these names lead to."""
    for name in path:
        block = block[int(name) if name.isdigit() else name]
    return block


def _taken(recorders: Mapping[Any, modules.InputRecorder]) -> dict[Any, mx.array]:
    """What the recorders saw of the stack that comes next."""
    return {name: recorder.take() for name, recorder in recorders.items()}


def joined(some: Sequence[mx.array]) -> mx.array:
    """Windows (B, T, D) one after the other: (n B, T, D)."""
    return mx.concatenate(list(some)) if len(some) > 1 else some[0]


def split(array: mx.array, parts: int) -> list[mx.array]:
    """The windows that `joined` has put together, which are as many as `parts`."""
    return list(mx.split(array, parts)) if parts > 1 else [array]
