"""Train a mixture's routers to choose among the experts that are left.

A block's experts are asked once, each for all tokens; then its router alone is trained on their
outputs, towards what the teacher's stream has there (CerebrasResearch/reap, issue 3).
"""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from mis_mlx.hardware.ledger import Ledger
from mis_mlx.hardware.stage_cost import StageCost
from mis_mlx.maths.reconstruction import held_out_windows, token_rms
from mis_mlx.models.architectures import experts
from mis_mlx.models.opening import load
from mis_mlx.models.opening.model_size import ModelSize
from mis_mlx.models.passing import stream
from mis_mlx.models.passing.stream import Hidden

ROUTER_BYTES = 2**28  # of outputs of all experts of a block
# of Adam on all tokens at once, and between looks at those held out
ROUTER_STEPS = 60
ROUTER_LOOK_STEPS = 5
# of Adam, times the root mean square of the router's weights: ten times as much unlearns what is
# rare
ROUTER_RATE = 5e-4


def train_router(
    source: stream.Stream,
    block: nn.Module,
    hidden: Hidden,
    goals: Hidden,
    kinds: Sequence[int],
) -> tuple[mx.array, float]:
    """Give the block the router that best takes `hidden` to `goals`, both [(B, T, D)].

    Returns (its rows (E, D) float32, the share of the error that they leave on batches held out).
    It stays as it is, and 1 is left, where none does better there. Tokens are weighted by 1 / rms
    of the goal, as in `fit_down_proj`. Unused batches are not fetched.
    """
    part, router = load.expert_part(source.checkpoint, block)
    old = router.weight
    dtype = hidden[0].dtype
    held_out = held_out_windows(kinds)
    # Outputs of all experts for a batch are E times as large as the batch: so many batches fit.
    most = max(2, ROUTER_BYTES // (hidden[0].nbytes * len(old)))
    learning = [b for b in range(len(hidden)) if b not in held_out]
    if not learning:
        return old.astype(mx.float32), 1.0

    def asked(numbers: Sequence[int]) -> _RouterBatch:
        some = numbers[:most]
        return _RouterBatch(source, block, [hidden[b] for b in some], [goals[b] for b in some])

    # Experts answer once, for all tokens of both sets: training asks only which answers count.
    training_set = asked(learning)
    held_out_set = asked(held_out)

    def error(weight: mx.array, batch: _RouterBatch) -> mx.array:
        router.weight = weight.astype(dtype)
        part.experts.expert_outputs = batch.expert_outputs
        mixed = part(batch.inputs).reshape(batch.beside.shape).astype(mx.float32)
        out = batch.beside + mixed
        return mx.square((batch.goal - out) * batch.weight).sum()

    weight = old.astype(mx.float32)
    best = weight
    first = float(error(weight, held_out_set))
    least = first
    size = float(mx.sqrt(mx.square(weight).mean()))
    adam = optim.Adam(ROUTER_RATE * size)
    for step in range(1, ROUTER_STEPS + 1):
        grads = {"gate": mx.grad(error)(weight, training_set)}
        weight = adam.apply_gradients(grads, {"gate": weight})["gate"]
        stream.evaluate_now(weight, adam.state)  # else sixty steps would be one graph
        if step % ROUTER_LOOK_STEPS == 0:
            now = float(error(weight, held_out_set))
            if now < least:
                best = weight
                least = now
    part.experts.expert_outputs = None  # the block computes its experts again
    router.weight = best.astype(old.dtype) if least < first else old
    return best, least / first if first else 1.0


class _RouterBatch:
    """Outputs of all experts of a block for some batches' tokens, and where these should arrive.

    Rows (n, ...): n tokens of all batches together.
    """

    def __init__(
        self,
        source: stream.Stream,
        block: nn.Module,
        hidden: Hidden,
        goals: Hidden,
    ):
        part, router = load.expert_part(source.checkpoint, block)
        beside = []
        inputs = []
        for x in hidden:
            # behind attention: the stream that the mixture's output is added to, and its input
            mask = load.mask(source.args, block, x)
            stream_in, experts_in = experts.attention_part(block, x, mask)
            stream.evaluate_now(stream_in, experts_in)
            beside.append(_rows(stream_in))
            inputs.append(_rows(experts_in)[None])
        self.inputs = mx.concatenate(inputs, axis=1)
        self.beside = mx.concatenate(beside).astype(mx.float32)
        self.goal = mx.concatenate([_rows(goal) for goal in goals]).astype(mx.float32)
        self.weight = 1.0 / token_rms(self.goal)[:, None]
        # Every token chooses every expert: (1, n, E).
        count = len(router.weight)
        numbers = np.broadcast_to(np.arange(count), (1, len(self.goal), count))
        every = mx.array(numbers)
        self.expert_outputs = part.experts.outputs([self.inputs], [every])[0]
        stream.evaluate_now(self.inputs, self.beside, self.goal, self.weight, self.expert_outputs)


def _rows(states: mx.array) -> mx.array:
    """(B, T, D) -> (B T, D)."""
    return states.reshape(-1, states.shape[-1])


def training_cost(ledger: Ledger, m: ModelSize, tokens: int) -> StageCost:
    """Write down what training a block's router holds; its work."""
    token_bytes = m.shape.experts * m.hidden_bytes  # of all experts' outputs
    # of two sets, each of which has ROUTER_BYTES at the most; a step gathers as many
    outputs_bytes = min(tokens * token_bytes, 2 * ROUTER_BYTES)
    ledger.hold("outputs of all experts", outputs_bytes, count=2)
    ledger.hold("what they should give", tokens * m.hidden_bytes)
    asked = outputs_bytes // token_bytes
    return StageCost("routers", flops=2.0 * asked * m.largest_block_params)
