"""GóralW: AdamW with the dog asleep; what the dog does when it wakes."""

from __future__ import annotations

import json
import math
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten, tree_map

from mis_mlx.maths.optimizer import (
    PATIENCE,
    STATE_BYTES,
    WAKE,
    GuardedAdamW,
    Part,
    global_norm,
    norm_of_squares,
    state_bytes,
    sums_of_squares,
)
from mis_mlx.types import MisError
from tests import tiny


def net() -> nn.Module:
    """A small net with fixed weights."""
    made = nn.Sequential(nn.Linear(6, 5), nn.RMSNorm(5), nn.Linear(5, 3))
    keys = mx.random.split(mx.random.key(1), 8)
    flat = [
        (n, mx.random.normal(p.shape, key=keys[i]))
        for i, (n, p) in enumerate(tree_flatten(made.parameters()))
    ]
    made.load_weights(flat)
    return made


def wide() -> nn.Module:
    """A matrix whose moments fit into 8 bits, with a bias, and one too small for a group."""
    made = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 3, bias=False))
    keys = iter(mx.random.split(mx.random.key(2), 4))
    made.update(
        tree_map(lambda p: 0.1 * mx.random.normal(p.shape, key=next(keys)), made.parameters())
    )
    return made


def gradients(model: nn.Module, step: int, scale: float = 1.0) -> Any:
    """Random gradients of step `step`, scaled to Euclidean norm `scale`."""
    keys = iter(mx.random.split(mx.random.key(100 + step), 16))
    raw = tree_map(
        lambda p: mx.random.normal(p.shape, key=next(keys)), model.trainable_parameters()
    )
    norm = global_norm(raw)
    return tree_map(lambda g: g * (scale / norm), raw)


def flat(tree: Any) -> dict[str, list[float]]:
    return {name: value.tolist() for name, value in tree_flatten(tree)}


def walk(optimizer: GuardedAdamW, model: nn.Module, steps: range, scale: float = 1.0) -> list[str]:
    """Ordinary steps; what the dog said at each."""
    said = []
    for step in steps:
        grads = gradients(model, step, scale)
        norm = float(global_norm(grads))
        rate = tiny.schedule(40, 1e-2, 3).rate(step)
        said.append(optimizer.update(model, grads, loss=1.0, norm=norm, learning_rate=rate))
        mx.eval(model.parameters(), optimizer.adamw.state)
    return said


@pytest.mark.parametrize("kind", [mx.float32, mx.float16])
def test_asleep_it_is_adamw(kind: mx.Dtype) -> None:
    """Where the guard has nothing to do, 5 steps with a changing rate: weights and moments equal
    mlx.optimizers.AdamW's to 1e-6 in float32, to four roundings in float16; the step count exactly.
    """
    ours = net()
    theirs = net()
    for model in (ours, theirs):
        model.set_dtype(kind)
    goral = GuardedAdamW(weight_decay=0.1)
    adamw = optim.AdamW(1e-2, betas=[0.9, 0.95], weight_decay=0.1, bias_correction=True)
    for step in range(5):
        g = tree_map(lambda a: a.astype(kind), gradients(net(), step, 50.0))
        rate = tiny.schedule(40, 1e-2, 3).rate(step)
        adamw.learning_rate = rate
        goral.update(ours, g, loss=1.0, norm=50.0, learning_rate=rate)
        adamw.update(theirs, g)
        mx.eval(ours.parameters(), goral.adamw.state, theirs.parameters(), adamw.state)
    close = {"rtol": 1e-6, "atol": 1e-8} if kind == mx.float32 else {"rtol": 4e-3, "atol": 1e-5}
    for mine, other in ((ours.parameters(), theirs.parameters()), (goral.adamw.state, adamw.state)):
        found = dict(tree_flatten(mine))
        want = dict(tree_flatten(other))
        assert found.keys() == want.keys()
        for name, array in found.items():
            assert array.dtype == want[name].dtype
            assert mx.allclose(array, want[name], **close)
    assert goral.adamw.step.item() == 5


def test_a_new_rate_compiles_nothing_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps after the first trace nothing: Python's part of the update is not entered again."""
    model = net()
    optimizer = GuardedAdamW()
    entered = []
    square = mx.square
    monkeypatch.setattr(mx, "square", lambda a: entered.append(a.shape) or square(a))
    seen = []
    for step in range(3):
        g = tree_map(lambda p, k=step: 0.1 * k + p * 0 + 1, model.trainable_parameters())
        entered.clear()
        optimizer.update(model, g, loss=1.0, norm=1.0, learning_rate=10.0 ** -(2 + step))
        mx.eval(model.parameters(), optimizer.adamw.state)
        seen.append(len(entered))
    assert seen[1:] == [0, 0]


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (1.0, math.inf)])
def test_a_step_that_is_not_a_number_is_skipped(loss: float, norm: float) -> None:
    """Weights, moments, norms and step count stay as they were, and it is noted."""
    model = net()
    optimizer = GuardedAdamW()
    walk(optimizer, model, range(3))
    before = flat(model.parameters()), flat(optimizer.adamw.state), list(optimizer.norms)
    bad = tree_map(lambda g: g * math.nan, gradients(model, 3))
    assert optimizer.update(model, bad, loss=loss, norm=norm, learning_rate=1e-2)
    assert (flat(model.parameters()), flat(optimizer.adamw.state), optimizer.norms) == before


