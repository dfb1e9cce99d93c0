"""The KL to sparse targets with a head in slabs, beside the same with the head whole."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx.compute import precision, slab_losses
from mis_mlx.compute.token_losses import TokenLoss
from mis_mlx.maths import losses


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("policy", ["cpu", "metal"])
def test_slabs_give_what_the_whole_head_gives(
    monkeypatch: pytest.MonkeyPatch, policy: str, softcap: float
) -> None:
    """700 tokens in slabs of 256, with positions that do not count and fillers that repeat."""
    monkeypatch.setenv(precision.POLICY, policy)
    monkeypatch.setattr(slab_losses, "LOGIT_BYTES", 1)
    keys = mx.random.split(mx.random.key(0), 4)
    hidden = mx.random.normal((11, 24), key=keys[0])
    head = mx.random.normal((700, 24), key=keys[1])
    teacher = mx.random.normal((11, 700), key=keys[2])
    mask = (mx.random.uniform(shape=(11,), key=keys[3]) < 0.7).astype(mx.float32)
    ids = mx.argsort(-teacher, axis=1)[:, :40]
    weights = mx.softmax(mx.take_along_axis(teacher, ids, axis=1), axis=1)
    ids = mx.concatenate([ids, mx.zeros((11, 3), ids.dtype)], axis=1)
    weights = mx.concatenate([weights, mx.zeros((11, 3))], axis=1)
    sizes = []

    def slabs(rows: int) -> Iterator[tuple[int, mx.array]]:
        for start in range(0, len(head), rows):
            sizes.append(len(head[start : start + rows]))
            yield start, head[start : start + rows]

    def whole(*arguments: mx.array, frozen_head: bool) -> mx.array:
        return losses.sampled_kl_sum(*arguments, frozen_head=frozen_head, softcap=softcap)

    want = TokenLoss(whole).gradients(hidden, head, mask, ids, weights, frozen_head=True)
    value, gradient = slab_losses.sparse_kl_gradients(
        hidden, slabs, mask, ids, weights, softcap=softcap
    )
    assert sizes == 2 * [256, 256, 188]
    assert value.item() == pytest.approx(want.value.item(), rel=1e-5)
    np.testing.assert_allclose(np.array(gradient), np.array(want.hidden), atol=1e-5)
