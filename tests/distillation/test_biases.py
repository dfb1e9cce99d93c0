"""Every engine that rebuilds or replaces a linear layer, on models with biases, against mlx-lm's
plain forward pass.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mis_mlx.distillation.block_student import BlockStudent
from mis_mlx.gguf_export import rerounding, tensors
from mis_mlx.models.architectures import arch
from mis_mlx.models.architectures.block_inputs import BlockInputs, BlockOutputs
from mis_mlx.models.architectures.sizes import shape_of
from mis_mlx.models.opening import load
from mis_mlx.models.writing import lora, model_writer
from mis_mlx.pruning import reconstruct, slicing
from mis_mlx.quantization import bit_allocation, packed_format, stage
from mis_mlx.storage.files import DISK
from mis_mlx.types import Checkpoint, KeptUnits
from tests import tiny
from tests.distillation import students
from tests.quantization.test_grid import trainable

TOKENS = mx.random.randint(0, 512, (2, 16), key=mx.random.key(3))
WINDOWS = [TOKENS, TOKENS + 0]


@pytest.fixture(scope="module", params=["qwen2", "biased"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """q, k and v with biases (9), or every matrix of the blocks (21), about as large as what they
    are added to.
    """
    folder = tmp_path_factory.mktemp("biased") / request.param
    checkpoint = load.open_checkpoint(tiny.make(folder, **tiny.KINDS[request.param]))
    names = [name for name in checkpoint.tensors if name.endswith(".bias")]
    assert len(names) == {"qwen2": 9, "biased": 21}[request.param]
    wide = folder.parent / "wide"

    def take(name: str) -> mx.array:
        return load.dense(checkpoint, name) * (10 if name in names else 1)

    model_writer.write_model(
        checkpoint.config, take, source=folder, out=wide, dtype="float32", files=DISK
    )
    return load.open_checkpoint(wide)


@pytest.fixture(scope="module")
def plain(model: Checkpoint) -> nn.Module:
    """Stock mlx-lm's model; without its biases it answers something else."""
    stock, _ = load.mlx_lm("utils").load(str(model.path))
    without, _ = load.mlx_lm("utils").load(str(model.path))
    parameters = tree_flatten(without.parameters())
    biases = [(name, array * 0) for name, array in parameters if name.endswith(".bias")]
    without.load_weights(biases, strict=False)
    apart = mx.abs(stock(TOKENS) - without(TOKENS)).max().item()
    assert apart > 0.1
    return stock


def entering(model: nn.Module, block: int) -> mx.array:
    """The hidden states (B, T, D) of TOKENS at the entrance of a block."""
    hidden = model.model.embed_tokens(TOKENS)
    for each in model.model.layers[:block]:
        hidden = each(hidden, "causal")
    return hidden


def same(a: mx.array, b: mx.array, atol: float = 1e-5) -> bool:
    return mx.allclose(a.astype(mx.float32), b, rtol=1e-4, atol=atol).item()


@pytest.mark.usefixtures("cpu_policy")  # beside mlx-lm in float32
def test_gptq(model: Checkpoint, plain: nn.Module, tmp_path: Path) -> None:
    """The folder's logits are those of the plain model with the matrices that were chosen; so is
    the stream that the last block was fitted to; biases keep their bytes.
    """
    hidden: list[mx.array] = []
    plan = packed_format.formats_of(model.config, 64)
    rounded = stage.rounded_blocks(model, WINDOWS, plan, hidden)
    packed_format.write_quantized(model, tmp_path / "q", plan=plan, files=DISK, rounded=rounded)
    made = load.open_checkpoint(tmp_path / "q")
    names = arch.tensors_of(model.config)
    inside = []
    outside = []
    for name, shape in names.items():
        if arch.block_of(name) is None:
            outside.append((name, load.dense(made, name)))
        elif len(shape) == 2:
            inside.append((name, load.dense(made, name)))
    other, _ = load.mlx_lm("utils").load(str(model.path))
    other.load_weights(inside, strict=False)
    assert same(hidden[0], entering(other, 2))
    other.load_weights(outside, strict=False)
    assert same(load.resident_model(made, mx.float32)(TOKENS), other(TOKENS))
    assert not same(other(TOKENS), plain(TOKENS), 1e-3)
    for name in names:
        if name.endswith(".bias"):
            assert mx.array_equal(load.dense(made, name), load.dense(model, name))


