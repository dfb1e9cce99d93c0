"""GóralW: AdamW with a guard, the sheepdog. One bad batch must not poison the moments.

AdamW's rules are mlx.optimizers', in three kernels per weight. The guard looks at the loss and the
gradient norm before every update.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from mis_mlx.types import MisError

WINDOW = 50  # steps that the guard remembers
WAKE = 10  # steps that it watches before it may clip
SIGMAS = 5.0
PATIENCE = 3  # bad batches in a row before the run stops
GRADIENT_BYTES = 4  # of a parameter in float32, and of its gradient
MOMENTS = ("m", "v")  # of every weight, by their names in an optimizer's state
# of a weight and its moments in float32, in memory or in a checkpoint
STATE_BYTES = GRADIENT_BYTES * (1 + len(MOMENTS))
# that one update moves: state and gradient read, the state written, in one kernel
TRAFFIC_BYTES = 2 * STATE_BYTES + GRADIENT_BYTES


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


StreamOf = Callable[
    [int], AbstractContextManager[Any]
]  # where MLX computes the i-th of several things


Named = Mapping[str, mx.array]


class Part(NamedTuple):
    """Some of a model's weights by name, and their moments {name: {"m": ..., "v": ...}}.

    moments: {} before the first step.
    """

    weights: Named
    moments: Mapping[str, Named]


def _lightest(loads: list[int], size: int) -> int:
    """The stream with the least work so far; this item's size is added to its load."""
    i = loads.index(min(loads))
    loads[i] += size
    return i


def global_norm(gradients: Any, stream_of: StreamOf = nullcontext) -> mx.array:
    """Euclidean norm over all gradients, a scalar.

    Sums each tensor's last axis first: float32 sums drift. stream_of: where MLX computes the i-th
    of two halves.
    """
    return norm_of_squares(sums_of_squares(gradients, stream_of))


def sums_of_squares(gradients: Any, stream_of: StreamOf = nullcontext) -> list[mx.array]:
    """Of each tensor, scalars: `global_norm` in parts, for gradients that come one after the other.

    As of `global_norm`.
    """
    squares = []
    loads = [0, 0]
    named = dict[str, mx.array](tree_flatten(gradients))
    for gradient in named.values():
        with stream_of(_lightest(loads, gradient.size)):
            rows = mx.square(gradient.astype(mx.float32)).sum(axis=-1)
            squares.append(rows.sum())
    return squares


def norm_of_squares(squares: Sequence[mx.array]) -> mx.array:
    """The global norm of tensors with these sums of squares, in the order of the model."""
    return mx.sqrt(sum(squares, mx.array(0.0)))


# Three kernels per weight, not one: MLX lets a kernel write its result over an input that nothing
# else reads, but only where it has a single result. So both moments and the weight are updated in
# their own memory.


@mx.compile
def _first_moment(m: mx.array, g: mx.array, scale: mx.array, beta: float) -> mx.array:
    return beta * m + (1 - beta) * (g * scale)


@mx.compile
def _second_moment(v: mx.array, g: mx.array, scale: mx.array, beta: float) -> mx.array:
    return beta * v + (1 - beta) * mx.square(g * scale)


@mx.compile
def _weight(
    p: mx.array,
    m: mx.array,
    v: mx.array,
    rate: mx.array,
    root: mx.array,
    decay: mx.array,
    eps: float,
) -> mx.array:
    return p * decay - rate * m / (mx.sqrt(v) * root + eps)


