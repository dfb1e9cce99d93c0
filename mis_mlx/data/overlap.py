"""Which held-out windows share text with training: they would measure what a model remembers."""

from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from mis_mlx.data.token_windows import WINDOWS_AT_ONCE, Windows
from mis_mlx.types import MisError

TOKENS_AT_ONCE = 2**18  # of training, whose runs are looked up together
BASE = np.uint64(0x9E3779B97F4A7C15)
OWN_SHARE = 0.5  # of a run: so much of it must be text or answer


def overlap(
    train: Windows,
    held_out: Windows,
    span: int = 32,
    own: Any = 1,
) -> np.ndarray:
    """Sorted indices of the held-out windows that share any run of `span` tokens with `train`.

    A window shorter than `span` shares all of it. By 64-bit polynomial hashes: a window may go
    without need, once in 10^9 times. own (N, T): 0 in prompts and templates, which conversations
    share; a run counts where half of it or more is 1.
    """
    span = min(span, held_out.tokens.shape[1])
    all_hashes = _hashes(held_out.tokens, span)
    wanted = np.unique(all_hashes)
    in_train = _found(wanted, train.tokens, span)
    own = np.broadcast_to(own, held_out.tokens.shape)
    shared = np.zeros(len(own), bool)
    for begin in range(0, len(own), WINDOWS_AT_ONCE):
        end = begin + WINDOWS_AT_ONCE
        some = slice(begin, end)
        hashes = _hashes(held_out.tokens[some], span)
        places = np.searchsorted(wanted, hashes)
        own_runs = sliding_window_view(own[some], span, axis=-1)
        counts = own_runs.mean(axis=-1) >= OWN_SHARE
        known = in_train[places] & counts
        shared[some] = known.any(axis=1)
    return np.flatnonzero(shared)


def _hashes(
    tokens: np.ndarray,
    span: int,
) -> np.ndarray:
    """Of every run of `span` tokens, along the last axis; products wrap at 2**64."""
    powers = BASE ** np.arange(span, dtype=np.uint64)
    wide = tokens.astype(np.uint64)
    runs = sliding_window_view(wide, span, axis=-1)
    return runs @ powers


def _found(
    wanted: np.ndarray,
    text: np.ndarray,
    span: int,
) -> np.ndarray:
    """(n,) whether each of n sorted hashes is that of a run in the training windows (N, T)."""
    # A start token that the windows got, not the text, would break every run across two windows.
    first = text[:, 0]
    same = first == first[0]
    if len(text) > 1 and same.all():
        text = text[:, 1:]
    # The windows lie back to back, so their runs are taken across the borders.
    flat = text.reshape(-1)
    found = np.zeros(wanted.shape, bool)
    for begin in range(0, len(flat) - span + 1, TOKENS_AT_ONCE):
        # With the end of the runs that begin in this part.
        end = begin + TOKENS_AT_ONCE + span - 1
        hashes = _hashes(flat[begin:end], span)
        places = np.searchsorted(wanted, hashes)
        last = len(wanted) - 1
        places = np.minimum(places, last)
        equal = wanted[places] == hashes
        found[places[equal]] = True
    return found


def without_overlap(
    held_out: Windows,
    train: Windows,
    span: int = 32,
    own: Any = 1,
) -> tuple[Windows, int]:
    """(held-out windows that share no run of `span` tokens with `train`, how many were removed).

    MisError where none are left.
    """
    shared = overlap(train, held_out, span, own)
    count = len(held_out.tokens)
    if len(shared) == count:
        raise MisError(
            f"all {count} held-out windows share {span} tokens in a row with train: use other test "
            f"text"
        )
    others = np.setdiff1d(np.arange(count), shared)
    return held_out.pick(others), len(shared)
