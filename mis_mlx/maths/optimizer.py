"""GóralW: AdamW with a sheepdog. One bad batch must not poison the moments.

AdamW's rules are mlx.optimizers', in three kernels a weight, with the dog: a guard on loss and
gradient norm.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from mis_mlx.types import MisError

WINDOW = 50  # steps the dog remembers
WAKE = 10  # steps it watches before it may bite
SIGMAS = 5.0
PATIENCE = 3  # bad batches in a row before the run stops


class Diverged(MisError):
    """Too many bad batches in a row; `batches`: their numbers, counted from 1 as steps are."""

    def __init__(self, batches: Sequence[int], loss: float):
        self.batches = tuple(batches)
        *first, last = map(str, batches)
        which = f"{len(batches)} steps in a row, of batches {', '.join(first)} and {last},"
        why = (
            f"{which} gave a loss or gradient that is not a number (last loss {loss}) and "
            f"changed no weight"
        )
        super().__init__(
            f"{why}: look at these batches, or start a new run with a lower --learning-rate"
        )


Lane = Callable[[int], AbstractContextManager[Any]]  # where MLX computes the i-th of several things


def _lightest(loads: list[int], size: int) -> int:
    """The lane of the next thing, of this size."""
    loads[i := loads.index(min(loads))] += size
    return i


def global_norm(gradients: Any, lane: Lane = nullcontext) -> mx.array:
    """Euclidean norm over all gradients, a scalar. Sums each tensor's last axis first: float32 sums
    drift.
    """
    squares = list[mx.array]()
    loads = [0, 0]
    for g in dict[str, mx.array](tree_flatten(gradients)).values():
        with lane(_lightest(loads, g.size)):
            squares.append(mx.square(g.astype(mx.float32)).sum(axis=-1).sum())
    return mx.sqrt(sum(squares, mx.array(0.0)))


# Three kernels for each weight: MLX writes what a kernel makes over what only it has read, if it
# makes one array.
_first = mx.compile(lambda m, g, scale, b1: b1 * m + (1 - b1) * (g * scale))
_second = mx.compile(lambda v, g, scale, b2: b2 * v + (1 - b2) * mx.square(g * scale))
_weight = mx.compile(
    lambda p, m, v, rate, root, kept, eps: p * kept - rate * m / (mx.sqrt(v) * root + eps)
)


class _Fused(optim.AdamW):
    """mlx.optimizers.AdamW, bias correction included, in 3 kernels for each weight in place of 14:
    40 bytes of memory traffic for each parameter in place of 128. Rates are arrays, so that a new
    one compiles nothing anew.

    scale, lane: of this update, as of `GuardedAdamW.update`; the gradient is scaled in these
    kernels. relative: as there, of what has no 8-bit moments.
    """

    scale: float
    lane: Lane
    relative: bool

    def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
        """The new weights, lazy; what all of them share is made once."""
        after = self.step + 1
        (b1, b2) = self.betas
        rate = self.learning_rate
        kept = 1 - rate * self.weight_decay
        self._shared = mx.array(self.scale), rate / (1 - b1**after), mx.rsqrt(1 - b2**after), kept
        self._loads = [0, 0]
        return super().apply_gradients(gradients, parameters)

    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]
    ) -> mx.array:
        """The new weight; the moments in `state` with it."""
        with self.lane(_lightest(self._loads, parameter.size)):
            scale, rate, root, kept = (a.astype(gradient.dtype) for a in self._shared)
            rate = rate * mx.sqrt(mx.square(parameter).mean()) if self.relative else rate
            state["m"] = _first(state["m"], gradient, scale, self.betas[0])
            state["v"] = _second(state["v"], gradient, scale, self.betas[1])
            return _weight(parameter, state["m"], state["v"], rate, root, kept, self.eps)


GROUP = 128  # moments that share a scale, along a matrix
TINY = 1e-30  # a scale where all of them are 0
# In 8 bits m, and the root of v, are the square of a share of the group's largest: no step of that
# code is much wider than what it stands for. Simulated gradients chose it: updates are 3 % off, 4
# to 60 % by shares that are not squared.
_weight_of_root = mx.compile(
    lambda p, m, r, rate, root, kept, eps: p * kept - rate * m / (r * root + eps)
)
# divides: no 0
_code_of_root = mx.compile(
    lambda r, steps: mx.maximum(mx.sqrt(r * steps) + 0.5, 1).astype(mx.uint8)
)


@mx.compile
def _first_of_code(c: mx.array, top: mx.array, g: mx.array, scale: mx.array, b1: float) -> mx.array:
    share = c.astype(g.dtype) * (1 / 127)
    return b1 * (share * mx.abs(share) * top) + (1 - b1) * (g * scale)


@mx.compile
def _root_of_code(c: mx.array, top: mx.array, g: mx.array, scale: mx.array, b2: float) -> mx.array:
    share = c.astype(g.dtype) * (1 / 255)
    return mx.sqrt(b2 * mx.square(share * share * top) + (1 - b2) * mx.square(g * scale))


@mx.compile
def _code_of_first(m: mx.array, steps: mx.array) -> mx.array:
    code = mx.sqrt(mx.abs(m) * steps) + 0.5
    return mx.where(m < 0, -code, code).astype(mx.int8)


def group_of(shape: Sequence[int]) -> int:
    """How many 8-bit moments of a weight share a scale; 0: they stay float32, as a vector's do."""
    size = math.gcd(math.prod(shape), GROUP)
    return size if len(shape) > 1 and size >= GROUP // 4 else 0