class _Fused(optim.AdamW):
    """mlx.optimizers.AdamW with bias correction, in 3 kernels per weight instead of 14.

    That is 40 bytes of memory traffic per parameter instead of 128. Rates are arrays, so a new one
    compiles nothing anew.

    scale, stream: of this update, as in `GuardedAdamW.update`; these kernels scale the gradient.
    relative: as in `GuardedAdamW`.
    """

    scale: float
    stream_of: StreamOf
    relative: bool

    def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
        """The new weights, lazy."""
        self._share(self.step + 1)
        return super().apply_gradients(gradients, parameters)

    def begin_parts(self) -> None:
        """Count a step whose weights come in parts: then call `apply_part` for each of them."""
        step = self.step + 1
        self._share(step)
        self.state["step"] = step

    def apply_part(self, part: Part, gradients: Named) -> Part:
        """Some weights with their moments after the step that has begun, lazy."""
        weights = {}
        moments = {}
        for name, weight in part.weights.items():
            state = dict(part.moments.get(name, {}))
            if not state:
                self.init_single(weight, state)
            weights[name] = self.apply_single(gradients[name], weight, state)
            moments[name] = state
        return Part(weights, moments)

    def _share(self, step: mx.array) -> None:
        """Compute once what all weights of a step share. step: its number, from 1."""
        beta1, beta2 = self.betas
        rate = self.learning_rate
        # Bias correction: m / (1 - b1^t), and 1 / sqrt(1 - b2^t) beside sqrt(v). Weight decay is
        # decoupled from the gradient: the weight shrinks by 1 - rate * decay.
        corrected_rate = rate / (1 - beta1**step)
        root = mx.rsqrt(1 - beta2**step)
        decay = 1 - rate * self.weight_decay
        self._shared = (mx.array(self.scale), corrected_rate, root, decay)
        self._loads = [0, 0]

    def _factors(self, gradient: mx.array, parameter: mx.array) -> tuple[mx.array, ...]:
        """(gradient's scale, rate, bias correction of a root, decay) of one weight's step."""
        # In the gradient's type: a float32 scalar array would widen half precision.
        scale, rate, root, decay = (a.astype(gradient.dtype) for a in self._shared)
        if self.relative:
            # The step becomes a share of the weight's root mean square.
            rate = rate * mx.sqrt(mx.square(parameter).mean())
        return scale, rate, root, decay

    def apply_single(
        self,
        gradient: mx.array,
        parameter: mx.array,
        state: dict[str, mx.array],
    ) -> mx.array:
        """The new weight; the moments in `state` with it. Lazy."""
        with self.stream_of(_lightest(self._loads, parameter.size)):
            scale, rate, root, decay = self._factors(gradient, parameter)
            state["m"] = _first_moment(state["m"], gradient, scale, self.betas[0])
            state["v"] = _second_moment(state["v"], gradient, scale, self.betas[1])
            return _weight(
                parameter,
                state["m"],
                state["v"],
                rate=rate,
                root=root,
                decay=decay,
                eps=self.eps,
            )


GROUP = 128  # moments that share a scale, along a matrix
TINY = 1e-30  # a scale where all of them are 0


# In 8 bits m, and the root of v, are stored as the square of a share of their group's largest: no
# step of that code is much wider than the number that it stands for. Simulated gradients chose it:
# updates are 3 % off, and 4 to 60 % with shares that are not squared.


@mx.compile
def _weight_of_root(
    p: mx.array,
    m: mx.array,
    r: mx.array,
    rate: mx.array,
    root: mx.array,
    decay: mx.array,
    eps: float,
) -> mx.array:
    # As `_weight`; r is sqrt(v) already.
    return p * decay - rate * m / (r * root + eps)


@mx.compile
def _code_of_root(r: mx.array, steps: mx.array) -> mx.array:
    # At least 1: the update divides by the root, so it must not become 0.
    return mx.maximum(mx.sqrt(r * steps) + 0.5, 1).astype(mx.uint8)


@mx.compile
def _first_of_code(
    code: mx.array,
    top: mx.array,
    g: mx.array,
    scale: mx.array,
    beta: float,
) -> mx.array:
    # code int8 (groups, GROUP), top (groups, 1): m = sign * share^2 * top, then its usual update
    share = code.astype(g.dtype) * (1 / 127)
    return beta * (share * mx.abs(share) * top) + (1 - beta) * (g * scale)


@mx.compile
def _root_of_code(
    code: mx.array,
    top: mx.array,
    g: mx.array,
    scale: mx.array,
    beta: float,
) -> mx.array:
    # The root is stored and v is averaged, so it is squared, updated, and its root taken again.
    share = code.astype(g.dtype) * (1 / 255)
    return mx.sqrt(beta * mx.square(share * share * top) + (1 - beta) * mx.square(g * scale))


