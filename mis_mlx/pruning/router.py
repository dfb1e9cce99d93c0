"""Heal the routers of a mixture that has lost experts: their rows learn to choose among those that are left.

A block's experts are asked once, each for all tokens; then the router alone is trained on what they said, towards the
teacher's stream behind the block, with everything else frozen (asked for in CerebrasResearch/reap, issue 3)."""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from mis_mlx.models import load, stream
from mis_mlx.models.experts import before
from mis_mlx.models.families import family
from mis_mlx.planner.compression_size import ROUTER_BYTES

Some = Sequence[mx.array]
STEPS, LOOK = 60, 5  # of Adam on all tokens at once, and between looks at those held out
RATE = 5e-4  # of Adam, times the root mean square of the router's weights: ten times as much unlearns what is rare


def heal(
    source: stream.Stream, block: nn.Module, hidden: Some, goals: Some, held_out: Sequence[int]
) -> tuple[mx.array, float]:
    """Give the block the router that best takes `hidden` to `goals`, both [(B, T, D)]: (its rows (E, D) float32, the
    share of the error that they leave on batches `held_out`). It stays as it is, and 1 is left, where none does better
    there. Tokens are weighted by 1 / rms of the goal, as in `reconstruct.refit`. Unused batches are not fetched."""
    of = family(source.checkpoint.config)
    part = block[of.mlp]
    router = part[of.router]
    old, kind = router.weight, hidden[0].dtype
    most = max(2, ROUTER_BYTES // (hidden[0].nbytes * len(old)))
    sets = [[b for b in range(len(hidden)) if (b in held_out) == held][:most] for held in (False, True)]
    parts = [_Asked(source, block, [hidden[b] for b in of_set], [goals[b] for b in of_set]) for of_set in sets]

    def error(weight: mx.array, at: _Asked) -> mx.array:
        router.weight = weight.astype(kind)
        part.experts.said = at.said
        out = at.beside + part(at.inputs).reshape(at.beside.shape).astype(mx.float32)
        return mx.square((at.goal - out) * at.weight).sum()

    best = weight = old.astype(mx.float32)
    least = first = float(error(weight, parts[1]))
    adam = optim.Adam(RATE * float(mx.sqrt(mx.square(weight).mean())))
    for step in range(1, STEPS + 1):
        slope = mx.grad(error)(weight, parts[0])
        weight = adam.apply_gradients({"gate": slope}, {"gate": weight})["gate"]
        stream.evaluate_now(weight, adam.state)
        if step % LOOK == 0 and (now := float(error(weight, parts[1]))) < least:
            best, least = weight, now
    part.experts.said, router.weight = None, best.astype(old.dtype) if least < first else old
    return best, least / first if first else 1.0


class _Asked:
    """What all experts of a block say to some batches' tokens, and what would be right. Rows (n, ...)."""

    def __init__(self, source: stream.Stream, block: nn.Module, hidden: Some, goals: Some):
        of = family(source.checkpoint.config)
        part = block[of.mlp]
        beside, inputs = list[mx.array](), list[mx.array]()
        for x in hidden:
            h, n = before(block, x, load.mask(source.args, block, x))
            stream.evaluate_now(h, n)
            beside.append(h)
            inputs.append(n)
        self.inputs = mx.concatenate([n.reshape(1, -1, n.shape[-1]) for n in inputs], axis=1)
        self.beside = mx.concatenate([h.reshape(-1, h.shape[-1]) for h in beside]).astype(mx.float32)
        self.goal = mx.concatenate([g.reshape(-1, g.shape[-1]) for g in goals]).astype(mx.float32)
        self.weight = 1.0 / mx.maximum(mx.sqrt(mx.square(self.goal).mean(axis=-1, keepdims=True)), 1e-6)
        count = len(part[of.router].weight)
        every = mx.array(np.broadcast_to(np.arange(count), (1, len(self.goal), count)))
        self.said = part.experts.outputs([self.inputs], [every])[0]
        stream.evaluate_now(self.inputs, self.beside, self.goal, self.weight, self.said)
