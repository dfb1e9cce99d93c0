"""How likely answers are under a model: the log-probability of every token, in one streamed pass.

A model reads a prompt through its own chat template and an answer with its own tokenizer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mis_mlx.compute import precision, quick_exp
from mis_mlx.compute.logit_figures import CHUNK
from mis_mlx.data import token_windows
from mis_mlx.judge.prompts import Answer, Prompt
from mis_mlx.models.architectures.families import shape_of
from mis_mlx.models.opening import load
from mis_mlx.models.passing.stream import Hidden, Stream, head_rows
from mis_mlx.types import Checkpoint, MisError

ROWS = 256  # tokens of short texts side by side; more make attention slower, fewer the products
POSITIONS = 32  # of texts whose logits a CPU computes at once


def has_template(model: Checkpoint) -> bool:
    """Whether a model has a chat template, without which answers are not judged."""
    return bool(load.tokenizer(model.path).has_chat_template)


def need_template(model: Checkpoint) -> None:
    """MisError where a model has no chat template."""
    if not has_template(model):
        why = f"{model.path} has no chat template: answers are not judged"
        raise MisError(f"{why}; take a model that has one")


def log_probabilities(
    model: Checkpoint,
    asked: Sequence[Prompt],
    answers: Sequence[Answer],
) -> list[np.ndarray]:
    """The log-probabilities of every answer's tokens after its prompt, in nats: [(n,) float64].

    One streamed pass: one block in memory at a time, then parts of the head. MisError as of
    `tokens_of`."""
    texts, counts = tokens_of(model, asked, answers)
    return of_last_tokens(Stream(model), texts, counts)


def tokens_of(
    model: Checkpoint,
    asked: Sequence[Prompt],
    answers: Sequence[Answer],
) -> tuple[list[list[int]], list[int]]:
    """(ids of every prompt with its answer; how many of them, at the end, are the answer's).

    MisError where the model has no chat template, or one that refuses a prompt."""
    need_template(model)
    tokenizer = load.tokenizer(model.path)
    end = _end_of_turn(tokenizer)
    texts = []
    counts = []
    for prompt, answer in zip(asked, answers, strict=True):
        before, own = _tokens_of(tokenizer, prompt, answer, end)
        texts.append([*before, *own])
        counts.append(len(own))
    return texts, counts


def _tokens_of(
    tokenizer: Any,
    prompt: Prompt,
    answer: Answer,
    end: int,
) -> tuple[list[int], list[int]]:
    """(ids up to the answer, ids of the answer), as they are when the model itself answers.

    They are not cut out of the rendered conversation: some templates trim or rewrite an answer,
    which then has other bytes, and a tokenizer may merge its first letter with the template's last
    one."""
    try:
        before = token_windows.prompt_ids(prompt.messages, tokenizer)
    except Exception as error:  # a template is a program of the model's: it can raise anything
        shown = prompt.messages[-1]["content"][:40]
        why = f"the chat template refuses the prompt {shown!r} ({error})"
        raise MisError(f"{why}: leave it out") from error
    own = list(tokenizer.encode(answer.text, add_special_tokens=False))
    if answer.ended:
        own.append(end)
    return before, own


def _end_of_turn(tokenizer: Any) -> int:
    """The stop token that the chat template puts after an answer.

    The tokenizer's end token where it puts none there. MisError where there is neither."""
    talk = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    stops = set(tokenizer.eos_token_ids)
    try:
        ids, loss_mask = token_windows.conversation({"messages": talk}, tokenizer, mask_prompt=True)
    except Exception:  # as above
        return token_windows.end_token(tokenizer)
    for token, own in zip(ids, loss_mask, strict=True):
        if own and token in stops:
            return token
    return token_windows.end_token(tokenizer)


def of_last_tokens(
    stream: Stream,
    texts: Sequence[Sequence[int]],
    counts: Sequence[int],
) -> list[np.ndarray]:
    """The log-probabilities of every text's last n tokens, in nats: [(n,) float64].

    counts: n of every text; at least one token must stand before these n. One block of the model is
    in memory at a time, then parts of its head. Short texts of like length go side by side, filled
    up at their ends, where no token of theirs looks."""
    if not texts:
        return []
    rising = sorted(range(len(texts)), key=lambda n: len(texts[n]))
    lines = list[list[int]]()  # the texts of each batch
    for n in rising:
        if not lines or (len(lines[-1]) + 1) * len(texts[n]) > ROWS:
            lines.append([])
        lines[-1].append(n)
    batches = list[mx.array]()
    for of_batch in lines:
        longest = len(texts[of_batch[-1]])
        rows = [[*texts[n], *[0] * (longest - len(texts[n]))] for n in of_batch]
        batches.append(mx.array(rows))
    hidden: list[Any] = [None] * len(texts)
    for of_batch, states in zip(lines, stream.forward(batches), strict=True):
        for line, n in enumerate(of_batch):
            hidden[n] = states[line : line + 1, : len(texts[n])]
    return after_pass(stream, hidden, texts, counts)


def after_pass(
    stream: Stream,
    hidden: Hidden,
    texts: Sequence[Sequence[int]],
    counts: Sequence[int],
) -> list[np.ndarray]:
    """`of_last_tokens` of a model that has read the texts: hidden [(1, T, D)], its final states."""
    targets = []
    for text, count in zip(texts, counts, strict=True):
        targets.append(np.array(text[len(text) - count :], np.int32))
    return _of_targets(stream, hidden, targets)


@dataclass(eq=False)
class _Last:
    """The last n tokens of a text.

    states: before each of them (n, D). normalizer, logit: so far (n,): logsumexp over the parts of
    the vocabulary that were seen, and the token's logit, -inf until its part has come.
    """

    states: mx.array
    targets: np.ndarray
    normalizer: np.ndarray
    logit: np.ndarray

    def add(self, part: np.ndarray) -> None:
        """What a part of the vocabulary gives: (2, n)."""
        normalizer, logit = part
        self.normalizer = np.logaddexp(self.normalizer, normalizer)
        # All parts but one have -inf for the target.
        self.logit = np.maximum(self.logit, logit)


def _of_targets(
    stream: Stream,
    hidden: Hidden,
    targets: Sequence[np.ndarray],
) -> list[np.ndarray]:
    """The log-probabilities of targets [(n,)], the last tokens of texts with these final states.

    hidden: [(1, T, D)]. The head comes in parts of the vocabulary, each read once: logsumexp adds
    up over them, and one of them has the target's logit."""
    shape = shape_of(stream.checkpoint.config)
    rows = head_rows(shape.hidden, shape.vocab)
    texts = []
    for states, target in zip(hidden, targets, strict=True):
        count = len(target)
        none = np.full(count, -np.inf)
        # A token is predicted one place before it.
        before = states[0][-count - 1 : -1]
        texts.append(_Last(before, target, normalizer=none, logit=none))
    full = [text for text in texts if len(text.targets)]
    for start, head in stream.head_parts(shape.vocab, rows):
        for some in _together(full):
            _add_part(head, some, start)
    return [text.logit - text.normalizer for text in texts]


def _add_part(head: nn.Module, texts: Sequence[_Last], start: int) -> None:
    """Add to these texts what a part of the head gives, whose first token is `start`."""
    states = mx.concatenate([text.states for text in texts])
    targets = np.concatenate([text.targets for text in texts])
    z = load.wide_logits(head, states)
    places = mx.array(targets - start)
    # The target's logit is -inf where another part of the vocabulary has the target.
    here = (places >= 0) & (places < z.shape[-1])
    chosen = mx.take_along_axis(z, mx.where(here, places, 0)[:, None], axis=-1)
    right = mx.where(here, chosen[:, 0], -mx.inf)
    wide = np.array(mx.stack([quick_exp.logsumexp(z), right])).astype(np.float64)
    first = 0
    for text in texts:
        end = first + len(text.targets)
        text.add(wide[:, first:end])
        first = end


def _together(texts: Sequence[_Last]) -> Iterator[list[_Last]]:
    """Texts whose logits are computed at once: up to CHUNK tokens, on a CPU fewer; or one text."""
    most = POSITIONS if precision.numpy_is_quicker() else CHUNK
    some = list[_Last]()
    tokens = 0
    for text in texts:
        tokens += len(text.targets)
        if some and tokens > most:
            yield some
            some = []
            tokens = len(text.targets)
        some.append(text)
    if some:
        yield some
