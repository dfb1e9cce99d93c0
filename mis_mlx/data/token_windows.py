"""Text for training and measuring: token windows, the bytes they stand for, batch order."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mis_mlx.data import chat_template
from mis_mlx.data.rows import Row
from mis_mlx.types import MisError

Ids = list[int]
Marked = tuple[Ids, Ids]  # ids, and 1 or 0 for each
IdArray = np.ndarray  # (T,) int32: a list of Python's takes nine times the memory
WINDOWS_AT_ONCE = 2**10  # whose bytes are counted at a time


@dataclass(frozen=True)
class Windows:
    """Windows of T tokens, N of them.

    tokens (N, T) int32: their ids. loss_mask (N, T) float32: 1 where the prediction made there, of
    the next token, counts; so its last column is 0. text_bytes (N,): bytes of text of these
    predictions; None where that was not counted.

    kind (N,): the number of the kind of text that a window is of; None: all are of one kind.
    shares: of each kind, by its number, in every draw (data/draws), however many windows there are
    of it; they add up to 1.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    text_bytes: Any = None
    kind: Any = None
    shares: tuple[float, ...] = ()

    def pick(self, indices: Any) -> "Windows":
        """Some of the windows: indices or a slice."""
        return replace(
            self,
            tokens=self.tokens[indices],
            loss_mask=self.loss_mask[indices],
            text_bytes=None if self.text_bytes is None else self.text_bytes[indices],
            kind=None if self.kind is None else self.kind[indices],
        )


def concatenated(parts: Sequence[Windows]) -> Windows:
    """Windows of one length, one text's behind the other's.

    Their bytes are kept where all parts have them counted.
    """
    if len(parts) == 1:
        return replace(parts[0], kind=None, shares=())
    sizes = [part.text_bytes for part in parts if part.text_bytes is not None]
    return Windows(
        tokens=np.concatenate([part.tokens for part in parts]),
        loss_mask=np.concatenate([part.loss_mask for part in parts]),
        text_bytes=np.concatenate(sizes) if len(sizes) == len(parts) else None,
    )


def tokenize(rows: Iterable[Row], tokenizer: Any) -> list[IdArray]:
    """Ids of every row, as mlx-lm's, but a special token spelled in a text stays text.

    A text row gets the tokenizer's own start token, if it puts one before every text, and the end
    token; the others are rendered with its chat template.
    """
    return [ids for ids, _ in marked(rows, tokenizer, mask_prompt=False)]


def marked(
    rows: Iterable[Row],
    tokenizer: Any,
    mask_prompt: bool = True,
) -> Iterator[tuple[IdArray, IdArray]]:
    """(`tokenize`'s ids, own) of every row, one after the other.

    own: 1 at text and answers; 0 at prompts and the template, if masked.
    """
    end = end_token(tokenizer)
    start = start_tokens(tokenizer)
    for number, row in enumerate(rows, 1):
        if "text" in row:
            text = _encode(tokenizer, row["text"], split=True)
            ids = np.array([*start, *text, end], np.int32)
            ones = np.broadcast_to(np.int32(1), ids.shape)
            yield ids, ones
            continue
        try:
            rendered, own = conversation(row, tokenizer, mask_prompt)
        except MisError:
            raise
        # a template is a program that came with the model: it can raise anything
        except Exception as error:
            raise MisError(
                f"the chat template refuses row {number} ({error}): fix it, or use plain text"
            ) from error
        ids = np.array(rendered, np.int32)
        marks = np.array(own, np.int32)
        yield ids, marks


def start_tokens(tokenizer: Any) -> Ids:
    """[start token] for tokenizers that put one before every text (Gemma needs it), else []."""
    # An attribute alone does not tell: many tokenizers name a start token and never put it.
    ids = list(tokenizer.encode(""))
    if ids and ids[0] == getattr(tokenizer, "bos_token_id", None):
        return ids[:1]
    return []


def end_token(tokenizer: Any) -> int:
    """The end token. MisError where there is none."""
    if tokenizer.eos_token_id is None:
        raise MisError(
            "the tokenizer names no end-of-text token: set eos_token in tokenizer_config.json"
        )
    return int(tokenizer.eos_token_id)


