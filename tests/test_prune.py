"""The command `prune`: who stays, and what is written. What the weather does to it is in
test_aais.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx import prune
from mis_mlx.maths.importance import Statistics, Sums
from mis_mlx.models.architectures.families import shape_of
from mis_mlx.models.opening import load
from mis_mlx.models.writing import model_writer
from mis_mlx.pruning import select
from mis_mlx.types import Checkpoint, MisError
from tests import tiny


@pytest.fixture(scope="module")
def small(llama: Checkpoint, text_folder: Path) -> prune.Settings:
    """Flags of a prune of the tiny llama that takes a moment."""
    return prune.Settings(
        model=str(llama.path),
        data=str(text_folder),
        num_samples=4,
        max_seq_length=32,
        importance="rms",
        dtype="float32",
    )


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_every_kind_along_every_axis_it_can(
    tmp_path: Path, models: Callable[[str], Checkpoint], small: prune.Settings, kind: str
) -> None:
    """Layers, FFN, heads and hidden (a qwen2: layers and FFN): stock mlx-lm opens the student; its
    parameters are told.
    """
    axes: dict[str, Any] = {"layers": 2, "ffn": 256}
    if kind != "qwen2":
        axes |= {"heads": 2, "hidden": 48}
    model_path = str(models(kind).path)
    result = prune.run(replace(small, model=model_path, mlx_path=str(tmp_path / "s"), **axes))
    whole_group = {"kv_heads": 1} if "heads" in axes else {}
    student = load.open_checkpoint(tmp_path / "s")
    assert shape_of(student.config) == replace(shape_of(models(kind).config), **axes, **whole_group)
    assert result["params"] == sum(np.prod(t.shape) for t in student.tensors.values())
    model, _ = load.mlx_lm("utils").load(str(tmp_path / "s"))
    assert mx.isfinite(model(mx.array([[1, 2, 3]]))).all()
    keep = model_writer.read_keep(tmp_path / "s")
    assert keep is not None
    assert len(keep.layers) == 2
    assert {axis for _, axis in keep.kept} == {*axes, *whole_group} - {"layers"}


def test_a_group_that_says_nothing_can_go(
    tmp_path: Path, llama: Checkpoint, small: prune.Settings
) -> None:
    """`--heads 2`: a key-value group whose heads have nothing to say goes, and the model says
    what it said.
    """
    mute = tmp_path / "mute"
    shutil.copytree(llama.path, mute)
    weights = dict(mx.load(str(mute / "model.safetensors")).items())
    # values of group 0, for heads 0 and 1, or of group 1; 16 rows each
    for i, gone in enumerate((0, 1, 0)):
        value = np.array(weights[f"model.layers.{i}.self_attn.v_proj.weight"])
        value[16 * gone : 16 * gone + 16] = 0
        weights[f"model.layers.{i}.self_attn.v_proj.weight"] = mx.array(value)
    mx.save_safetensors(str(mute / "model.safetensors"), weights, {"format": "mlx"})
    cut = replace(small, model=str(mute), scenario="none", heads=2)
    prune.run(replace(cut, mlx_path=str(tmp_path / "s")))
    student = load.open_checkpoint(tmp_path / "s")
    assert shape_of(student.config) == replace(shape_of(llama.config), heads=2, kv_heads=1)
    keep = model_writer.read_keep(tmp_path / "s")
    assert keep is not None
    assert [keep.kept[i, "kv_heads"] for i in range(3)] == [(1,), (0,), (1,)]
    tokens = mx.array([[5, 9, 300, 7]])
    whole, less = (
        load.mlx_lm("utils").load(str(path))[0](tokens) for path in (mute, tmp_path / "s")
    )
    # other sizes, another order of sums
    np.testing.assert_allclose(np.array(less), np.array(whole), atol=1e-5)


def pencil_statistics() -> Statistics:
    """Three layers; block 1 changes the stream least; neurons and heads 0, 1, 2 ... matter less and
    less.
    """
    made = Statistics(block={0: 0.5, 1: 0.1, 2: 0.3})
    for i in range(3):
        made.ffn[i] = Sums(*np.zeros((2, 768)))
        made.heads[i] = Sums(*np.zeros((2, 4)))
        made.ffn[i].add(np.roll(np.arange(768)[::-1] + 1.0, i) ** 2, 1.0)
        made.heads[i].add(np.array([4.0, 3.0, 2.0, 1.0]) ** 2, 1.0)
    return made


def test_who_stays_by_pencil() -> None:
    """The least block goes; the best neurons of each kept layer stay; the best
    group of heads.
    """
    cut = select.PruningConfig(scenario="none", layers=2, ffn=256, heads=2, importance="rms")
    shape, keep = select.select_units(tiny.CONFIG, pencil_statistics(), cut)
    assert keep.layers == (0, 2)
    assert shape.layers == 2
    assert keep.kept[0, "ffn"] == tuple(range(256))
    assert keep.kept[2, "ffn"] == tuple(range(2, 258))
    assert keep.kept[0, "heads"] == (0, 1)
    assert (1, "ffn") not in keep.kept
    assert keep.report["channels_kept"] == 2 * (256 + 2 + 1)
    assert keep.report["channels_differing_from_plain"] == 0


ONE_HEAD = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64}
THREE = {"hidden_size": 36, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 12}


@pytest.mark.parametrize(
    ("changes", "flags", "said"),
    [
        ({"num_hidden_layers": 2}, {"scenario": "goral"}, ""),
        (ONE_HEAD, {"scenario": "baca"}, ""),
        ({"intermediate_size": 64}, {"scenario": "goral"}, ""),
        (THREE, {"scenario": "zbojnik"}, ""),
        ({"intermediate_size": 64}, {"scenario": "halny"}, "--scenario ffn-only .* 3 .* 64"),
        ({"num_hidden_layers": 1}, {"scenario": "juhas"}, "--scenario shallow .* 1 "),
        (ONE_HEAD, {"scenario": "none", "heads": 2}, "--heads 2 .* 1"),
    ],
)
def test_odd_teachers(
    tmp_path: Path, small: prune.Settings, changes: dict[str, Any], flags: dict[str, Any], said: str
) -> None:
    """Two layers, one head, an FFN of 64, a hidden size that no kernel likes: what can be cut is,
    and it opens; what cannot is a sentence with both numbers, and no folder is left.
    """
    odd = tiny.make(tmp_path / "odd", **changes)
    out = tmp_path / "s"
    asked = replace(small, model=str(odd), mlx_path=str(out), **flags)
    if said:
        with pytest.raises(MisError, match=said):
            prune.run(asked)
        assert not out.exists()
        return
    prune.run(asked)
    model, _ = load.mlx_lm("utils").load(str(out))
    assert mx.isfinite(model(mx.array([[1, 2, 3]]))).all()
    made, before = (shape_of(load.open_checkpoint(folder).config) for folder in (out, odd))
    assert made != before