class _Packed(_Fused):
    """`_Fused` with moments of 8 bits, opened and closed again one weight at a time."""

    def init_single(self, parameter: mx.array, state: dict[str, mx.array]) -> None:
        if not (group := group_of(parameter.shape)):
            return super().init_single(parameter, state)
        shape = parameter.size // group, group
        state |= {"m": mx.zeros(shape, mx.int8), "v": mx.zeros(shape, mx.uint8)}
        state |= {f"{name}_top": mx.zeros((shape[0], 1)) for name in "mv"}

    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]
    ) -> mx.array:
        if "m_top" not in state:
            return super().apply_single(gradient, parameter, state)
        with self.lane(_lightest(self._loads, parameter.size)):
            scale, rate, root, kept = (a.astype(gradient.dtype) for a in self._shared)
            g = gradient.reshape(state["m"].shape)
            m = _first_of_code(state["m"], state["m_top"], g, scale, self.betas[0])
            r = _root_of_code(state["v"], state["v_top"], g, scale, self.betas[1])
            state["m_top"] = mx.maximum(mx.abs(m).max(axis=1, keepdims=True), TINY)
            state["v_top"] = mx.maximum(r.max(axis=1, keepdims=True), TINY)
            state["m"] = _code_of_first(m, 127**2 / state["m_top"])
            state["v"] = _code_of_root(r, 255**2 / state["v_top"])
            return _weight_of_root(
                parameter.reshape(g.shape), m, r, rate, root, kept, self.eps
            ).reshape(gradient.shape)


class GuardedAdamW:
    """mlx.optimizers.AdamW behind a gradient-norm guard; while that has nothing to do, AdamW but
    for rounding of sums.

    The guard looks before the update: a loss or norm that is not finite skips the step (three in a
    row raise `Diverged`); a norm above mean + 5 sigma of the last 50 is clipped to that bound.
    eight_bit: matrices' moments take 2.06 bytes a parameter in place of 8. relative: a step is a
    share of a tensor's root mean square, as Adafactor's.
    """

    def __init__(
        self, *, weight_decay: float = 0.01, eight_bit: bool = False, relative: bool = False
    ):
        kind = _Packed if eight_bit else _Fused
        self.adamw = kind(0.0, betas=[0.9, 0.95], weight_decay=weight_decay, bias_correction=True)
        self.adamw.relative = relative
        # batches: in a row, and left out from now on
        self.bad = list[int]()
        self.passed = list[int]()
        # calm: factor on every learning rate
        self.norms = list[float]()
        self.calm = 1.0

    def bound(self) -> float:
        """The largest gradient norm that passes unclipped now."""
        if len(self.norms) < WAKE:
            return math.inf
        mean = sum(self.norms) / len(self.norms)
        return mean + SIGMAS * math.sqrt(sum((n - mean) ** 2 for n in self.norms) / len(self.norms))

    def pass_over(self, batches: Sequence[int]) -> None:
        """From now on leave these batches out, and learn at half the rate."""
        self.bad = []
        self.passed = [*self.passed, *batches]
        self.calm = self.calm / 2

    def update(
        self,
        model: nn.Module,
        gradients: Any,
        loss: float,
        norm: float,
        learning_rate: float,
        batch: int = 0,
        scale: float = 1.0,
        lane: Lane = nullcontext,
    ) -> str:
        """One step on `model`'s trainable parameters, lazily. Returns what the dog did ('' = it
        slept).

        scale: of the gradients; `norm` is theirs once scaled. lane: where MLX computes the i-th of
        several weights.
        """
        if batch in self.passed:
            return "skipped: not a number before"
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.bad = [*self.bad, batch]
            if len(self.bad) >= PATIENCE:
                raise Diverged(self.bad, loss)
            return "skipped: not a number"
        self.bad = []
        bound = self.bound()
        clipped = norm > bound
        scale *= bound / norm if clipped else 1.0
        self.norms = [*self.norms, min(norm, bound)][-WINDOW:]
        self.adamw.learning_rate = learning_rate * self.calm
        self.adamw.scale = scale
        self.adamw.lane = lane
        self.adamw.update(model, gradients)
        return f"clipped {norm:.1f} to {bound:.1f}" if clipped else ""

    def arrays(self) -> dict[str, mx.array]:
        """Moments and step count by name, for a checkpoint."""
        return dict(tree_flatten(self.adamw.state))

    def memory(self) -> dict[str, Any]:
        """What the dog remembers, for a checkpoint's state.json."""
        return {"norms": self.norms, "bad": self.bad, "passed": self.passed, "calm": self.calm}

    def restore(self, arrays: dict[str, mx.array], memory: dict[str, Any]) -> None:
        """Put back what `arrays` and `memory` gave."""
        self.adamw.state = tree_unflatten(list(arrays.items()))
        self.norms, self.bad, self.passed, self.calm = (
            memory[k] for k in ("norms", "bad", "passed", "calm")
        )