def _encode(tokenizer: Any, text: str, split: bool) -> Ids:
    """Ids of `text`, nothing added. split: cut special tokens spelled in it into ordinary ones.

    MisError where the tokenizer's regular expression breaks down.
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
            f"the tokenizer fails on {text[:40]!r} ({why}): remove that text, or use another model"
        ) from None


def plain(row: Row, tokenizer: Any, mask_prompt: bool) -> Marked:
    """(ids, learn) of a prompt/completion row without a template, with the end token.

    Prompt and completion are encoded apart, so that no token lies in both.
    """
    prompt = start_tokens(tokenizer) + _encode(tokenizer, row["prompt"], split=True)
    answer = _encode(tokenizer, row["completion"], split=True)
    answer.append(tokenizer.eos_token_id)
    loss_mask = [int(not mask_prompt)] * len(prompt)
    loss_mask += [1] * len(answer)
    return prompt + answer, loss_mask


def _messages(row: Row) -> list[Row]:
    if row.get("messages"):
        return row["messages"]
    return [
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": row["completion"]},
    ]


def conversation(row: Row, tokenizer: Any, mask_prompt: bool) -> Marked:
    """(ids, learn) of a prompt/completion or messages row.

    mask_prompt: only answers are learned, all of them. Learn starts where the ids part from those
    of the conversation before an answer. It ends where they part from the answer's own ids, which
    are those of the conversation up to it: the templates of some models rewrite earlier turns.
    """
    messages = _messages(row)
    calls = row.get("tools") or any(message.get("tool_calls") for message in messages)
    if calls and not chat_template.knows_tools(tokenizer):  # it would leave them out in silence
        raise MisError(
            "the text has conversations with tools, but this model's chat template knows none: "
            "leave these rows out, or take a model that calls tools"
        )
    thinking = chat_template.thinks(messages, tokenizer)
    told: dict[str, Any] = {"thinking": thinking, "tools": row.get("tools") or ()}
    ids = _render(messages, tokenizer, **told)
    if not mask_prompt:
        return ids, [1] * len(ids)
    loss_mask = [0] * len(ids)
    for last, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before: Ids = []
        if last:
            before = _render(messages[:last], tokenizer, prompt=True, **told)
        begin = _shared(ids, before)
        end = len(ids)
        if last < len(messages) - 1:
            so_far = _render(messages[: last + 1], tokenizer, **told)
            # Behind the prompt, wherever that has led: Qwen 3 drops the thoughts of earlier turns,
            # so the answer stands in another place than when it was the last one.
            first = _shared(so_far, before)
            own = so_far[first:]
            end = begin + _shared(ids[begin:], own)
        count = end - begin
        loss_mask[begin:end] = [1] * count
    return ids, loss_mask


def prompt_ids(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    *,
    today: bool = False,
    tools: chat_template.Tools = (),
) -> Ids:
    """Ids of a conversation up to where the next answer begins.

    today: a template that asks for the date gets today's, for people who chat; otherwise it is the
    same on every day. tools: that the model may call. Errors of the template pass through: it is a
    program that came with the model.
    """
    conversation = [dict(message) for message in messages]
    return _render(conversation, tokenizer, prompt=True, today=today, tools=tools)


def encode_prompt(prompt: str, tokenizer: Any, *, plain: bool = False, today: bool = False) -> Ids:
    """Ids of a prompt through the chat template, if there is one. plain: without it."""
    if plain or not tokenizer.has_chat_template:
        return list(tokenizer.encode(prompt))
    return prompt_ids([{"role": "user", "content": prompt}], tokenizer, today=today)


def _shared(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the common beginning."""
    for length, (own, other) in enumerate(zip(left, right, strict=False)):
        if own != other:
            return length
    return min(len(left), len(right))


def _render(
    messages: Sequence[Row],
    tokenizer: Any,
    *,
    prompt: bool = False,
    thinking: bool = False,
    today: bool = False,
    tools: chat_template.Tools = (),
) -> Ids:
    """Ids of `chat_template.text`, where only the template's own special tokens are special.

    A special token spelled in a message or a tool, whether in its content, in a name or in an
    argument, passes through the template as one other character and is cut up afterwards. A
    conversation without any, nearly every one, is encoded in one go, exactly as mlx-lm does.
    """
    content = json.dumps([*messages, *tools], ensure_ascii=False)
    spelled = []
    for token in _special_tokens(tokenizer):
        if json.dumps(token, ensure_ascii=False)[1:-1] in content:
            spelled.append(token)
    # The longest first, because one special token may begin another; by name for a fixed order.
    spelled.sort(key=lambda token: (-len(token), token))
    # Rare Chinese characters that no message uses; Python's repr writes them as they are.
    unused = (chr(code) for code in range(0x20000, 0x2A6DE) if chr(code) not in content)
    stand_ins = dict(zip(spelled, unused, strict=False))
    pattern = "|".join(map(re.escape, spelled)) or "(?!)"
    known = re.compile(pattern)
    rendered = chat_template.text(
        _replaced(messages, known, stand_ins),
        tokenizer,
        prompt=prompt,
        thinking=thinking,
        today=today,
        tools=_replaced(tools, known, stand_ins),
    )
    if not spelled:
        return _encode(tokenizer, rendered, split=False)
    meant = {stand_in: token for token, stand_in in stand_ins.items()}
    ids = []
    # The brackets keep the stand-ins among the pieces: these are text, what lies between them is
    # the template's, with special tokens of its own.
    for piece in re.split(f"([{''.join(meant)}])", rendered):
        if piece in meant:
            ids += _encode(tokenizer, meant[piece], split=True)
        elif piece:
            ids += _encode(tokenizer, piece, split=False)
    return ids


