"""Models timed, in turn, round after round: requests, what the trials come to, and what a machine
could do at best.

Stock mlx-lm generates, greedy, past the end token. At best: bytes over bandwidth, operations over
arithmetic.

Definitions (those of vLLM and AIPerf; none has the tokenizer or the text in it):
    TTFT      from the token ids to the first new token, in the process's hands
    ITL       the time between two tokens;  TPOT  (last - first) / (tokens - 1), one number a
    request
    decode    (tokens - 1) / (last - first); mlx-lm's own generation_tps counts the first token too
"""

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mis_mlx.data import preparation
from mis_mlx.hardware import rates
from mis_mlx.hardware.thermal.thermal_monitor import Monitor
from mis_mlx.maths.stats import summary
from mis_mlx.models import arch, load, mlx_generate, stream
from mis_mlx.planner import estimates, phases
from mis_mlx.types import Checkpoint, Row

WARM_UP = 4  # tokens after the whole prompt, timed by nobody
PREFILL = 2048  # mlx-lm's prefill_step_size
SLOWED = 0.9  # the last trial's speed over the first's, below which something throttles
Facts = Mapping[str, Mapping[str, Any]]  # by model


class Request(NamedTuple):
    """What is timed: tokens of prompt and answer (2 or more)."""

    prompt: int
    answer: int


class BenchmarkModel(NamedTuple):
    """A model in memory. nbytes: its weights there; read_bytes: without an untied embedding."""

    model: nn.Module
    tokenizer: Any
    load_s: float
    nbytes: int
    read_bytes: int


class Measurement(NamedTuple):
    """One request. stamps_s: when each token was there, from the start. cached_s: TTFT of the same
    prompt, all but its last token in the cache, if it can be trimmed. watts: from first token to
    last. peak_bytes: its model's weights, cache and workspace. load_s, read_bytes: of its model,
    which may be gone.
    """

    asked: tuple[int, ...]
    tokens: tuple[int, ...]
    stamps_s: tuple[float, ...]
    cached_s: float | None = None
    watts: float | None = None
    peak_bytes: int | None = None
    load_s: float = 0.0
    read_bytes: int = 0

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first."""
        return (self.stamps_s[-1] - self.stamps_s[0]) / (len(self.stamps_s) - 1)


def mean_watts(monitor: Monitor, seconds: float) -> float | None:
    """The machine's mean power over the last `seconds`, by trapezoids, once the GPU is done; None:
    no two readings.
    """
    since_s = monitor.clock.monotonic() - seconds
    seen = [
        (r.time_s, r.power_w)
        for r in monitor.history()
        if r.time_s >= since_s and r.power_w is not None
    ]
    if len(seen) < 2 or seen[-1][0] <= seen[0][0]:
        return None
    times, powers = np.array(seen).T
    return float(np.trapezoid(powers, times) / (times[-1] - times[0]))


def opened(folder: Path) -> BenchmarkModel:
    """A model whole in memory, with the time that took: from files that the system may have in its
    page cache.
    """
    began = time.perf_counter()
    model, tokenizer = mlx_generate.open_model(folder)
    stream.evaluate_now(model.parameters())
    seconds = time.perf_counter() - began
    arrays = dict[str, mx.array](tree_flatten(model.parameters()))
    read_bytes = sum(a.nbytes for n, a in arrays.items() if not n.startswith(_looked_up(arrays)))
    stream.load_checked(model, f"{folder}: ")
    return BenchmarkModel(
        model, tokenizer, seconds, sum(a.nbytes for a in arrays.values()), read_bytes
    )


def _looked_up(names: Iterable[str]) -> tuple[str, ...]:
    """What the names of tables begin with of which a token takes a row, out of a model with these
    tensors.
    """
    has_head = any(name.startswith("lm_head.") for name in names)
    return (arch.PER_LAYER, load.EMBEDDING) if has_head else (arch.PER_LAYER,)


def prompt(tokenizer: Any, count: int, seed: Sequence[int]) -> list[int]:
    """`count` token ids of Python's manual, from a topic that `seed` chooses."""
    rows = [f"\n\n{row['text']}" for row in preparation.load(None).train]
    start = int(np.random.default_rng(list(seed)).integers(len(rows)))
    text = "".join(rows[start:] + rows[:start])[: 10 * count]  # a token has 3 to 5 letters
    return [int(i) for i in np.array(mlx_generate.prompt_ids(tokenizer, text, count))]