def test_three_bad_steps_in_a_row_stop_the_run() -> None:
    """Two and a good one are forgiven; three raise a sentence with a remedy."""
    model = net()
    optimizer = GuardedAdamW()

    def bad_step() -> None:
        grads = gradients(model, 0)
        optimizer.update(model, grads, loss=math.nan, norm=1.0, learning_rate=1e-2)

    for _ in range(2):
        for _ in range(PATIENCE - 1):
            bad_step()
        walk(optimizer, model, range(1))
    for _ in range(PATIENCE - 1):
        bad_step()
    with pytest.raises(MisError, match="3 steps in a row.*--learning-rate"):
        bad_step()


def test_a_spike_is_clipped_to_mean_plus_five_sigma() -> None:
    """Norms 1 and 2 in turn: mean 1.5, sigma 0.5, so a 100x spike counts as 4; the moments say so
    too. Before ten norms were seen nothing is clipped.
    """
    model = net()
    twin = net()
    dog = GuardedAdamW()
    sleepy = GuardedAdamW()
    for step in range(WAKE):
        assert dog.bound() == math.inf
        for optimizer, own in ((dog, model), (sleepy, twin)):
            walk(optimizer, own, range(step, step + 1), 1.0 + step % 2)
    assert dog.bound() == pytest.approx(1.5 + 5 * 0.5, rel=1e-5)
    dog.update(model, gradients(model, 77, 150.0), loss=1.0, norm=150.0, learning_rate=1e-2)
    assert dog.norms[-1] == pytest.approx(4.0, rel=1e-5)
    sleepy.update(twin, gradients(twin, 77, 4.0), loss=1.0, norm=4.0, learning_rate=1e-2)
    for name, value in tree_flatten(dog.adamw.state):
        want = dict(tree_flatten(sleepy.adamw.state))[name]
        assert mx.allclose(value, want, rtol=1e-4, atol=1e-7), name


def test_batches_that_were_left_out_stay_so_at_half_the_rate() -> None:
    """Also in a run that goes on from what a checkpoint keeps."""
    first = GuardedAdamW()
    first.skip_batches([3, 4])
    later = GuardedAdamW()
    later.restore(first.arrays(), json.loads(json.dumps(first.memory())))
    for optimizer in (first, later):
        learns, note = optimizer.decide(1.0, 1.0, 1e-3, batch=4)
        assert not learns
        assert note
        learns, _ = optimizer.decide(1.0, 1.0, 1e-3, batch=5)
        assert learns
        assert float(optimizer.adamw.learning_rate) == pytest.approx(5e-4)


@pytest.mark.parametrize("eight_bit", [False, True])
def test_relative_steps_are_a_share_of_each_tensor(eight_bit: bool) -> None:
    """Scales of 8 bits are a seventeenth of those of 4 and go a seventeenth as far; AdamW takes
    both equally far. With moments of 8 bits, too.
    """
    sizes = {"four": 0.06, "eight": 0.06 * 15 / 255}
    moved = {}
    for relative in (False, True):
        model = nn.Module()
        optimizer = GuardedAdamW(weight_decay=0.0, relative=relative, eight_bit=eight_bit)
        dict.update(model, {name: mx.full((4, 32), size) for name, size in sizes.items()})
        ones = tree_map(mx.ones_like, model.parameters())
        optimizer.update(model, ones, loss=1.0, norm=1.0, learning_rate=1e-3)
        moved[relative] = {
            name: abs(model[name][0, 0].item() - size) for name, size in sizes.items()
        }
    assert moved[False] == pytest.approx({"four": 1e-3, "eight": 1e-3}, rel=1e-3)
    assert moved[True] == pytest.approx(
        {name: 1e-3 * size for name, size in sizes.items()}, rel=1e-2
    )


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_eight_bits_go_nearly_where_adamw_goes(spread: float) -> None:
    """30 steps of noise around a direction, every element on a scale of its own: where the matrix
    has gone differs by less than 6 % from AdamW's. A bias and a small matrix have float32 moments,
    and the same bits.
    """
    models = [wide(), wide()]
    optimizers = [GuardedAdamW(eight_bit=e, weight_decay=0.0) for e in (False, True)]
    begun = dict(tree_flatten(wide().parameters()))
    keys = mx.random.split(mx.random.key(3), 33)
    size = tree_map(
        lambda p: 1e-3 * mx.exp(spread * mx.random.normal(p.shape, key=keys[30])),
        wide().parameters(),
    )
    ahead = tree_map(lambda p: 0.2 * mx.random.normal(p.shape, key=keys[31]), wide().parameters())
    for step in range(30):
        noise = partial(lambda k, s, a: s * (a + mx.random.normal(s.shape, key=k)), keys[step])
        g = tree_map(noise, size, ahead)
        norm = float(global_norm(g))
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.update(model, g, loss=1.0, norm=norm, learning_rate=1e-3)
            mx.eval(model.parameters(), optimizer.adamw.state)
    plain, packed = (dict(tree_flatten(model.parameters())) for model in models)
    way, other = (named["layers.0.weight"] - begun["layers.0.weight"] for named in (plain, packed))
    assert 0 < mx.linalg.norm(way - other).item() < 0.06 * mx.linalg.norm(way).item()
    assert all(
        mx.array_equal(plain[name], packed[name]) for name in plain if name != "layers.0.weight"
    )


