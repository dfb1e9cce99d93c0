"""Streamed decoding is mlx-lm's greedy decoding, token for token; a draft changes how many passes
it takes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mis_mlx.models.opening import load, resolve
from mis_mlx.models.passing.stream import Stream
from mis_mlx.models.writing import mlx_generate, streamed_decode
from mis_mlx.quantization import packed_format
from mis_mlx.storage.files import DISK
from mis_mlx.types import Checkpoint
from tests import tiny
from tests.conftest import mostly_slow

COUNT = 24
MORE = ("phi3", "ministral3", "gemma4_text", "lfm2", "olmo2")
IDS = [5, 9, 300, 41, 7, 7, 120]


def stock(checkpoint: Checkpoint, ids: list[int]) -> list[int]:
    """mlx-lm's own resident greedy decoding, in float32."""
    return list(mlx_generate.greedy(load.resident_model(checkpoint, mx.float32), ids, COUNT))


def ours(checkpoint: Checkpoint, ids: list[int], **more: Any) -> list[list[int]]:
    """Tokens by pass."""
    return list(streamed_decode.decode(Stream(checkpoint, mx.float32), ids, COUNT, **more))


def flat(passes: list[list[int]]) -> list[int]:
    return list(chain.from_iterable(passes))


@pytest.fixture
def stranger(tmp_path: Path) -> Stream:
    """A draft whose guesses are mostly wrong."""
    return Stream(
        load.open_checkpoint(tiny.make(tmp_path / "s", seed=5, num_hidden_layers=1)),
        mx.float32,
        None,
    )


@pytest.mark.parametrize(
    "kind",
    mostly_slow([*tiny.KINDS, *MORE], "llama", thorough=["lfm2"]),
)
def test_the_tokens_are_mlx_lms(
    models: Callable[[str], Checkpoint],
    kind: str,
    stranger: Stream,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One token a pass, or with a stranger's guesses, one and 16 a pass; a long prompt goes through
    in parts.
    """
    want = stock(models(kind), IDS)
    passes = ours(models(kind), IDS)
    assert flat(passes) == want
    assert [len(p) for p in passes] == [1] * COUNT
    for guessed in (1, 16):
        assert flat(ours(models(kind), IDS, draft=stranger, guessed=guessed)) == want
    monkeypatch.setattr(streamed_decode, "ROWS", 48)
    long = (IDS * 20)[: 2 * 48 + 5]
    assert flat(ours(models(kind), long)) == stock(models(kind), long)


def test_sliding_windows(tmp_path: Path, stranger: Stream) -> None:
    """A token looks back as far as mlx-lm's does, a guessed one too."""
    types = ["full_attention", "sliding_attention", "full_attention"]
    checkpoint = load.open_checkpoint(
        tiny.make(tmp_path / "sliding", layer_types=types, sliding_window=6)
    )
    want = stock(checkpoint, IDS)
    assert (
        flat(ours(checkpoint, IDS))
        == flat(ours(checkpoint, IDS, draft=stranger, guessed=16))
        == want
    )
    full = Checkpoint(
        checkpoint.path, {**checkpoint.config, "layer_types": None}, checkpoint.tensors
    )
    assert stock(full, IDS) != want


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_scaled_positions_turn_row_by_row(tmp_path: Path, kind: str, stranger: Stream) -> None:
    """Every kind of rotary positions takes a position for each row: in a prompt, and in a guess."""
    rope: dict[str, Any] = {
        "rope_type": kind,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    checkpoint = load.open_checkpoint(tiny.make(tmp_path / "scaled", rope_scaling=rope))
    assert flat(ours(checkpoint, IDS, draft=stranger, guessed=16)) == stock(checkpoint, IDS)


@pytest.mark.slow
def test_the_real_teacher_says_the_same() -> None:
    """SmolLM2-135M streamed with nothing kept, plain and with itself as the draft: mlx-lm's
    tokens.
    """
    checkpoint = load.open_checkpoint(resolve.resolve_model().path)
    ids = mlx_generate.encode(load.tokenizer(checkpoint.path), "What is a shepherd?")
    want = stock(checkpoint, ids)
    assert flat(ours(checkpoint, ids)) == want
    drafted = ours(checkpoint, ids, draft=Stream(checkpoint, mx.float32, None), guessed=16)
    assert flat(drafted) == want
    assert len(drafted) < COUNT / 2


@pytest.mark.thorough
def test_a_packed_model_whose_best_draft_is_itself(tmp_path: Path, llama: Checkpoint) -> None:
    """With some blocks kept between passes; a pass settles its 16 guesses and one more token.
    Nothing comes after the end token, and never more than asked for, however much a pass
    settles.
    """
    packed_format.write_quantized(
        llama, tmp_path / "q4", packed_format.formats_of(llama.config, 64), DISK
    )
    packed = load.open_checkpoint(tmp_path / "q4")
    want = stock(packed, IDS)
    draft = Stream(packed, mx.float32, None)
    rooms = (Stream(packed, mx.float32, kib << 10) for kib in itertools.count(64, 16))
    source = next(stream for stream in rooms if stream.resident_blocks == 1)
    passes = list(streamed_decode.decode(source, IDS, COUNT, draft=draft, guessed=16))
    assert flat(passes) == want
    assert len(passes) <= COUNT / 3
    for guesser in (None, draft):
        assert (
            flat(ours(packed, IDS, draft=guesser, guessed=16, ends={want[5]}))
            == want[: want.index(want[5]) + 1]
        )
        assert (
            flat(list(streamed_decode.decode(source, IDS, 5, draft=guesser, guessed=16)))
            == want[:5]
        )
