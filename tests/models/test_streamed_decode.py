"""Streamed decoding is mlx-lm's greedy decoding, token for token; a draft changes how many passes it takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx.models import load, mlx_generate, resolve, streamed_decode
from mis_mlx.models.stream import Stream
from mis_mlx.quantization import packed_format
from mis_mlx.storage.files import DISK
from mis_mlx.types import Checkpoint
from tests import tiny

COUNT = 24
IDS = [5, 9, 300, 41, 7, 7, 120]


def stock(checkpoint: Checkpoint, ids: list[int], count: int = COUNT) -> list[int]:
    """mlx-lm's own resident greedy decoding, in float32."""
    model = load.resident(checkpoint, mx.float32)
    step = load.mlx_lm("generate").generate_step
    return [int(t) for t, _ in step(mx.array(ids), model, max_tokens=count)]


def ours(checkpoint: Checkpoint, ids: list[int], **more: object) -> list[list[int]]:
    """Tokens by pass."""
    return list(streamed_decode.decode(Stream(checkpoint, mx.float32), ids, COUNT, **more))  # type: ignore[arg-type]


def flat(passes: list[list[int]]) -> list[int]:
    return [t for new in passes for t in new]


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_plain_decoding_is_mlx_lms(models: Callable[[str], Checkpoint], kind: str) -> None:
    """One token a pass, the same tokens; a long prompt goes through in parts."""
    passes = ours(models(kind), IDS)
    assert flat(passes) == stock(models(kind), IDS) and [len(p) for p in passes] == [1] * COUNT
    long = (IDS * 20)[: 2 * 48 + 5]
    want = stock(models(kind), long)
    before, streamed_decode.ROWS = streamed_decode.ROWS, 48
    try:
        assert flat(ours(models(kind), long)) == want
    finally:
        streamed_decode.ROWS = before


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("size", [2, pytest.param(12, marks=pytest.mark.slow), 64])
def test_any_draft_gives_the_same_tokens(
    tmp_path: Path, models: Callable[[str], Checkpoint], kind: str, size: int
) -> None:
    """A stranger as the draft, whose guesses are mostly wrong: the tokens are those of plain decoding."""
    stranger = tiny.make(tmp_path / "s", seed=5, **{**tiny.KINDS[kind], "num_hidden_layers": 1})
    draft = Stream(load.open_checkpoint(stranger), mx.float32, None)
    assert flat(ours(models(kind), IDS, draft=draft, size=size)) == stock(models(kind), IDS)


def test_a_model_is_its_own_best_draft(llama: Checkpoint) -> None:
    """All its guesses are right: a pass settles the depth of the tree and one more token."""
    passes = ours(llama, IDS, draft=Stream(llama, mx.float32, None), size=64)
    assert flat(passes) == stock(llama, IDS)
    assert len(passes) <= COUNT / 3


def test_sliding_windows_count_positions_not_columns(tmp_path: Path) -> None:
    """A tree's nodes lie side by side in the cache; how far a window reaches is a matter of depth."""
    types = ["full_attention", "sliding_attention", "full_attention"]
    folder = tiny.make(tmp_path / "sliding", layer_types=types, sliding_window=6)
    checkpoint = load.open_checkpoint(folder)
    want = stock(checkpoint, IDS)
    assert flat(ours(checkpoint, IDS)) == want
    draft = Stream(load.open_checkpoint(tiny.make(tmp_path / "s", seed=5)), mx.float32, None)
    assert flat(ours(checkpoint, IDS, draft=draft, size=32)) == want
    full = Checkpoint(checkpoint.path, {**checkpoint.config, "layer_types": None}, checkpoint.tensors)
    assert stock(full, IDS) != want


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": 128},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_scaled_positions_turn_row_by_row(tmp_path: Path, rope: dict[str, object]) -> None:
    """Every kind of rotary positions takes a position for each row: in a prompt, and in a tree."""
    checkpoint = load.open_checkpoint(tiny.make(tmp_path / "scaled", rope_scaling=rope))
    draft = Stream(load.open_checkpoint(tiny.make(tmp_path / "s", seed=5)), mx.float32, None)
    assert flat(ours(checkpoint, IDS, draft=draft, size=32)) == stock(checkpoint, IDS)


@pytest.mark.slow
def test_the_real_teacher_says_the_same() -> None:
    """SmolLM2-135M streamed with nothing kept, plain and with itself as the draft: mlx-lm's tokens."""
    checkpoint = load.open_checkpoint(resolve.find().path)
    ids = mlx_generate.encode(load.tokenizer(checkpoint.path), "What is a shepherd?")
    want = stock(checkpoint, ids)
    assert flat(ours(checkpoint, ids)) == want
    drafted = ours(checkpoint, ids, draft=Stream(checkpoint, mx.float32, None))
    assert flat(drafted) == want and len(drafted) < COUNT / 2


def test_four_bits_and_kept_blocks(tmp_path: Path, llama: Checkpoint) -> None:
    """A packed model, with some blocks kept between passes: the tokens of the resident one."""
    packed_format.write_quantized(llama, tmp_path / "q4", 64, DISK)
    packed = load.open_checkpoint(tmp_path / "q4")
    want = stock(packed, IDS)
    one = Stream(packed, mx.float32)
    source = Stream(packed, mx.float32, one._head_bytes + one._block_bytes + 1000)
    assert source.keeps == 1
    assert flat(list(streamed_decode.decode(source, IDS, COUNT, draft=Stream(llama, mx.float32, None)))) == want


def test_it_stops_at_the_end_token_and_at_the_count(llama: Checkpoint) -> None:
    """Nothing after the end token, and never more than asked for, however much a pass settles."""
    want = stock(llama, IDS)
    end = want[5]
    for draft in (None, Stream(llama, mx.float32, None)):
        stopped = flat(ours(llama, IDS, draft=draft, ends={end}))
        assert stopped == want[: want.index(end) + 1]
        some = streamed_decode.decode(Stream(llama, mx.float32), IDS, 5, draft=draft)
        assert flat(list(some)) == want[:5]


def test_a_tree_by_pencil() -> None:
    """Odds of 0.6 and 0.4 everywhere: the four best of a binary tree are 0.6, 0.4, 0.36 and 0.24 (the first of two)."""
    asked: list[int] = []

    def after(nodes: list[streamed_decode.Node]) -> streamed_decode.Odds:  # type: ignore[type-arg]
        rows = max(1, len(nodes))
        asked.append(len(nodes))
        return np.log(np.full((rows, 2), [0.6, 0.4])), np.full((rows, 2), [1, 2])

    nodes = streamed_decode.grow(after, 4, 3)  # type: ignore[arg-type]
    assert sorted(round(float(np.exp(n.score)), 2) for n in nodes) == [0.24, 0.36, 0.4, 0.6]
    assert [n.depth for n in nodes] == sorted(n.depth for n in nodes)
    assert all(n.up is None or n.up in nodes for n in nodes) and asked[0] == 0
    assert max(n.depth for n in streamed_decode.grow(after, 50, 2)) == 2  # type: ignore[arg-type]
    assert all(n.up is None or n.up.token != 1 for n in streamed_decode.grow(after, 20, 4, {1}))  # type: ignore[arg-type]
    first = next(n for n in nodes if n.depth == 1 and n.token == 1)
    below = next(n for n in nodes if n.up is first)
    choice = dict.fromkeys(range(len(nodes) + 1), 9)
    choice[0], choice[1 + nodes.index(first)] = 1, below.token
    branch, last = streamed_decode.accepted(nodes, list(choice.values()))
    assert branch == [first, below] and last == 9
