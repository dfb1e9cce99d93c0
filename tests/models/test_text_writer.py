"""The writer of texts against one token at a time without a cache, whole in memory and streamed; a
draft changes how many passes it takes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx.data import token_windows
from mis_mlx.models.opening import compute_type, load, resolve
from mis_mlx.models.opening.model_size import model_of
from mis_mlx.models.passing.resident import Resident
from mis_mlx.models.passing.stream import NotNumbers, Stream
from mis_mlx.models.writing import streamed_batch, text_writer
from mis_mlx.models.writing.draws import Draws, Sampling
from mis_mlx.models.writing.text_writer import Completion, Room, TextWriter
from mis_mlx.quantization import packed_format
from mis_mlx.types import Checkpoint
from tests import tiny
from tests.conftest import mostly_slow

Models = Callable[[str], Checkpoint]
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [40], [21, 22, 23], [7, 9]]
COUNT = 24
IDS = [5, 9, 300, 41, 7, 7, 120]
MORE = ("phi3", "ministral3", "gemma4_text", "lfm2", "olmo2")


@pytest.fixture(
    name="checkpoint",
    params=mostly_slow(
        ["llama", "qwen3", "lfm2", "gemma3_text"], "llama", thorough=["lfm2", "gemma3_text"]
    ),
)
def _checkpoint(request: pytest.FixtureRequest, models: Callable[[str], Checkpoint]) -> Checkpoint:
    return models(request.param)


@pytest.fixture(name="model", params=["whole", "streamed"])
def _model(request: pytest.FixtureRequest, checkpoint: Checkpoint) -> Resident | Stream:
    if request.param == "streamed":
        return Stream(checkpoint, mx.float32)
    return resident(checkpoint)


def resident(checkpoint: Checkpoint) -> Resident:
    made = load.resident_model(checkpoint, mx.float32)
    mx.eval(made.parameters())
    return Resident(made)


def plainly(
    checkpoint: Checkpoint, prompt: Sequence[int], count: int, stop: Collection[int] = ()
) -> list[int]:
    """The greedy continuation, the whole text read anew for every token."""
    model = load.resident_model(checkpoint, mx.float32)
    written = list[int]()
    while len(written) < count:
        logits = model(mx.array([[*prompt, *written]]))[0, -1]
        written.append(int(mx.argmax(logits)))
        if written[-1] in stop:
            break
    return written


@pytest.mark.usefixtures("cpu_policy")
@pytest.mark.parametrize("at_once", mostly_slow([1, 2, 16], 2))
def test_greedy_is_the_models_own_text(
    checkpoint: Checkpoint, model: Resident | Stream, at_once: int
) -> None:
    """Prompts of 1 to 7 tokens together; a stop token ends one early, is its last, and lets another
    begin.
    """
    expected = [plainly(checkpoint, prompt, 9) for prompt in PROMPTS]
    writer = TextWriter(model, Room(at_once))
    assert writer.write(PROMPTS, 9, ()) == expected
    stop = {expected[0][4]}
    ended = [plainly(checkpoint, prompt, 9, stop) for prompt in PROMPTS]
    assert ended != expected
    found = list(writer.completions(PROMPTS, 9, stop))
    assert sorted(found) == list(enumerate(ended))
    assert TextWriter(model).write([], 9, ()) == []


@pytest.mark.usefixtures("cpu_policy")
def test_a_text_depends_on_its_prompt_and_its_seed(
    checkpoint: Checkpoint, model: Resident | Stream
) -> None:
    """It is the same alone, beside others and behind them, whole and streamed; MLX's global random
    state has no part in it. Another seed gives another text, also to the same prompt.
    """
    other = text_writer.opened(checkpoint, 0, room=Room(3))

    def written(writer: TextWriter, order: Sequence[int]) -> list[list[int]]:
        mx.random.seed(len(order))
        prompts = [PROMPTS[number % 4] for number in order]
        draws = Draws(Sampling(1.0, top_p=0.9), order)
        found = dict(zip(order, writer.write(prompts, 8, (), draws), strict=True))
        return [found[number] for number in sorted(order)]

    forwards = list(range(8))
    expected = written(TextWriter(model), forwards)
    assert len({tuple(ids) for ids in expected}) == 8
    for at_once in (1, 3):
        writer = TextWriter(model, Room(at_once))
        assert written(writer, forwards[::-1]) == expected
    assert written(other, forwards) == expected
    assert written(TextWriter(model), [5]) == [expected[5]]


def test_a_group_is_drawn_from_its_prompts_distribution(llama: Checkpoint) -> None:
    """1,000 first tokens: frequencies of the likeliest token agree with its probability at
    temperature 0.1.
    """
    model = load.resident_model(llama, mx.float32)
    draws = Draws(Sampling(0.1), range(1000))
    group = TextWriter(Resident(model)).write(PROMPTS[:1] * 1000, 1, (), draws)
    p = mx.softmax(model(mx.array([PROMPTS[0]]))[0, -1] / 0.1)
    top = int(mx.argmax(p))
    share = np.mean([answer == [top] for answer in group])
    assert 0.02 < float(p[top]) < 0.98
    assert abs(share - float(p[top])) < 4 * np.sqrt(0.25 / 1000)


def test_longer_texts_are_fewer_side_by_side() -> None:
    """As many as have the planned tokens together, and one in any case."""
    room = Room(12, 40)
    assert [room.texts(tokens) for tokens in (1, 40, 41, 80, 479, 481, 10**6)] == [
        *[12, 12, 11, 6, 1, 1, 1]
    ]
    assert Room(12).texts(10**6) == 12


@pytest.mark.usefixtures("cpu_policy")
def test_writing_side_by_side_takes_what_the_plan_says(llama: Checkpoint) -> None:
    """32 texts of 100 tokens stay well below the plan, which has keys and values three times: the
    prompts' own caches go when the batch begins. Kept, they made it six tenths and more here, and
    more than all of it for a real model.
    """
    writer = text_writer.opened(compute_type.open_to_compute(llama.path), None)
    prompts = [[5, 6, 7, 8] * 15] * 32
    planned = streamed_batch.resident_bytes(model_of(llama), at_once=32, tokens=100)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()

    writer.write(prompts, 40, ())

    assert 0.3 * planned < mx.get_peak_memory() - before < 0.55 * planned


def test_a_text_comes_as_soon_as_it_has_ended(llama: Checkpoint) -> None:
    """Two places and four prompts, the longest first: the first text comes before the last prompt
    was read.
    """
    read: list[int] = []

    class Counted(list[int]):
        """A prompt that notes when it is read."""

        def __iter__(self) -> Iterator[int]:
            read.append(len(self))
            return super().__iter__()

    prompts = [Counted(prompt) for prompt in PROMPTS]
    completions = TextWriter(resident(llama), Room(2)).completions(prompts, 9, ())
    assert next(completions) == Completion(0, plainly(llama, PROMPTS[0], 9))
    assert 1 not in read
    assert len(list(completions)) == 3
    assert 1 in read


def test_a_prompt_that_comes_several_times_is_read_once(llama: Checkpoint) -> None:
    """Texts behind it are those of each alone; its tokens are looked up once."""
    model = resident(llama)
    tokens = []
    embed = model.embed

    def watched(batches: Sequence[mx.array]) -> list[mx.array]:
        tokens.append(sum(batch.size for batch in batches))
        return embed(batches)

    model.embed = watched  # type: ignore[method-assign]
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[0]]
    written = TextWriter(model).write(prompts, 3, ())
    assert written == [plainly(llama, prompt, 3) for prompt in prompts]
    assert tokens == [len(PROMPTS[0]) + len(PROMPTS[1]), 4, 4]


@pytest.mark.parametrize("kind", ["whole", "streamed"])
def test_what_is_not_a_number_is_refused(llama: Checkpoint, kind: str) -> None:
    """Behind the first token the embedding gives infinity: no token is drawn of that."""
    model: Resident | Stream = resident(llama) if kind == "whole" else Stream(llama, mx.float32)
    embed = model.embed
    coming = TextWriter(model).settled(IDS, 3, ())
    assert next(coming) == plainly(llama, IDS, 1)
    model.embed = lambda batches: [rows * mx.inf for rows in embed(batches)]  # type: ignore
    with pytest.raises(NotNumbers):
        next(coming)


def passes(model: Resident | Stream, ids: list[int], count: int = COUNT, **more: Any) -> Any:
    """(the text, tokens of each pass)."""
    found = list(TextWriter(model).settled(ids, count, more.pop("stop", ()), **more))
    return [token for new in found for token in new], [len(new) for new in found]


@pytest.fixture
def stranger(tmp_path: Path) -> TextWriter:
    """A draft whose guesses are mostly wrong."""
    return TextWriter(
        resident(load.open_checkpoint(tiny.make(tmp_path / "s", seed=5, num_hidden_layers=1)))
    )


@pytest.mark.usefixtures("cpu_policy")
@pytest.mark.parametrize("kind", mostly_slow([*tiny.KINDS, *MORE], "llama", thorough=["lfm2"]))
def test_a_draft_changes_no_token(
    models: Models, kind: str, stranger: TextWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One token a pass, or with a stranger's guesses, one and 16 a pass; a long prompt goes through
    in parts.
    """
    want = plainly(models(kind), IDS, COUNT)
    assert passes(Stream(models(kind), mx.float32), IDS) == (want, [1] * COUNT)
    for guessed in (1, 16):
        model = Stream(models(kind), mx.float32)
        assert passes(model, IDS, draft=stranger, guessed=guessed)[0] == want
    monkeypatch.setattr(streamed_batch, "ROWS", 48)
    long = (IDS * 20)[: 2 * 48 + 5]
    found, _ = passes(Stream(models(kind), mx.float32), long, draft=stranger, guessed=16)
    assert found == plainly(models(kind), long, COUNT)


