"""A layer whose scales and biases learn: its product and its gradients."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mis_mlx.maths import rounding
from mis_mlx.quantization import learned_scales, packed_format
from tests import peaks


@pytest.mark.usefixtures("policy")
@pytest.mark.parametrize("at_once", [learned_scales.LEARNED_AT_ONCE, 20 * 128])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_the_gradients_of_a_grid(
    dtype: mx.Dtype, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of input, scales and biases, against the same product by plain operations, in their types;
    the matrix at once, and in slabs of 20, 20 and 8 rows.
    """
    monkeypatch.setattr(learned_scales, "LEARNED_AT_ONCE", at_once)
    weight = mx.random.normal((48, 128), key=mx.random.key(1))
    packed = rounding.fitted(weight, 32, 3)
    grid = learned_scales.TrainableQuantizedLinear(packed, packed_format.Format(3, 32))
    x = mx.random.normal((2, 5, 128), key=mx.random.key(2)).astype(dtype)
    pull = mx.random.normal((2, 5, 48), key=mx.random.key(3))

    def plain(x: mx.array, scales: mx.array, biases: mx.array) -> list[mx.array]:
        values = grid.levels() * scales[..., None] + biases[..., None]
        return [x @ values.reshape(48, 128).T]

    def ours(x: mx.array, scales: mx.array, biases: mx.array) -> list[mx.array]:
        grid.scales = scales
        grid.biases = biases
        return [grid(x)]

    primals = [x, grid.scales, grid.biases]
    wanted_outputs, wanted = mx.vjp(plain, primals, [pull])
    outputs, found = mx.vjp(ours, primals, [pull])
    for a, b in zip([*outputs, *found], [*wanted_outputs, *wanted], strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert mx.allclose(a, b, rtol=1e-5, atol=1e-4 if a.dtype == mx.float32 else 1e-2)


def test_a_wide_matrix_is_never_there_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its product and its gradients take eight arrays of a slab at the most, where it has 32
    slabs.
    """
    monkeypatch.setattr(learned_scales, "LEARNED_AT_ONCE", 2**16)
    weight = mx.random.normal((4096, 512), key=mx.random.key(1))
    packed = rounding.nearest(weight, 64, 4)
    grid = learned_scales.TrainableQuantizedLinear(packed, packed_format.Format(4, 64))
    x = mx.random.normal((4, 512), key=mx.random.key(2))
    pull = mx.random.normal((4, 4096), key=mx.random.key(3))

    def ours(x: mx.array, scales: mx.array, biases: mx.array) -> list[mx.array]:
        grid.scales = scales
        grid.biases = biases
        return [grid(x)]

    primals = [x, grid.scales, grid.biases]
    mx.eval(primals, pull, grid._stored)
    del weight, packed
    with peaks.of_mlx() as peak:
        mx.eval(mx.vjp(ours, primals, [pull]))
    results = 4 * (2 * 4096 * 512 // 64 + 4 * 4096 + 4 * 512)
    # gradients of scales twice: slab by slab, and joined
    assert peak.nbytes < 2 * results + 8 * 4 * 2**16
