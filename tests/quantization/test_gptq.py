"""Blocks rounded one after the other: on the stream of the rounded ones, nearer than plain
rounding, opened by all.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx.maths import gptq, reconstruction, rounding
from mis_mlx.models.architectures import arch
from mis_mlx.models.opening import compute_type, load
from mis_mlx.models.passing import stream
from mis_mlx.models.passing.sweep import BlockTurn
from mis_mlx.quantization import packed_format, stage
from mis_mlx.storage.hidden_spool import Spool
from mis_mlx.types import UNDECIDED, Checkpoint, MisError
from tests import stock, tiny
from tests.conftest import mostly_thorough


def write(
    checkpoint: Checkpoint, out: Path, batches: list[mx.array], group: int = 64
) -> Checkpoint:
    """The model rounded on `batches`, opened."""
    plan = packed_format.formats_of(checkpoint.config, group)
    packed_format.write_quantized(
        checkpoint,
        out,
        plan=plan,
        rounded=stage.rounded_blocks(checkpoint, batches, plan),
    )
    return load.open_checkpoint(out)


@pytest.mark.parametrize("kind", mostly_thorough([*tiny.KINDS, "phi3"], "llama", "phi3"))
def test_every_kind_opens_in_stock_mlx_lm(
    tmp_path: Path, models: Callable[[str], Checkpoint], batches: list[mx.array], kind: str
) -> None:
    """Same config, names, types and sizes as plain rounding; embedding, head and norms the same
    bytes.
    """
    made = write(models(kind), tmp_path / "gptq", batches)
    plain = tiny.packed(models(kind), tmp_path / "round")
    assert made.config == plain.config
    assert made.tensors.keys() == plain.tensors.keys()
    same = {
        n
        for n in made.tensors
        if (load.dense(made, n) == load.dense(plain, n)).all() and not n.endswith("ases")
    }
    packed = {
        n for n in made.tensors if arch.block_of(n) is not None and made.tensors[n].dtype == "U32"
    }
    assert not same & packed
    assert len(packed) == {"phi3": 28}.get(kind, 21)
    assert same >= {n for n in arch.tensors_of(made.config) if n not in packed}
    assert mx.isfinite(stock.opened(tmp_path / "gptq")(batches[0])).all()


@pytest.mark.usefixtures("cpu_policy")
def test_each_block_is_fitted_to_the_stream_of_the_rounded_ones(
    tmp_path: Path, models: Callable[[str], Checkpoint], batches: list[mx.array]
) -> None:
    """Of layers with biases: block 2 is what its own float matrices give on hidden states that the
    folder written, not the original, has there; and what comes back from the folder is what was
    chosen, bit for bit.
    """
    model = models("biased")
    folder = write(model, tmp_path / "q4", batches)
    rounded = stream.Stream(folder, mx.float32)
    source = stream.Stream(model, mx.float32)
    hidden = rounded.embed(batches)  # 8 bits, as in the folder
    chosen = list(stage.rounded_blocks(model, batches, packed_format.formats_of(model.config, 64)))
    for block in chosen:
        for path, packed in block.items():
            assert (load.dense(folder, f"{path}.weight") == rounding.values(packed, 64, 4)).all()
    hidden = source.embed(batches)
    for i, block in rounded.blocks([0, 1]):
        assert i < 2
        rounded.run_block(block, hidden)
    for _, block in source.blocks([2]):
        grams = stage._grams(BlockTurn(source, source.block_index, block, hidden), ["ffn"])
        down = block.mlp.down_proj.weight
    wanted = gptq.rounded([down], gptq.factorize(grams["ffn"]), 64, 4)[0]
    for a, b in zip(chosen[2]["model.layers.2.mlp.down_proj"], wanted, strict=True):
        assert (a == b).all()


def narrow_head(checkpoint: Checkpoint) -> packed_format.Formats:
    """4 bits everywhere, 3 for the head; the embedding keeps its 8 where it is another matrix."""
    head = load.head_prefix(checkpoint).rstrip(".")
    plan = packed_format.formats_of(checkpoint.config, 64)
    return {**plan, head: packed_format.Format(3, 64)}


@pytest.mark.usefixtures("cpu_policy")
@pytest.mark.parametrize("kind", ["llama", "untied"])
def test_the_head_is_fitted_to_what_the_rounded_blocks_give_it(
    tmp_path: Path, models: Callable[[str], Checkpoint], batches: list[mx.array], kind: str
) -> None:
    """It comes behind the blocks, in the folder too; the logits are nearer than with nearest
    values, and the integers are those of the final states that the rounded blocks make.
    """
    model = models(kind)
    plan = narrow_head(model)
    head = load.head_prefix(model).rstrip(".")
    assert packed_format.compensated_head(model, packed_format.formats_of(model.config, 64)) is None
    *blocks, last = stage.rounded_blocks(model, batches, plan)
    assert len(blocks) == 3 and list(last) == [head]
    packed_format.write_quantized(
        model, tmp_path / "q", plan, rounded=iter([*blocks, last]), fit=True
    )
    made = load.open_checkpoint(tmp_path / "q")
    stored = load.dense(made, f"{head}.weight")
    assert (stored == rounding.values(last[head], 64, 3)).all()

    rounded = stream.Stream(made, mx.float32)
    hidden = stream.Stream(model, mx.float32).embed(batches)
    for _, block in rounded.blocks():
        rounded.run_block(block, hidden)
    states = np.concatenate([np.array(h)[0] for h in rounded.norm(hidden)])
    weight = load.dense(model, f"{head}.weight")
    gram = (states.T @ states).astype(float)
    if kind == "llama":  # tied: the rows are inputs, too
        gram += stage.TIED_RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram))
    (wanted,) = gptq.rounded([weight], gptq.factorize(gram), 64, 3)
    assert (last[head][0] == wanted[0]).mean() > 0.99

    def error(weight_there: mx.array) -> float:
        return float(np.square(states @ np.array(weight - weight_there).T).sum())

    nearest = rounding.values(rounding.fitted(weight, 64, 3), 64, 3)
    assert error(stored) < 0.8 * error(nearest)
    assert mx.isfinite(stock.opened(tmp_path / "q")(batches[0])).all()


def test_the_gram_matrices(
    llama: Checkpoint, batches: list[mx.array], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what goes into the matrices of block 0, against mlx-lm's modules turn by turn; the block
    stays whole. Wide ones are float32, one triangle, some rows at a time.
    """
    source = stream.Stream(llama, mx.float32)
    hidden = source.embed(batches)
    for _, block in source.blocks([0]):
        linear = block.mlp.down_proj
        turn = BlockTurn(source, source.block_index, block, hidden)
        grams = stage._grams(turn, list(arch.READERS))
        assert block.mlp.down_proj is linear
        monkeypatch.setattr(reconstruction, "WIDE", 500)
        monkeypatch.setattr(gptq, "PANEL", 100)
        wide = stage._grams(turn, ["ffn"])["ffn"]
        seen = {axis: np.zeros_like(g) for axis, g in grams.items()}
        for h in hidden:
            first = block.input_layernorm(h)
            middle = h + block.self_attn(first, load.mask(source.args, block, h))
            second = block.post_attention_layernorm(middle)
            mlp = block.mlp
            inner = mx.sigmoid(mlp.gate_proj(second)) * mlp.gate_proj(second) * mlp.up_proj(second)
            for axis, a in (("norm1", first), ("norm2", second), ("ffn", inner)):
                flat = np.array(a, np.float64)[0]
                seen[axis] += flat.T @ flat
    for axis in ("norm1", "norm2", "ffn"):
        scale = np.abs(seen[axis]).max()
        np.testing.assert_allclose(grams[axis], seen[axis], atol=1e-5 * scale)  # float32 products
        assert grams[axis].dtype == np.float64
    assert wide.dtype == np.float32
    np.testing.assert_allclose(np.triu(wide), np.triu(seen["ffn"]), atol=1e-5 * scale)
    assert grams["heads"].shape == (64, 64)
    assert np.linalg.eigvalsh(grams["heads"]).min() > -1e-6