def test_sensitivity(model: Checkpoint, plain: nn.Module) -> None:
    """The block on the way back computes what the plain one does, and its cotangents are the plain
    gradients.
    """
    above = mx.random.normal((2, 16, 64), key=mx.random.key(5))
    x = entering(plain, 1)
    block = plain.model.layers[1]
    down = block.mlp.down_proj

    def forward(hidden: mx.array, weight: mx.array) -> mx.array:
        return _with(block, weight)(hidden, "causal")

    _, (below, slope) = mx.vjp(forward, [x, down.weight], [above])
    block.mlp.down_proj = down
    args = load.model_args(model.config)
    mine = load.block(model, 1, args, mx.float32)
    matrices = []
    for axis, (part, names) in arch.readers(mine).items():
        matrices += [(part, name, axis) for name in names]
    (got,), seen = bit_allocation._back(
        args, mine, matrices=matrices, inputs=BlockInputs(x), above=BlockOutputs(above)
    )
    assert same(got, below)
    assert same(seen[1][0].T @ seen[0]["ffn"], slope, 1e-4)


def _with(block: nn.Module, weight: mx.array) -> nn.Module:
    block.mlp.down_proj.weight = weight
    return block


def test_training_block_by_block(model: Checkpoint, plain: nn.Module, tmp_path: Path) -> None:
    """Loss and gradients of the middle block, biases too, are the plain model's."""
    tokens = mx.roll(TOKENS.reshape(-1), -1)
    parts = model_writer.by_block(model, tmp_path / "parts", DISK)
    student = BlockStudent(parts, "weights", at_once=1, steps_each=9)
    student._enter(1, {})
    batch = (TOKENS, mx.ones((32,)), tokens[:, None], mx.ones((32, 1)))
    value, found = students.gradients_of(student, [batch])

    def whole(m: nn.Module) -> mx.array:
        return nn.losses.cross_entropy(m(TOKENS).reshape(32, -1), tokens, reduction="sum")

    wanted, gradients = nn.value_and_grad(plain, whole)(plain)
    assert value == pytest.approx(wanted.item() / 32, rel=1e-5)
    theirs = dict(tree_flatten(gradients["model"]["layers"][1]))
    del found["model.norm.weight"]
    ours = {name.removeprefix("model.layers.1."): array for name, array in found.items()}
    assert ours.keys() == theirs.keys()
    assert any(n.endswith(".bias") for n in ours)
    assert all(same(ours[n], theirs[n], 1e-4) for n in ours)


@pytest.mark.usefixtures("cpu_policy")  # beside mlx-lm in float32
def test_reconstruct(model: Checkpoint, tmp_path: Path) -> None:
    """A student from which nothing was cut: nothing to mend."""
    keep = KeptUnits((0, 1, 2), {}, "")
    student = tmp_path / "student"
    slicing.write_student(
        model, shape_of(model.config), keep=keep, out=student, dtype="float32", files=DISK
    )
    pruned = load.open_checkpoint(student)
    repaired, left = reconstruct.reconstruct(model, pruned, keep, WINDOWS)
    assert not repaired
    assert left == [1.0] * 3


def test_lora(model: Checkpoint, plain: nn.Module, tmp_path: Path) -> None:
    """Adapters of zeros change nothing; fused ones give what they gave beside the weights."""
    ours = load.resident_model(model, mx.float32)
    how = lora.Lora(-1, 4, 2.0)
    lora.insert(ours, how, 0)
    assert same(ours(TOKENS), plain(TOKENS))
    trained = tree_flatten(ours.trainable_parameters())
    moved = [(name, 0.1 * mx.random.normal(array.shape)) for name, array in trained]
    assert len(moved) == 2 * 21
    ours.load_weights(moved, strict=False)
    take = lora.fused(model, dict(moved), how)
    model_writer.write_model(
        model.config, take, source=model.path, out=tmp_path / "fused", dtype="float32", files=DISK
    )
    fused, _ = load.mlx_lm("utils").load(str(tmp_path / "fused"))
    assert same(fused(TOKENS), ours(TOKENS), 1e-4)
    assert not same(fused(TOKENS), plain(TOKENS), 1e-2)


