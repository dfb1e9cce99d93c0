"""A model passed through memory block by block computes what the whole model computes, bit for
bit.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import psutil
import pytest
from mlx.utils import tree_flatten

from mis_mlx.hardware import memory
from mis_mlx.models.opening import load
from mis_mlx.models.passing import stream
from mis_mlx.types import Checkpoint, MisError
from tests import peaks, tiny


def logits_of(checkpoint: Checkpoint, batches: list[mx.array]) -> list[mx.array]:
    """A streamed pass, then the head."""
    source = stream.Stream(checkpoint, mx.float32)
    return [load.logits(source.head(), h) for h in source.forward(batches)]


@pytest.mark.thorough
def test_passes_leave_nothing_behind(
    models: Callable[[str], Checkpoint], batches: list[mx.array]
) -> None:
    """The process is as large after 200 passes of three blocks as after 20. The blocks' first
    weights, which are drawn and never evaluated, once stayed in the generator's state: 16 KB each.
    """
    source = stream.Stream(models("llama"), mx.float32, 0)

    def size_after(passes: int) -> int:
        for _ in range(passes):
            source.forward(batches[:1])
        memory.give_back()
        return psutil.Process().memory_info().rss

    before = size_after(20)
    assert size_after(180) - before < 2 * 2**20


@pytest.mark.usefixtures("cpu_policy")
@pytest.mark.parametrize("kind", ["llama", "untied", "qwen3"])
def test_a_quantized_folder_streams(
    tmp_path: Path, models: Callable[[str], Checkpoint], batches: list[mx.array], kind: str
) -> None:
    """4-bit: bit for bit the model of the de-quantized weights; mlx-lm's own 4-bit kernels within
    1e-4.

    The kernels de-quantize to the same numbers but with float16 scales and add up in another order.
    """
    packed = tiny.packed(models(kind), tmp_path / "q4")
    plain = load.resident_model(models(kind), mx.float32)
    plain.load_weights([(n, load.dense(packed, n)) for n in models(kind).tensors])
    stock, _ = load.mlx_lm("utils").load(str(tmp_path / "q4"))
    stock.set_dtype(mx.float32)
    for ours, tokens in zip(logits_of(packed, batches), batches, strict=True):
        assert mx.array_equal(ours, plain(tokens))
        assert mx.abs(ours - stock(tokens)).max().item() < 1e-4 * mx.abs(ours).max().item() + 1e-4


def test_memory_holds_one_block_not_the_model(tmp_path: Path) -> None:
    """24 blocks of 641 KiB pass through 4 MiB: the peak stays under, the model is four times
    over.
    """
    limit = 4 * 2**20
    checkpoint = load.open_checkpoint(tiny.make(tmp_path / "deep", num_hidden_layers=24))
    assert checkpoint.nbytes > 3.5 * limit
    tokens = [mx.random.randint(0, 512, (1, 32), key=mx.random.key(0))] * 4
    mx.eval(tokens)
    with peaks.of_mlx() as peak:
        stream.Stream(checkpoint, mx.float32).forward(tokens)
    assert peak.nbytes < peaks.allocated(limit)


@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight"],
)
def test_a_weight_that_is_not_a_number_is_named(
    tmp_path: Path, batches: list[mx.array], name: str
) -> None:
    """One poked value anywhere stops the first pass, with the tensor's name and how many there
    are.
    """
    folder = tiny.make(tmp_path / "m")
    values = np.array(tiny.stored_weights(folder)[name])
    values.reshape(-1)[7] = np.inf if "norm" in name else np.nan
    tiny.change(folder, {name: mx.array(values)})
    with pytest.raises(MisError, match=f"{name} holds 1 values"):
        source = stream.Stream(load.open_checkpoint(folder), mx.float32)
        source.forward(batches)
        source.head()


@pytest.mark.parametrize("kind", ["llama", "untied"])
def test_what_has_room_is_read_once(
    models: Callable[[str], Checkpoint], batches: list[mx.array], kind: str
) -> None:
    """The head first, then blocks from the first on; the second pass reads only the rest, and gives
    the same bits.
    """
    checkpoint = models(kind)
    plain = stream.Stream(checkpoint, mx.float32)
    want = plain.forward(batches)
    embedded = plain.reader.nbytes
    embedded -= sum(t.nbytes for n, t in checkpoint.tensors.items() if ".layers." in n)
    block = sum(t.nbytes for n, t in checkpoint.tensors.items() if ".layers.0." in n)
    head = 512 * 64 * 4
    for room, keeps in ((head - 1, 0), (head + block, 0), (head + 5 * block // 2, 2), (None, 3)):
        source = stream.Stream(checkpoint, mx.float32, room)
        assert source.resident_blocks == keeps
        passes = []
        for _ in range(2):
            before = source.reader.nbytes
            got = source.forward(batches)
            source.head()
            passes.append(source.reader.nbytes - before)
            assert all(mx.array_equal(a, b) for a, b in zip(want, got, strict=True))
        kept_head = head if room is None or room >= head else 0
        # gaps are read along
        assert passes[0] == pytest.approx(embedded + 3 * block + head, abs=3 * 65536)
        norm = 64 * 4  # always kept
        assert passes[0] - passes[1] == pytest.approx(
            keeps * block + kept_head + norm, abs=keeps * 2 * 65536
        )


@pytest.mark.parametrize("headroom_bytes", [0, None])
def test_a_block_whose_output_is_no_number_is_named(
    tmp_path: Path, batches: list[mx.array], headroom_bytes: int | None
) -> None:
    """Streamed or kept in memory."""
    folder = tiny.make(tmp_path / "m")
    tiny.change(folder, {"model.layers.1.mlp.down_proj.weight": mx.full((64, 768), 3e38)})
    where = load.open_checkpoint(folder), mx.float32, headroom_bytes, False
    source = stream.Stream(*where)
    with pytest.raises(stream.NotNumbers, match="block 1 of 3 gives values that are not numbers"):
        source.forward(batches)


def test_backwards_past_the_page_cache_and_in_parts(
    llama: Checkpoint, batches: list[mx.array]
) -> None:
    """Any order of blocks; direct reading and files of one block each give the same weights; a
    break is harmless.
    """
    want = {}
    for i, block in stream.Stream(llama, mx.float32).blocks():
        want[i] = [mx.array(np.array(weight)) for _, weight in tree_flatten(block.parameters())]
    source = stream.Stream(llama, mx.float32, direct=True)
    for _ in source.blocks():
        break
    seen = []
    for i, block in source.blocks([2, 0]):
        seen.append(i)
        assert all(
            mx.array_equal(a, b)
            for a, (_, b) in zip(want[i], tree_flatten(block.parameters()), strict=True)
        )
    assert seen == [2, 0]


def test_the_block_before_is_let_go(llama: Checkpoint) -> None:
    """The loop variable of whoever goes through the blocks does not keep the last one's weights."""
    passing = stream.Stream(llama, mx.float32).blocks()
    _, first = next(passing)
    assert tree_flatten(first.parameters())
    next(passing)
    assert not tree_flatten(first.parameters())


