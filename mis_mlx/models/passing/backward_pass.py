"""One streamed forward pass and one backward pass, one block in memory at a time.

The gradient is that of the log-probability of next tokens that the model itself draws. The data's
own tokens would make this the empirical Fisher of arXiv 2204.09656.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mis_mlx.compute import quick_exp, slab_draws, slab_losses
from mis_mlx.hardware import memory
from mis_mlx.hardware.memory import headroom_bytes
from mis_mlx.hardware.stage_cost import WINDOWS, StageCost
from mis_mlx.maths.losses import Logits, chunk_rows, softcap_gradient
from mis_mlx.models.architectures import block_inputs, modules
from mis_mlx.models.architectures.block_inputs import BlockInputs, BlockOutputs
from mis_mlx.models.architectures.families import family, shape_of
from mis_mlx.models.opening import load
from mis_mlx.models.opening.model_size import ModelSize
from mis_mlx.models.passing import stream, sweep
from mis_mlx.models.passing.pass_cost import (
    forward_flops,
    parallel_windows,
    streamed_pass,
    workspace_bytes,
)
from mis_mlx.models.passing.residency import backward_bytes, batches_per_pass
from mis_mlx.types import Checkpoint

# For as many batches as there are streams, or as a GPU takes back in one pass: the block's inputs
# and the cotangents of its outputs -> the cotangents of its inputs.
BlockBackward = Callable[[Sequence[BlockInputs], Sequence[BlockOutputs]], Sequence[BlockInputs]]
BlockVisitor = Callable[[int, nn.Module], BlockBackward]
AtHead = Callable[[mx.array, mx.array, mx.array | None, int], None]
AtChannels = Callable[[int, int, mx.array], None]

# Bytes of a head in float32 that is there at once; of a larger one, such as Gemma's with its
# 262 thousand tokens, one slab is. It draws other tokens, so the size of the head decides, and
# never a budget.
HEAD_AT_ONCE = 2**28
LOGIT_ARRAYS = 6  # float32 (n, V) that drawing and the gradient take at a time


def input_gradients(
    checkpoint: Checkpoint,
    batches: stream.Batches,
    visit: BlockVisitor,
    seed: int = 0,
    *,
    kept: stream.Hidden | None = None,
    at_head: AtHead = lambda x, above, slopes, first: None,
    at_channels: AtChannels = lambda i, b, below: None,
) -> list[mx.array]:
    """d log p / d x (B, T, D) of every batch, x the scaled embedding: forward, then back.

    p is the probability of tokens drawn from the model, one for each position.

    batches: token ids [(B, T)]. visit(i, block): gives the function that takes batches back through
    block i, from the block's inputs and d log p / d outputs to d log p / d inputs. kept: a place
    other than memory for L * len(batches) hidden states (B, T, D). at_head: sees the head's inputs
    (n, D), the likelihood gradients of some tokens' logits, as large as their probabilities or
    those of all other tokens (n, v), d logits / d what the head gives (n, v), and the first of
    these tokens; slopes are None where no softcap is between the two. at_channels: sees d log p / d
    per-layer inputs (B, T, P) of block i and batch b, where the family has them.
    """
    # Forward. `kept` holds the inputs of every block: those of block i and batch b at i n + b. The
    # last block is left out here: it runs first in the backward pass.
    if kept is None:
        kept = []
    source = stream.Stream(checkpoint)
    n = len(batches)
    source.embed(batches, kept)
    for turn in source.sweep(kept, range(source.layers - 1), keep=True):
        turn.go()

    # Backward, from the last block to the first. `grads` holds d log p / d outputs of block i.
    grads: list[mx.array] = []
    shared = block_inputs.Cotangents(source.sides.owners)
    from_last = range(source.layers - 1, -1, -1)
    for i, block in source.blocks(from_last):
        if not grads:
            grads = _grads_at_head(source, block, kept[-n:], seed=seed, at_head=at_head)
        through = visit(i, block)
        width = sweep.back_at_once(source, grads[0])
        for first in range(0, n, width):
            stop = min(first + width, n)
            numbers = range(first, stop)
            inputs = []
            above = []
            for b in numbers:
                inputs.append(source.sides.inputs(i, b, kept[i * n + b]))
                above.append(BlockOutputs(grads[b], shared.take(i, b)))
            # not named: the gradients of keys and channels go as soon as they are used
            for b, below in zip(numbers, through(inputs, above), strict=True):
                # The sums must not remain lazy: they would hold the graph of this block, whose
                # weights are gone when the next one comes.
                stream.evaluate_now(shared.add(i, b, below))
                if below.per_layer is not None:
                    at_channels(i, b, below.per_layer)
                grads[b] = below.hidden
    for at_block in grads:
        stream.evaluate_now(at_block)
    return grads


def head_in_slabs(config: Mapping[str, Any]) -> bool:
    """Whether a model of this config.json has a head that is never there at once."""
    shape = shape_of(config)
    return 4 * shape.vocab * shape.hidden > HEAD_AT_ONCE


def _grads_at_head(
    source: stream.Stream,
    last_block: nn.Module,
    hidden: stream.Hidden,
    *,
    seed: int,
    at_head: AtHead,
) -> list[mx.array]:
    """d log p / d the last block's outputs [(B, T, D)]; hidden: its inputs [(B, T, D)].

    Every batch draws with a key of its own, so the draws do not depend on the number of streams.
    """
    outputs = source.run_block(last_block, hidden)
    norm = load.final_norm(source.checkpoint, source.dtype)
    memory.give_back()  # what blocks used: the head may be the largest thing of all
    if head_in_slabs(source.checkpoint.config):
        return _drawn_in_slabs(source, norm, outputs, seed=seed, at_head=at_head)
    head = source.head()
    grads = []
    for b, output in enumerate(outputs):
        key = mx.random.key(seed * len(outputs) + b)
        grads.append(_drawn(source, norm, head, hidden=output, key=key, at_head=at_head))
    return grads


def _drawn_in_slabs(
    source: stream.Stream,
    norm: nn.Module,
    hidden: Sequence[mx.array],
    *,
    seed: int,
    at_head: AtHead,
) -> list[mx.array]:
    """d log p(drawn tokens) / d hidden [(B, T, D)]: `_drawn` of all batches, the head in slabs.

    The head is gone through four times: two draw, two make the gradient.
    """
    config = source.checkpoint.config
    vocab = shape_of(config).vocab
    flat = [states.reshape(-1, states.shape[-1]) for states in hidden]
    normed = [norm(states).astype(mx.float32) for states in flat]
    stream.evaluate_now(normed)
    starts = np.cumsum([0, *(len(states) for states in normed)])

    def logits() -> Iterator[tuple[int, Logits]]:
        for start, part in source.head_parts(vocab, slab_draws.slab_rows(*normed[0].shape)):
            yield start, partial(load.wide_logits, part)

    def weights(rows: int) -> Iterator[tuple[int, mx.array]]:
        for start, part in source.head_parts(vocab, rows):
            yield start, modules.dense_weight(part)

    targets = slab_draws.sample(normed, logits, count=1, seed=seed, first=starts[:-1].tolist())
    drawn = np.concatenate([ids for _, ids, _ in targets])
    together = mx.concatenate(normed)
    normed.clear()
    # The KL to the drawn token alone is its -log p.
    _, pull = slab_losses.sparse_kl_gradients(
        together,
        weights,
        mx.ones((len(together),)),
        mx.array(drawn[:, None]),
        mx.ones((len(together), 1)),
        softcap=family(config).softcap or 0.0,
        seen=lambda start, p, slopes: at_head(together, p, slopes, start),
    )
    grads = []
    for b, states in enumerate(flat):
        above = -pull[starts[b] : starts[b + 1]].astype(states.dtype)
        grads.append(mx.vjp(norm, [states], [above])[1][0].reshape(hidden[b].shape))
        stream.evaluate_now(grads[-1])
    return grads


def _drawn(
    source: stream.Stream,
    norm: nn.Module,
    head: nn.Module,
    *,
    hidden: mx.array,
    key: mx.array,
    at_head: AtHead,
) -> mx.array:
    """d log p(drawn token) / d hidden (B, T, D), the last block's output.

    One token is drawn for each position.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    # Half a chunk: as many logits again are noise to draw with.
    rows = chunk_rows(2 * shape_of(source.checkpoint.config).vocab)

    cap = family(source.checkpoint.config).softcap

    def logits(x: mx.array) -> mx.array:
        return load.wide_logits(head, norm(x))

    parts = []
    for start in range(0, len(flat), rows):
        some = flat[start : start + rows]
        z = logits(some)
        key, subkey = mx.random.split(key)
        drawn = mx.random.categorical(z, key=subkey)
        slopes = None
        if cap:
            slopes = softcap_gradient(z, cap)
            stream.evaluate_now(slopes)  # before the logits are used up
        # d log softmax(z)[drawn] / d z: 1 at the drawn token minus softmax(z)
        above = (-quick_exp.softmax(z)).at[mx.arange(len(z)), drawn].add(1.0)
        gradients = mx.vjp(logits, [some], [above])[1]
        parts.append(gradients[0])
        # Evaluated part by part: the logits of one part alone are in memory.
        stream.evaluate_now(parts[-1])
        at_head(norm(some), above, slopes, 0)
    return mx.concatenate(parts).reshape(hidden.shape)


