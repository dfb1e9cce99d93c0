"""A block's experts one after the other, instead of stacked as in mlx-lm's SwitchGLU, whose place
this takes; and what their tensors are called: one by one, as on the hub and here, or stacked.

So each can be read from disk when it is needed, has its own name as on disk, and gives the same
bits wherever its weights come from: in memory or read, a batch at a time or many.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mis_mlx.models.config import shape_of
from mis_mlx.models.families import GATED, Family, family
from mis_mlx.types import MisError, TensorAt

STACKED = re.compile(r"(.*\.)(?:switch_mlp|experts)\.(gate_proj|up_proj|down_proj)\.(\w+)")
Visit = Callable[[int, int, np.ndarray, mx.array, mx.array], None]  # see `Stream.mixed`


class Expert(nn.Module):
    """One gated MLP. Its matrices are called as on disk."""

    def __init__(
        self,
        of: Family,
        hidden: int,
        ffn: int,
        activation: Callable[[mx.array, mx.array], mx.array],
    ):
        super().__init__()
        self.names = of.matrices
        self._activation = activation
        # of what it gave, if its weights go elsewhere then
        self.settle: Callable[[mx.array], None] = lambda _: None
        for name, (into, out) in zip(
            of.matrices, ((hidden, ffn), (hidden, ffn), (ffn, hidden)), strict=True
        ):
            self[name] = nn.Linear(into, out, bias=of.expert_bias)

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """x (n, D) -> (what its last matrix reads (n, F), what it gives (n, D))."""
        gate, up, down = (self[name] for name in self.names)
        neurons = self._activation(up(x), gate(x))
        return neurons, down(neurons)


Each = Callable[[Sequence[int]], Iterator[tuple[int, Expert]]]


class Experts(list[Expert]):
    """Parts of a block, called as SwitchGLU is: x (..., D), chosen (..., k) -> (..., k, D).

    each(numbers): those experts in turn, where they are no parts of it: one may be gone when the
    next is asked for.
    """

    def __init__(self, parts: Iterable[Expert] = (), each: Each | None = None):
        super().__init__(parts)
        self._each = each or (lambda numbers: ((e, self[e]) for e in numbers))
        # (n, E, D), what every expert gives for all tokens of every call
        self.said: mx.array | None = None
        self.ready: list[mx.array] = []  # what the next calls give
        self._asked: list[mx.array] | None = None  # what the calls of `chosen` were made with

    def __call__(self, x: mx.array, chosen: mx.array) -> mx.array:
        if self._asked is not None:
            self._asked.append(chosen)
            return mx.zeros((*chosen.shape, x.shape[-1]), x.dtype)
        if self.said is not None:
            every = self.said.reshape(*chosen.shape[:-1], *self.said.shape[-2:])
            return mx.take_along_axis(every, chosen[..., None], axis=-2)
        return self.ready.pop(0) if self.ready else self.outputs([x], [chosen])[0]

    def chosen(self, part: nn.Module, x: mx.array) -> mx.array:
        """Which experts (..., k) the router of `part`, whose experts these are, chooses for x (...,
        D). Lazy.
        """
        self._asked = asked = list[mx.array]()
        part(x)
        self._asked = None
        return asked[0]

    def outputs(
        self,
        inputs: Sequence[mx.array],
        chosen: Sequence[mx.array],
        visit: Visit | None = None,
        gates: Sequence[np.ndarray] = (),
        first: int = 0,
    ) -> list[mx.array]:
        """[(..., k, D)] of several batches' inputs [(..., D)] and experts [(..., k)]: each expert
        is asked for once.

        visit: as of `Stream.mixed`. gates: of every batch's choice, flat. first: the number of the
        first batch.
        """
        flat = [np.array(c).reshape(-1) for c in chosen]
        places = [list[np.ndarray]() for _ in flat]
        pieces = [list[mx.array]() for _ in flat]
        for e, expert in self._each(np.unique(np.concatenate(flat)).tolist()):
            for b, (x, numbers, c) in enumerate(zip(inputs, flat, chosen, strict=True)):
                if not len(where := np.flatnonzero(numbers == e)):
                    continue
                neurons, made = expert(x.reshape(-1, x.shape[-1])[mx.array(where // c.shape[-1])])
                if visit:
                    visit(first + b, e, gates[b][where], neurons, made)
                expert.settle(made)
                places[b].append(where)
                pieces[b].append(made)
        back = (mx.array(np.argsort(np.concatenate(of))) for of in places)
        outs = (mx.concatenate(of)[order] for of, order in zip(pieces, back, strict=True))
        return [out.reshape(*c.shape, -1) for out, c in zip(outs, chosen, strict=True)]


def before(block: nn.Module, x: mx.array, mask: Any) -> tuple[mx.array, mx.array]:
    """(x behind attention, that behind the second norm), both (B, T, D): the block's output is the
    first and what its experts make of the second. Lazy.
    """
    h = x + block.self_attn(block.input_layernorm(x), mask, None)
    return h, block.post_attention_layernorm(h)


def tensors_of(config: Mapping[str, Any], together: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what a block of a mixture has in the place of an MLP: a router, experts
    one by one or `together`, perhaps one that every token meets.
    """
    s = shape_of(config)
    of = family(config)

    def biased(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": shape} | ({f"{name}.bias": shape[:-1]} if of.expert_bias else {})

    inside = biased(of.router, s.experts, s.hidden)
    wide = int(config.get(of.shared_expert) or 0)
    each = [(f"experts.{e}", of.matrices, tuple[int, ...]()) for e in range(s.experts)]
    for place, names, stacked in [(of.switch, GATED, (s.experts,))] if together else each:
        for name in names:
            sizes = (s.hidden, s.ffn) if name == names[2] else (s.ffn, s.hidden)
            inside |= biased(f"{place}.{name}", *stacked, *sizes)
    for name in GATED if wide else ():
        inside[f"shared_expert.{name}.weight"] = (
            (s.hidden, wide) if name == "down_proj" else (wide, s.hidden)
        )
    if wide:
        inside["shared_expert_gate.weight"] = (1, s.hidden)
    return {f"{of.mlp}.{name}": shape for name, shape in inside.items()}


def expert_of(name: str) -> int | None:
    """The number of the expert in its block that a tensor or module belongs to; None outside of
    experts.
    """
    found = re.search(r"\bexperts\.(\d+)\.", name)
    return int(found[1]) if found else None


def one_by_one(path: str, config: Mapping[str, Any]) -> list[str]:
    """What the parts of a matrix that `stacked` names are called; another path alone."""
    of = family(config)
    stem, _, name = path.partition(f"{of.switch}.")
    if (kind := name.split(".")[0]) not in GATED:
        return [path]
    own = name.replace(kind, of.matrices[GATED.index(kind)])
    return [f"{stem}experts.{e}.{own}" for e in range(shape_of(config).experts)]


def stacked(path: str, config: Mapping[str, Any]) -> str:
    """What mlx-lm calls the matrix, of all experts, that an expert's is part of; another path as it
    is.
    """
    found = re.fullmatch(r"(.*\.)experts\.\d+\.(\w+)", path)
    of = family(config)
    return f"{found[1]}{of.switch}.{GATED[of.matrices.index(found[2])]}" if found else path


def is_router(name: str) -> bool:
    """Whether this matrix decides which experts a token meets, or how much of the shared one: it is
    never quantized.
    """
    return (
        re.search(
            r"\.(mlp|block_sparse_moe)\.(gate|router|shared_expert_gate)(\.weight|\.bias)?$", name
        )
        is not None
    )


def apart(
    stacked: re.Match[str], name: str, at: TensorAt, config: Mapping[str, Any]
) -> Iterator[tuple[str, TensorAt]]:
    """Of experts that mlx_lm.convert has stacked, (E, out, in): each expert's part, by its own
    name.
    """
    of = family(config)
    count = shape_of(config).experts
    if at.shape[0] != count:
        raise MisError(
            f"{at.file}: {name} has {at.shape[0]} experts, config.json makes it {count}: download "
            f"it again"
        )
    matrix = of.matrices[GATED.index(stacked[2])]
    size = at.nbytes // count
    for e in range(count):
        part = replace(at, shape=at.shape[1:], offset=at.offset + e * size, nbytes=size)
        yield f"{stacked[1]}experts.{e}.{matrix}.{stacked[3]}", replace(part, stored=(name, at))