def trial(
    s: BenchmarkModel,
    r: Request,
    seed: Sequence[int],
    monitor: Monitor | None = None,
    peaks: bool = False,
) -> Measurement:
    """One request with a prompt that `seed` chooses. monitor: of its power. peaks: count MLX's
    highest memory anew.
    """
    asked = prompt(s.tokenizer, r.prompt, seed)
    kept = mlx_generate.filled_cache(s.model, 0)
    before = mx.get_active_memory()
    if peaks:
        mx.reset_peak_memory()
    stamps, tokens = clocked(mlx_generate.greedy(s.model, asked, r.answer, kept))
    watts = mean_watts(monitor, stamps[-1] - stamps[0]) if monitor else None
    # mlx-lm has begun one more token: not to run into the next trial
    stream.evaluate_now([c.state for c in kept])
    peak = mx.get_peak_memory() - before + s.nbytes if peaks else None
    caches = load.mlx_lm("models.cache")
    cached = None
    if caches.can_trim_prompt_cache(kept):
        caches.trim_prompt_cache(kept, kept[0].offset - (len(asked) - 1))
        (cached,), _ = clocked(mlx_generate.greedy(s.model, asked[-1:], 1, kept))
        stream.evaluate_now([c.state for c in kept])
    mx.clear_cache()
    return Measurement(
        tuple(asked), tuple(tokens), tuple(stamps), cached, watts, peak, s.load_s, s.read_bytes
    )


def clocked(coming: Iterable[int]) -> tuple[list[float], list[int]]:
    """(seconds from now to each token, the tokens). Between two, measuring adds but this:
    benchmarks/throughput.py.
    """
    stamps = list[float]()
    tokens = list[int]()
    began = time.perf_counter()
    for token in coming:
        stamps.append(time.perf_counter() - began)
        tokens.append(token)
    return stamps, tokens


def need_bytes(checkpoint: Checkpoint, r: Request) -> int:
    """One model whole in stock mlx-lm, its cache, and a piece of the prompt under way."""
    m = estimates.model_of(checkpoint)
    own = phases.timed_bytes(m.params) + estimates.keys_bytes(m, r.prompt + r.answer)
    return own + estimates.workspace_bytes(m, min(r.prompt, PREFILL), r.prompt)


def rounds(
    folders: Mapping[str, Path],
    together: bool,
    count: int,
    r: Request,
    seed: int = 0,
    delay: float = 0.0,
    monitor: Monitor | None = None,
    peaks: bool = False,
) -> Iterator[tuple[str, Measurement]]:
    """Every trial as it ends, by model, but the warm-up, a whole prompt: all models in turn, A B A
    B; or, where they do not fit in memory together, model after model. No model is handed on:
    whoever took one would keep it in memory.
    """
    for group in filter(None, [list(folders)] if together else [[name] for name in folders]):
        subjects = {name: opened(folders[name]) for name in group}
        for s in subjects.values():
            trial(s, r._replace(answer=min(r.answer, WARM_UP)), (seed, 0))
        for number in range(1, count + 1):
            for name, s in subjects.items():
                time.sleep(delay)
                yield name, trial(s, r, (seed, number), monitor, peaks)
        del s, subjects  # the next one's memory
        mx.clear_cache()


def figures(
    trials: Sequence[Measurement], r: Request, idle_w: float | None = None
) -> dict[str, dict[str, float]]:
    """{metric: what the trials of one model say}; `itl_ms` is over all gaps, `joules` per token and
    beyond `idle_w`.
    """
    powers = [(t, t.watts - idle_w) for t in trials if t.watts is not None and idle_w is not None]
    every: dict[str, list[float]] = {
        "ttft_ms": [1000 * t.stamps_s[0] for t in trials],
        "ttft_cached_ms": [1000 * t.cached_s for t in trials if t.cached_s is not None],
        "prefill_tps": [r.prompt / t.stamps_s[0] for t in trials],
        "tpot_ms": [1000 * t.tpot_s for t in trials],
        "itl_ms": [1000 * (b - a) for t in trials for a, b in pairwise(t.stamps_s)],
        "decode_tps": [1 / t.tpot_s for t in trials],
        "peak_mb": [t.peak_bytes / 1e6 for t in trials if t.peak_bytes],
        "joules": [beyond_w * t.tpot_s for t, beyond_w in powers],
    }
    return {name: summary(values) for name, values in every.items() if values}


