"""LFM2: short convolutions beside attention, its folders and cuts. What it shares with other
families is in test_contract.py and test_families.py, generation in test_streamed_decode.py and
test_streamed_batch.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx import prune
from mis_mlx.models.architectures import arch, hybrid
from mis_mlx.models.architectures.sizes import attends, shape_of
from mis_mlx.models.opening import load
from mis_mlx.models.writing import model_writer
from mis_mlx.pruning import slicing
from mis_mlx.storage.files import DISK
from mis_mlx.types import Checkpoint, MisError
from tests import stock, tiny
from tests.family_checks import TOKENS, apart, streamed

KIND = "lfm2"
CONFIG = {**tiny.CONFIG, **tiny.FAMILIES[KIND]}
CONVOLUTIONS = [0, 1, 3, 5]  # blocks of the tiny model

SIZES: dict[str, Any] = {"scenario": "none", "layers": 5, "ffn": 512, "hidden": 32, "heads": 2}
FEW: dict[str, Any] = {"num_samples": 2, "max_seq_length": 24}


@pytest.fixture(scope="module")
def lfm(models: Callable[[str], Checkpoint]) -> Checkpoint:
    return models(KIND)


@pytest.mark.usefixtures("cpu_policy")
def test_the_convolution_by_hand() -> None:
    """y_t = out(C_t * sum_k w_k (B x)_{t - 2 + k}) in float64."""
    layer = hybrid.ShortConv(16, 3)
    x = mx.random.normal((2, 7, 16), key=mx.random.key(1))
    inner = np.array(x, np.float64) @ np.array(layer.in_proj.weight, np.float64).T
    gate, gate_out, value = np.split(inner, 3, axis=-1)
    padded = np.pad(gate * value, [(0, 0), (2, 0), (0, 0)])
    kernel = np.array(layer.conv.weight[..., 0], np.float64)
    mixed = sum(padded[:, k : k + 7] * kernel[:, k] for k in range(3))
    want = (gate_out * mixed) @ np.array(layer.out_proj.weight, np.float64).T
    assert np.allclose(np.array(layer(x)), want, atol=1e-5)


@pytest.mark.usefixtures("cpu_policy")
def test_the_published_form_is_opened(lfm: Checkpoint, tmp_path: Path) -> None:
    """Attention by numbers of blocks, a larger FFN that is adjusted, kernels as torch has them or
    as mlx-lm has them: the same logits.
    """
    folder = tiny.make(tmp_path / "m", **tiny.FAMILIES[KIND])
    config = json.loads((folder / "config.json").read_text())
    assert config["full_attn_idxs"] == [2, 4, 6]
    stored: Any = mx.load(str(folder / "model.safetensors"))
    weights: dict[str, mx.array] = dict(stored)
    mx.eval(weights)
    kernel = "model.layers.0.conv.conv.weight"
    assert weights[kernel].shape == (64, 1, 3)
    want = streamed(lfm, TOKENS)
    # of 1,149 neurons two thirds are 766, and the next multiple of 256 is 768
    config |= {"block_auto_adjust_ff_dim": True, "block_ff_dim": 1149, "block_multiple_of": 256}
    for key in ("layer_types", "intermediate_size"):
        del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    assert mx.array_equal(streamed(load.open_checkpoint(folder), TOKENS), want)
    assert apart(stock.opened(folder)(TOKENS), want) <= 1e-5
    for name in list(weights):
        if name.endswith("conv.conv.weight"):
            weights[name] = mx.contiguous(weights[name].swapaxes(1, 2))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    again = load.open_checkpoint(folder)
    assert mx.array_equal(streamed(again, TOKENS), want)
    assert mx.array_equal(load.resident_model(again, mx.float32)(TOKENS), want)


def test_all_axes_are_cut_together(lfm: Checkpoint, tmp_path: Path, text_folder: Path) -> None:
    """Channels of the stream and of convolutions, heads, neurons, blocks: stock mlx_lm opens it."""
    out = str(tmp_path / "cut")
    asked = prune.Settings(
        model=str(lfm.path),
        mlx_path=out,
        data=str(text_folder),
        dtype="float32",
        **SIZES,
        **FEW,
    )
    prune.run(asked)
    student = load.open_checkpoint(tmp_path / "cut")
    keep = model_writer.read_keep(student.path)
    assert keep
    s = shape_of(student.config)
    assert (s.layers, s.hidden, s.heads, s.kv_heads, s.ffn) == (5, 32, 2, 1, 512)
    assert student.config["layer_types"] == [CONFIG["layer_types"][i] for i in keep.layers]
    for i in keep.layers:
        axis = "heads" if attends(CONFIG, i) else "channels"
        assert len(keep.kept[i, axis]) == (2 if axis == "heads" else 32)
    # a kept channel of a convolution is a row of each of three matrices, a kernel, a column
    first = CONVOLUTIONS[0]
    rows = list(keep.kept[first, "channels"])
    name = f"model.layers.{first}.conv.conv.weight"
    assert mx.array_equal(load.dense(student, name), load.dense(lfm, name)[mx.array(rows)])
    theirs = stock.opened(student.path)(TOKENS)
    assert apart(streamed(student, TOKENS), theirs) <= 1e-5


@pytest.mark.usefixtures("cpu_policy")
def test_a_rotation_changes_nothing(lfm: Checkpoint, tmp_path: Path) -> None:
    """With all directions kept, and the last norm's gain 1 (the head is tied), the logits stay."""
    config = lfm.config
    tensors = arch.tensors_of(config)
    basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(64, 64)))
    norms = [name for name in tensors if name.endswith("layernorm.weight")]
    energy = dict.fromkeys([*norms, slicing.FINAL], 1.0)
    plain = {name: load.dense(lfm, name) for name in tensors}
    plain[slicing.FINAL] = mx.ones(64)

    def written(folder: str, take: Callable[[str], mx.array]) -> Checkpoint:
        out = tmp_path / folder
        model_writer.write_model(
            config, take, source=lfm.path, out=out, dtype="float32", files=DISK
        )
        return load.open_checkpoint(out)

    before = written("plain", plain.__getitem__)
    turn = slicing.rotated_teacher(before, slicing.Rotation(basis, energy))
    after = written("turned", turn)
    assert apart(streamed(after, TOKENS), streamed(before, TOKENS)) <= 1e-4


@pytest.mark.thorough
def test_both_kinds_stay(lfm: Checkpoint, tmp_path: Path, text_folder: Path) -> None:
    """The first block of each kind; one block alone is refused before any work."""
    asked = {"model": str(lfm.path), "scenario": "none", "data": str(text_folder)}
    with pytest.raises(MisError, match="1 layers of a lfm2 are too few: 2 blocks must stay"):
        prune.run(prune.Settings(mlx_path=str(tmp_path / "x"), layers=1, **asked))
    prune.run(prune.Settings(mlx_path=str(tmp_path / "two"), layers=2, **asked))
    student = load.open_checkpoint(tmp_path / "two")
    assert student.config["layer_types"] == ["conv", "full_attention"]
    assert mx.isfinite(stock.opened(student.path)(TOKENS).astype(mx.float32)).all().item()