@pytest.mark.usefixtures("cpu_policy")
def test_sliding_windows(tmp_path: Path, stranger: TextWriter) -> None:
    """A token looks back as far as the model's own pass does, a guessed one too."""
    types = ["full_attention", "sliding_attention", "full_attention"]
    checkpoint = load.open_checkpoint(
        tiny.make(tmp_path / "sliding", layer_types=types, sliding_window=6)
    )
    want = plainly(checkpoint, IDS, COUNT)
    model = Stream(checkpoint, mx.float32)
    assert passes(model, IDS)[0] == passes(model, IDS, draft=stranger, guessed=16)[0] == want
    full = Checkpoint(
        checkpoint.path, {**checkpoint.config, "layer_types": None}, checkpoint.tensors
    )
    assert plainly(full, IDS, COUNT) != want


@pytest.mark.usefixtures("cpu_policy")
@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_scaled_positions_turn_row_by_row(tmp_path: Path, kind: str, stranger: TextWriter) -> None:
    """Every kind of rotary positions takes a position for each row: in a prompt, and in a guess."""
    rope: dict[str, Any] = {
        "rope_type": kind,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    checkpoint = load.open_checkpoint(tiny.make(tmp_path / "scaled", rope_scaling=rope))
    found, _ = passes(Stream(checkpoint, mx.float32), IDS, draft=stranger, guessed=16)
    assert found == plainly(checkpoint, IDS, COUNT)


@pytest.mark.slow
def test_the_real_teacher_says_the_same() -> None:
    """SmolLM2-135M streamed with nothing kept, plain and with itself as the draft, and whole."""
    checkpoint = load.open_checkpoint(resolve.resolve_model().path)
    ids = token_windows.encode_prompt("What is a shepherd?", load.tokenizer(checkpoint.path))
    want = plainly(checkpoint, ids, COUNT)
    assert passes(Stream(checkpoint, mx.float32), ids)[0] == want
    itself = TextWriter(resident(checkpoint))
    drafted, sizes = passes(Stream(checkpoint, mx.float32), ids, draft=itself, guessed=16)
    assert drafted == want == passes(itself.model, ids)[0]
    assert len(sizes) < COUNT / 2


@pytest.mark.thorough
def test_a_packed_model_whose_best_draft_is_itself(tmp_path: Path, llama: Checkpoint) -> None:
    """With some blocks kept between passes; a pass settles its 16 guesses and one more token.
    Nothing comes after the end token, and never more than asked for, however much a pass
    settles.
    """
    packed_format.write_quantized(
        llama, tmp_path / "q4", packed_format.formats_of(llama.config, 64)
    )
    packed = load.open_checkpoint(tmp_path / "q4")
    want = plainly(packed, IDS, COUNT)
    draft = TextWriter(resident(packed))
    rooms = (Stream(packed, mx.float32, kib << 10) for kib in itertools.count(64, 16))
    source = next(stream for stream in rooms if stream.resident_blocks == 1)
    found, sizes = passes(source, IDS, draft=draft, guessed=16)
    assert found == want
    assert len(sizes) <= COUNT / 3
    ended = want[: want.index(want[5]) + 1]
    for more in ({}, {"draft": draft, "guessed": 16}):
        assert passes(source, IDS, stop={want[5]}, **more)[0] == ended
        assert passes(source, IDS, 5, **more)[0] == want[:5]