def slowed(name: str, trials: Sequence[Measurement]) -> str | None:
    """Whether the last trial was a good deal slower than the first: heat, or other work on this
    machine.
    """
    first, last = (1 / t.tpot_s for t in (trials[0], trials[-1]))
    if last >= SLOWED * first:
        return None
    return f"{name} fell from {first:.1f} to {last:.1f} tokens/s between its first and last trial"


def rows(fixed: Facts, measured: Facts) -> list[Row]:
    """Mean ± standard deviation of what was timed, plain values of the rest."""
    found = []
    for name, values in measured.items():
        f = fixed[name]
        found += [
            Row(name, "params", f["params"] / 1e6),
            Row(name, "weights_mb", f["weight_bytes"] / 1e6),
        ]
        found.append(Row(name, "m1_best_tps", f["m1_best_tps_computed"]))
        for metric, value in values.items():
            if isinstance(value, Mapping):
                mean = value["mean"]
                sd = value["sd"]
                found.append(
                    Row(name, metric, mean, *(mean - sd, mean + sd) if value["n"] > 1 else ())
                )
                if "p95" in value:
                    found.append(Row(name, metric.replace("_ms", "_p95_ms"), value["p95"]))
            elif metric != "bound":  # a word
                found.append(Row(name, metric, value))
    return found


def moved(
    checkpoint: Checkpoint, weight_bytes: int, r: Request
) -> tuple[tuple[float, float], tuple[float, float]]:
    """(bytes to move, float operations) of one token, half-way through the answer: all weights, the
    keys and values; and of the first one: the prompt through all blocks, then its last row through
    the head.
    """
    m = estimates.model_of(checkpoint)
    seen = r.prompt + r.answer // 2
    first = estimates.forward_flops(m, r.prompt, r.prompt, head=False) + 2.0 * m.head_params
    keys = estimates.keys_bytes(m, seen)
    read = estimates.keys_bytes(m, r.prompt)
    # Twice what it sees: all of it, not the half.
    return (weight_bytes + keys, estimates.forward_flops(m, 1, 2 * seen)), (
        weight_bytes + read,
        first,
    )


def m1_tokens_per_s(checkpoint: Checkpoint, r: Request) -> float:
    """Computed, never run: an M1's 68 GB/s over the bytes of one sequence's token, floats in
    float16, packed as is.
    """
    unread = _looked_up(checkpoint.tensors)
    read = [t for name, t in checkpoint.tensors.items() if not name.startswith(unread)]
    nbytes = sum(t.nbytes if t.dtype == "U32" else 2 * math.prod(t.shape) for t in read)
    m = estimates.model_of(checkpoint, gpu=True)
    seen = r.prompt + r.answer // 2
    return rates.M1_AIR.memory_bytes_per_s / (nbytes + estimates.keys_bytes(m, seen))


def beside(
    checkpoint: Checkpoint, weight_bytes: int, r: Request, at: rates.Roof, tps: float
) -> dict[str, Any]:
    """MB a token moves, the best times there could be, the share reached, and what the limit is.
    weight_bytes: read.
    """
    token, first = moved(checkpoint, weight_bytes, r)
    best = {"decode_best_tps": 1 / at.seconds(*token), "ttft_best_ms": 1000 * at.seconds(*first)}
    bound = (
        "memory bandwidth"
        if token[0] / at.memory_bytes_per_s >= at.seconds(*token)
        else "arithmetic"
    )
    return {"moved_mb": token[0] / 1e6, **best, "reached": tps * at.seconds(*token), "bound": bound}


def kind(checkpoint: Checkpoint, dtype: str) -> str:
    """The format that a model computes in: 'float32', '4-bit', '3- to 8-bit' where matrices
    differ.
    """
    settings = checkpoint.config.get("quantization") or {}
    bits = sorted(
        s["bits"] for s in (settings, *settings.values()) if isinstance(s, Mapping) and "bits" in s
    )
    return (
        dtype
        if not bits
        else f"{bits[0]}-bit"
        if bits[0] == bits[-1]
        else f"{bits[0]}- to {bits[-1]}-bit"
    )