def test_the_model_stays_nearer_to_itself(tmp_path: Path) -> None:
    """Final hidden states on text that calibration did not see: nearer to the float model's than by
    plain rounding.

    (0.59 of its squared distance when this was written; ten tokens for each neuron.)
    """
    llama = load.open_checkpoint(tiny.make(tmp_path / "narrow", intermediate_size=128))
    windows = [mx.random.randint(0, 512, (1, 64), key=mx.random.key(k)) for k in range(24)]
    made = write(llama, tmp_path / "gptq", windows[:20])
    tiny.packed(llama, tmp_path / "round")
    want = stream.Stream(llama, mx.float32).forward(windows[20:])

    def error(model: Checkpoint) -> float:
        found = stream.Stream(model, mx.float32).forward(windows[20:])
        return sum(mx.square(a - b).sum().item() for a, b in zip(found, want, strict=True))

    assert error(made) < 0.8 * error(load.open_checkpoint(tmp_path / "round"))


def test_hidden_states_on_disk_change_nothing(
    tmp_path: Path, llama: Checkpoint, batches: list[mx.array]
) -> None:
    """One window in memory, the other spooled: the same bits."""
    plan = narrow_head(llama)
    spooled = stage.rounded_blocks(llama, batches, plan, Spool(tmp_path, 1))
    for a, b in zip(stage.rounded_blocks(llama, batches, plan), spooled, strict=True):
        for path in a:
            assert all((x == y).all() for x, y in zip(a[path], b[path], strict=True))


def test_inputs_that_overflow_are_refused(tmp_path: Path, batches: list[mx.array]) -> None:
    """Finite weights whose products are not: no gram matrix can be made of that."""
    name = "model.layers.1.mlp.up_proj.weight"
    folder = tiny.make(tmp_path / "bad")
    tiny.change(folder, {name: tiny.stored_weights(folder)[name] * 1e38})
    bad = compute_type.open_to_compute(folder, UNDECIDED)  # in a type that holds the weights
    with pytest.raises(MisError, match="model.layers.1.mlp.down_proj"):
        write(bad, tmp_path / "q4", batches)
    assert not (tmp_path / "q4").exists()
