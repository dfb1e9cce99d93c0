"""Loss-aware importance: the streamed way back against mlx-lm's whole model, and against the KL it
stands for.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from benchmarks.ablations import fisher_importance
from mis_mlx.models import host_losses, load, stream
from mis_mlx.types import Checkpoint
from tests.conftest import near


def by_hand(
    model: Checkpoint, tokens: mx.array, key: mx.array, layer: int, part: str, name: str
) -> np.ndarray:
    """Gradients (T, in) of the drawn tokens' log p in gates before one matrix of the resident
    model.
    """
    whole = load.resident(model, mx.float32)
    owner = whole.model.layers[layer][part]
    inner = owner[name]
    drawn = mx.random.categorical(whole(tokens)[0], key=mx.random.split(key)[1])

    def chance(gate: mx.array) -> mx.array:
        owner[name] = lambda x: inner(x * gate)
        z = whole(tokens)[0]
        owner[name] = inner
        picked = mx.take_along_axis(z, drawn[:, None], axis=-1)[:, 0]
        return (picked - mx.logsumexp(z, axis=-1)).sum()

    size = inner.weight.shape[1]
    return np.array(mx.grad(chance)(mx.ones((1, tokens.shape[1], size)))[0], np.float64)


@pytest.mark.parametrize("kind", ["llama", "untied", "qwen3"])
def test_streamed_gradients_are_resident_ones(
    models: Callable[[str], Checkpoint], batches: list[mx.array], kind: str
) -> None:
    """Every layer's neurons and heads, over two batches: half the mean square of autodiff's
    gradients.
    """
    found = fisher_importance.fisher(models(kind), batches, seed=3)
    for layer in range(3):
        neurons = np.zeros(768)
        heads = np.zeros(4)
        for b, tokens in enumerate(batches):
            key = mx.random.key(3 * len(batches) + b)
            slopes = by_hand(
                models(kind), tokens, key=key, layer=layer, part="mlp", name="down_proj"
            )
            neurons += np.square(slopes).mean(axis=0) / 4  # half of the mean over two batches
            slopes = by_hand(
                models(kind), tokens, key=key, layer=layer, part="self_attn", name="o_proj"
            )
            heads += np.square(slopes.reshape(len(slopes), 4, -1).sum(axis=-1)).mean(axis=0) / 4
        close = near(1e-3, 0.05)  # float32, two orders of sums; or half precision against it
        np.testing.assert_allclose(found[layer, "ffn"], neurons, rtol=close, atol=near(1e-9, 1e-6))
        np.testing.assert_allclose(found[layer, "heads"], heads, rtol=close, atol=near(1e-9, 1e-6))
    assert found[-1, "hidden"].shape == (64,) and (found[-1, "hidden"] > 0).all()
    assert all(found[layer, "layers"].shape == (1,) for layer in range(3))


def test_it_is_the_kl_of_a_gate_half_closed(llama: Checkpoint, batches: list[mx.array]) -> None:
    """The last block damped by eps: KL(model || damped) = eps^2 times its fisher value, in the mean
    over draws.

    Only of the last block, because there no later token looks back at an earlier gate. 60 draws a
    position of 48: their mean scatters by some 5 %.
    """
    eps = 0.02
    drawn = [fisher_importance.fisher(llama, batches, seed)[2, "layers"][0] for seed in range(60)]
    source = stream.Stream(llama, mx.float32)
    hidden = source.embed(batches)
    for _, block in source.blocks():
        into = list(hidden)
        source.through(block, hidden)
    damped = source.norm([x + (1 - eps) * (h - x) for x, h in zip(into, hidden, strict=True)])
    head = source.head()
    kl = 0.0
    for a, b in zip(source.norm(hidden), damped, strict=True):
        both = load.logits(head, a[0]), load.logits(head, b[0])
        kl += float(host_losses.compared(*both, np.zeros(a.shape[1], int))[:, 0].mean()) / len(
            batches
        )
    assert np.mean(drawn) == pytest.approx(kl / eps**2, rel=0.15)


def test_draws_are_by_seed(llama: Checkpoint, batches: list[mx.array]) -> None:
    """The same seed gives the same bits, another one others."""
    first, again, other = (fisher_importance.fisher(llama, batches, seed) for seed in (0, 0, 1))
    assert all((first[key] == again[key]).all() for key in first)
    assert (first[0, "ffn"] != other[0, "ffn"]).any()
