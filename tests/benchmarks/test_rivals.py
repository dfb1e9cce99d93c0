"""mlx_lm.dwq on de-quantized weights: the same values and the same gradients as on packed ones."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

other_quantizers = pytest.importorskip("benchmarks.other_quantizers")


class Pair(nn.Module):
    """An embedding that is the head, too, and a layer with a bias between them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 128)
        self.linear = nn.Linear(128, 128)

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.embed.as_linear(self.linear(self.embed(tokens)))


@pytest.mark.parametrize("bits", [3, 4])
def test_unpacked_layers_learn_what_packed_ones_do(bits: int) -> None:
    """To float32's rounding; afterwards the packed layers hold what was learned."""
    mx.random.seed(0)
    model = Pair()
    nn.quantize(model, group_size=64, bits=bits)
    tokens = mx.array([[3, 7, 95, 0]])

    def loss(parameters: dict) -> mx.array:
        model.update(parameters)
        return mx.square(nn.softmax(model(tokens), axis=-1)).sum()

    def learn() -> tuple[float, dict[str, mx.array]]:
        for module in (model.embed, model.linear):
            module.unfreeze(keys=["scales", "biases"], recurse=False)
        value, gradients = mx.value_and_grad(loss)(model.trainable_parameters())
        return float(value), dict(tree_flatten(gradients))

    packed_value, packed = learn()
    pairs = other_quantizers.unpack(model)
    wide_value, wide = learn()
    assert wide_value == pytest.approx(packed_value, rel=1e-4)
    assert sorted(wide) == sorted(packed)
    assert len(packed) == 5
    for name, gradient in packed.items():
        largest = float(mx.abs(gradient).max())
        assert float(mx.abs(gradient - wide[name]).max()) < 1e-3 * largest, name
    model.linear.scales = 2 * model.linear.scales
    doubled = mx.array(model.linear.scales)
    other_quantizers.pack_again(model, pairs)
    assert isinstance(model.linear, nn.QuantizedLinear)
    assert mx.array_equal(model.linear.scales, doubled)