def _replaced(value: Any, known: re.Pattern[str], stand_ins: Mapping[str, str]) -> Any:
    """A JSON value in which every string has its stand-ins in place of what is `known`."""
    if isinstance(value, str):
        return known.sub(lambda match: stand_ins[match[0]], value)
    if isinstance(value, Mapping):
        parts = {}
        for name, part in value.items():
            parts[_replaced(name, known, stand_ins)] = _replaced(part, known, stand_ins)
        return parts
    if isinstance(value, list | tuple):
        return [_replaced(part, known, stand_ins) for part in value]
    return value


def _special_tokens(tokenizer: Any) -> set[str]:
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    special = {token.content for token in added if token.special}
    return special.union(getattr(tokenizer, "all_special_tokens", ()))


def windows(
    tokenized: Iterable[Sequence[int] | IdArray],
    length: int,
    start: Sequence[int] = (),
) -> Windows:
    """(N, `length`) windows of all rows' ids, back to back, each after `start` (`start_tokens`).

    A partial window at the end goes. MisError where there is not one whole window.
    """
    rows = (np.asarray(row, np.int32) for row in tokenized)
    nothing = np.zeros(0, np.int32)
    ids = np.concatenate([nothing, *rows])
    first = len(start)
    own = length - first
    count = len(ids) // own
    if count == 0:
        why = f"the text has {len(ids)} tokens, but one window takes {own}"
        raise MisError(f"{why}: add text, or lower --max-seq-length")
    whole = ids[: count * own]
    tokens = whole.reshape(count, own)
    if first:
        starts = np.array(start, np.int32)
        before = np.broadcast_to(starts, (count, first))
        tokens = np.concatenate([before, tokens], axis=1)
    return _all_learned(tokens)


def _all_learned(tokens: np.ndarray) -> Windows:
    """Windows whose predictions all count, but the last column's: its next token is not there."""
    # One line stands for all of them: memory for as many floats as tokens is not needed.
    line = np.ones(tokens.shape[1], np.float32)
    line[-1] = 0
    return Windows(tokens, np.broadcast_to(line, tokens.shape))


def text_bytes(windows: Windows, tokenizer: Any) -> np.ndarray:
    """(N,) bytes of text of the predictions that count in each window; special tokens have none."""
    special = _special_tokens(tokenizer)
    added = tokenizer.get_added_vocab()
    # SentencePiece's spelling; in a byte-level one each character is a byte
    spaced = "▁" in tokenizer.get_vocab()

    def size(token: str | None) -> int:
        if token is None or token in special:
            return 0
        if spaced and re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
            return 1
        if spaced or token in added:
            return len(token.replace("▁", " ").encode())
        return len(token)

    # Each id is sized once, however often it comes up.
    ids = np.unique(windows.tokens)
    names = tokenizer.convert_ids_to_tokens(ids.tolist())
    sizes = np.array(list(map(size, names)))
    counted = np.zeros(len(windows.tokens), np.int64)
    for first in range(0, len(counted), WINDOWS_AT_ONCE):
        end = first + WINDOWS_AT_ONCE
        some = slice(first, end)
        # The prediction at place t is of the token at t + 1.
        predicted = windows.tokens[some, 1:]
        places = np.searchsorted(ids, predicted)
        counts = windows.loss_mask[some, :-1] > 0
        sizes_of_tokens = np.where(counts, sizes[places], 0)
        counted[some] = sizes_of_tokens.sum(axis=1)
    return counted


