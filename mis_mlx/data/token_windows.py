"""Text for training and measuring: token windows, the bytes they stand for, batch order."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from mis_mlx.data.rows import Row
from mis_mlx.types import MisError


@dataclass(frozen=True)
class Windows:
    """Token ids (N, T) int32, and learn (N, T) float32: 1 where the prediction made there, of the
    next token, counts; so its last column is 0. text_bytes (N,): of the text of these predictions;
    None where that was not counted.

    kind (N,): the number of the kind of text that a window is of; None: all are of one kind.
    shares: of each kind, by its number, in every draw (data/draws), however many windows there are
    of it; they add up to 1.
    """

    tokens: np.ndarray
    learn: np.ndarray
    text_bytes: Any = None
    kind: Any = None
    shares: tuple[float, ...] = ()

    def pick(self, at: Any) -> "Windows":
        """Some of the windows: indices or a slice."""
        return replace(
            self,
            tokens=self.tokens[at],
            learn=self.learn[at],
            text_bytes=None if self.text_bytes is None else self.text_bytes[at],
            kind=None if self.kind is None else self.kind[at],
        )


def joined(parts: Sequence[Windows]) -> Windows:
    """Windows of one length, one text's after the other's; their bytes where all have them
    counted.
    """
    sizes = [part.text_bytes for part in parts if part.text_bytes is not None]
    tokens, learn = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("tokens", "learn")
    )
    return Windows(tokens, learn, np.concatenate(sizes) if len(sizes) == len(parts) else None)


def tokenize(rows: Iterable[Row], tokenizer: Any) -> list[list[int]]:
    """Ids of every row. A text row gets the tokenizer's own start token, if it has that habit, and
    the end token; the others are rendered with its chat template. mlx-lm's ids, but a special token
    spelled in a text stays text.
    """
    return [ids for ids, _ in marked(rows, tokenizer, False)]


def marked(
    rows: Iterable[Row], tokenizer: Any, mask_prompt: bool = True
) -> list[tuple[list[int], list[int]]]:
    """(`tokenize`'s ids, own) of every row. own: 1 at text and answers; 0 at prompts and the
    template, if masked.
    """
    end = end_of(tokenizer)
    start = start_of(tokenizer)
    tokenized = list[tuple[list[int], list[int]]]()
    for number, row in enumerate(rows, 1):
        if "text" in row:
            ids = [*start, *_encode(tokenizer, row["text"], split=True), end]
            tokenized.append((ids, [1] * len(ids)))
            continue
        try:
            tokenized.append(conversation(row, tokenizer, mask_prompt))
        except MisError:
            raise
        # a template is a program that came with the model: it can raise anything
        except Exception as error:
            raise MisError(
                f"the chat template refuses row {number} ({error}): fix it, or use plain text"
            ) from error
    return tokenized


def start_of(tokenizer: Any) -> list[int]:
    """[start token] for tokenizers that put one before every text (Gemma needs it), else []."""
    habit = list(tokenizer.encode(""))
    return habit[:1] if habit and habit[0] == getattr(tokenizer, "bos_token_id", None) else []


def end_of(tokenizer: Any) -> int:
    """The end token. MisError where there is none."""
    if tokenizer.eos_token_id is None:
        raise MisError(
            "the tokenizer names no end-of-text token: set eos_token in tokenizer_config.json"
        )
    return int(tokenizer.eos_token_id)


def _encode(tokenizer: Any, text: str, split: bool) -> list[int]:
    """Ids of `text`, nothing added; split: cut special tokens spelled in it. MisError: a regular
    expression astray.
    """
    options = {"add_special_tokens": False}
    if hasattr(tokenizer, "split_special_tokens"):  # transformers' kind has this switch
        options |= {"split_special_tokens": split, "verbose": False}
    try:
        return list(tokenizer.encode(text, **options))
    # Rust's panic is no Exception, so that nobody mistakes it for one of Python's
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        why = " ".join(str(error).split())[:120]
        raise MisError(
            f"the tokenizer breaks down on {text[:40]!r} ({why}): drop it, or use another model"
        ) from None


def plain(row: Row, tokenizer: Any, mask_prompt: bool) -> tuple[list[int], list[int]]:
    """(ids, learn) of a prompt/completion row without a template: encoded apart, no token in both;
    and the end.
    """
    prompt = [*start_of(tokenizer), *_encode(tokenizer, row["prompt"], split=True)]
    answer = [*_encode(tokenizer, row["completion"], split=True), tokenizer.eos_token_id]
    return [*prompt, *answer], [int(not mask_prompt)] * len(prompt) + [1] * len(answer)


def _messages(row: Row) -> list[Row]:
    pair = {"user": "prompt", "assistant": "completion"}
    return row.get("messages") or [
        {"role": role, "content": row[key]} for role, key in pair.items()
    ]


def conversation(row: Row, tokenizer: Any, mask_prompt: bool) -> tuple[list[int], list[int]]:
    """(ids, learn) of a prompt/completion or messages row. mask_prompt: only answers are learned,
    all of them. Learn starts where the ids part from those of the conversation before an answer,
    and ends where they part from those of the conversation up to it: the templates of some models
    rewrite earlier turns.
    """
    messages = _messages(row)
    ids = _render(messages, tokenizer)
    if not mask_prompt:
        return ids, [1] * len(ids)
    learn = [0] * len(ids)
    for last in (at for at, message in enumerate(messages) if message["role"] == "assistant"):
        begin = (
            _shared(ids, _render(messages[:last], tokenizer, add_generation_prompt=True))
            if last
            else 0
        )
        end = (
            len(ids)
            if last == len(messages) - 1
            else _shared(ids, _render(messages[: last + 1], tokenizer))
        )
        learn[begin:end] = [1] * max(0, end - begin)
    return ids, learn


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next(
        (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )


def _render(
    messages: Sequence[Row], tokenizer: Any, add_generation_prompt: bool = False
) -> list[int]:
    """Ids of the rendered conversation, where only the template's own special tokens are special. A
    special token spelled in a message passes through the template as one private character and is
    cut up afterwards. A conversation without any, nearly every one, is encoded in one go, exactly
    as mlx-lm does.
    """
    content = "".join(message["content"] for message in messages)
    spelled = sorted(
        (t for t in _special_tokens(tokenizer) if t in content), key=lambda t: (-len(t), t)
    )
    unused = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in content)
    stand_ins = dict(zip(spelled, unused, strict=False))
    known = re.compile("|".join(map(re.escape, spelled)) or "(?!)")
    safe = [
        {**m, "content": known.sub(lambda found: stand_ins[found[0]], m["content"])}
        for m in messages
    ]
    rendered = tokenizer.apply_chat_template(
        safe, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    if not spelled:
        return _encode(tokenizer, rendered, split=False)
    meant = {stand_in: token for token, stand_in in stand_ins.items()}
    ids = list[int]()
    for piece in re.split(f"([{''.join(meant)}])", rendered):
        if piece:
            ids += _encode(tokenizer, meant.get(piece, piece), split=piece in meant)
    return ids


def _special_tokens(tokenizer: Any) -> set[str]:
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return {t.content for t in added if t.special} | set(
        getattr(tokenizer, "all_special_tokens", ())
    )


def windows(tokenized: Iterable[Sequence[int]], length: int, start: Sequence[int] = ()) -> Windows:
    """(N, `length`) windows of all rows' ids, back to back, each after `start` (`start_of`); a
    partial one goes.
    """
    ids = np.concatenate(
        [np.asarray(row, np.int32) for row in tokenized] or [np.zeros(0, np.int32)]
    )
    own = length - len(start)
    count = len(ids) // own
    if count == 0:
        why = f"the text has {len(ids)} tokens and one window takes {own}"
        raise MisError(f"{why}: bring more text or lower --max-seq-length")
    tokens = np.empty((count, length), np.int32)
    learn = np.ones((count, length), np.float32)
    tokens[:, : len(start)] = start
    tokens[:, len(start) :] = ids[: count * own].reshape(count, own)
    learn[:, -1] = 0
    return Windows(tokens, learn)


def text_bytes(windows: Windows, tokenizer: Any) -> np.ndarray:
    """(N,) bytes of text that the predictions that count in each window are of; a special token is
    none of the text.
    """
    special = _special_tokens(tokenizer)
    added = tokenizer.get_added_vocab()
    # SentencePiece's spelling; in a byte-level one each character is a byte
    spaced = "▁" in tokenizer.get_vocab()

    def size(token: str | None) -> int:
        if token is None or token in special:
            return 0
        if spaced and re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
            return 1
        return len(token.replace("▁", " ").encode()) if spaced or token in added else len(token)

    ids, places = np.unique(windows.tokens, return_inverse=True)
    sizes = np.array([size(token) for token in tokenizer.convert_ids_to_tokens(ids.tolist())])
    return np.where(
        windows.learn[:, :-1] > 0, sizes[places.reshape(windows.tokens.shape)][:, 1:], 0
    ).sum(axis=1)


def reread(windows: Windows, tokenizer: Any, other: Any) -> Windows:
    """The text of each window as another model's tokenizer cuts it, (N, T') with what is behind its
    end not counted. Special tokens stay what they are; half of a letter at either end is left out.
    """
    names = _special_tokens(tokenizer)
    length = 0
    special = {
        i: other.convert_tokens_to_ids(t) for t, i in tokenizer.get_vocab().items() if t in names
    }
    rows = list[list[int]]()
    for window in windows.tokens.tolist():
        row = list[int]()
        begin = 0
        for end in [*(at for at, i in enumerate(window) if i in special), len(window)]:
            text = tokenizer.decode(window[begin:end], clean_up_tokenization_spaces=False)
            row += _encode(other, text.strip("\ufffd"), split=True)
            row += [special[window[end]]] if end < len(window) else []
            begin = end + 1
        rows.append(row)
        length = max(length, len(row))
    learn = np.arange(length) < np.array([len(row) - 1 for row in rows])[:, None]
    again = Windows(
        np.array([row + [0] * (length - len(row)) for row in rows], np.int32),
        learn.astype(np.float32),
    )
    return replace(again, text_bytes=text_bytes(again, other))


def aligned(tokenized: Sequence[Sequence[int]], length: int, start: Sequence[int] = ()) -> Windows:
    """(N, `length`) windows that each begin with a row's first token, after `start`, and go on with
    the rows behind it.

    A window ends where it is full, in the middle of a row; that row begins the next window, whole.
    So no window begins in the middle of an answer, and no question is lost. Only a row longer than
    a window goes on in the next one where it was cut. Behind the last row the first ones follow
    again.
    """
    own = length - len(start)
    rows = list[list[int]]()
    for row in tokenized:
        rows += [list(row[at : at + own]) for at in range(0, len(row), own)]
    if not rows:
        raise MisError(
            f"0 conversations have text, one window takes {own} tokens: bring more of them"
        )
    tokens = list[list[int]]()
    first = 0
    while first < len(rows):
        ids = list[int]()
        last = first
        while len(ids) < own:
            ids += rows[last % len(rows)]
            last += 1
        tokens.append([*start, *ids[:own]])
        whole_rows = last - first if len(ids) == own else last - first - 1
        first += max(1, whole_rows)
    learn = np.ones((len(tokens), length), np.float32)
    learn[:, -1] = 0
    return Windows(np.array(tokens, np.int32), learn)


def of_kinds(parts: Sequence[Windows], shares: Sequence[float]) -> Windows:
    """Windows of several kinds of text, one part a kind, that every draw takes in these shares of
    their sum.
    """
    kind = np.concatenate(
        [np.full(len(part.tokens), number, np.int32) for number, part in enumerate(parts)]
    )
    total = sum(shares)
    return replace(joined(parts), kind=kind, shares=tuple(share / total for share in shares))


def order(n_windows: int, batch_size: int, step: int, seed: int) -> np.ndarray:
    """Indices (batch_size,) of the windows of optimizer step `step`, counted from 0: a pure
    function of its arguments. Each epoch is a fresh permutation, less a rest too small for a batch;
    a batch bigger than the data goes round it.
    """
    if n_windows < 1 or batch_size < 1:
        raise MisError(f"{n_windows} windows in batches of {batch_size}: both must be at least 1")
    epoch, within = divmod(step, max(1, n_windows // batch_size))
    return np.resize(
        np.random.default_rng([seed, epoch]).permutation(n_windows)[within * batch_size :],
        batch_size,
    )


def overlap(train: Windows, held_out: Windows, span: int = 32, own: Any = 1) -> np.ndarray:
    """Sorted indices of the held-out windows that share any run of `span` tokens (or all, of a
    shorter one) with the training text. By 64-bit polynomial hashes: a window may go without need,
    once in 10^9 times. own (N, T): 0 in prompts and templates, which conversations share; a run
    counts where half of it or more is 1.
    """
    span = min(span, held_out.tokens.shape[1])
    powers = np.uint64(0x9E3779B97F4A7C15) ** np.arange(span, dtype=np.uint64)

    def hashes(tokens: np.ndarray) -> np.ndarray:
        return sliding_window_view(tokens.astype(np.uint64), span, axis=-1) @ powers

    text = train.tokens
    # a start token that the windows got, not the text
    if len(text) > 1 and (text[:, 0] == text[0, 0]).all():
        text = text[:, 1:]
    said = sliding_window_view(np.broadcast_to(own, held_out.tokens.shape), span, axis=-1).mean(
        axis=-1
    )
    return np.flatnonzero(
        (np.isin(hashes(held_out.tokens), hashes(text.reshape(-1))) & (said >= 0.5)).any(axis=1)
    )


def without_overlap(
    held_out: Windows, train: Windows, span: int = 32, own: Any = 1
) -> tuple[Windows, int]:
    """(held-out windows that share no run of `span` tokens with the training text, how many were
    removed).
    """
    shared = overlap(train, held_out, span, own)
    count = len(held_out.tokens)
    if len(shared) == count:
        raise MisError(
            f"all {count} held-out windows share {span} tokens in a row with train: bring other "
            f"test text"
        )
    return held_out.pick(np.setdiff1d(np.arange(count), shared)), len(shared)


def fingerprint(windows: Windows) -> str:
    """sha256 of the windows' shape and tokens, in hex: the same on every machine."""
    tokens = np.ascontiguousarray(windows.tokens, dtype="<i4").tobytes()
    kinds = "" if windows.kind is None else repr((windows.kind.tolist(), windows.shares))
    return hashlib.sha256(repr(windows.tokens.shape).encode() + tokens + kinds.encode()).hexdigest()
