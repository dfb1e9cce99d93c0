"""A model whose blocks several machines share: hidden states travel, weights stay.

Every machine has the files and reads its own blocks. All make the same passes together, with
batches of their own or none.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mis_mlx.models.architectures import side_inputs, sizes
from mis_mlx.models.opening import load
from mis_mlx.models.passing import distributed, stream
from mis_mlx.types import Checkpoint, MisError


def share_blocks(layers: int, keeps: Sequence[int], reading: float) -> list[int]:
    """How many blocks each machine gets, in the machines' order, for the shortest pass.

    keeps: how many blocks each machine has room for. If there is room for all, the machines work at
    the same time, and none gets more than it must. Otherwise they work one after the other, each as
    long as it computes or reads. reading: the cost of a block that is read anew, in units of
    computing one.
    """
    counts = [0] * len(keeps)
    all_fit = sum(keeps) >= layers

    def cost(machine: int, count: int) -> float:
        reread = max(0, count - keeps[machine])
        return max(float(count), reading * reread)

    def cost_of_one_more(machine: int) -> tuple[float, int]:
        count = counts[machine]
        if all_fit:
            return float(count >= keeps[machine]), count
        return cost(machine, count + 1) - cost(machine, count), count

    for _ in range(layers):
        cheapest = min(range(len(keeps)), key=cost_of_one_more)
        counts[cheapest] += 1
    return counts


def passing(source: stream.Stream, items: Sequence[Any]) -> list[Any]:
    """The items whose hidden states `source` has, in order.

    items: one a batch, which machines divide by `distributed.shard`. A `Relay` has every machine's
    batches, those of one machine after those of another.
    """
    machines = distributed.size() if isinstance(source, Relay) else 1
    if machines == 1:
        return list(distributed.shard(items))
    passed: list[Any] = []
    for rank in range(machines):
        passed += items[rank::machines]
    return passed


class Relay(stream.Stream):
    """This machine's blocks of a model, used as a `Stream` is.

    `embed` takes in the other machines' batches, and `norm` gives each machine its own back.
    shares: how many blocks each machine has. headroom_bytes: for the head, then this machine's
    blocks.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: mx.Dtype,
        headroom_bytes: int | None,
        direct: bool,
        shares: Sequence[int],
    ):
        if not side_inputs.plain(checkpoint.config):
            why = f"blocks of a {checkpoint.config['model_type']} exchange more than hidden states"
            raise MisError(
                f"{why}, and machines that share blocks send nothing else: use --spread whole"
            )
        end = list(accumulate(shares))[distributed.rank()]
        self.mine = range(end - shares[distributed.rank()], end)
        self._counts: list[int] = []  # batches of each machine, in the current pass
        self._hidden: stream.Hidden = []
        super().__init__(checkpoint, dtype, headroom_bytes, direct)
        self.first = self.mine.start

    def embed(self, batches: stream.Batches, hidden: stream.Hidden | None = None) -> stream.Hidden:
        """Hidden states (B, T, D) of all machines' batches, machine by machine.

        The machine with the first block computes them. On the others they are zeros of the right
        shape, until `blocks` or `forward` receives them.
        """
        # Token ids (B, T) are small, so every machine gets all of them: each then knows the number
        # and the shapes of the hidden states that it will receive.
        gathered = distributed.all_gather([np.array(batch).tolist() for batch in batches])
        self._counts = []
        all_batches = []
        for from_machine in gathered:
            self._counts.append(len(from_machine))
            all_batches += [np.array(batch, np.int32) for batch in from_machine]
        hidden = [] if hidden is None else hidden
        if distributed.is_main():
            hidden = super().embed([mx.array(batch) for batch in all_batches], hidden)
        # A receiver must know the dtype beforehand. Only the first machine has seen it.
        name = distributed.broadcast_json(
            lambda: str((hidden[0] if all_batches else self).dtype).removeprefix("mlx.core.")
        )
        if not distributed.is_main():
            channels = sizes.shape_of(self.checkpoint.config).hidden
            dtype = getattr(mx, name)
            for batch in all_batches:
                hidden.append(mx.zeros((*batch.shape, channels), dtype))
        self._hidden = hidden
        return hidden

    def blocks(self, order: Sequence[int] | None = None) -> Iterator[tuple[int, nn.Module]]:
        """(i, block i) of this machine, between receiving hidden states and passing them on.

        The caller changes the hidden states of `embed` in place, so what this sends at the end is
        what the caller's last block made of them.
        """
        if order is not None:
            raise ValueError("a relay has one order")
        for b in range(len(self._hidden)):
            distributed.receive_from_previous(self._hidden, b)
        yield from super().blocks(self.mine)
        for b in range(len(self._hidden)):
            distributed.send_to_next(self._hidden, b)

    def forward(
        self, batches: stream.Batches, hidden: stream.Hidden | None = None
    ) -> stream.Hidden:
        """One pass, as of a `Stream`.

        If all blocks of this machine are in memory, it passes every batch on as soon as it is done,
        and the next machine works on it meanwhile.
        """
        if self.resident_blocks < len(self.mine):
            # Blocks are read from disk: all batches go through one before the next is read, so that
            # each is read once a pass.
            return super().forward(batches, hidden)
        resident = [block for _, block in super().blocks(self.mine)]
        hidden = self.embed(batches, hidden)
        for b in range(len(hidden)):
            distributed.receive_from_previous(self._hidden, b)
            for i, block in zip(self.mine, resident, strict=True):
                self.block_index = i  # for the message of `finite`
                out = block(hidden[b], load.mask(self.args, block, hidden[b]))
                stream.evaluate_now(out)
                hidden[b] = self.finite(out) if b == 0 else out
            distributed.send_to_next(self._hidden, b)
        return self.norm(hidden)

    def norm(self, hidden: stream.Hidden) -> stream.Hidden:
        """This machine's own batches after the last RMSNorm."""
        rank = distributed.rank()
        last_rank = distributed.size() - 1
        if rank == last_rank:
            super().norm(hidden)
        # Every machine takes part in every broadcast, and keeps only its own batches: one that left
        # a broadcast out would leave the others waiting.
        begin = sum(self._counts[:rank])
        own_batches = range(begin, begin + self._counts[rank])
        own = []
        for b in range(len(hidden)):
            final = distributed.broadcast_array(hidden[b], last_rank)
            if b in own_batches:
                own.append(final)
        self._hidden = []
        return own
