"""The loop: a step cut into micro-batches is the same step; stopping and going on changes
nothing.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mis_mlx.alignment.whole_model import WholeModel
from mis_mlx.distillation import train_loop
from mis_mlx.maths.optimizer import GuardedAdamW
from mis_mlx.settings.recipe import TrainingConfig
from mis_mlx.types import Step
from tests import tiny


def net() -> nn.Module:
    """Two linears with fixed weights."""
    made = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    keys = mx.random.split(mx.random.key(0), 8)
    shapes = [(n, p.shape) for n, p in tree_flatten(made.parameters())]
    made.load_weights(
        [(n, 0.5 * mx.random.normal(s, key=keys[i])) for i, (n, s) in enumerate(shapes)]
    )
    return made


def squares(
    model: nn.Module, x: mx.array, y: mx.array, loss_mask: mx.array
) -> tuple[mx.array, mx.array]:
    return (mx.square(model(x)[:, 0] - y) * loss_mask).sum(), loss_mask.sum()


def rows(step: int) -> tuple[mx.array, mx.array, mx.array]:
    """Twelve rows of a step, with an uneven learn mask."""
    k = mx.random.split(mx.random.key(step), 2)
    loss_mask = mx.array([1.0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0.0])
    return mx.random.normal((12, 4), key=k[0]), mx.random.normal((12,), key=k[1]), loss_mask


def cut(sizes: list[int]) -> Any:
    """micro_batches(step) that cuts the twelve rows into parts of `sizes`."""

    def micro_batches(step: int) -> list[tuple[mx.array, ...]]:
        parts = []
        start = 0
        for size in sizes:
            parts.append(tuple(array[start : start + size] for array in rows(step)))
            start += size
        return parts

    return micro_batches


def weights(model: nn.Module) -> dict[str, Any]:
    return {n: p.tolist() for n, p in tree_flatten(model.parameters())}


def run(
    model: nn.Module, optimizer: GuardedAdamW, micro_batches: Any, start: int = 0, **more: Any
) -> list[Step]:
    return list(
        train_loop.steps(
            WholeModel(model, optimizer),
            micro_batches,
            squares,
            tiny.schedule(6, 1e-2, 2),
            start=start,
            **more,
        )
    )


@pytest.mark.parametrize("sizes", [[6, 6], [1, 11], [5, 1, 6], [1] * 12])
def test_micro_batches_do_not_change_a_step(sizes: list[int]) -> None:
    """However 12 rows with an uneven mask are cut (parts without a counted row included): same step
    to 1e-6.
    """
    whole = net()
    parts = net()
    one = run(whole, GuardedAdamW(), cut([12]))
    many = run(parts, GuardedAdamW(), cut(sizes))
    for a, b in zip(one, many, strict=True):
        assert (a.loss, a.grad_norm, a.tokens) == (
            pytest.approx(b.loss, rel=1e-6),
            pytest.approx(b.grad_norm, rel=1e-5),
            6,
        )
    for (name, a), (_, b) in zip(
        tree_flatten(whole.parameters()), tree_flatten(parts.parameters()), strict=True
    ):
        assert mx.abs(a - b).max().item() < 1e-6, name


def test_further_sums_come_as_means_and_tokens_as_a_number() -> None:
    """A loss that tells more: means over what it counts, whatever the cut; "tokens" is what the
    step then names.
    """

    def telling(model: nn.Module, x: mx.array, y: mx.array, loss_mask: mx.array) -> tuple[Any, ...]:
        total, count = squares(model, x, y, loss_mask)
        return total, count, {"target": (y * loss_mask).sum(), "tokens": mx.array(float(len(y)))}

    schedule = tiny.schedule(2, 1e-2, 2)
    whole, parts = (
        list(train_loop.steps(WholeModel(net(), GuardedAdamW()), cut(sizes), telling, schedule))
        for sizes in ([12], [5, 1, 6])
    )
    for number, (a, b) in enumerate(zip(whole, parts, strict=True)):
        _, y, loss_mask = rows(number)
        assert a.tokens == b.tokens == 12
        assert set(a.further) == set(b.further) == {"target"}
        assert a.further["target"] == pytest.approx(b.further["target"], rel=1e-6)
        assert a.further["target"] == pytest.approx((y * loss_mask).sum().item() / 6, rel=1e-6)


def test_a_step_by_pencil() -> None:
    """y = w x with w = 2, x = 1 and 3, targets 0, the second masked: loss 4, gradient 4, norm 4, 1
    token.
    """
    model = nn.Linear(1, 1, bias=False)
    model.weight = mx.array([[2.0]])
    batch = (mx.array([[1.0], [3.0]]), mx.array([0.0, 0.0]), mx.array([1.0, 0.0]))
    schedule = tiny.schedule(1, 0.5, 1)
    (step,) = train_loop.steps(
        WholeModel(model, GuardedAdamW(weight_decay=0.0)), lambda _: [batch], squares, schedule
    )
    assert (step.number, step.loss, step.grad_norm, step.learning_rate, step.tokens) == (
        1,
        4.0,
        4.0,
        0.5,
        1,
    )
    # Adam's first step is the learning rate
    assert model.weight.item() == pytest.approx(1.5, abs=1e-6)


def test_all_masked_is_not_a_division_by_zero() -> None:
    """No token counts: loss 0, gradient 0, and only weight decay moves the weights."""
    model = net()
    x, y, loss_mask = rows(0)
    schedule = tiny.schedule(1, 1e-2, 1)
    (step,) = train_loop.steps(
        WholeModel(model, GuardedAdamW(weight_decay=0.0)),
        lambda _: [(x, y, 0 * loss_mask)],
        squares,
        schedule,
    )
    assert (step.loss, step.grad_norm) == (0.0, 0.0)
    assert weights(model) == weights(net())


def test_recipe_schedule() -> None:
    """Peak and floor of the flags; a warm-up longer than the run is cut to it."""
    schedule = TrainingConfig(iters=3, learning_rate=1e-3)
    assert [schedule.rate(i) for i in range(3)] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3])
    assert TrainingConfig(iters=10).rate(9) == pytest.approx(3e-5)
