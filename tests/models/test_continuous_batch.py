"""Texts that begin when others end, and what mlx-lm's generator would wire. That they are the
model's own: test_text_writer.py."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import pytest

from mis_mlx.models.opening import load
from mis_mlx.models.writing import continuous_batch
from mis_mlx.models.writing.continuous_batch import Completion, Room
from mis_mlx.models.writing.draws import Draws
from mis_mlx.types import Checkpoint

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


@pytest.fixture(name="model")
def _model(llama: Checkpoint) -> nn.Module:
    loaded = load.resident_model(llama, mx.float32)
    mx.eval(loaded.parameters())
    return loaded


def alone(model: nn.Module, prompt: Sequence[int], stop: Sequence[int]) -> list[int]:
    """The greedy continuation, the whole text read anew for every token."""
    written: list[int] = []
    while len(written) < LENGTH and (not written or written[-1] not in stop):
        logits = model(mx.array([[*prompt, *written]]))
        written.append(int(mx.argmax(logits[0, -1])))
    return written


def test_a_text_comes_as_soon_as_it_has_ended(model: nn.Module) -> None:
    """Three places and seven prompts: the first text comes before the last prompt was read."""
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