def retokenized(windows: Windows, tokenizer: Any, other: Any) -> Windows:
    """The text of each window as another model's tokenizer cuts it: (N, T').

    Padding behind a window's end is not counted. Special tokens stay what they are; half of a
    letter at either end is left out.
    """
    names = _special_tokens(tokenizer)
    special = {}
    for token, i in tokenizer.get_vocab().items():
        if token in names:
            special[i] = other.convert_tokens_to_ids(token)
    rows = []
    for window in windows.tokens.tolist():
        row: Ids = []
        begin = 0
        # Text between two special tokens is decoded in one piece, so that `other` cuts it freely.
        ends = [place for place, i in enumerate(window) if i in special]
        for end in [*ends, len(window)]:
            text = tokenizer.decode(window[begin:end], clean_up_tokenization_spaces=False)
            row += _encode(other, text.strip("\ufffd"), split=True)
            if end < len(window):
                row.append(special[window[end]])
            begin = end + 1
        rows.append(row)
    length = max(map(len, rows), default=0)
    tokens = np.zeros((len(rows), length), np.int32)
    loss_mask = np.zeros((len(rows), length), np.float32)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = row
        # the last token of a row has no next one
        last = max(0, len(row) - 1)
        loss_mask[number, :last] = 1
    again = Windows(tokens, loss_mask)
    return replace(again, text_bytes=text_bytes(again, other))


def aligned(
    tokenized: Iterable[Sequence[int] | IdArray],
    length: int,
    start: Sequence[int] = (),
) -> Windows:
    """(N, `length`) windows that each begin with a row's first token, after `start`.

    A window goes on with the rows behind its first one and ends where it is full, in the middle of
    a row; that row begins the next window, whole. So no window begins in the middle of an answer,
    and no question is lost. Only a row longer than a window goes on in the next one where it was
    cut. Behind the last row the first ones follow again. MisError without rows.
    """
    own = length - len(start)
    rows = []
    for row in tokenized:
        ids = np.asarray(row, np.int32)
        for begin in range(0, len(row), own):
            end = begin + own
            rows.append(ids[begin:end])
    if not rows:
        raise MisError(
            f"no conversation has text, and one window takes {own} tokens: add conversations"
        )
    tokens = []
    before = np.array(start, np.int32)
    first = 0
    while first < len(rows):
        pieces = []
        count = 0
        last = first
        while count < own:
            pieces.append(rows[last % len(rows)])
            count += len(pieces[-1])
            last += 1
        ids = np.concatenate([before, *pieces])
        tokens.append(ids[:length])
        complete = last - first
        if count > own:  # the last row was cut: the next window begins with it
            complete -= 1
        first += max(1, complete)  # a row that fills the window alone must not come again
    return _all_learned(np.stack(tokens))


def mixed_kinds(parts: Sequence[Windows], shares: Sequence[float]) -> Windows:
    """Windows of several kinds of text, one part a kind.

    Every draw takes the kinds in these shares of their sum.
    """
    counts = [len(part.tokens) for part in parts]
    numbers = np.arange(len(parts), dtype=np.int32)
    kind = np.repeat(numbers, counts)
    total = sum(shares)
    of_sum = tuple(share / total for share in shares)
    return replace(concatenated(parts), kind=kind, shares=of_sum)


def order(n_windows: int, batch_size: int, step: int, seed: int) -> np.ndarray:
    """Indices (batch_size,) of the windows of optimizer step `step`, counted from 0.

    A pure function of its arguments. Each epoch is a fresh permutation, less a rest too small for a
    batch; a batch bigger than the data goes round it. MisError where either number is 0.
    """
    if n_windows < 1 or batch_size < 1:
        raise MisError(f"{n_windows} windows in batches of {batch_size}: both must be at least 1")
    epoch, within = divmod(step, max(1, n_windows // batch_size))
    rng = np.random.default_rng([seed, epoch])
    permutation = rng.permutation(n_windows)
    return np.resize(permutation[within * batch_size :], batch_size)


def drawn(count: int, batches: Iterable[np.ndarray]) -> np.ndarray:
    """Those of `count` windows that are in batches of indices, rising.

    Batches are asked for until all windows are drawn.
    """
    seen = np.zeros(count, bool)
    for indices in batches:
        seen[indices] = True
        if seen.all():
            break
    return np.flatnonzero(seen)


def fingerprint(windows: Windows) -> str:
    """sha256 of the windows' shape and tokens, in hex: the same on every machine."""
    shape = repr(windows.tokens.shape)
    digest = hashlib.sha256(shape.encode())
    digest.update(np.ascontiguousarray(windows.tokens, dtype="<i4").tobytes())
    if windows.kind is not None:
        kinds = (windows.kind.tolist(), windows.shares)
        digest.update(repr(kinds).encode())
    return digest.hexdigest()
