"""A packed model whose scales learn."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mis_mlx.distillation import pipeline
from mis_mlx.models.opening import load
from mis_mlx.models.passing import stream
from mis_mlx.quantization import learned_scales, packed_format
from mis_mlx.settings.recipe import DistillationConfig
from mis_mlx.types import Checkpoint

TOKENS = mx.random.randint(0, 512, (2, 16), key=mx.random.key(3))


@pytest.fixture
def packed(llama: Checkpoint, tmp_path: Path) -> Checkpoint:
    """The tiny llama in 3, 4 and 8 bits."""
    plan = packed_format.formats_of(llama.config, 64)
    plan["model.layers.1.mlp.down_proj"] = packed_format.Format(8, 64)
    plan["model.layers.0.self_attn.q_proj"] = packed_format.Format(3, 64)
    packed_format.write_quantized(llama, tmp_path / "q", plan)
    return load.open_checkpoint(tmp_path / "q")


def trainable(checkpoint: Checkpoint) -> nn.Module:
    """mlx-lm's whole model of a packed folder, in float32, with layers that learn in its blocks."""
    model = load.resident_model(checkpoint, mx.float32)
    raw = packed_format.safetensors.lazy(checkpoint.tensors, list(checkpoint.tensors))
    plan = packed_format.formats(checkpoint)
    for i, block in enumerate(model.model.layers):
        learned_scales.with_grids(block, f"model.layers.{i}.", raw, plan)
    model.model.embed_tokens.freeze()
    return stream.load_checked(model)


def write(checkpoint: Checkpoint, model: nn.Module, out: Path) -> None:
    """`out`: the folder with what such a model holds."""
    learned = dict(tree_flatten(model.trainable_parameters()))
    learned_scales.write_learned(checkpoint, learned.get, out)


def test_a_bit_more_halves_the_rate(llama: Checkpoint, tmp_path: Path) -> None:
    """4 bits and their scales learn at the rate that is asked for, 8 at a sixteenth of it, 3 at
    twice of it.
    """
    paths = {
        path
        for path in packed_format.formats_of(llama.config, 64)
        if path.startswith("model.layers")
    }
    for bits, rate in ((4, 2e-4), (8, 1.25e-5), (3, 4e-4)):
        plan = {
            path: packed_format.Format(bits if path in paths else 8, 64)
            for path in (*paths, "model.embed_tokens")
        }
        packed_format.write_quantized(llama, tmp_path / str(bits), plan)
        rounded = load.open_checkpoint(tmp_path / str(bits))
        recipe = pipeline.tuning_recipe(DistillationConfig(), rounded, 20, 2e-4)
        assert recipe.learning_rate == pytest.approx(rate)
        assert recipe.iters == 20


def test_few_files_are_open_at_once(packed: Checkpoint) -> None:
    """21 matrices with room for 8 more files than are open: none keeps its own until the end."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = sorted(set(range(1000)) - set(map(int, os.listdir("/dev/fd"))))
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[8], hard))
    try:
        assert mx.isfinite(trainable(packed)(TOKENS)).all().item()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_written_back(packed: Checkpoint, tmp_path: Path) -> None:
    """Untouched, the folder has the same bytes; with other scales, only those tensors differ, in
    the same types.
    """
    model = trainable(packed)
    write(packed, model, tmp_path / "same")
    same = (tmp_path / "same" / "model.safetensors").read_bytes()
    assert same == (packed.path / "model.safetensors").read_bytes()
    linear = model.model.layers[1].mlp.up_proj
    linear.scales = linear.scales * 1.5
    write(packed, model, tmp_path / "other")
    other = load.open_checkpoint(tmp_path / "other")
    assert other.config == packed.config
    assert {n: t.dtype for n, t in other.tensors.items()} == {
        n: t.dtype for n, t in packed.tensors.items()
    }
    changed = [n for n in packed.tensors if not (raw(other, n) == raw(packed, n)).all()]
    assert changed == ["model.layers.1.mlp.up_proj.scales"]
    stock, _ = load.mlx_lm("utils").load(str(tmp_path / "other"))
    # it computes in float16
    assert mx.allclose(stock(TOKENS).astype(mx.float32), model(TOKENS), atol=5e-3)


def raw(checkpoint: Checkpoint, name: str) -> mx.array:
    """As stored."""
    return packed_format.safetensors.lazy(checkpoint.tensors, [name])[name]