@pytest.mark.parametrize("kind", ["llama", "untied"])
def test_a_head_of_another_type_is_not_in_memory_twice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    """Read and converted a part at a time: the same numbers, and little memory beside them."""
    stored = load.open_checkpoint(
        tiny.make(tmp_path / kind, dtype="BF16", vocab_size=65_520, **tiny.KINDS[kind])
    )
    prefix = load.head_prefix(stored)
    wanted = load.dense(stored, f"{prefix}weight").astype(mx.float32)
    monkeypatch.setattr(stream, "HEAD_PART", 100 * 64)
    monkeypatch.setattr(stream, "CHECKED", 100 * 64)
    mx.eval(wanted)
    with peaks.of_mlx() as peak:
        head = stream.Stream(stored, mx.float32).head()
        mx.eval(head.parameters())
    assert peak.nbytes < 1.1 * wanted.nbytes
    assert mx.array_equal(head.weight, wanted)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_a_search_for_nan_waits_once_a_tensor(
    dtype: mx.Dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four times as many numbers as are looked at together, a last part that is shorter, and
    numbers that are none at both ends.
    """
    waits = list[object]()
    plain = stream.evaluate_now
    monkeypatch.setattr(stream, "evaluate_now", lambda *a: (waits.append(a), plain(*a)))
    values = np.ones((1025, stream.CHECKED // 256), np.float32)
    values[0, 0] = np.nan
    values[-1, -1] = -np.inf
    assert stream.not_numbers(mx.array(values).astype(dtype)) == 2
    assert stream.not_numbers(mx.array(values).astype(dtype).T) == 2
    assert stream.not_numbers(mx.array(1.0, dtype)) == 0
    assert len(waits) == 3
