"""Time one request to a model in memory: first token, every later one, the prompt again from its cache.

Stock mlx-lm generates, greedy, past the end token.

Definitions (those of vLLM and AIPerf; none has the tokenizer or the text in it):
    TTFT      from the token ids to the first new token, in the process's hands
    ITL       the time between two tokens;  TPOT  (last - first) / (tokens - 1), one number a request
    decode    sequences x (tokens - 1) / (last - first); mlx-lm's own generation_tps counts the first token too
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mis_mlx.data import sources
from mis_mlx.hardware.thermal.energy import Energy, EnergyMeter
from mis_mlx.models import load, mlx_generate
from mis_mlx.models.stream import evaluate_now, load_checked


@dataclass(frozen=True)
class Request:
    """What is timed: tokens of prompt and answer (2 or more), sequences side by side, tokens in the cache before."""

    prompt: int
    answer: int
    batch: int = 1
    depth: int = 0


class Loaded(NamedTuple):
    """What is left to know of a model once it is gone."""

    name: str
    load_s: float
    read_bytes: int


@dataclass(frozen=True)
class BenchmarkModel:
    """A model in memory."""

    name: str
    model: nn.Module
    tokenizer: Any
    load_s: float

    @property
    def nbytes(self) -> int:
        """Bytes of the weights in memory."""
        return _nbytes(self.model)

    @property
    def read_bytes(self) -> int:
        """Bytes of the weights that a token has to fetch: all but an embedding that is not the head too."""
        return self.nbytes - (_nbytes(self.model.model.embed_tokens) if hasattr(self.model, "lm_head") else 0)

    @property
    def loaded(self) -> Loaded:
        """Without the model."""
        return Loaded(self.name, self.load_s, self.read_bytes)


@dataclass(frozen=True)
class Measurement:
    """One request. stamps_s: when each token (of every sequence of the batch) was there, from the start on.
    cached_s: TTFT of the same prompt, all of it but its last token in the cache. energy: from the first token to the
    last. peak_bytes: its own model's weights, cache and workspace."""

    asked: tuple[tuple[int, ...], ...]
    tokens: tuple[int, ...]
    stamps_s: tuple[float, ...]
    cached_s: float | None = None
    energy: Energy | None = None
    peak_bytes: int | None = None

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first."""
        return (self.stamps_s[-1] - self.stamps_s[0]) / (len(self.stamps_s) - 1)


def _nbytes(module: nn.Module) -> int:
    arrays: Any = tree_flatten(module.parameters())
    return sum(a.nbytes for _, a in arrays)


def opened(folder: Path, name: str) -> BenchmarkModel:
    """A model whole in memory, with the time that took: from files that the system may have in its page cache."""
    began = time.perf_counter()
    model, tokenizer = mlx_generate.open_model(folder)
    evaluate_now(model.parameters())
    seconds = time.perf_counter() - began
    return BenchmarkModel(name, load_checked(model, f"{folder}: "), tokenizer, seconds)


@cache
def _manual() -> tuple[str, ...]:
    return tuple(str(row["text"]) for row in sources.load(None).train)


def prompts(tokenizer: Any, r: Request, seed: Sequence[int]) -> list[list[int]]:
    """Token ids of `r.batch` pieces of Python's manual, each of `r.prompt`, from topics that `seed` chooses."""
    rows, rng, texts = _manual(), np.random.default_rng(list(seed)), []
    for _ in range(r.batch):
        start, text = int(rng.integers(len(rows))), ""
        while len(text) < 5 * r.prompt and len(text) < sum(map(len, rows)):  # a token has 3 to 5 letters
            text, start = f"{text}\n\n{rows[start % len(rows)]}", start + 1
        texts.append([int(i) for i in np.array(mlx_generate.prompt_ids(tokenizer, text, r.prompt))])
    return texts


def trial(
    s: BenchmarkModel, r: Request, seed: Sequence[int], meter: EnergyMeter | None = None, peaks: bool = False
) -> Measurement:
    """One request with prompts that `seed` chooses. peaks: MLX's highest memory is counted anew for it."""
    asked = prompts(s.tokenizer, r, seed)
    kept = [] if r.batch > 1 else mlx_generate.filled_cache(s.model, r.depth)
    evaluate_now([c.state for c in kept if r.depth])
    before = mx.get_active_memory()
    if peaks:
        mx.reset_peak_memory()
    stamps, tokens = clocked(_steps(s, asked, r.answer, kept), meter)
    energy = meter.end() if meter else None
    evaluate_now([c.state for c in kept])  # mlx-lm has begun a token too many: it is not to run into the next trial
    peak = mx.get_peak_memory() - before + s.nbytes if peaks else None
    cached = _again(s.model, asked[0], kept, r.depth + r.prompt - 1)
    mx.clear_cache()
    return Measurement(tuple(map(tuple, asked)), tuple(tokens), tuple(stamps), cached, energy, peak)


def clocked(steps: Iterable[list[int]], meter: EnergyMeter | None = None) -> tuple[list[float], list[int]]:
    """(seconds from now to each step, all tokens). The meter begins at the first token. What is done here between two
    tokens is all that measuring adds to them: benchmarks/throughput.py times it."""
    stamps, tokens = list[float](), list[int]()
    began = time.perf_counter()
    for new in steps:
        stamps.append(time.perf_counter() - began)
        tokens += new
        if meter and len(stamps) == 1:
            meter.begin()
    return stamps, tokens


def _steps(s: BenchmarkModel, asked: list[list[int]], count: int, kept: list[Any]) -> Iterator[list[int]]:
    """A new token of each sequence, as they come."""
    generate = load.mlx_lm("generate")
    if len(asked) > 1:
        n = len(asked)
        batch = generate.BatchGenerator(s.model, max_tokens=count, prefill_batch_size=n, completion_batch_size=n)
        try:
            batch.insert(asked)
            for _ in range(count):
                yield [response.token for response in batch.next_generated()]
        finally:
            batch.close()
    else:
        for token, _ in generate.generate_step(mx.array(asked[0]), s.model, max_tokens=count, prompt_cache=kept):
            yield [int(token)]


def _again(model: nn.Module, ids: list[int], kept: list[Any], known: int) -> float | None:
    """Seconds to the first token of the same prompt when the cache has all of it but the last token, `known`
    tokens; None where a cache forgets only from its other end."""
    caches = load.mlx_lm("models.cache")
    if not kept or not caches.can_trim_prompt_cache(kept):
        return None
    caches.trim_prompt_cache(kept, kept[0].offset - known)
    steps = load.mlx_lm("generate").generate_step(mx.array(ids[-1:]), model, max_tokens=1, prompt_cache=kept)
    began = time.perf_counter()
    next(steps)
    taken = time.perf_counter() - began
    steps.close()
    evaluate_now([c.state for c in kept])
    return taken
