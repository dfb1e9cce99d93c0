"""Rankings that lost: what moves and weights' lengths by hand, and that pruning goes by the scores
it is given.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from benchmarks.ablations import rankings
from mis_mlx.models import load
from mis_mlx.pruning import calibrate, select
from mis_mlx.types import Checkpoint
from tests.conftest import near


def test_what_moves_by_pencil() -> None:
    """FLAP: variance over all tokens times the squared length of the reading column; a head sums
    its channels.
    """
    a = np.array([[1.0, 2.0, 0.0, 4.0], [3.0, 2.0, 0.0, 0.0]])
    moments = rankings.Moments.zeros(np.array([2.0, 5.0, 1.0, 0.5]))
    for token in a:
        moments.add(mx.array(token[None, None]))
    np.testing.assert_allclose(moments.mean, [2, 2, 0, 2])
    np.testing.assert_allclose(rankings.fluctuation(moments), [2 * 1, 0, 0, 0.5 * 4])
    np.testing.assert_allclose(rankings.fluctuation(moments, 2), [2, 2])


def test_moments_and_lengths_are_those_of_the_resident_model(
    llama: Checkpoint, batches: list[mx.array]
) -> None:
    """Squares of what down_proj reads are calibration's, to float32, or to the half precision in
    which that calibrates; lengths are of the weights as they are stored.
    """
    moments, lengths = rankings.measured(llama, batches, mx.float32)
    found, _ = calibrate.calibrate(llama, batches)
    tokens = batches[0].size
    names = (
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
        "self_attn.q_proj",
        "self_attn.o_proj",
    )
    w = {
        n: np.array(load.dense(llama, f"model.layers.1.{n}.weight"), np.float64) ** 2 for n in names
    }
    for i in range(3):
        np.testing.assert_allclose(
            moments[i, "ffn"].square / tokens, found.ffn[i].square, rtol=near(1e-5, 1e-2)
        )
        assert moments[i, "norm1"].tokens == sum(b.size for b in batches)
    ffn = w["mlp.gate_proj"].sum(1) + w["mlp.up_proj"].sum(1) + w["mlp.down_proj"].sum(0)
    np.testing.assert_allclose(lengths[1, "ffn"], ffn, rtol=1e-5)
    heads = (w["self_attn.q_proj"].sum(1) + w["self_attn.o_proj"].sum(0)).reshape(4, -1).sum(1)
    np.testing.assert_allclose(lengths[1, "heads"], heads, rtol=1e-5)
    np.testing.assert_allclose(moments[1, "ffn"].columns, w["mlp.down_proj"].sum(0), rtol=1e-5)
    moving = rankings.moving(moments, 16)
    assert moving((0, "heads")).shape == (4,)
    assert moving((-1, "hidden")).shape == (64,)


def test_pruning_goes_by_the_scores_it_is_given(llama: Checkpoint, batches: list[mx.array]) -> None:
    """Neurons, heads and blocks that stay are those of the highest scores; random ones are by
    seed.
    """
    found, _ = calibrate.calibrate(llama, batches)
    cut = select.PruningConfig(scenario="none", layers=2, ffn=256, importance="activation")
    rising = rankings.keeping(
        rankings.by(found, lambda key: np.arange(4.0 if key[1] == "heads" else 768.0)), (0, 1)
    )
    _, keep = select.select_units(dict(llama.config), rising, cut)
    assert keep.layers == (0, 1)
    assert keep.kept[1, "ffn"] == tuple(range(512, 768))
    kept = [
        select.select_units(
            dict(llama.config), rankings.by(found, rankings.random(found, seed)), cut
        )[1].kept
        for seed in (0, 0, 1)
    ]
    assert kept[0] == kept[1] != kept[2]
    assert kept[0][keep.layers[0], "ffn"] != keep.kept[0, "ffn"]
