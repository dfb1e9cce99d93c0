"""A block's experts one by one, in the place of mlx-lm's SwitchGLU, which stacks them.

Each expert can be read from disk when it is needed and has its own name as on disk. It gives the
same bits wherever its weights come from (memory or disk), and for one batch or many.

Tensors of experts are called one by one, as on the hub and here, or stacked, as mlx-lm writes them;
`mixture` has both names.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

STACKED = re.compile(r"(.*\.)(?:switch_mlp|experts)\.(gate_proj|up_proj|down_proj)\.(\w+)")
ROUTER = re.compile(
    r"\.(mlp|block_sparse_moe)\.(gate|router|shared_expert_gate)(\.weight|\.bias)?$"
)
Visit = Callable[[int, int, np.ndarray, mx.array, mx.array], None]  # see `Stream.run_experts`
# what of a batch, by number, goes before the experts: see `attention_part`
Attend = Callable[[int, mx.array], tuple[mx.array, mx.array]]
Activation = Callable[[mx.array, mx.array], mx.array]  # (up, gate), both (n, F) -> (n, F)


class Expert(nn.Module):
    """One gated MLP. names: of its gate, up and down matrix, as on disk."""

    def __init__(
        self,
        names: tuple[str, str, str],
        hidden: int,
        ffn: int,
        activation: Activation,
        *,
        bias: bool,
    ):
        super().__init__()
        self.names = names
        self._activation = activation
        # Called with the outputs. A stream evaluates them here, before it reuses the memory that
        # the weights lie in.
        self.on_output: Callable[[mx.array], None] = lambda _: None
        gate, up, down = names
        sizes = {gate: (hidden, ffn), up: (hidden, ffn), down: (ffn, hidden)}
        for name, (into, out) in sizes.items():
            self[name] = nn.Linear(into, out, bias=bias)

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """x (n, D) -> (the input of the last matrix (n, F), its output (n, D))."""
        gate_name, up_name, down_name = self.names
        up = self[up_name](x)
        gate = self[gate_name](x)
        neurons = self._activation(up, gate)
        return neurons, self[down_name](neurons)


ReadExperts = Callable[[Sequence[int]], Iterator[tuple[int, Expert]]]


class Experts(list[Expert]):
    """All experts of a block, called as SwitchGLU is: x (..., D), chosen (..., k) -> (..., k, D).

    read_experts(numbers): yields those experts in turn, where they are not parts of the block. An
    expert may be gone when the next one is asked for.
    """

    def __init__(self, parts: Iterable[Expert] = (), read_experts: ReadExperts | None = None):
        super().__init__(parts)
        self.read: ReadExperts = read_experts or self._resident
        self.ready: list[mx.array] = []  # results of the next calls, in their order
        self._observed_choices: list[mx.array] | None = None  # of the calls within `observed`

    def _resident(self, numbers: Sequence[int]) -> Iterator[tuple[int, Expert]]:
        for e in numbers:
            yield e, self[e]

    def __call__(self, x: mx.array, chosen: mx.array) -> mx.array:
        # Someone wants to know what the router chooses: record it, compute nothing.
        if self._observed_choices is not None:
            self._observed_choices.append(chosen)
            return mx.zeros((*chosen.shape, x.shape[-1]), x.dtype)
        # `Stream.run_experts` has computed this call's result together with those of other batches.
        if self.ready:
            return self.ready.pop(0)
        return self.outputs([x], [chosen])[0]

    @contextmanager
    def observed(self) -> Iterator[list[mx.array]]:
        """Within, the list gets the experts (..., k) of every call, lazy; they compute nothing."""
        asked = list[mx.array]()
        self._observed_choices = asked
        try:
            yield asked
        finally:
            self._observed_choices = None

    def chosen(self, part: nn.Module, x: mx.array) -> mx.array:
        """The experts (..., k) that the router of `part` chooses for x (..., D). Lazy.

        part: the module that has these experts. mlx-lm's routers have no function of their own, so
        the whole module is called, and the experts record what they are asked for.
        """
        with self.observed() as asked:
            part(x)
        return asked[0]

    def outputs(
        self,
        inputs: Sequence[mx.array],
        chosen: Sequence[mx.array],
        *,
        visit: Visit | None = None,
        gates: Sequence[np.ndarray] = (),
        first: int = 0,
    ) -> list[mx.array]:
        """[(..., k, D)] of several batches' inputs [(..., D)] and choices [(..., k)].

        Each expert is asked for once, however many batches use it. visit: as of
        `Stream.run_experts`. gates: of every batch's choice, flat. first: the number of the first
        batch.
        """
        # Every choice is one row of the result. Token t's choices are rows t k to t k + k - 1.
        flat = [np.array(choice).reshape(-1) for choice in chosen]
        rows = [list[np.ndarray]() for _ in flat]  # of each batch, in the order of computing
        pieces = [list[mx.array]() for _ in flat]
        used = np.unique(np.concatenate(flat)).tolist()
        for e, expert in self.read(used):
            for b, numbers in enumerate(flat):
                where = np.flatnonzero(numbers == e)
                if not len(where):
                    continue
                tokens = mx.array(where // chosen[b].shape[-1])
                neurons, output = expert(inputs[b].reshape(-1, inputs[b].shape[-1])[tokens])
                if visit:
                    visit(first + b, e, gates[b][where], neurons, output)
                expert.on_output(output)
                rows[b].append(where)
                pieces[b].append(output)
        # The pieces are sorted by expert: put their rows back into the order of the choices.
        results = []
        for choice, places, parts in zip(chosen, rows, pieces, strict=True):
            order = mx.array(np.argsort(np.concatenate(places)))
            results.append(mx.concatenate(parts)[order].reshape(*choice.shape, -1))
        return results


def attention_part(
    block: nn.Module, x: mx.array, mask: Any, cache: Any = None
) -> tuple[mx.array, mx.array]:
    """The part of a block before its experts: x (B, T, D) -> two arrays (B, T, D). Lazy.

    The first is x behind attention, the second that behind the norm, which the experts read. The
    block's output is the first plus the experts' output.
    """
    normed = block.input_layernorm(x)
    attended = block.self_attn(normed, mask, cache)
    h = x + attended
    return h, block.post_attention_layernorm(h)


def run_group(
    part: nn.Module,
    hidden: Sequence[mx.array],
    numbers: range,
    attend: Attend,
    *,
    visit: Visit | None,
    router: nn.Module,
    evaluate: Callable[..., None],
) -> Iterator[mx.array]:
    """The batches of these numbers, hidden (B, T, D), behind a block, evaluated.

    part: the block's module that has the experts. router: which chooses. Each expert is asked for
    once. evaluate(arrays): computes them.
    """
    # First everything before the experts, for all batches, and which experts each token chose.
    residual = []
    inputs = list[mx.array]()
    chosen = list[mx.array]()
    gates = list[np.ndarray]()
    for b in numbers:
        h, x = attend(b, hidden[b])
        choice = part.experts.chosen(part, x)
        evaluate(h, x, choice)
        residual.append(h)
        inputs.append(x)
        chosen.append(choice)
        if visit:
            gates.append(_gates(router, x, choice))
    # Then the experts in turn, each for all batches: it is read once. The block's own code finds
    # their outputs ready, and weighs and adds them.
    part.experts.ready = part.experts.outputs(
        inputs, chosen, visit=visit, gates=gates, first=numbers.start
    )
    for h, x in zip(residual, inputs, strict=True):
        out = h + part(x)
        evaluate(out)
        yield out


def _gates(router: nn.Module, x: mx.array, chosen: mx.array) -> np.ndarray:
    """Gates of the experts (..., k) chosen for x (..., D), flat; they sum to 1 for every token."""
    odds = router(x).astype(mx.float32).reshape(*chosen.shape[:-1], -1)
    odds = mx.take_along_axis(odds, chosen, axis=-1)
    odds = mx.softmax(odds, axis=-1)
    return np.array(odds).reshape(-1)


def expert_of(name: str) -> int | None:
    """The number of a tensor's or module's expert in its block; None outside of experts."""
    match = re.search(r"\bexperts\.(\d+)\.", name)
    return int(match[1]) if match else None


def is_router(name: str) -> bool:
    """Whether this matrix decides which experts a token uses, or how much of the shared one.

    These matrices are never quantized.
    """
    return ROUTER.search(name) is not None
