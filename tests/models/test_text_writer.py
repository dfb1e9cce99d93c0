"""The writer of texts against one token at a time without a cache, whole in memory and streamed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mis_mlx.hardware import memory
from mis_mlx.models.opening import compute_type, load
from mis_mlx.models.opening.model_size import model_of
from mis_mlx.models.passing.stream import Stream
from mis_mlx.models.writing import continuous_batch, text_writer
from mis_mlx.models.writing.continuous_batch import Room
from mis_mlx.models.writing.draws import Draws, Sampling
from mis_mlx.models.writing.text_writer import TextWriter
from mis_mlx.types import Checkpoint
from tests.conftest import mostly_slow

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [40], [21, 22, 23], [7, 9]]


@pytest.fixture(
    name="checkpoint",
    params=mostly_slow(
        ["llama", "qwen3", "lfm2", "gemma3_text"], "llama", thorough=["lfm2", "gemma3_text"]
    ),
)
def _checkpoint(request: pytest.FixtureRequest, models: Callable[[str], Checkpoint]) -> Checkpoint:
    return models(request.param)


@pytest.fixture(name="model", params=["whole", "streamed"])
def _model(request: pytest.FixtureRequest, checkpoint: Checkpoint) -> nn.Module | Stream:
    if request.param == "streamed":
        return Stream(checkpoint, mx.float32)
    made = load.resident_model(checkpoint, mx.float32)
    mx.eval(made.parameters())
    return made


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
    checkpoint: Checkpoint, model: nn.Module | Stream, at_once: int
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
    checkpoint: Checkpoint, model: nn.Module | Stream
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
    group = TextWriter(model).write(PROMPTS[:1] * 1000, 1, (), draws)
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
    planned = continuous_batch.resident_bytes(model_of(llama), at_once=32, tokens=100)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()

    writer.write(prompts, 40, ())

    assert 0.3 * planned < mx.get_peak_memory() - before < 0.55 * planned


@pytest.mark.parametrize(("said", "want"), [("", []), ("1", ["all"])])
def test_what_mlx_lm_would_wire_is_not_wired(
    said: str, want: list[object], llama: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Metal the generator wires all that is recommended, unasked: that call does nothing, unless
    MIS_MLX_WIRE=1.
    """
    calls = list[object]()
    seen = list[object]()

    class Watched(Draws):
        """Draws that look at what was wired when they are asked."""

        def __call__(self, log_probs: mx.array, texts: Sequence[int]) -> mx.array:
            seen[:] = calls
            return super().__call__(log_probs, texts)

    generate = load.mlx_lm("generate")
    monkeypatch.setattr(
        generate, "maybe_set_recommended_wired_limit", lambda: mx.set_wired_limit("all")
    )
    monkeypatch.setattr(memory, "_recommended", lambda device: 5 * 2**30)
    monkeypatch.setattr(mx, "set_wired_limit", calls.append)
    monkeypatch.setenv("MIS_MLX_WIRE", said)
    text_writer.opened(llama, None).write(PROMPTS, 2, (), Watched())
    assert seen == want
