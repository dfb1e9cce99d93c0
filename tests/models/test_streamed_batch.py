"""Texts side by side, against every text alone and read anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mis_mlx.models.architectures import block_state
from mis_mlx.models.opening import load
from mis_mlx.models.passing import stream
from mis_mlx.models.passing.resident import Resident
from mis_mlx.models.writing import streamed_batch
from mis_mlx.types import Checkpoint
from tests import tiny
from tests.conftest import mostly_slow

Models = Callable[[str], Checkpoint]
# of several lengths; longer than the tiny models' windows, of one token, and alike
# Gemma 4's queries choose one token, so that a difference in the last bits grows (`tiny.calm`).
NEAR = {"gemma4_text": 1e-2}
PROMPTS = [[5, 9, 300, 17, 21, 8, 40, 41, 42, 43, 44, 45, 46], [40], [21, 22, 23], [7, 7], [3] * 6]


SHOWN = (
    "llama",
    "gemma3_text",
    "ministral3",
    "qwen3_moe",
    "gpt_oss",
    "lfm2",
    "qwen3_5_text",
)


QUICK = ("gpt_oss", "lfm2")


def log_probs_of(whole: nn.Module, text: Sequence[int]) -> mx.array:
    """Of the token behind a text (V,), all of which is read at once."""
    logits = whole(mx.array([text]))[0, -1].astype(mx.float32)
    return logits - mx.logsumexp(logits)


@pytest.mark.usefixtures("cpu_policy")
@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize(
    "kind", mostly_slow(["llama", "biased", *tiny.MODELS], *QUICK, thorough=SHOWN)
)
def test_what_comes_next_is_what_a_text_alone_says(
    models: Models, kind: str, streamed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every family, on disk and in memory: prompts that begin together and later, texts that end
    in between, prompts in pieces, room that grows. Log-probabilities are those of the whole text
    read at once.
    """
    monkeypatch.setattr(streamed_batch, "ROWS", 5)
    monkeypatch.setattr(block_state, "STEP", 3)
    checkpoint = models(kind)
    whole = load.resident_model(checkpoint, mx.float32)
    source = stream.Stream(checkpoint, mx.float32) if streamed else Resident(whole)
    batch = streamed_batch.Batch(source)
    texts = list[list[int]]()
    waiting = [list(prompt) for prompt in PROMPTS]
    begins = {0: 2, 2: 1, 6: 2}  # how many, before which pass
    ends = {4: [1], 8: [0, 2]}  # which places, behind which pass
    for number in range(11):
        prompts = [waiting.pop(0) for _ in range(begins.get(number, 0))]
        found = batch.read([text[-1:] for text in texts], prompts)
        texts += prompts
        assert found.shape == (len(texts), source.config["vocab_size"])
        for row, text in zip(found, texts, strict=True):
            expected = log_probs_of(whole, text)
            assert mx.abs(row - expected).max().item() < NEAR.get(kind, 1e-4)
            text.append(int(mx.argmax(row)))
        gone = ends.get(number, [])
        places = [place for place in range(len(texts)) if place not in gone]
        texts = [texts[place] for place in places]
        batch.keep(places)
    assert not waiting
    assert len(texts) == 2


@pytest.mark.parametrize(
    "kind", mostly_slow(["llama", "qwen3_5_text", "gpt_oss"], "llama", "gpt_oss")
)
def test_by_metals_policy(models: Models, kind: str, metal: None) -> None:
    """In float16, prompts evaluated several together: near the whole text, which is read in float16
    too, and always a number.
    """
    checkpoint = models(kind)
    whole = load.resident_model(checkpoint, mx.float16)
    batch = streamed_batch.Batch(stream.Stream(checkpoint, mx.float16))
    texts = [list(prompt) for prompt in PROMPTS]
    found = batch.read([], texts[:3])
    for text, row in zip(texts, found, strict=False):
        text.append(int(mx.argmax(row)))
    found = batch.read([text[-1:] for text in texts[:3]], texts[3:])
    for row, text in zip(found, texts, strict=True):
        assert mx.abs(row - log_probs_of(whole, text)).max().item() < 0.05


@pytest.mark.usefixtures("cpu_policy")
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_passes_read_the_weights_once(models: Models, kind: str) -> None:
    """Of all prompts, and of a token of all texts: no byte of a block twice."""
    checkpoint = models(kind)
    source = stream.Stream(checkpoint, mx.float32)
    batch = streamed_batch.Batch(source)
    read = [source.reader.nbytes]
    found = batch.read([], PROMPTS)
    for _ in range(2):
        read.append(source.reader.nbytes)
        found = batch.read(mx.argmax(found, axis=-1)[:, None].tolist(), [])
    read.append(source.reader.nbytes)
    passes = np.diff(read)
    # besides the rows of the embedding that occur
    assert max(passes) <= checkpoint.nbytes + source.args.hidden_size * 4 * len(PROMPTS) * 13