@mx.compile
def _code_of_first(m: mx.array, steps: mx.array) -> mx.array:
    code = mx.sqrt(mx.abs(m) * steps) + 0.5
    return mx.where(m < 0, -code, code).astype(mx.int8)


def group_of(shape: Sequence[int]) -> int:
    """How many 8-bit moments of a weight share a scale; 0: they stay float32, as a vector's do."""
    size = math.gcd(math.prod(shape), GROUP)
    if len(shape) > 1 and size >= GROUP // 4:
        return size
    return 0


def state_bytes(shapes: Iterable[Sequence[int]]) -> int:
    """Weights of these shapes in float32 with moments of 8 bits, in memory or in a checkpoint."""
    total = 0
    for shape in shapes:
        numbers = math.prod(shape)
        group = group_of(shape)
        moment_bytes = GRADIENT_BYTES * numbers
        if group:
            moment_bytes = numbers + GRADIENT_BYTES * numbers // group
        total += GRADIENT_BYTES * numbers + len(MOMENTS) * moment_bytes
    return total


def update_bytes(numbers: int, *, eight_bit: bool = False) -> int:
    """What the update of a weight of so many numbers makes beside its state (measured).

    A clipped gradient and, where moments have 8 bits, these opened; the rest is written over what
    it is made of.
    """
    arrays = 2 + len(MOMENTS) if eight_bit else 2
    return GRADIENT_BYTES * arrays * numbers


class _Packed(_Fused):
    """`_Fused` with moments of 8 bits, unpacked and packed again one weight at a time."""

    def init_single(self, parameter: mx.array, state: dict[str, mx.array]) -> None:
        group = group_of(parameter.shape)
        if not group:
            return super().init_single(parameter, state)
        groups = parameter.size // group
        state["m"] = mx.zeros((groups, group), mx.int8)
        state["v"] = mx.zeros((groups, group), mx.uint8)
        state["m_top"] = mx.zeros((groups, 1))
        state["v_top"] = mx.zeros((groups, 1))

    def apply_single(
        self,
        gradient: mx.array,
        parameter: mx.array,
        state: dict[str, mx.array],
    ) -> mx.array:
        if "m_top" not in state:
            return super().apply_single(gradient, parameter, state)
        with self.stream_of(_lightest(self._loads, parameter.size)):
            scale, rate, root, decay = self._factors(gradient, parameter)
            # (groups, group), as the moments lie
            g = gradient.reshape(state["m"].shape)
            m = _first_of_code(state["m"], state["m_top"], g, scale, beta=self.betas[0])
            r = _root_of_code(state["v"], state["v_top"], g, scale, beta=self.betas[1])
            # Each group's largest is its new scale; TINY where all are 0, which are divided by it.
            state["m_top"] = mx.maximum(mx.abs(m).max(axis=1, keepdims=True), TINY)
            state["v_top"] = mx.maximum(r.max(axis=1, keepdims=True), TINY)
            state["m"] = _code_of_first(m, 127**2 / state["m_top"])
            state["v"] = _code_of_root(r, 255**2 / state["v_top"])
            # The weight moves by the moments before they are coded: their rounding reaches only
            # later steps.
            weight = _weight_of_root(
                parameter.reshape(g.shape),
                m,
                r,
                rate=rate,
                root=root,
                decay=decay,
                eps=self.eps,
            )
            return weight.reshape(gradient.shape)