def test_slice(model: Checkpoint, plain: nn.Module, tmp_path: Path) -> None:
    """Half the neurons and a group of heads less: the plain model with zeros in their place."""
    neurons = tuple(range(0, 768, 3))
    size = shape_of(model.config)
    keep = KeptUnits((0, 1, 2), {(i, "ffn"): neurons for i in range(3)}, "")
    cut = arch.target_shape(model.config, {}, ffn=len(neurons))
    assert cut.heads == size.heads
    slicing.write_student(model, cut, keep=keep, out=tmp_path / "cut", dtype="float32", files=DISK)
    gone = mx.array([n not in neurons for n in range(768)])
    zeroed = load.resident_model(model, mx.float32)
    for block in zeroed.model.layers:
        block.mlp.down_proj.weight = mx.where(gone[None], 0, block.mlp.down_proj.weight)
    made, _ = load.mlx_lm("utils").load(str(tmp_path / "cut"))
    assert same(made(TOKENS), zeroed(TOKENS))
    assert not same(made(TOKENS), plain(TOKENS), 1e-3)


def test_rotation(model: Checkpoint, tmp_path: Path) -> None:
    """Rotated, not cut, with a head of its own: the same function."""
    head = mx.random.normal((512, 64), key=mx.random.key(8)) * 0.05

    def take(name: str) -> mx.array:
        return head if name == "lm_head.weight" else load.dense(model, name)

    config = {**model.config, "tie_word_embeddings": False}
    model_writer.write_model(
        config, take, source=model.path, out=tmp_path / "untied", dtype="float32", files=DISK
    )
    untied = load.open_checkpoint(tmp_path / "untied")
    basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(64, 64)))
    rotation = slicing.Rotation(basis, {n: 1.0 for n in untied.tensors if "norm" in n})
    turned = slicing.rotated_teacher(untied, rotation)
    model_writer.write_model(
        config, turned, source=model.path, out=tmp_path / "turned", dtype="float32", files=DISK
    )
    one, _ = load.mlx_lm("utils").load(str(tmp_path / "untied"))
    other, _ = load.mlx_lm("utils").load(str(tmp_path / "turned"))
    assert same(one(TOKENS), other(TOKENS), 1e-4)


@pytest.mark.parametrize("wanted", ["f16", "q4_1"])
def test_gguf(model: Checkpoint, tmp_path: Path, wanted: str) -> None:
    """Every tensor once under a name of its own, biases in float32; those of q and k of a llama in
    llama.cpp's order, packed model or not.
    """
    source = model
    if wanted == "q4_1":
        packed_format.write_quantized(
            model, tmp_path / "q", packed_format.formats_of(model.config, 64), DISK
        )
        source = load.open_checkpoint(tmp_path / "q")
    found = tensors.parts(source, wanted)
    assert [p.source for p in found] == list(arch.tensors_of(model.config))
    assert max(Counter(p.name for p in found).values()) == 1
    biases = [p for p in found if p.source.endswith(".bias")]
    for part in biases:
        assert part.kind == "F32"
        assert part.name.endswith(".bias")
        assert part.name.startswith("blk.")
        rows = np.concatenate(list(tensors.rows(source, part, rerounding.Rerounding())))
        written = rows.view(np.float32).reshape(-1)
        stored = np.array(load.dense(model, part.source))
        heads = {"attn_q": 4, "attn_k": 2}.get(part.name.split(".")[2], 0)
        if heads and model.config["model_type"] == "llama":
            stored = stored.reshape(heads, 2, 8).swapaxes(1, 2).reshape(-1)
        assert np.array_equal(written, stored), part.name


def test_tune(model: Checkpoint, tmp_path: Path) -> None:
    """Before its first step the packed model that learns answers what the packed model does."""
    packed_format.write_quantized(
        model, tmp_path / "q", packed_format.formats_of(model.config, 64), DISK
    )
    packed = load.open_checkpoint(tmp_path / "q")
    assert same(
        trainable(packed)(TOKENS),
        load.resident_model(packed, mx.float32)(TOKENS),
    )
