"""A block's experts one by one, in the place of mlx-lm's SwitchGLU, which stacks them.

Each expert can be read from disk when it is needed and has its own name as on disk. It gives the
same bits wherever its weights come from (memory or disk), and for one batch or many.

The second half of the file is about names: an expert's tensors are called one by one, as on the hub
and here, or stacked, as mlx-lm writes them.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mis_mlx.models.architectures.families import GATED, Config, Family, Shapes, family
from mis_mlx.models.architectures.sizes import shape_of
from mis_mlx.types import MisError, TensorAt

STACKED = re.compile(r"(.*\.)(?:switch_mlp|experts)\.(gate_proj|up_proj|down_proj)\.(\w+)")
ROUTER = re.compile(
    r"\.(mlp|block_sparse_moe)\.(gate|router|shared_expert_gate)(\.weight|\.bias)?$"
)
Visit = Callable[[int, int, np.ndarray, mx.array, mx.array], None]  # see `Stream.run_experts`
# what of a batch, by number, goes before the experts: see `attention_part`
Attend = Callable[[int, mx.array], tuple[mx.array, mx.array]]
Activation = Callable[[mx.array, mx.array], mx.array]  # (up, gate), both (n, F) -> (n, F)


class Expert(nn.Module):
    """One gated MLP. Its matrices are called as on disk."""

    def __init__(self, family: Family, hidden: int, ffn: int, activation: Activation):
        super().__init__()
        self.names = family.matrices
        self._activation = activation
        # Called with the outputs. A stream evaluates them here, before it reuses the memory that
        # the weights lie in.
        self.on_output: Callable[[mx.array], None] = lambda _: None
        gate, up, down = family.matrices
        sizes = {gate: (hidden, ffn), up: (hidden, ffn), down: (ffn, hidden)}
        for name, (into, out) in sizes.items():
            self[name] = nn.Linear(into, out, bias=family.expert_bias)

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
        self._read_experts: ReadExperts = read_experts or self._resident
        # (n, E, D): what every expert gives for all tokens of every call
        self.expert_outputs: mx.array | None = None
        self.ready: list[mx.array] = []  # results of the next calls, in their order
        self._observed_choices: list[mx.array] | None = (
            None  # choices of the calls that `chosen` observes
        )

    def _resident(self, numbers: Sequence[int]) -> Iterator[tuple[int, Expert]]:
        for e in numbers:
            yield e, self[e]

    def __call__(self, x: mx.array, chosen: mx.array) -> mx.array:
        # `chosen` wants to know what the router chooses: record it, compute nothing.
        if self._observed_choices is not None:
            self._observed_choices.append(chosen)
            return mx.zeros((*chosen.shape, x.shape[-1]), x.dtype)
        # A router is being trained: every expert's output is known, pick k of E for each token.
        if self.expert_outputs is not None:
            experts, hidden = self.expert_outputs.shape[-2:]
            outputs = self.expert_outputs.reshape(*chosen.shape[:-1], experts, hidden)
            indices = chosen[..., None]
            return mx.take_along_axis(outputs, indices, axis=-2)
        # `Stream.run_experts` has computed this call's result together with those of other batches.
        if self.ready:
            return self.ready.pop(0)
        return self.outputs([x], [chosen])[0]

    def chosen(self, part: nn.Module, x: mx.array) -> mx.array:
        """The experts (..., k) that the router of `part` chooses for x (..., D). Lazy.

        part: the module that has these experts. mlx-lm's routers have no function of their own, so
        the whole module is called, and the experts record what they are asked for.
        """
        asked = list[mx.array]()
        self._observed_choices = asked
        part(x)
        self._observed_choices = None
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
        for e, expert in self._read_experts(used):
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
    router: str,
    evaluate: Callable[..., None],
) -> Iterator[mx.array]:
    """The batches of these numbers, hidden (B, T, D), behind a block, evaluated.

    part: the block's module that has the experts. router: its name in there. Each expert is asked
    for once. evaluate(arrays): computes them.
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
            gates.append(_gates(part[router], x, choice))
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


