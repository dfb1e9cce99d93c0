"""One streamed pass forwards and one back, from the log-probability of next tokens that the model
itself draws.

The data's own tokens would make this the empirical Fisher of arXiv 2204.09656. One block is in
memory at a time.
"""

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mis_mlx.maths.losses import chunk_rows
from mis_mlx.models import block_inputs, config, host_losses, load, policy, stream
from mis_mlx.models.block_inputs import BlockInputs, BlockOutputs
from mis_mlx.types import Checkpoint

# Of as many batches as there are lanes, or as a GPU takes back in one pass: what goes into a block,
# cotangents of what it gives -> of what goes into it.
Back = Callable[[Sequence[BlockInputs], Sequence[BlockOutputs]], Sequence[BlockInputs]]
Visit = Callable[[int, nn.Module], Back]
AtHead = Callable[[mx.array, mx.array], None]
AtChannels = Callable[[int, int, mx.array], None]


def backwards(
    checkpoint: Checkpoint,
    batches: stream.Batches,
    visit: Visit,
    seed: int = 0,
    kept: stream.Hidden | None = None,
    at_head: AtHead = lambda x, above: None,
    at_channels: AtChannels = lambda i, b, below: None,
) -> list[mx.array]:
    """One pass forwards, then back to the first block, d log p / d x of which is returned:
    `visit(i, block)` gives what takes batches back.

    That function takes the block's inputs and d log p(drawn tokens) / d outputs of some batches; it
    gives d log p / d inputs. Token ids [(B, T)]. kept: a place other than memory for L *
    len(batches) hidden states (B, T, D). at_head: sees the head's inputs (n, D) and d log p / d
    logits (n, V), some rows at a time. at_channels: sees d log p / d per-layer inputs (B, T, P) of
    block i and batch b, where the family has them.
    """
    kept = [] if kept is None else kept
    source = stream.Stream(checkpoint)
    n = len(batches)
    source.embed(batches, kept)
    for _, block in source.blocks(range(source.layers - 1)):
        kept.extend(source.through(block, kept[-n:]))
    back: list[mx.array] = []
    shared = block_inputs.Cotangents(source.sides.owners)
    for i, block in source.blocks(range(source.layers - 1, -1, -1)):
        if not back:
            last = source.through(block, kept[-n:])
            keys = (mx.random.key(seed * n + b) for b in range(n))
            back = [
                _drawn(checkpoint, source, h, key, at_head)
                for h, key in zip(last, keys, strict=True)
            ]
        through = visit(i, block)
        width = source.back_at_once(back[0])
        for b in range(0, n, width):
            some = range(b, min(b + width, n))
            inputs = [source.sides.inputs(i, k, kept[i * n + k]) for k in some]
            above = [BlockOutputs(back[k], shared.take(i, k)) for k in some]
            for k, below in zip(some, through(inputs, above), strict=True):
                stream.evaluate_now(shared.add(i, k, below))
                if below.per_layer is not None:
                    at_channels(i, k, below.per_layer)
                back[k] = below.hidden
    return back


def _drawn(
    checkpoint: Checkpoint, source: stream.Stream, hidden: mx.array, key: mx.array, at_head: AtHead
) -> mx.array:
    """d log p(drawn token) / d hidden (B, T, D), of the last block's output; one draw a
    position.
    """
    norm = load.final_norm(checkpoint, source.dtype)
    head = source.head()
    parts = []
    flat = hidden.reshape(-1, hidden.shape[-1])

    def logits(x: mx.array) -> mx.array:
        return load.wide_logits(head, norm(x))

    # Half a chunk: as many logits again are noise to draw with.
    for start in range(
        0, len(flat), rows := chunk_rows(2 * config.shape_of(checkpoint.config).vocab)
    ):
        some = flat[start : start + rows]
        z = logits(some)
        key, now = mx.random.split(key)
        above = _pulls(z, mx.random.categorical(z, key=now))
        parts.append(mx.vjp(logits, [some], [above])[1][0])
        stream.evaluate_now(parts[-1])
        at_head(norm(some), above)
    return mx.concatenate(parts).reshape(hidden.shape)


def _pulls(z: mx.array, drawn: mx.array) -> mx.array:
    """d log softmax(z)[drawn] / d z (n, V), for z (n, V) and drawn (n,). On a CPU z is made over
    into it.
    """
    if policy.name() != "cpu":
        return (mx.arange(z.shape[-1]) == drawn[:, None]).astype(mx.float32) - mx.softmax(
            z, axis=-1
        )
    stream.evaluate_now(z, drawn)
    at = np.array(drawn)
    p = host_losses.view(z)
    host_losses.by_rows(host_losses.softmax, p)
    np.negative(p, out=p)
    p[np.arange(len(p)), at] += 1.0
    return z
