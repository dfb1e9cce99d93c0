"""A block's experts one after the other, instead of stacked as in mlx-lm's SwitchGLU, whose place this takes.

So each can be read from disk when it is needed, has its own name as on disk, and gives the same bits wherever its
weights come from: in memory or read, a batch at a time or many."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mis_mlx.models.families import Family

Visit = Callable[[int, int, np.ndarray, mx.array, mx.array], None]  # see `Experts.outputs`


class Expert(nn.Module):
    """One gated MLP. Its matrices are called as on disk."""

    def __init__(self, of: Family, hidden: int, ffn: int, activation: Callable[[mx.array, mx.array], mx.array]):
        super().__init__()
        self.names, self._activation = of.matrices, activation
        self.settle: Callable[[mx.array], None] = lambda _: None  # of what it gave, if its weights go elsewhere then
        for name, (into, out) in zip(of.matrices, ((hidden, ffn), (hidden, ffn), (ffn, hidden)), strict=True):
            self[name] = nn.Linear(into, out, bias=of.expert_bias)

    def neurons(self, x: mx.array) -> mx.array:
        """What its last matrix reads: x (n, D) -> (n, F)."""
        gate, up, _ = (self[name] for name in self.names)
        return self._activation(up(x), gate(x))


Each = Callable[[Sequence[int]], Iterator[tuple[int, Expert]]]


class Experts(list[Expert]):
    """Parts of a block, called as SwitchGLU is: x (..., D), chosen (..., k) -> (..., k, D).

    each(numbers): those experts in turn, where they are no parts of it: one may be gone when the next is asked for."""

    def __init__(self, parts: Iterable[Expert] = (), each: Each | None = None):
        super().__init__(parts)
        self._each = each or (lambda numbers: ((e, self[e]) for e in numbers))
        self.said: mx.array | None = None  # (n, E, D), what every expert gives for all tokens of every call
        self.ready: list[mx.array] = []  # what the next calls give
        self._asked: list[mx.array] | None = None  # what the calls of `chosen` were made with

    def __call__(self, x: mx.array, chosen: mx.array) -> mx.array:
        """See the class."""
        if self._asked is not None:
            self._asked.append(chosen)
            return mx.zeros((*chosen.shape, x.shape[-1]), x.dtype)
        if self.said is not None:
            every = self.said.reshape(*chosen.shape[:-1], *self.said.shape[-2:])
            return mx.take_along_axis(every, chosen[..., None], axis=-2)
        return self.ready.pop(0) if self.ready else self.outputs([x], [chosen])[0]

    def chosen(self, part: nn.Module, x: mx.array) -> mx.array:
        """Which experts (..., k) the router of `part`, whose experts these are, chooses for x (..., D). Lazy."""
        self._asked = asked = list[mx.array]()
        part(x)
        self._asked = None
        return asked[0]

    def outputs(
        self, inputs: Sequence[mx.array], chosen: Sequence[mx.array], visit: Visit | None = None
    ) -> list[mx.array]:
        """[(..., k, D)] of several batches' inputs [(..., D)] and experts [(..., k)]: each expert is asked for once.

        visit(batch, expert, places (n,) in the flat choice, neurons (n, F), outputs (n, D)): looks at what was made."""
        flat = [np.array(c).reshape(-1) for c in chosen]
        places, pieces = [list[np.ndarray]() for _ in flat], [list[mx.array]() for _ in flat]
        for e, expert in self._each(np.unique(np.concatenate(flat)).tolist()):
            for b, (x, numbers, c) in enumerate(zip(inputs, flat, chosen, strict=True)):
                if not len(where := np.flatnonzero(numbers == e)):
                    continue
                neurons = expert.neurons(x.reshape(-1, x.shape[-1])[mx.array(where // c.shape[-1])])
                made = expert[expert.names[2]](neurons)
                if visit:
                    visit(b, e, where, neurons, made)
                expert.settle(made)
                places[b].append(where)
                pieces[b].append(made)
        back = (mx.array(np.argsort(np.concatenate(of))) for of in places)
        outs = (mx.concatenate(of)[order] for of, order in zip(pieces, back, strict=True))
        return [out.reshape(*c.shape, -1) for out, c in zip(outs, chosen, strict=True)]


def before(block: nn.Module, x: mx.array, mask: Any) -> tuple[mx.array, mx.array]:
    """(x behind attention, that behind the second norm), both (B, T, D): the block's output is the first and what its
    experts make of the second. Lazy."""
    h = x + block.self_attn(block.input_layernorm(x), mask, None)
    return h, block.post_attention_layernorm(h)