def tensors_of(config: Config, stack_experts: bool) -> Shapes:
    """Names and shapes of the tensors that a mixture has in the place of an MLP.

    They are a router, the experts one by one or `stack_experts`, and in some families one expert
    that every token uses.
    """
    s = shape_of(config)
    hidden = s.hidden
    ffn = s.ffn
    row = family(config)
    tensors: Shapes = {}

    def add(name: str, *shape: int) -> None:
        stem = f"{row.mlp}.{name}"
        tensors[f"{stem}.weight"] = shape
        if row.expert_bias:
            tensors[f"{stem}.bias"] = shape[:-1]

    add(row.router, s.experts, hidden)
    places = [f"experts.{e}" for e in range(s.experts)]
    names = row.matrices
    stack: tuple[int, ...] = ()
    if stack_experts:
        places = [row.switch]
        names = GATED
        stack = (s.experts,)
    gate, up, down = names
    for place in places:
        add(f"{place}.{gate}", *stack, ffn, hidden)
        add(f"{place}.{up}", *stack, ffn, hidden)
        add(f"{place}.{down}", *stack, hidden, ffn)

    shared = int(config.get(row.shared_expert) or 0)
    if shared:
        stem = f"{row.mlp}.shared_expert"
        tensors[f"{stem}.gate_proj.weight"] = (shared, hidden)
        tensors[f"{stem}.up_proj.weight"] = (shared, hidden)
        tensors[f"{stem}.down_proj.weight"] = (hidden, shared)
        tensors[f"{stem}_gate.weight"] = (1, hidden)
    return tensors


def expert_of(name: str) -> int | None:
    """The number of a tensor's or module's expert in its block; None outside of experts."""
    match = re.search(r"\bexperts\.(\d+)\.", name)
    return int(match[1]) if match else None


def one_by_one(path: str, config: Config) -> list[str]:
    """The paths of all experts' parts of a stacked matrix; of another path, itself alone.

    This is the inverse of `stacked`.
    """
    row = family(config)
    stem, _, name = path.partition(f"{row.switch}.")
    kind = name.split(".")[0]
    if kind not in GATED:
        return [path]
    matrix = row.matrices[GATED.index(kind)]
    own = name.replace(kind, matrix)
    experts = shape_of(config).experts
    return [f"{stem}experts.{e}.{own}" for e in range(experts)]


def stacked(path: str, config: Config) -> str:
    """mlx-lm's path of the stacked matrix that an expert's matrix is part of.

    Any other path is returned as it is.
    """
    match = re.fullmatch(r"(.*\.)experts\.\d+\.(\w+)", path)
    if not match:
        return path
    row = family(config)
    kind = GATED[row.matrices.index(match[2])]
    return f"{match[1]}{row.switch}.{kind}"


def is_router(name: str) -> bool:
    """Whether this matrix decides which experts a token uses, or how much of the shared one.

    These matrices are never quantized.
    """
    return ROUTER.search(name) is not None


def unstack(
    stacked: re.Match[str], name: str, tensor_at: TensorAt, config: Config
) -> Iterator[tuple[str, TensorAt]]:
    """(own name, its part) of every expert in a tensor (E, out, in) that mlx_lm.convert stacked.

    stacked: the match of STACKED on the tensor's `name`. MisError where E is not the config's.
    """
    row = family(config)
    count = shape_of(config).experts
    if tensor_at.shape[0] != count:
        raise MisError(
            f"{tensor_at.file}: {name} has {tensor_at.shape[0]} experts, but config.json says "
            f"{count}: download it again"
        )
    stem, kind, tensor = stacked.groups()
    matrix = row.matrices[GATED.index(kind)]
    size = tensor_at.nbytes // count
    for e in range(count):
        part = replace(
            tensor_at,
            shape=tensor_at.shape[1:],
            offset=tensor_at.offset + e * size,
            nbytes=size,
            stored=(name, tensor_at),
        )
        yield f"{stem}experts.{e}.{matrix}.{tensor}", part
