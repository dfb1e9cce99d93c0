"""Calibration: streamed statistics equal those of the resident model; the weather of each batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx.compute import precision
from mis_mlx.maths import importance
from mis_mlx.models.architectures import modules
from mis_mlx.models.opening import load
from mis_mlx.models.passing import stream
from mis_mlx.pruning import calibrate
from mis_mlx.types import Air, Checkpoint
from tests import tiny
from tests.conftest import near


def wide(array: mx.array) -> np.ndarray:
    """In float64."""
    return np.array(array, np.float64)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_streamed_statistics_are_resident_ones(
    models: Callable[[str], Checkpoint], batches: list[mx.array], kind: str
) -> None:
    """FFN and heads, gathered inside mlx-lm's whole model by hand: equal to the
    last bit.
    """
    statistics, hidden = calibrate.calibrate(models(kind), batches)
    model = load.resident_model(models(kind), precision.dtype_of(models(kind)))
    for layer in model.model.layers:
        for part, name in (
            (layer.mlp, "down_proj"),
            (layer.self_attn, "o_proj"),
        ):
            setattr(part, name, modules.InputRecorder(getattr(part, name)))
    squares = np.zeros((3, 768))
    loud = np.zeros((3, 4))
    for tokens, streamed in zip(batches, hidden, strict=True):
        assert mx.array_equal(model.model(tokens), streamed)
        for i, layer in enumerate(model.model.layers):
            seen = layer.mlp.down_proj.take()
            squares[i] += wide(importance.square_sample(seen)) / tokens.size
            attended = layer.self_attn.o_proj.take()
            by_head = mx.square(attended).reshape(-1, 4, 16)
            norm = mx.sqrt(by_head.sum(axis=-1))
            loud[i] += wide(mx.square(norm).mean(axis=0))
    for i in range(3):
        assert (statistics.ffn[i].square == squares[i]).all()
        np.testing.assert_allclose(statistics.heads[i].square, loud[i], rtol=near(1e-5, 5e-3))


def test_block_importance_by_hand(llama: Checkpoint, batches: list[mx.array]) -> None:
    """1 - cosine of what goes into and comes out of each block, mean over batches."""
    statistics, _ = calibrate.calibrate(llama, batches)
    source = stream.Stream(llama, mx.float32)
    hidden = source.embed(batches)
    for i, block in source.blocks():
        out = source.run_block(block, list(hidden))
        cosines = []
        for before, after in zip(hidden, out, strict=True):
            x = wide(before)
            y = wide(after)
            lengths = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
            cosine = (x * y).sum(-1) / lengths
            cosines.append(cosine.mean())
        assert statistics.block[i] == pytest.approx(1 - np.mean(cosines), abs=1e-5)
        hidden = out


def airs(*celsius: float | None) -> Callable[[], Air]:
    """A thermometer that says these, one after another, and then fails the test."""
    left: Iterator[float | None] = iter(celsius)
    return lambda: Air(next(left), altitude_m=832.0)


def test_each_batch_is_weighed_by_its_own_air(llama: Checkpoint, batches: list[mx.array]) -> None:
    """Asked once a batch, not once a block; T_b in kelvin weighs batch b in every layer."""
    both, _ = calibrate.calibrate(llama, batches, airs(10.0, 30.0))
    first, _ = calibrate.calibrate(llama, batches[:1])
    second, _ = calibrate.calibrate(llama, batches[1:])

    assert both.measured
    assert both.ambient_c == [10.0, 30.0]
    assert both.altitude_m == 832.0
    for i in range(3):
        for found, cold, hot in (
            (both.ffn[i], first.ffn[i], second.ffn[i]),
            (both.heads[i], first.heads[i], second.heads[i]),
        ):
            weighed = cold.square * 283.15**2 + hot.square * 303.15**2
            np.testing.assert_allclose(found.env_weighted, weighed, rtol=1e-12)
            np.testing.assert_allclose(found.square, cold.square + hot.square, rtol=1e-12)


def test_a_gap_in_the_weather_means_plain_importance(
    llama: Checkpoint, batches: list[mx.array]
) -> None:
    """One batch without T_env: all weigh 1 and `measured` is False, so nobody is favoured by a
    broken sensor.
    """
    statistics, _ = calibrate.calibrate(llama, batches, airs(10.0, None))
    assert not statistics.measured
    assert statistics.ambient_c == [10.0]
    assert (statistics.ffn[0].env_weighted == statistics.ffn[0].square).all()
