"""A model whose blocks several machines share: hidden states go from one machine to the next,
weights stay.

Every machine has the files and reads its own blocks. All make the same passes together, with own
batches or none.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mis_mlx.models import block_inputs, config, distributed, families, load, stream
from mis_mlx.types import Checkpoint, MisError


def shared(layers: int, keeps: Sequence[int], reading: float) -> list[int]:
    """How many blocks each machine gets, in their order, so that a pass is as short as can be.

    keeps: how many each has room for. Where that is enough, all work at the same time, and none
    gets more than it must. Otherwise they work one after the other, each as long as it computes or
    reads. reading: what a block costs that is read anew, where computing costs 1.
    """
    counts = [0] * len(keeps)

    def more(machine: int) -> tuple[float, int]:
        n = counts[machine]
        kept = keeps[machine]
        if sum(keeps) >= layers:
            return float(n >= kept), n
        after, before = (max(float(i), reading * max(0, i - kept)) for i in (n + 1, n))
        return after - before, n

    for _ in range(layers):
        counts[min(range(len(keeps)), key=more)] += 1
    return counts


def passing(source: stream.Stream, items: Sequence[Any]) -> list[Any]:
    """Of items that machines `distributed.shard`, one a batch: those whose hidden states `source`
    has, in order.
    """
    n = distributed.size() if isinstance(source, Relay) else 1
    return (
        [item for rank in range(n) for item in items[rank::n]]
        if n > 1
        else list(distributed.shard(items))
    )


class Relay(stream.Stream):
    """This machine's blocks of a model, used as a `Stream` is; `embed` takes the others' batches
    in, `norm` gives each its own back. shares: how many blocks each machine has. room_bytes: for
    the head, then this machine's own blocks.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: mx.Dtype,
        room_bytes: int | None,
        direct: bool,
        shares: Sequence[int],
    ):
        if not block_inputs.plain(checkpoint.config):
            why = (
                f"blocks of a {families.family(checkpoint.config).name} need more of each other "
                f"than hidden states"
            )
            raise MisError(
                f"{why}, which machines that share blocks do not send: use --spread whole"
            )
        end = list(accumulate(shares))[distributed.rank()]
        self.mine = range(end - shares[distributed.rank()], end)
        self._counts: list[int] = []  # batches of each machine, in the pass that is under way
        self._hidden: stream.Hidden = []
        super().__init__(checkpoint, dtype, room_bytes, direct)
        self.first = self.mine.start

    def embed(self, batches: stream.Batches, hidden: stream.Hidden | None = None) -> stream.Hidden:
        """Hidden states of all machines' batches, those of one machine after those of another.

        They are real where the first block is; elsewhere they have the right shape, until they
        come.
        """
        everyone = distributed.all_gather([np.array(b).tolist() for b in batches])
        self._counts = [len(each) for each in everyone]
        whole = [np.array(b, np.int32) for each in everyone for b in each]
        hidden = [] if hidden is None else hidden
        if distributed.is_main():
            hidden = super().embed([mx.array(b) for b in whole], hidden)
        name = distributed.broadcast_json(
            lambda: str((hidden[0] if whole else self).dtype).removeprefix("mlx.core.")
        )
        if not distributed.is_main():
            for b in whole:
                hidden.append(
                    mx.zeros(
                        (*b.shape, config.shape_of(self.checkpoint.config).hidden),
                        getattr(mx, name),
                    )
                )
        self._hidden = hidden
        return hidden

    def blocks(self, order: Sequence[int] | None = None) -> Iterator[tuple[int, nn.Module]]:
        """(i, block i) of this machine's own, once their input has come; what they leave goes to
        the next machine.
        """
        if order is not None:
            raise ValueError("a relay has one order")
        for b in range(len(self._hidden)):
            distributed.receive(self._hidden, b)
        yield from super().blocks(self.mine)
        for b in range(len(self._hidden)):
            distributed.pass_on(self._hidden, b)

    def forward(
        self, batches: stream.Batches, hidden: stream.Hidden | None = None
    ) -> stream.Hidden:
        """One pass, as of a `Stream`. Where all of a machine's blocks are in memory it passes every
        batch on at once, and the next machine works on it meanwhile.
        """
        if self.keeps < len(self.mine):
            return super().forward(batches, hidden)
        kept = [block for _, block in super().blocks(self.mine)]
        hidden = self.embed(batches, hidden)
        for b in range(len(hidden)):
            distributed.receive(self._hidden, b)
            for i, block in zip(self.mine, kept, strict=True):
                self.at = i
                out = block(hidden[b], load.mask(self.args, block, hidden[b]))
                stream.evaluate_now(out)
                hidden[b] = self.finite(out) if b == 0 else out
            distributed.pass_on(self._hidden, b)
        return self.norm(hidden)

    def norm(self, hidden: stream.Hidden) -> stream.Hidden:
        """This machine's own batches after the last RMSNorm."""
        if distributed.rank() == distributed.size() - 1:
            super().norm(hidden)
        begin = sum(self._counts[: distributed.rank()])
        own = list[mx.array]()
        for b in range(len(hidden)):
            whole = distributed.broadcast_array(hidden[b], distributed.size() - 1)
            if begin <= b < begin + self._counts[distributed.rank()]:
                own.append(whole)
        self._hidden = []
        return own
