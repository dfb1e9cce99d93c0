"""A packed model whose scales learn."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
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
from mis_mlx.storage.files import DISK
from mis_mlx.types import Checkpoint

TOKENS = mx.random.randint(0, 512, (2, 16), key=mx.random.key(3))


@pytest.fixture
def packed(llama: Checkpoint, tmp_path: Path) -> Checkpoint:
    """The tiny llama in 3, 4 and 8 bits."""
    plan = packed_format.formats_of(llama.config, 64)
    plan["model.layers.1.mlp.down_proj"] = packed_format.Format(8, 64)
    plan["model.layers.0.self_attn.q_proj"] = packed_format.Format(3, 64)
    packed_format.write_quantized(llama, tmp_path / "q", plan, DISK)
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
    learned_scales.write_learned(checkpoint, learned.get, out, DISK)


@pytest.mark.parametrize("kind", ["qwen2", "biased"])
def test_biases_stay_and_learn(
    models: Callable[[str], Checkpoint], tmp_path: Path, kind: str
) -> None:
    """With biases the logits are the dense model's too, every bias has its gradient, and what is
    learned is written.
    """
    packed_format.write_quantized(
        models(kind), tmp_path / "q", packed_format.formats_of(models(kind).config, 64), DISK
    )
    packed = load.open_checkpoint(tmp_path / "q")
    model = trainable(packed)
    dense = load.resident_model(packed, mx.float32)
    assert mx.allclose(model(TOKENS), dense(TOKENS), atol=1e-5)
    ours, theirs = (
        dict(tree_flatten(nn.value_and_grad(m, lambda m: mx.square(m(TOKENS)).mean())(m)[1]))
        for m in (model, dense)
    )
    names = [n for n in packed.tensors if n.endswith(".bias")]
    assert len(names) == {"qwen2": 9, "biased": 21}[kind]
    largest = max(mx.abs(theirs[n]).max().item() for n in names)
    assert all(mx.allclose(ours[n], theirs[n], rtol=1e-3, atol=1e-5 * largest) for n in names)
    linear = model.model.layers[1].self_attn.v_proj
    linear.bias = linear.bias + 1
    write(packed, model, tmp_path / "other")
    other = load.open_checkpoint(tmp_path / "other")
    name = "model.layers.1.self_attn.v_proj.bias"
    assert mx.array_equal(raw(other, name), raw(packed, name) + 1)


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
        packed_format.write_quantized(llama, tmp_path / str(bits), plan, DISK)
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


@pytest.mark.usefixtures("cpu_policy")
def test_gradients_are_those_of_the_dense_weights(packed: Checkpoint) -> None:
    """d loss / d scale is the sum over the group of integer times d loss / d weight; of a bias
    without the integer.
    """
    model = trainable(packed)
    dense = load.resident_model(packed, mx.float32)

    def loss(m: nn.Module) -> mx.array:
        return m(TOKENS).square().mean()

    ours = dict(tree_flatten(nn.value_and_grad(model, loss)(model)[1]))
    theirs = dict(tree_flatten(nn.value_and_grad(dense, loss)(dense)[1]))
    for path in (
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.mlp.down_proj",
        "model.layers.2.mlp.up_proj",
    ):
        owner = model.model.layers[int(path.split(".")[2])][path.split(".")[3]][path.split(".")[4]]
        slope = theirs[f"{path}.weight"].reshape(owner.levels().shape)
        assert mx.allclose(ours[f"{path}.biases"], slope.sum(axis=-1), rtol=1e-4, atol=1e-8)
        by_hand = (slope * owner.levels()).sum(axis=-1)
        assert mx.allclose(ours[f"{path}.scales"], by_hand, rtol=1e-4, atol=1e-8)


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
