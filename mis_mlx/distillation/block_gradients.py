"""Loss and gradients of a student whose blocks are not all in memory, one block at a time.

A step goes forward through all blocks. Only the inputs of the blocks are kept, and on the way back
each block is computed again from its input, for one gradient. So activations and gradients of one
block are held at a time, whatever the model's depth.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mis_mlx.compute import streams
from mis_mlx.compute.slab_losses import Slabs, slab_bytes
from mis_mlx.compute.token_losses import TokenLoss
from mis_mlx.distillation.train_loop import MicroBatch
from mis_mlx.hardware.ledger import Ledger
from mis_mlx.models.architectures import block_inputs, modules
from mis_mlx.models.architectures.block_inputs import BlockInputs, BlockOutputs
from mis_mlx.models.opening import load
from mis_mlx.models.passing import distributed, stream
from mis_mlx.models.passing.pass_cost import (
    SMALL_BYTES,
    forward_flops,
    parallel_windows,
    side_bytes,
)
from mis_mlx.models.passing.residency import activation_bytes, backward_bytes
from mis_mlx.planner.distillation_spec import DistillationSpec


@dataclass(frozen=True)
class _End:
    """What stands behind the last block in a step: norm, head (V, D) and the loss.

    learning: the norm's weights, by name, if they learn. slabs: the head in slabs; `head` is a
    placeholder then. width: D.
    """

    loss: TokenLoss
    norm: nn.Module
    learning: dict[str, mx.array]
    head: mx.array
    batches: Sequence[MicroBatch]
    width: int
    slabs: Slabs | None = None

    def vjp(
        self,
        run: Callable[..., list[mx.array]],
        primals: Sequence[mx.array],
        b: int,
        shared: Sequence[mx.array],
    ) -> tuple[mx.array, list[mx.array]]:
        """(the loss of micro-batch b in nats, its gradients in `primals`), lazy.

        The last primals are the norm's weights, if they learn. run(*primals): the last block's
        output (B, T, D), and what else it gives; shared: the cotangents of that.
        """
        tokens, loss_mask, *targets = self.batches[b]
        norm_at = len(primals) - len(self.learning)

        def forward(*primals: mx.array) -> list[mx.array]:
            _set_weights(self.norm, self.learning, primals[norm_at:])
            out, *further = run(*primals[:norm_at])
            normed = self.loss.map_windows(self.norm, out)  # as the resident model's
            return [normed.reshape(-1, self.width), self.head, *further]

        return self.loss.vjp(
            forward,
            primals,
            loss_mask,
            targets,
            width=self.width,
            windows=len(tokens),
            cotangents=shared,
            slabs=self.slabs,
        )


@dataclass(frozen=True)
class ForwardResult:
    """The forward pass of one step, as far as the backward pass needs it.

    loss: per token, in nats. tokens: how many count, of all machines. hidden: for every micro-batch
    the input (B, T, D) of each block from the shard's first one on; the backward pass shortens this
    list. micro_batches: their number. last_block, norm: gradients of the last block and of the
    final norm, by name; {} where they do not learn.
    """

    loss: float
    tokens: float
    hidden: stream.Hidden
    micro_batches: int
    last_block: dict[str, mx.array]
    norm: dict[str, mx.array]


class BlockGradients:
    """Passes through a model of which some consecutive blocks learn.

    source: streams blocks; it also has embedding and head. norm: the final one. blocks: those that
    get gradients. shard: its `layers` are these blocks, in memory; None: they are streamed, too.
    norm_learns: the final norm gets a gradient. slabs: the head comes in slabs, to losses that
    take it so.
    """

    def __init__(
        self,
        source: stream.Stream,
        norm: nn.Module,
        blocks: range,
        shard: nn.Module | None = None,
        *,
        norm_learns: bool = False,
        slabs: bool = False,
    ):
        self._source = source
        self._norm = norm
        self._blocks = blocks
        self._shard = shard
        self._norm_learns = norm_learns
        self._slabs = slabs

    def forward(self, batches: Sequence[MicroBatch], loss: TokenLoss) -> ForwardResult:
        """The micro-batches of a step through all blocks, and the last block's gradients.

        The loss and the token count are those of all machines.
        """
        n = len(batches)
        top = self._source.layers - 1
        hidden: stream.Hidden = []
        self._source.embed([tokens for tokens, *_ in batches], hidden)
        # Keys and values that later blocks use send cotangents back to the block that made them.
        self._sharers = block_inputs.Cotangents(self._source.sides.owners)
        total = 0.0
        grads = dict[str, mx.array]()
        of_norm = dict[str, mx.array]()
        for i, block in self._in_turn(range(top + 1)):
            if i < top:
                self._forward_block(i, block, hidden, n)
            else:
                # Forward and back in one go, so that it is neither read nor computed twice.
                total, grads, of_norm = self._run_last_block(block, hidden, batches, loss)
        counted = float(sum(loss_mask.sum() for _, loss_mask, *_ in batches))
        total, counted = distributed.sums(total, counted)
        tokens = max(counted, 1.0)  # a step without a token that counts has loss 0
        return ForwardResult(
            loss=total / tokens,
            tokens=tokens,
            hidden=hidden,
            micro_batches=n,
            last_block=grads,
            norm=of_norm,
        )

    def backward_blocks(self, forward: ForwardResult) -> Iterator[tuple[int, dict[str, mx.array]]]:
        """(i, gradients by name) of the shard's blocks, from the last to the first, evaluated.

        Gradients are this machine's *sum* over tokens. Block i may be updated when they are there:
        the blocks below do not need it any more.
        """
        n = forward.micro_batches
        hidden = forward.hidden
        top = self._source.layers - 1
        first = self._blocks.start
        if top in self._blocks:
            yield top, forward.last_block
        for i, block in self._in_turn(range(top - 1, first - 1, -1)):
            # Keep the inputs of this block and the cotangents of its outputs; what is behind goes.
            del hidden[(i + 1 - first) * n + n :]
            _, grads, _ = self._backward_block(i, block, hidden, n)
            if i in self._blocks:
                yield i, grads
        hidden.clear()

    def _in_turn(self, order: Sequence[int]) -> Iterator[tuple[int, nn.Module]]:
        """(i, block i) in `order`: the shard's from memory, the others streamed.

        As with `Stream.blocks`, ask for the next block when everything is evaluated that the last
        one went into.
        """
        shard = self._shard
        if shard is None:
            yield from self._source.blocks(order)
            return
        streamed = self._source.blocks([i for i in order if i not in self._blocks])
        for i in order:
            if i in self._blocks:
                yield i, shard.layers[i - self._blocks.start]
            else:
                yield next(streamed)
        next(streamed, None)  # the stream takes its last block back

    def _run_block(self, block: nn.Module, inputs: BlockInputs) -> BlockOutputs:
        """A micro-batch through a block, its windows side by side; lazy."""
        mask = partial(load.mask, self._source.args, block)
        return block_inputs.by_windows(block, inputs, mask)

    def _forward_block(self, i: int, block: nn.Module, hidden: stream.Hidden, n: int) -> None:
        """The n micro-batches of a step through block i, evaluated one after the other.

        Below the shard the outputs (B, T, D) replace the inputs, which nobody needs again. From
        its first block on they are appended: every block's inputs stay for the backward pass.
        """
        sides = self._source.sides
        below = i < self._blocks.start
        for b in range(n):
            place = b if below else -n  # where the block before left its output
            inputs = sides.inputs(i, b, hidden[place])
            outputs = self._run_block(block, inputs)
            states = sides.keep(i, b, outputs)
            with streams.single_threaded_blas(len(hidden[0])):
                mx.eval(states)
            if below:
                hidden[b] = states
            else:
                hidden.append(states)

    def _run_last_block(
        self,
        block: nn.Module,
        hidden: stream.Hidden,
        batches: Sequence[MicroBatch],
        loss: TokenLoss,
    ) -> tuple[float, dict[str, mx.array], dict[str, mx.array]]:
        """(this machine's loss in nats, the last block's gradients, the norm's).

        `hidden` gets cotangents. The head (V, D) is read here and dies here: it is one of the
        largest arrays of a step.
        """
        learning = {}
        if self._norm_learns:
            learning = dict(tree_flatten(self._norm.trainable_parameters()))
        in_slabs = self._slabs and loss.by_slabs is not None
        head = mx.array(0.0)
        if not in_slabs:
            head = modules.dense_weight(self._source.head())
        end = _End(
            loss=loss,
            norm=self._norm,
            learning=learning,
            head=head,
            batches=batches,
            width=self._source.checkpoint.config["hidden_size"],
            slabs=self._head_slabs if in_slabs else None,
        )
        last = self._source.layers - 1
        return self._backward_block(last, block, hidden, len(batches), end=end)

    def _head_slabs(self, rows: int) -> Iterator[tuple[int, mx.array]]:
        """(first token, weights (rows, D) float32) of the head, a slab at a time."""
        vocab = self._source.checkpoint.config["vocab_size"]
        for start, part in self._source.head_parts(vocab, rows):
            yield start, modules.dense_weight(part)

    def _backward_block(
        self,
        i: int,
        block: nn.Module,
        hidden: stream.Hidden,
        n: int,
        *,
        end: _End | None = None,
    ) -> tuple[float, dict[str, mx.array], dict[str, mx.array]]:
        """n micro-batches back through block i, computed again: (sum of losses, gradients by name).

        The third: the final norm's gradients, if it learns. hidden: inputs (B, T, D) of the block,
        which their cotangents replace; behind them the cotangents of its outputs. end: of the last
        block only.
        """
        start = self._blocks.start
        trained = {}
        if i in self._blocks:
            trained = dict(tree_flatten(block.trainable_parameters()))
        of_norm = end.learning if end else {}
        total = mx.array(0.0)
        grads = [mx.zeros_like(weight) for weight in [*trained.values(), *of_norm.values()]]
        for b in range(n):
            index = (i - start) * n + b
            windows = len(hidden[index])
            above = [] if end else [hidden[index + n]]
            value, new_grads, below = self._vjp(
                block,
                trained,
                hidden[index],
                above,
                i=i,
                b=b,
                end=end,
            )
            total = total + value
            if b:
                new_grads = [old + new for old, new in zip(grads, new_grads, strict=True)]
            grads = new_grads
            # Below the shard nobody asks for a cotangent, so it is not computed there.
            wanted = []
            of_owner = []
            if i > start:
                wanted.append(below.hidden)
                of_owner = self._sharers.add(i, b, below)
            with streams.single_threaded_blas(windows):
                mx.eval(total, grads, wanted, of_owner)
            hidden[index : index + len(wanted)] = wanted
            # Not to be held beside the next micro-batch's.
            del above, value, new_grads, below, wanted, of_owner
        _set_weights(block, trained, trained.values())  # `_vjp` left tracers there
        _set_weights(self._norm, of_norm, of_norm.values())
        named = dict(zip(trained, grads[: len(trained)], strict=True))
        named_norm = dict(zip(of_norm, grads[len(trained) :], strict=True))
        return float(total), named, named_norm

    def _vjp(
        self,
        block: nn.Module,
        trained: dict[str, mx.array],
        hidden: mx.array,
        above: list[mx.array],
        *,
        i: int,
        b: int,
        end: _End | None,
    ) -> tuple[mx.array, list[mx.array], BlockInputs]:
        """(loss, gradients of what learns, cotangents of the inputs) of micro-batch b; lazy.

        What learns: `trained`, then `end`'s norm. above: the cotangent of the output; nothing for
        the last block, behind which `end` stands. The loss of other blocks is 0. Block and norm
        keep MLX's tracers in place of their weights: put these back.
        """
        inputs = self._source.sides.inputs(i, b, hidden)
        # keys and values count where later blocks have sent cotangents of them
        counted = BlockOutputs(hidden, self._sharers.take(i, b))
        _, *of_shared = counted.arrays(counted)
        cotangents = [*above, *of_shared]
        count = len(inputs.arrays)

        def run(*primals: mx.array) -> list[mx.array]:
            _set_weights(block, trained, primals[count:])
            outputs = self._run_block(block, inputs.like(primals[:count]))
            return outputs.arrays(counted)

        primals = [*inputs.arrays, *trained.values()]
        if end:
            primals += end.learning.values()
            value, grads = end.vjp(run, primals, b, cotangents)
        else:
            value = mx.array(0.0)
            _, grads = mx.vjp(run, primals, cotangents)
        below = inputs.like(grads[:count])
        return value, grads[count:], below


def _set_weights(block: nn.Module, names: Iterable[str], weights: Iterable[mx.array]) -> None:
    """Put weights into a block, by their names in it."""
    named = list(zip(names, weights, strict=True))
    block.update(tree_unflatten(named))


def holdings(
    job: DistillationSpec,
    micro: int,
    *,
    gradient: int,
    update: int,
    of_stream: int = 0,
    slabs: bool = False,
    own_head: bool = False,
) -> Ledger:
    """What a step of micro-batches of `micro` windows holds besides what learns.

    gradient: bytes of a block's; windows side by side have one each. update: bytes of a block's.
    of_stream: what more the pass through a block takes in every stream. slabs: the head comes so.
    own_head: it is there between steps, too, and not counted here.
    """
    m = job.student
    s = m.shape
    tokens = micro * job.max_seq_length
    # of earlier micro-batches, to which those of the next are added
    summed = gradient if job.step_tokens > tokens else 0
    activations = activation_bytes(m, micro, job.max_seq_length) // s.layers  # of a block
    side_by_side = min(parallel_windows(m), micro)
    block = {
        "block": backward_bytes(m, micro, job.max_seq_length),
        "gradients": side_by_side * (gradient + of_stream) + summed,
    }
    kept = activations + summed
    ledger = Ledger(gpu=m.gpu)
    ledger.hold("norms and masks", SMALL_BYTES)
    ledger.hold("inputs of every block", 4 * s.layers * job.step_tokens * m.channels)
    ledger.hold("what blocks share", side_bytes(replace(m, item=4), job.step_tokens))
    ledger.hold("in flight", m.in_flight(activations))
    alone = job.targets != "live"  # and the head of a student in blocks is frozen
    logits = job.loss_footprint.logit_bytes(s.vocab, tokens, student_alone=alone)
    if slabs:
        ledger.hold("head in slabs", slab_bytes(tokens, s.hidden, s.vocab))
        ledger.moment("loss", kept=kept)
    elif job.loss_footprint.on_host:
        ledger.moment("loss", logits=logits, kept=kept)
    else:
        ledger.moment("loss", logits=logits, **block)
    if not (slabs or own_head):
        ledger.hold("head", 4 * m.head_params)
    ledger.moment("backward", **block)
    ledger.moment("update", update=update)
    return ledger


def step_flops(job: DistillationSpec) -> float:
    """Operations of a step: forward, forward again and back, and the head."""
    m = job.student
    flops = 4 * forward_flops(m, job.step_tokens, job.max_seq_length, head=False)
    return flops + 4.0 * job.step_tokens * m.head_params
