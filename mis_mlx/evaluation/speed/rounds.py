"""Models timed in turn, round after round: what the trials come to, beside what a machine could do at best.

At best: bytes over bandwidth, operations over arithmetic."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import mlx.core as mx

from mis_mlx.evaluation.speed import timing
from mis_mlx.evaluation.speed.timing import BenchmarkModel, Loaded, Measurement, Request
from mis_mlx.hardware import rates
from mis_mlx.hardware.thermal.thermal_monitor import Monitor
from mis_mlx.maths.stats import summary
from mis_mlx.planner import estimates, phases
from mis_mlx.types import Checkpoint, Row

WARM_UP = 4  # tokens after the whole prompt, timed by nobody
PREFILL = 2048  # mlx-lm's prefill_step_size
SLOWED = 0.9  # the last trial's speed over the first's, below which something throttles

Openers = Mapping[str, Callable[[], BenchmarkModel]]
METRICS = (
    ("params", "parameters, millions", ".1f"),
    ("weights_mb", "weights on disk, MB (10^6)", ".1f"),
    ("load_s", "time to load, s", ".2f"),
    ("ttft_ms", "time to first token, ms", ".0f"),
    ("ttft_best_ms", "– at best here", ".0f"),
    ("ttft_cached_ms", "– the prompt in the cache", ".0f"),
    ("prefill_tps", "prefill, tokens/s", ".0f"),
    ("tpot_ms", "time per output token, ms", ".1f"),
    ("itl_p95_ms", "– p95 of the gaps", ".1f"),
    ("decode_tps", "decode, tokens/s", ".2f"),
    ("moved_mb", "– memory it reads per token, MB", ".1f"),
    ("decode_best_tps", "– at best here, tokens/s", ".1f"),
    ("reached", "– reached of that", ".0%"),
    ("m1_best_tps", "– at best on an M1 (68 GB/s), computed", ".0f"),
    ("peak_mb", "peak memory, MB", ".0f"),
    ("joules", "energy above idle, J/token, an estimate", ".3f"),
)

Facts = Mapping[str, Mapping[str, Any]]  # by model


def need_bytes(checkpoint: Checkpoint, r: Request) -> int:
    """One model whole in stock mlx-lm, its cache, and a piece of the prompt under way."""
    m = estimates.model_of(checkpoint)
    own = phases.timed_bytes(checkpoint.config) + estimates.keys_bytes(m, r.prompt + r.answer)
    return own + estimates.workspace_bytes(m, min(r.prompt, PREFILL), r.prompt)


def rounds(
    openers: Openers,
    together: bool,
    count: int,
    r: Request,
    seed: int = 0,
    delay: float = 0.0,
    monitor: Monitor | None = None,
    peaks: bool = False,
    warm_up: Request | None = None,
) -> Iterator[tuple[Loaded, Measurement]]:
    """Every trial as it ends, but the warm-up, a whole prompt: all models in turn, A B A B; or, where they do not fit
    in memory together, model after model. No model is handed on: whoever took one would keep it in memory."""
    first = warm_up or r._replace(answer=min(r.answer, WARM_UP))
    for group in [list(openers)] if together else [[name] for name in openers]:
        subjects = [openers[name]() for name in group]
        for s in subjects:
            timing.trial(s, first, (seed, 0))
        for number in range(1, count + 1):
            for s in subjects:
                time.sleep(delay)
                yield s.loaded, timing.trial(s, r, (seed, number), monitor, peaks)
        del s, subjects  # the next one's memory
        mx.clear_cache()


def figures(trials: Sequence[Measurement], r: Request, idle_w: float | None = None) -> dict[str, dict[str, float]]:
    """{metric: what the trials of one model say}; `itl_ms` is over all gaps, `joules` per token and beyond `idle_w`."""
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
    """Whether the last trial was a good deal slower than the first: heat, or other work on this machine."""
    first, last = (1 / t.tpot_s for t in (trials[0], trials[-1]))
    if last >= SLOWED * first:
        return None
    return f"{name} fell from {first:.1f} to {last:.1f} tokens/s between its first and last trial"


def rows(fixed: Facts, measured: Facts) -> list[Row]:
    """Mean ± standard deviation of what was timed, plain values of the rest."""
    found = []
    for name, values in measured.items():
        f = fixed[name]
        found += [Row(name, "params", f["params"] / 1e6), Row(name, "weights_mb", f["weight_bytes"] / 1e6)]
        found.append(Row(name, "m1_best_tps", f["m1_best_tps_computed"]))
        for metric, value in values.items():
            if isinstance(value, Mapping):
                mean, sd = value["mean"], value["sd"]
                found.append(Row(name, metric, mean, *(mean - sd, mean + sd) if value["n"] > 1 else ()))
                if "p95" in value:
                    found.append(Row(name, metric.replace("_ms", "_p95_ms"), value["p95"]))
            elif metric != "bound":  # a word
                found.append(Row(name, metric, value))
    return found


def decoding(checkpoint: Checkpoint, weight_bytes: int, r: Request) -> tuple[float, float]:
    """(bytes to move, float operations) of one token, half-way through the answer: all weights, the keys and values."""
    m, seen = estimates.model_of(checkpoint), r.prompt + r.answer // 2
    flops = estimates.forward_flops(m, 1, 2 * seen)  # 2: it sees all, not the half
    return weight_bytes + estimates.keys_bytes(m, seen), flops


def first_token(checkpoint: Checkpoint, weight_bytes: int, r: Request) -> tuple[float, float]:
    """(bytes to move, float operations) of the prompt through all blocks, then its last row through the head."""
    m = estimates.model_of(checkpoint)
    blocks = estimates.forward_flops(m, r.prompt, r.prompt, head=False)
    return weight_bytes + estimates.keys_bytes(m, r.prompt), blocks + 2.0 * m.head_params


def m1_tokens_per_s(checkpoint: Checkpoint, r: Request) -> float:
    """Computed, never run: an M1's 68 GB/s over the bytes of one sequence's token, floats in float16, packed as is."""
    unread = "model.embed_tokens." if any(name.startswith("lm_head.") for name in checkpoint.tensors) else "-"
    read = [t for name, t in checkpoint.tensors.items() if not name.startswith(unread)]
    nbytes = sum(t.nbytes if t.dtype == "U32" else 2 * math.prod(t.shape) for t in read)
    m, seen = estimates.model_of(checkpoint, gpu=True), r.prompt + r.answer // 2
    return rates.M1_AIR.memory_bytes_per_s / (nbytes + estimates.keys_bytes(m, seen))


def beside(
    checkpoint: Checkpoint, weight_bytes: int, r: Request, at: rates.Roof, tokens_per_s: float
) -> dict[str, Any]:
    """MB a token moves, the best times there could be, the share reached, and what the limit is. weight_bytes: read."""
    token, first = (f(checkpoint, weight_bytes, r) for f in (decoding, first_token))
    best = {"decode_best_tps": 1 / at.seconds(*token), "ttft_best_ms": 1000 * at.seconds(*first)}
    reached = tokens_per_s * at.seconds(*token)
    return {"moved_mb": token[0] / 1e6, **best, "reached": reached, "bound": at.bound(*token)}


def kind(checkpoint: Checkpoint, dtype: str) -> str:
    """The format that a model computes in: 'float32', '4-bit', '3- to 8-bit' where matrices differ."""
    settings = checkpoint.config.get("quantization") or {}
    bits = sorted(s["bits"] for s in (settings, *settings.values()) if isinstance(s, Mapping) and "bits" in s)
    return dtype if not bits else f"{bits[0]}-bit" if bits[0] == bits[-1] else f"{bits[0]}- to {bits[-1]}-bit"
