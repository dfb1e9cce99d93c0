"""GóralW: AdamW with a sheepdog. One bad batch must not poison the moments.

AdamW itself is mlx.optimizers'; here is the dog (a guard on loss and gradient norm) and the schedule.
Does not know models' insides, files or the training loop.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_map_with_path, tree_reduce, tree_unflatten

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
        super().__init__(
            f"{len(batches)} steps in a row, of batches {', '.join(first)} and {last}, gave a loss or gradient that is "
            f"not a number (last loss {loss}) and changed no weight: look at these batches, or start a new run with a "
            "lower --learning-rate"
        )


def cosine(step: int, iters: int, peak: float, warmup: int, floor: float = 0.1) -> float:
    """Learning rate of 0-based `step`: linear warm-up to `peak`, then cosine to `floor * peak` at the end."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, iters - 1 - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def global_norm(gradients: Any) -> mx.array:
    """Euclidean norm over all gradients, a scalar. Sums each tensor's last axis first: float32 sums drift."""
    squares = tree_map(lambda g: mx.square(g.astype(mx.float32)).sum(axis=-1).sum(), gradients)
    return mx.sqrt(tree_reduce(lambda a, b: a + b, squares, mx.array(0.0)))


class GoralW:
    """mlx.optimizers.AdamW behind a gradient-norm guard; with `guard=False` it is AdamW to the last bit.

    The guard looks before the update: a loss or norm that is not finite skips the step (three in a row raise
    `Diverged`); a norm above mean + 5 sigma of the last 50 is clipped to that bound.
    factors: {how weights' names end: factor on their learning rate}; 1 leaves AdamW as it is.
    """

    def __init__(
        self,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.01,
        guard: bool = True,
        factors: Mapping[str, float] | None = None,
    ):
        self.factors = {end: factor for end, factor in (factors or {}).items() if factor != 1.0}
        self.adamw = optim.AdamW(0.0, betas=list(betas), weight_decay=weight_decay, bias_correction=True)
        self.guard = guard
        self.norms: list[float] = []
        self.bad: list[int] = []  # batches, in a row
        self.passed: list[int] = []  # batches that are left out
        self.calm = 1.0  # factor on every learning rate

    def bound(self) -> float:
        """The largest gradient norm that passes unclipped now."""
        if not self.guard or len(self.norms) < WAKE:
            return math.inf
        mean = sum(self.norms) / len(self.norms)
        variance = sum((n - mean) ** 2 for n in self.norms) / len(self.norms)
        return mean + SIGMAS * math.sqrt(variance)

    def pass_over(self, batches: Sequence[int]) -> None:
        """From now on leave these batches out, and learn at half the rate."""
        self.bad, self.passed, self.calm = [], [*self.passed, *batches], self.calm / 2

    def update(
        self, model: nn.Module, gradients: Any, loss: float, norm: float, learning_rate: float, batch: int = 0
    ) -> str:
        """One step on `model`'s trainable parameters, lazily. Returns what the dog did ('' = it slept)."""
        note = ""
        if batch in self.passed:
            return "skipped: not a number before"
        if self.guard:
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self.bad = [*self.bad, batch]
                if len(self.bad) >= PATIENCE:
                    raise Diverged(self.bad, loss)
                return "skipped: not a number"
            self.bad = []
            bound = self.bound()
            if norm > bound:
                gradients = tree_map(lambda g: g * (bound / norm), gradients)
                note = f"clipped {norm:.1f} to {bound:.1f}"
            self.norms = [*self.norms, min(norm, bound)][-WINDOW:]
        self.adamw.learning_rate = learning_rate * self.calm
        moved = self.adamw.apply_gradients(gradients, model)
        model.update(self._scaled(model, moved) if self.factors else moved)
        return note

    def _scaled(self, model: nn.Module, moved: Any) -> Any:
        """The new weights, those with a factor only so far: AdamW's step, decay and all, is linear in its rate."""
        before = dict(tree_flatten(model.parameters()))

        def scale(name: str, after: mx.array) -> mx.array:
            factor = next((f for end, f in self.factors.items() if name.endswith(end)), None)
            return after if factor is None else before[name] + factor * (after - before[name])

        return tree_map_with_path(scale, moved)

    def arrays(self) -> dict[str, mx.array]:
        """Moments and step count by name, for a checkpoint."""
        return dict(tree_flatten(self.adamw.state))

    def memory(self) -> dict[str, Any]:
        """What the dog remembers, for a checkpoint's state.json."""
        return {"norms": self.norms, "bad": self.bad, "passed": self.passed, "calm": self.calm}

    def restore(self, arrays: dict[str, mx.array], memory: dict[str, Any]) -> None:
        """Put back what `arrays` and `memory` gave."""
        self.adamw.state = tree_unflatten(list(arrays.items()))
        self.norms, self.bad = list(memory["norms"]), list(memory["bad"])
        self.passed, self.calm = list(memory["passed"]), float(memory["calm"])
