"""Log-likelihoods of options against the plain forward pass, in any company."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx.judge.tasks import option_likelihood
from mis_mlx.models.opening import load
from mis_mlx.models.passing.stream import Stream
from mis_mlx.types import Checkpoint, MisError
from tests import tiny
from tests.conftest import mostly_thorough

WORDS = ("if", "the", "loop", "is", "true", "then", "print", "all", "while", "name", "value")


def asked(tokenizer: Any, count: int) -> list[option_likelihood.Encoded]:
    """Questions of unlike length and number of options, some alike, one without a context."""
    rng = random.Random(1)
    made = []
    for number in range(count):
        context = " ".join(rng.choices(WORDS, k=rng.randint(1, 30))) if number else ""
        options = [
            " " + " ".join(rng.choices(WORDS, k=rng.randint(1, 6))) for _ in range(2 + number % 4)
        ]
        made.append(option_likelihood.encode(tokenizer, context, options))
    return made


def plain(checkpoint: Checkpoint, encoded: list[option_likelihood.Encoded]) -> list[list[float]]:
    """Every option in a pass of its own, after its whole context, through mlx-lm's model."""
    model = load.resident_model(checkpoint, mx.float32)
    found = []
    for context, options in encoded:
        found.append([])
        for option in options:
            logits = np.array(model(mx.array([[*context, *option]]))[0], np.float64)[
                len(context) - 1 : -1
            ]
            logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            found[-1].append(float(logps[np.arange(len(option)), option].sum()))
    return found


@pytest.mark.parametrize(
    "kind", mostly_thorough([*tiny.KINDS, "lfm2", "qwen3_5_text"], "llama", "qwen3_5_text")
)
def test_the_plain_forward_pass_gives_the_same(
    models: Callable[[str], Checkpoint], kind: str
) -> None:
    """Neither options nor questions see each other, positions are right: to 1e-4 nats."""
    checkpoint = models(kind)
    encoded = asked(load.tokenizer(checkpoint.path), 24)
    found = option_likelihood.score(Stream(checkpoint, mx.float32), encoded)
    for ours, witness in zip(found, plain(checkpoint, encoded), strict=True):
        # sums of up to 30 float32 log-probabilities
        np.testing.assert_allclose(ours, witness, atol=1e-4)


def test_company_changes_nothing(llama: Checkpoint) -> None:
    """One question in a pass, or all side by side, filled up: the same numbers."""
    encoded = asked(load.tokenizer(llama.path), 40)
    source = Stream(llama, mx.float32)
    together = option_likelihood.score(source, encoded)
    for question, found in list(zip(encoded, together, strict=True))[::4]:
        (alone,) = option_likelihood.score(source, [question])
        np.testing.assert_allclose(found, alone, atol=1e-4)


def test_encode_splits_where_lm_eval_splits(llama: Checkpoint) -> None:
    """Context and option together, less the context; white space at its end goes to the options.
    Without a context the start token is one, so that the first token counts; an option of nothing,
    which would always win, is refused.
    """
    tokenizer = load.tokenizer(llama.path)
    context, options = option_likelihood.encode(tokenizer, "if the", [" loop", " loop is"])
    assert context == tokenizer.encode("if the")
    assert context + options[1] == tokenizer.encode("if the loop is")
    assert option_likelihood.encode(tokenizer, "if the ", ["loop", "loop is"]) == (context, options)
    lines = option_likelihood.encode(tokenizer, "if the\n", ["loop"])
    assert lines[0] == context
    assert lines[0] + lines[1][0] == tokenizer.encode("if the\nloop")
    alone = option_likelihood.encode(tokenizer, "", ["if the", "while"])
    assert alone == (
        [tokenizer.bos_token_id],
        [tokenizer.encode("if the"), tokenizer.encode("while")],
    )
    with pytest.raises(MisError, match="'' .*'if the'"):
        option_likelihood.encode(tokenizer, "if the", [" loop", ""])
