"""Loss-aware importance: the streamed way back against mlx-lm's whole model, and against the KL it
stands for.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from benchmarks.ablations import fisher_importance
from mis_mlx.compute import host_losses
from mis_mlx.models import load, stream
from mis_mlx.types import Checkpoint
from tests.conftest import near


def by_hand(
    model: Checkpoint, tokens: mx.array, key: mx.array, layer: int, part: str, name: str
) -> np.ndarray:
    """Gradients (T, in) of the drawn tokens' log p in gates before one matrix of the resident
    model.
    """
    whole = load.resident_model(model, mx.float32)
    owner = whole.model.layers[layer][part]
    inner = owner[name]
    _, own_key = mx.random.split(key)
    drawn = mx.random.categorical(whole(tokens)[0], key=own_key)

    def chance(gate: mx.array) -> mx.array:
        owner[name] = lambda x: inner(x * gate)
        z = whole(tokens)[0]
        owner[name] = inner
        picked = mx.take_along_axis(z, drawn[:, None], axis=-1)[:, 0]
        return (picked - mx.logsumexp(z, axis=-1)).sum()

    open_gates = mx.ones((1, tokens.shape[1], inner.weight.shape[1]))
    gradient = mx.grad(chance)(open_gates)
    return np.array(gradient[0], np.float64)


@pytest.mark.parametrize("kind", ["llama", "untied", "qwen3"])
def test_streamed_gradients_are_resident_ones(
    models: Callable[[str], Checkpoint], batches: list[mx.array], kind: str
) -> None:
    """Every layer's neurons and heads, over two batches: half the mean square of autodiff's
    gradients.
    """
    model = models(kind)
    # float32, two orders of sums; or half precision against it
    close = {"rtol": near(1e-3, 0.05), "atol": near(1e-9, 1e-6)}

    found = fisher_importance.fisher(model, batches, seed=3)

    for layer in range(3):
        neurons = np.zeros(768)
        heads = np.zeros(4)
        for b, tokens in enumerate(batches):
            key = mx.random.key(3 * len(batches) + b)
            host_gradients = by_hand(
                model, tokens, key=key, layer=layer, part="mlp", name="down_proj"
            )
            neurons += (
                np.square(host_gradients).mean(axis=0) / 4
            )  # half of the mean over two batches
            host_gradients = by_hand(
                model, tokens, key=key, layer=layer, part="self_attn", name="o_proj"
            )
            by_head = host_gradients.reshape(len(host_gradients), 4, -1).sum(axis=-1)
            heads += np.square(by_head).mean(axis=0) / 4
        np.testing.assert_allclose(found[layer, "ffn"], neurons, **close)
        np.testing.assert_allclose(found[layer, "heads"], heads, **close)
    hidden = found[-1, "hidden"]
    assert hidden.shape == (64,)
    assert (hidden > 0).all()
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
        source.run_block(block, hidden)
    pairs = zip(into, hidden, strict=True)
    damped = source.norm([x + (1 - eps) * (h - x) for x, h in pairs])
    head = source.head()
    kls = []
    for whole, less in zip(source.norm(hidden), damped, strict=True):
        logits = load.logits(head, whole[0])
        damped_logits = load.logits(head, less[0])
        any_targets = np.zeros(whole.shape[1], int)
        compared = host_losses.compared(logits, damped_logits, any_targets)
        kls.append(float(compared[:, 0].mean()))
    assert np.mean(drawn) == pytest.approx(np.mean(kls) / eps**2, rel=0.15)


def test_draws_are_by_seed(llama: Checkpoint, batches: list[mx.array]) -> None:
    """The same seed gives the same bits, another one others."""
    first = fisher_importance.fisher(llama, batches, 0)
    again = fisher_importance.fisher(llama, batches, 0)
    other = fisher_importance.fisher(llama, batches, 1)

    assert all((first[key] == again[key]).all() for key in first)
    assert (first[0, "ffn"] != other[0, "ffn"]).any()
