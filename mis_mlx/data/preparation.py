"""Token windows of a data source for one tokenizer: train, and held-out sets that share nothing with it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mis_mlx.data import sources, token_windows
from mis_mlx.data.rows import Row
from mis_mlx.data.token_windows import Windows

MIS_SHARE = 1 / 8  # of the built-in training windows: Polish enough to matter, English enough to measure


class Data(NamedTuple):
    """Windows to train on, held-out windows by name (the first is the main one), and what was done, in words."""

    train: Windows
    held_out: dict[str, Windows]
    notes: tuple[str, ...]


def calibration(data: Windows, count: int, seed: int, use: int = 1) -> list[mx.array]:
    """Up to `count` windows (1, T) of the training text, the same ones in every command; another `use` gets others."""
    at = np.random.default_rng([seed, use, 1]).permutation(len(data.tokens))[:count]
    return [mx.array(data.tokens[i][None]) for i in at]


def prepare(data: str | None, tokenizer: Any, length: int) -> Data:
    """Windows of `length` tokens; held-out ones that overlap training are removed. data None: Python's manual (English)
    with one part in eight of Polish Miś texts, whose splits share sentence templates by design: there overlap stays."""

    def counted(held_out: Windows) -> Windows:
        return replace(held_out, text_bytes=token_windows.text_bytes(held_out, tokenizer))

    def windows(rows: Sequence[Row]) -> Windows:
        return token_windows.windows(token_windows.tokenize(rows, tokenizer), length, token_windows.start_of(tokenizer))

    texts = sources.load(data)
    train, test = windows(texts.train), windows(texts.test)
    test, removed = token_windows.without_overlap(test, train)
    notes = [
        *texts.notes,
        f"{len(train.tokens)} training windows of {length} tokens, {len(test.tokens)} held out; "
        f"{removed} more held-out windows shared 32 tokens in a row with training and were removed",
    ]
    if data is not None:
        return Data(train, {"held-out": counted(test)}, tuple(notes))
    polish = sources.load(sources.MIS)
    extra = windows(polish.train)
    count = min(len(extra.tokens), round(len(train.tokens) * MIS_SHARE / (1 - MIS_SHARE)))
    joined = (np.concatenate([a, b[:count]]) for a, b in ((train.tokens, extra.tokens), (train.learn, extra.learn)))
    train = Windows(*joined)
    notes += [*polish.notes, f"{count} of the training windows are Polish"]
    return Data(train, {"English": counted(test), "Polish": counted(windows(polish.test))}, tuple(notes))