class GuardedAdamW:
    """mlx.optimizers.AdamW behind a guard on loss and gradient norm.

    While the guard has nothing to do, this is AdamW but for the rounding of sums. The guard looks
    before the update: a loss or norm that is not finite skips the step (three in a row raise
    `Diverged`); a norm above mean + 5 sigma of the last 50 is clipped to that bound.

    eight_bit: matrices' moments take 2.06 bytes a parameter instead of 8. relative: a step is a
    share of a tensor's root mean square, as Adafactor's.
    """

    def __init__(
        self,
        *,
        weight_decay: float = 0.01,
        eight_bit: bool = False,
        relative: bool = False,
    ):
        kind = _Packed if eight_bit else _Fused
        self.adamw = kind(0.0, betas=[0.9, 0.95], weight_decay=weight_decay, bias_correction=True)
        self.adamw.relative = relative
        self.bad: list[int] = []  # bad batches in a row, up to now
        self.skipped: list[int] = []  # batches left out from now on
        self.norms: list[float] = []  # of the last WINDOW steps, clipped ones as clipped
        self.lr_scale = 1.0  # factor on every learning rate

    def bound(self) -> float:
        """The largest gradient norm that passes unclipped now."""
        if len(self.norms) < WAKE:
            return math.inf
        mean = sum(self.norms) / len(self.norms)
        variance = sum((norm - mean) ** 2 for norm in self.norms) / len(self.norms)
        return mean + SIGMAS * math.sqrt(variance)

    def skip_batches(self, batches: Sequence[int]) -> None:
        """From now on leave these batches out, and learn at half the rate."""
        self.bad = []
        self.skipped = [*self.skipped, *batches]
        self.lr_scale = self.lr_scale / 2

    def update(
        self,
        model: nn.Module,
        gradients: Any,
        loss: float,
        norm: float,
        learning_rate: float,
        batch: int = 0,
        scale: float = 1.0,
        stream_of: StreamOf = nullcontext,
    ) -> str:
        """One step on `model`'s trainable parameters, lazily. Returns a note on the guard's action.

        The note is '' where the guard did nothing. scale: of the gradients; `norm` is that of the
        scaled ones. stream_of: where MLX computes the i-th of several weights. Raises `Diverged`.
        """
        learns, note = self.decide(loss, norm, learning_rate, batch=batch, scale=scale)
        if learns:
            self.adamw.stream_of = stream_of
            self.adamw.update(model, gradients)
        return note

    def decide(
        self,
        loss: float,
        norm: float,
        learning_rate: float,
        *,
        batch: int = 0,
        scale: float = 1.0,
    ) -> tuple[bool, str]:
        """(whether the step may change weights, a note), by the loss and norm of all of it.

        Sets rate and scale of the update that may follow: `update`, or `begin_parts` and
        `updated`. The rest as of `update`.
        """
        if batch in self.skipped:
            return False, "skipped: not a number before"
        # Before the update: moments that have taken in a NaN never lose it again.
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.bad = [*self.bad, batch]
            if len(self.bad) >= PATIENCE:
                raise Diverged(self.bad, loss)
            return False, "skipped: not a number"
        self.bad = []
        bound = self.bound()
        note = ""
        if norm > bound:
            scale *= bound / norm
            note = f"clipped {norm:.1f} to {bound:.1f}"
        # A clipped norm is remembered as clipped: otherwise one outlier would raise the bound.
        self.norms = [*self.norms, min(norm, bound)][-WINDOW:]
        self.adamw.learning_rate = learning_rate * self.lr_scale
        self.adamw.scale = scale
        return True, note

    def begin_parts(self, stream_of: StreamOf = nullcontext) -> None:
        """Begin the update of a step that `decide` lets learn, whose weights come in parts."""
        self.adamw.stream_of = stream_of
        self.adamw.begin_parts()

    def updated(self, part: Part, gradients: Named) -> Part:
        """Some weights and their moments after the step, lazy: to the bit as `update` makes them.

        gradients: of these weights, not scaled.
        """
        return self.adamw.apply_part(part, gradients)

    def arrays(self) -> dict[str, mx.array]:
        """Moments and step count by name, for a checkpoint."""
        return dict(tree_flatten(self.adamw.state))

    def memory(self) -> dict[str, Any]:
        """Everything that the guard remembers, for a checkpoint's state.json."""
        return {
            "norms": self.norms,
            "bad": self.bad,
            "skipped": self.skipped,
            "lr_scale": self.lr_scale,
        }

    def restore(self, arrays: dict[str, mx.array], memory: dict[str, Any]) -> None:
        """Put back what `arrays` and `memory` gave."""
        self.adamw.state = tree_unflatten(list(arrays.items()))
        self.norms = memory["norms"]
        self.bad = memory["bad"]
        self.skipped = memory["skipped"]
        self.lr_scale = memory["lr_scale"]
