"""Time one request to a model in memory: first token, every later one, the prompt again from its cache.

Stock mlx-lm generates, greedy, past the end token.

Definitions (those of vLLM and AIPerf; none has the tokenizer or the text in it):
    TTFT      from the token ids to the first new token, in the process's hands
    ITL       the time between two tokens;  TPOT  (last - first) / (tokens - 1), one number a request
    decode    (tokens - 1) / (last - first); mlx-lm's own generation_tps counts the first token too"""

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mis_mlx.data import sources
from mis_mlx.hardware.thermal.thermal_monitor import Monitor
from mis_mlx.models import load, mlx_generate
from mis_mlx.models.stream import evaluate_now, load_checked


class Request(NamedTuple):
    """What is timed: tokens of prompt and answer (2 or more)."""

    prompt: int
    answer: int


class Loaded(NamedTuple):
    """Of a model, also once it is gone. nbytes: its weights in memory; read_bytes: without an untied embedding."""

    name: str
    load_s: float
    nbytes: int
    read_bytes: int


class BenchmarkModel(NamedTuple):
    """A model in memory."""

    loaded: Loaded
    model: nn.Module
    tokenizer: Any


class Measurement(NamedTuple):
    """One request. stamps_s: when each token was there, from the start. cached_s: TTFT of the same prompt, all but its
    last token in the cache. watts: from first token to last. peak_bytes: its model's weights, cache and workspace."""

    asked: tuple[int, ...]
    tokens: tuple[int, ...]
    stamps_s: tuple[float, ...]
    cached_s: float | None = None
    watts: float | None = None
    peak_bytes: int | None = None

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first."""
        return (self.stamps_s[-1] - self.stamps_s[0]) / (len(self.stamps_s) - 1)


def mean_watts(monitor: Monitor, seconds: float) -> float | None:
    """The machine's mean power over the last `seconds`, by trapezoids, once the GPU is done; None: no two readings."""
    since_s = monitor.clock.monotonic() - seconds
    seen = [(r.time_s, r.power_w) for r in monitor.history() if r.time_s >= since_s and r.power_w is not None]
    if len(seen) < 2 or seen[-1][0] <= seen[0][0]:
        return None
    times, powers = np.array(seen).T
    return float(np.trapezoid(powers, times) / (times[-1] - times[0]))


def opened(folder: Path, name: str) -> BenchmarkModel:
    """A model whole in memory, with the time that took: from files that the system may have in its page cache."""
    began = time.perf_counter()
    model, tokenizer = mlx_generate.open_model(folder)
    evaluate_now(model.parameters())
    seconds, arrays = time.perf_counter() - began, dict[str, mx.array](tree_flatten(model.parameters()))
    unread = ("model.embed_tokens.",) if hasattr(model, "lm_head") else ()
    nbytes = sum(a.nbytes for a in arrays.values())
    read_bytes = sum(a.nbytes for n, a in arrays.items() if not n.startswith(unread))
    return BenchmarkModel(Loaded(name, seconds, nbytes, read_bytes), load_checked(model, f"{folder}: "), tokenizer)


def prompt(tokenizer: Any, count: int, seed: Sequence[int]) -> list[int]:
    """`count` token ids of Python's manual, from a topic that `seed` chooses."""
    rows = [f"\n\n{row['text']}" for row in sources.load(None).train]
    start = int(np.random.default_rng(list(seed)).integers(len(rows)))
    text = "".join(rows[start:] + rows[:start])[: 10 * count]  # a token has 3 to 5 letters
    return [int(i) for i in np.array(mlx_generate.prompt_ids(tokenizer, text, count))]


def trial(
    s: BenchmarkModel, r: Request, seed: Sequence[int], monitor: Monitor | None = None, peaks: bool = False
) -> Measurement:
    """One request with a prompt that `seed` chooses. monitor: of its power. peaks: count MLX's highest memory anew."""
    asked, kept = prompt(s.tokenizer, r.prompt, seed), mlx_generate.filled_cache(s.model, 0)
    before = mx.get_active_memory()
    if peaks:
        mx.reset_peak_memory()
    stamps, tokens = clocked(mlx_generate.greedy(s.model, asked, r.answer, kept))
    watts = mean_watts(monitor, stamps[-1] - stamps[0]) if monitor else None
    evaluate_now([c.state for c in kept])  # mlx-lm has begun a token too many: it is not to run into the next trial
    peak = mx.get_peak_memory() - before + s.loaded.nbytes if peaks else None
    cached = _again(s.model, asked, kept)
    mx.clear_cache()
    return Measurement(tuple(asked), tuple(tokens), tuple(stamps), cached, watts, peak)


def clocked(coming: Iterable[int]) -> tuple[list[float], list[int]]:
    """(seconds from now to each token, the tokens). Between two, measuring adds but this: benchmarks/throughput.py."""
    stamps, tokens = list[float](), list[int]()
    began = time.perf_counter()
    for token in coming:
        stamps.append(time.perf_counter() - began)
        tokens.append(token)
    return stamps, tokens


def _again(model: nn.Module, ids: list[int], kept: list[Any]) -> float | None:
    """Seconds to the first token when all of the prompt but one token is cached; None where that cannot be trimmed."""
    caches = load.mlx_lm("models.cache")
    if not caches.can_trim_prompt_cache(kept):
        return None
    caches.trim_prompt_cache(kept, kept[0].offset - (len(ids) - 1))
    steps = load.mlx_lm("generate").generate_step(mx.array(ids[-1:]), model, max_tokens=1, prompt_cache=kept)
    began = time.perf_counter()
    next(steps)
    taken = time.perf_counter() - began
    steps.close()
    evaluate_now([c.state for c in kept])
    return taken
