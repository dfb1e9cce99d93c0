"""How likely answers are under a model: the log-probability of every token, in one streamed pass.

A model reads a prompt through its own chat template and an answer with its own tokenizer."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mis_mlx.compute import host_losses, precision
from mis_mlx.data import token_windows
from mis_mlx.evaluation.answer_records import Answer, Prompt
from mis_mlx.models import config, load, mlx_generate
from mis_mlx.models.stream import HEAD_PART, Hidden, Stream
from mis_mlx.types import Checkpoint, MisError


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

    One streamed pass: one block in memory at a time, then parts of the head. MisError where the
    model has no chat template, or one that refuses a prompt."""
    need_template(model)
    tokenizer = load.tokenizer(model.path)
    end = _end_of_turn(tokenizer)
    texts = []
    counts = []
    for prompt, answer in zip(asked, answers, strict=True):
        before, own = _tokens_of(tokenizer, prompt, answer, end)
        texts.append([*before, *own])
        counts.append(len(own))
    return of_last_tokens(model, texts, counts)


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
        before = mlx_generate.chat_ids(tokenizer, prompt.messages)
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
    model: Checkpoint,
    texts: Sequence[Sequence[int]],
    counts: Sequence[int],
) -> list[np.ndarray]:
    """The log-probabilities of every text's last n tokens, in nats: [(n,) float64].

    counts: n of every text; at least one token must stand before these n. One block of the model is
    in memory at a time, then parts of its head."""
    if not texts:
        return []
    targets = []
    for text, count in zip(texts, counts, strict=True):
        targets.append(np.array(text[len(text) - count :], np.int32))
    stream = Stream(model)
    hidden = stream.forward([mx.array([text]) for text in texts])
    return _of_targets(stream, hidden, targets)


def _of_targets(
    stream: Stream,
    hidden: Hidden,
    targets: Sequence[np.ndarray],
) -> list[np.ndarray]:
    """The log-probabilities of targets [(n,)], the last tokens of texts with these final states.

    hidden: [(1, T, D)]. The head comes in parts of the vocabulary, each read once: logsumexp adds
    up over them, and one of them has the target's logit."""
    shape = config.shape_of(stream.checkpoint.config)
    rows = max(1, HEAD_PART // shape.hidden)
    asked = [number for number, target in enumerate(targets) if len(target)]
    # A token is predicted one place before it.
    states = {number: hidden[number][0][-len(targets[number]) - 1 : -1] for number in asked}
    normalizers = {number: np.full(len(targets[number]), -np.inf) for number in asked}
    logits = {number: np.full(len(targets[number]), -np.inf) for number in asked}
    for start, head in stream.head_parts(shape.vocab, rows):
        places = {number: targets[number] - start for number in asked}
        for number, (normalizer, logit) in _parts(head, states, places):
            normalizers[number] = np.logaddexp(normalizers[number], normalizer)
            # All parts but one have -inf for the target.
            logits[number] = np.maximum(logits[number], logit)
    found = [np.zeros(0)] * len(targets)
    for number in asked:
        found[number] = logits[number] - normalizers[number]
    return found


Found = tuple[np.ndarray, np.ndarray]  # logsumexp, and the target's logit: (n,) float64


def _parts(
    head: nn.Module,
    states: Mapping[int, mx.array],
    places: Mapping[int, np.ndarray],
) -> Iterator[tuple[int, Found]]:
    """What a part of the head gives for every text, by number.

    states: (n, D) of each text. places: of its targets (n,) in this part.
    """
    if precision.policy() == "cpu":  # whose exp takes seven times as long as numpy's
        for number, rows in states.items():
            view = host_losses.view(load.wide_logits(head, rows))
            of_part = host_losses.by_rows(_of_part, view, places[number])
            normalizer, logit = of_part.astype(np.float64).T
            yield number, (normalizer, logit)
        return
    for some in _together(states):
        numbers = [number for number, _ in some]
        rows = mx.concatenate([rows for _, rows in some])
        targets = np.concatenate([places[number] for number in numbers])
        found = _on_device(load.wide_logits(head, rows), mx.array(targets))
        wide = np.array(found).astype(np.float64)
        ends = np.cumsum([len(rows) for _, rows in some])[:-1]
        for number, of_text in zip(numbers, np.split(wide, ends, axis=1), strict=True):
            yield number, (of_text[0], of_text[1])


def _together(states: Mapping[int, mx.array]) -> Iterator[list[tuple[int, mx.array]]]:
    """Texts whose logits are computed at once: up to CHUNK tokens, or one text."""
    some = list[tuple[int, mx.array]]()
    tokens = 0
    for number, rows in states.items():
        if some and tokens + len(rows) > host_losses.CHUNK:
            yield some
            some = []
            tokens = 0
        some.append((number, rows))
        tokens += len(rows)
    if some:
        yield some


def _on_device(z: mx.array, targets: mx.array) -> mx.array:
    """`_of_part` by MLX: (2, n) of logits z (n, v) and targets (n,)."""
    vocab = z.shape[-1]
    normalizer = mx.logsumexp(z, axis=-1)
    here = (targets >= 0) & (targets < vocab)
    places = mx.where(here, targets, 0)
    chosen = mx.take_along_axis(z, places[:, None], axis=-1)[:, 0]
    right = mx.where(here, chosen, -mx.inf)
    return mx.stack([normalizer, right])


def _of_part(z: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """(n, 2): the logsumexp of logits z (n, v), which are overwritten, and the target's logit.

    The latter is -inf where another part of the vocabulary has the target."""
    rows, vocab = z.shape
    here = (targets >= 0) & (targets < vocab)
    places = np.where(here, targets, 0)
    chosen = z[np.arange(rows), places]
    right = np.where(here, chosen, -np.inf)
    normalizer = host_losses.softmax(z)
    return np.stack([normalizer, right], axis=1)
