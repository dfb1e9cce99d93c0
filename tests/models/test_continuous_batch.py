"""Texts that begin when others end, against one token at a time without a cache."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn
import pytest

from mis_mlx.models.opening import load
from mis_mlx.models.writing import continuous_batch
from mis_mlx.models.writing.continuous_batch import Completion, Room
from mis_mlx.models.writing.draws import Draws
from mis_mlx.types import Checkpoint
from tests.conftest import mostly_thorough

# Seven prompts of 1 to 9 tokens: in a batch of three, texts begin beside longer ones.
PROMPTS = [
    [5, 6, 7, 8, 9, 10, 11],
    [40],
    [21, 22, 23],
    [301, 302, 303, 304, 305, 306, 307, 308, 309],
    [77, 78],
    [150, 3, 150, 3, 150],
    [12, 400, 12, 400],
]
LENGTH = 12


# gemma3_text has blocks that see seven tokens, with a cache of their own kind.
@pytest.fixture(name="model", params=["llama", "qwen3", "gemma3_text"])
def _model(request: pytest.FixtureRequest, models: Callable[[str], Checkpoint]) -> nn.Module:
    loaded = load.resident_model(models(request.param), mx.float32)
    mx.eval(loaded.parameters())
    return loaded


def alone(model: nn.Module, prompt: Sequence[int], stop: Sequence[int]) -> list[int]:
    """The greedy continuation, the whole text read anew for every token."""
    written: list[int] = []
    while len(written) < LENGTH and (not written or written[-1] not in stop):
        logits = model(mx.array([[*prompt, *written]]))
        written.append(int(mx.argmax(logits[0, -1])))
    return written


def stops_of(model: nn.Module) -> list[int]:
    """Two tokens that end some texts early: one of the first text, one of the last."""
    return [alone(model, PROMPTS[0], [])[3], alone(model, PROMPTS[-1], [])[1]]


@pytest.mark.parametrize("at_once", mostly_thorough([1, 3, 16], 3))
def test_greedy_is_the_models_own_text(model: nn.Module, at_once: int) -> None:
    """Every prompt once, whatever the batch; some texts end early, so others begin beside them."""
    stop = stops_of(model)
    expected = [alone(model, prompt, stop) for prompt in PROMPTS]
    assert len({len(ids) for ids in expected}) > 1

    completions = list(
        continuous_batch.completions(
            model, PROMPTS, max_tokens=LENGTH, stop=stop, room=Room(at_once), draws=Draws()
        )
    )

    numbers = [completion.number for completion in completions]
    assert sorted(numbers) == list(range(len(PROMPTS)))
    assert {number: ids for number, ids in completions} == dict(enumerate(expected))


def test_a_text_comes_as_soon_as_it_has_ended(llama: Checkpoint) -> None:
    """Three places and seven prompts: the first text comes before the last prompt was read."""
    model = load.resident_model(llama, mx.float32)
    read: list[int] = []

    class Counted(list):
        """A prompt that notes when it is read."""

        def __getitem__(self, key: object) -> object:
            read.append(len(self))
            return super().__getitem__(key)  # type: ignore[index]

    prompts = [Counted(prompt) for prompt in PROMPTS]
    completions = continuous_batch.completions(
        model, prompts, max_tokens=LENGTH, stop=[], room=Room(3), draws=Draws()
    )

    first = next(completions)

    # The longest three begin first; the shortest prompt has not been read.
    assert first == Completion(3, alone(model, PROMPTS[3], []))
    assert 1 not in read
    assert len(list(completions)) == len(PROMPTS) - 1
    assert 1 in read


@pytest.mark.parametrize(("said", "wires"), [("", False), ("1", True)])
def test_nothing_is_wired_for_a_batch(
    said: str, wires: bool, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mlx-lm's generator wires all that Metal recommends, and unwires it at its end. Unless
    MIS_MLX_WIRE=1, MLX is called not once: while it is made, writes, is closed, and is forgotten.
    """
    calls = list[int]()

    def recording(nbytes: int) -> int:
        calls.append(nbytes)
        return 7

    recommended = {"max_recommended_working_set_size": 5 * 2**30}
    monkeypatch.setattr(mx, "device_info", lambda *device: recommended)
    monkeypatch.setattr(mx, "set_wired_limit", recording)
    monkeypatch.setenv("MIS_MLX_WIRE", said)
    list(
        continuous_batch.completions(
            model, PROMPTS, max_tokens=2, stop=[], room=Room(3), draws=Draws()
        )
    )
    assert mx.set_wired_limit is recording
    gc.collect()  # a generator closes itself once more when it goes
    assert calls == ([5 * 2**30, 7] if wires else [])