def gradients_cost(
    m: ModelSize, *, windows: int, length: int, limit: int, beside_bytes: int, visiting: int
) -> StageCost:
    """What `input_gradients` takes with its `visit`.

    beside_bytes: that the visit holds all the time; visiting: on the way back. Inputs of all blocks
    are spooled if need be.
    """
    one_pass = streamed_pass("", m, tokens=length, length=length, head=False, spool=False)
    # The workspace of the forward pass is gone at the head, and the head before the way back.
    workspace = workspace_bytes(m, length, length)
    # In one stream 0.2 to 0.8 of it were measured, in two 0.4 to 1.2.
    backward = (1 + parallel_windows(m)) * backward_bytes(m, 1, length) // 2
    if m.gpu:  # half a stack goes back in one pass
        backward *= min(windows, max(1, batches_per_pass(m.config, length, length) // 2))
    peak_bytes = beside_bytes + one_pass.peak_bytes - workspace
    peak_bytes += 2 * windows * length * m.hidden_bytes  # hidden states and cotangents
    slabs = head_in_slabs(m.config)
    if slabs:
        head = _slabs_bytes(m, windows * length, length)
    else:
        rows = min(length, chunk_rows(2 * m.shape.vocab))
        head = m.head_work + LOGIT_ARRAYS * 4 * rows * m.shape.vocab
    peak_bytes += max(head, visiting + max(workspace, backward))
    inputs_bytes = length * m.hidden_bytes * m.shape.layers
    held = min(windows, headroom_bytes(limit, peak_bytes) // inputs_bytes)
    spooled = (windows - held) * inputs_bytes
    return StageCost(
        name="there and back",
        read_bytes=2 * m.nbytes + spooled + slabs * 3 * m.head_bytes,
        written_bytes=spooled,
        peak_bytes=peak_bytes + held * inputs_bytes,
        flops=4 * forward_flops(m, windows * length, length)
        + slabs * 4 * windows * length * m.head_params,
        stays={WINDOWS: held},
    )


def _slabs_bytes(m: ModelSize, positions: int, length: int) -> int:
    """What a head in slabs takes: its inputs, their gradient and a slab's part of it; the slabs."""
    s = m.shape
    state = positions * (4 * 4 * s.hidden + slab_draws.state_bytes(0, 1))
    drawing = slab_draws.slab_bytes(length, s.hidden, s.vocab)
    return state + max(drawing, slab_losses.slab_bytes(positions, s.hidden, s.vocab))
