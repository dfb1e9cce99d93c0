"""What fewer bits cost, against the KL itself."""

from __future__ import annotations

from itertools import pairwise, product
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mis_mlx.maths import rounding
from mis_mlx.models.architectures import arch
from mis_mlx.models.architectures.block_inputs import BlockInputs, BlockOutputs
from mis_mlx.models.architectures.families import family
from mis_mlx.models.opening import load
from mis_mlx.models.passing import backward_pass
from mis_mlx.quantization import bit_allocation
from mis_mlx.storage.hidden_spool import Spool
from mis_mlx.types import Checkpoint
from tests import tiny
from tests.conftest import mostly_slow


@pytest.fixture
def batches() -> list[mx.array]:
    """Text that means nothing, in windows of 24 tokens."""
    return [mx.random.randint(0, 512, (1, 24), key=mx.random.key(k)) for k in range(6)]


# 1e-4 is float32's; squares of sums that cancel are some % off in float16
@pytest.mark.usefixtures("cpu_policy")
@pytest.mark.parametrize(
    ("kind", "held_bytes"),
    mostly_slow(
        product(("qwen2", "biased", "phi3"), (1, bit_allocation.HELD_BYTES)),
        ("qwen2", 1),
        ("biased", bit_allocation.HELD_BYTES),
        ("phi3", bit_allocation.HELD_BYTES),
        of_several=True,
    ),
)
def test_it_is_the_gradient_of_weights_along_the_errors(
    models, batches: list[mx.array], kind: str, held_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half the mean of <d log p / dW, Q(W) - W>^2 with the whole gradient of every matrix, one
    window after the other (1e-4, float32), however many windows are held at once and wherever slabs
    end.
    """
    checkpoint = models(kind)
    wanted = dict[str, dict[int, float]]()
    args = family(checkpoint.config).model_args()
    tokens = sum(b.size for b in batches)
    monkeypatch.setattr(bit_allocation, "HELD_BYTES", held_bytes)
    monkeypatch.setattr(bit_allocation, "SLAB", 1000 if held_bytes == 1 else bit_allocation.SLAB)

    def visit(i: int, block: nn.Module):
        paths = []
        for part, names in arch.readers(block).values():
            paths += [f"{part}.{name}" for name in names]
        linears = [block[path.split(".")[0]][path.split(".")[1]] for path in paths]

        def each(inputs: BlockInputs, cotangents: BlockOutputs) -> BlockInputs:
            x = inputs.hidden
            above = cotangents.hidden

            def run(x: mx.array, *weights: mx.array) -> mx.array:
                for linear, weight in zip(linears, weights, strict=True):
                    linear.weight = weight
                return block(x, load.mask(args, block, x))

            stored = [linear.weight for linear in linears]
            _, (below, *host_gradients) = mx.vjp(run, [x, *stored], [above])
            mx.eval(below, host_gradients)
            for path, linear, weight, slope in zip(
                paths, linears, stored, host_gradients, strict=True
            ):
                linear.weight = weight
                cost = wanted.setdefault(f"model.layers.{i}.{path}", {})
                for bits in (3, 5):
                    error = rounding.values(rounding.nearest(weight, 64, bits), 64, bits) - weight
                    along = np.sum(np.array(slope, np.float64) * np.array(error, np.float64))
                    cost[bits] = cost.get(bits, 0.0) + along**2 / (2 * tokens)
            return BlockInputs(below)

        return lambda x, above: [each(*of) for of in zip(x, above, strict=True)]

    backward_pass.input_gradients(checkpoint, batches, visit, 3)
    found = bit_allocation.costs(checkpoint, batches, group=64, bits=(3, 5), seed=3)
    assert found.keys() - wanted.keys() == {"model.embed_tokens"}
    for path, cost in wanted.items():
        assert found[path] == pytest.approx(cost, rel=1e-4), path


def test_the_way_back_keeps_no_block_once_its_batches_are_through(
    llama: Checkpoint, batches: list[mx.array]
) -> None:
    """Whoever names a layer of it: a 3 B model's block takes 400 MB, and the next one comes."""
    layers = list[nn.Module]()

    def visit(i: int, block: nn.Module) -> backward_pass.BlockBackward:
        assert not any("weight" in layer for layer in layers), i
        layers.append(block.self_attn.q_proj)
        assert "weight" in layers[-1]
        return lambda inputs, above: [
            x.like(y.arrays(y)) for x, y in zip(inputs, above, strict=True)
        ]

    backward_pass.input_gradients(llama, batches, visit)
    assert len(layers) == 3


def test_every_matrix_of_the_blocks_and_fewer_bits_cost_more(
    llama: Checkpoint, batches: list[mx.array]
) -> None:
    """Each has a cost in each number of bits; in sum a bit less costs two to eight times as
    much.
    """
    found = bit_allocation.costs(llama, batches, 64, (3, 4, 5, 8))
    assert set(found) == {
        n.removesuffix(".weight") for n, d in arch.tensors_of(llama.config).items() if len(d) == 2
    }

    def together(bits: int) -> float:
        return sum(cost[bits] for cost in found.values())

    sums = [together(bits) for bits in (3, 4, 5)]
    assert all(2 < a / b < 10 for a, b in pairwise(sums))
    assert together(8) < together(5) / 20


def test_the_same_from_disk(llama: Checkpoint, batches: list[mx.array], tmp_path: Path) -> None:
    """Inputs of the blocks spooled, but for three: the same numbers; another seed draws others."""
    one = bit_allocation.costs(llama, batches, 64, (4,))
    assert one == bit_allocation.costs(
        llama, batches, group=64, bits=(4,), seed=0, kept=Spool(tmp_path, 3)
    )
    assert one != bit_allocation.costs(llama, batches, group=64, bits=(4,), seed=1)


@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4"])
def test_microscaling_formats(
    mode: str, llama: Checkpoint, batches: list[mx.array], tmp_path: Path
) -> None:
    """A teacher in it, the embedding in 8 affine bits: stock mlx-lm computes what we read."""
    done = tiny.in_fp4(llama, tmp_path / "q", mode)
    assert done["bits_per_block_weight"] == {"mxfp4": 4.25, "nvfp4": 4.5}[mode]
    made = load.open_checkpoint(tmp_path / "q")
    model, _ = load.mlx_lm("utils").load(str(tmp_path / "q"))
    assert (
        dict(tree_flatten(model.parameters()))["model.layers.0.mlp.up_proj.scales"].dtype
        == mx.uint8
    )
    ours = load.resident_model(made, mx.float32)
    # it computes in float16
    assert mx.allclose(model(batches[0]).astype(mx.float32), ours(batches[0]), atol=5e-3)