@pytest.mark.parametrize("eight_bit", [True, False])
def test_a_plan_counts_what_the_optimizer_keeps(eight_bit: bool) -> None:
    """Weights and moments of every shape, to the byte. Gradients of zeros move nothing, and divide
    nothing.
    """
    model = wide()
    optimizer = GuardedAdamW(eight_bit=eight_bit, weight_decay=0.0)
    nothing = tree_map(mx.zeros_like, model.parameters())
    optimizer.update(model, nothing, loss=1.0, norm=0.0, learning_rate=1e-2)
    assert flat(model.parameters()) == flat(wide().parameters())
    weights = dict(tree_flatten(model.parameters()))
    kept = [array.nbytes for array in weights.values()]
    kept += [a.nbytes for name, a in optimizer.arrays().items() if name.startswith("layers.")]
    shapes = [array.shape for array in weights.values()]
    planned = STATE_BYTES * sum(math.prod(shape) for shape in shapes)
    assert sum(kept) == (state_bytes(shapes) if eight_bit else planned)


@pytest.mark.parametrize("relative", [False, True])
def test_in_parts_it_is_the_same_to_the_bit(relative: bool) -> None:
    """Layer by layer, in an order of its own, past an outlier that is clipped and a step of no
    number: weights, moments, step count and what the guard says and remembers.
    """
    whole = net()
    at_once = GuardedAdamW(relative=relative)
    in_parts = GuardedAdamW(relative=relative)
    parts: dict[str, Part] = {}
    for name, weight in tree_flatten(whole.parameters()):
        layer, _, _ = name.rpartition(".")
        before = parts.setdefault(layer, Part({}, {}))
        parts[layer] = Part({**before.weights, name: weight}, {})
    scales = [1.0] * (WAKE + 2) + [100.0, math.nan, 1.0]
    for step, scale in enumerate(scales):
        grads = gradients(whole, step, scale)
        named = dict[str, mx.array](tree_flatten(grads))
        norm = float(global_norm(grads))
        squares = [sums_of_squares([grad])[0] for grad in named.values()]
        assert mx.array_equal(norm_of_squares(squares), mx.array(norm), equal_nan=True)
        note = at_once.update(whole, grads, loss=1.0, norm=norm, learning_rate=1e-2, batch=step)
        learns, said = in_parts.decide(1.0, norm, 1e-2, batch=step)
        assert said == note
        if learns:
            in_parts.begin_parts()
            for layer in reversed(parts):
                parts[layer] = in_parts.updated(parts[layer], named)
    learned = {}
    moments = in_parts.arrays()
    for part in parts.values():
        learned |= part.weights
        for name, of_weight in part.moments.items():
            moments |= {f"{name}.{moment}": array for moment, array in of_weight.items()}
    assert flat(learned) == flat(dict(tree_flatten(whole.parameters())))
    assert flat(moments) == flat(at_once.arrays())
    assert in_parts.memory() == at_once.memory()
    assert in_parts.bad == []


def test_global_norm_by_pencil() -> None:
    """3, 4 in two tensors and 12 in a scalar: 13."""
    tree = {"a": mx.array([[3.0, 0.0]]), "b": {"c": mx.array([4.0]), "d": mx.array([12.0])}}
    assert global_norm(tree).item() == 13.0


def test_cosine_by_pencil() -> None:
    """Warm-up 2: half, full; then down a cosine over 8 steps: halfway 0.55, at the end a tenth of
    the peak.
    """
    rates = [tiny.schedule(11, 1.0, 2).rate(step) for step in range(11)]
    assert rates[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert rates[6] == pytest.approx(0.1 + 0.9 * 0.5)
    assert rates[10] == pytest.approx(0.1)
    assert rates[2:] == sorted(rates[2:], reverse=True)
