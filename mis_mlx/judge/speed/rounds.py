"""Time models in turn, round after round. Stock mlx-lm generates, greedily, past the end token.

Definitions (those of vLLM and AIPerf; none includes the tokenizer or the text):
    TTFT      from the token ids to the first new token, in the process's hands
    ITL       the time between two tokens
    TPOT      (last - first) / (tokens - 1), one number for each request
    decode    (tokens - 1) / (last - first); mlx-lm's own generation_tps counts the first token too
"""

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path

from mis_mlx.compute import precision
from mis_mlx.data import preparation
from mis_mlx.hardware import rates
from mis_mlx.maths.stats import summary
from mis_mlx.models.architectures import arch
from mis_mlx.models.opening import load
from mis_mlx.models.opening.model_size import model_of
from mis_mlx.models.passing import pass_cost, stream
from mis_mlx.types import Checkpoint, Row

WARM_UP = 4  # tokens after the whole prompt, which are not timed
PREFILL = 2048  # mlx-lm's prefill_step_size
SLOWED = 0.9  # the last trial's speed over the first's, below which something throttles
Facts = Mapping[str, Mapping[str, Any]]  # by model


class Request(NamedTuple):
    """The work that is timed: tokens of the prompt, and of the answer (2 or more)."""

    prompt: int
    answer: int


class BenchmarkModel(NamedTuple):
    """A model in memory.

    nbytes: its weights there.
    """

    model: nn.Module
    tokenizer: Any
    load_s: float
    nbytes: int


class Measurement(NamedTuple):
    """One timed request.

    asked, tokens: token ids of prompt and answer. stamps_s: seconds from the start to each token.
    cached_s: TTFT of the same prompt with all but its last token in the cache; None where the cache
    cannot be trimmed. peak_bytes: its model's weights, cache and workspace. load_s: of its
    model, which may be gone.
    """

    asked: tuple[int, ...]
    tokens: tuple[int, ...]
    stamps_s: tuple[float, ...]
    cached_s: float | None = None
    peak_bytes: int | None = None
    load_s: float = 0.0

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first."""
        return (self.stamps_s[-1] - self.stamps_s[0]) / (len(self.stamps_s) - 1)


def open_model(checkpoint: Checkpoint) -> tuple[nn.Module, Any]:
    """(model, tokenizer) as stock `mlx_lm.load` opens a folder, which passed our gate.

    Floats are in the type that the checkpoint computes in. Weights are read and converted one after
    the other: together they would be held twice. A tokenizer that is open is not opened again.
    """
    tokenizer = load.tokenizer(checkpoint.path)
    model, _ = load.mlx_lm("utils").load_model(checkpoint.path, lazy=True, trust_remote_code=False)
    model = getattr(model, "language_model", model)  # of a model that also sees
    config = checkpoint.config
    dtype = precision.dtype_of(checkpoint)

    def cast(name: str, array: mx.array) -> mx.array:
        floats = mx.issubdtype(array.dtype, mx.floating)
        return array.astype(arch.type_of(config, name, dtype)) if floats else array

    # `set_dtype` would cast those, too, that are float32 in a model of any type
    model.update(tree_map_with_path(cast, model.parameters()))
    for array in dict[str, mx.array](tree_flatten(model.parameters())).values():
        stream.evaluate_now(array)
    return model, tokenizer


def greedy(
    model: nn.Module, ids: Sequence[int], count: int, cache: list[Any] | None = None
) -> Iterator[int]:
    """The `count` tokens that mlx_lm's own loop puts after the token ids `ids`."""
    step = load.mlx_lm("generate").generate_step
    for token, _ in step(mx.array(list(ids)), model, max_tokens=count, prompt_cache=cache):
        yield int(token)


def load_model(checkpoint: Checkpoint) -> BenchmarkModel:
    """A model, whole in memory, with the time that took.

    The system may have the files in its page cache.
    """
    began = time.perf_counter()
    model, tokenizer = open_model(checkpoint)
    arrays = dict[str, mx.array](tree_flatten(model.parameters()))
    seconds = time.perf_counter() - began
    nbytes = sum(array.nbytes for array in arrays.values())
    stream.load_checked(model, f"{checkpoint.path}: ")
    return BenchmarkModel(
        model=model,
        tokenizer=tokenizer,
        load_s=seconds,
        nbytes=nbytes,
    )


def _table_prefixes(names: Iterable[str]) -> tuple[str, ...]:
    """How the names of tables begin of which a token takes one row, in a model with these tensors.

    A tied embedding is read as a whole: it is the head, too.
    """
    has_head = any(name.startswith("lm_head.") for name in names)
    if has_head:
        return (arch.PER_LAYER, load.EMBEDDING)
    return (arch.PER_LAYER,)


def prompt(tokenizer: Any, count: int, seed: Sequence[int]) -> list[int]:
    """`count` token ids of Python's manual, from a topic that `seed` chooses."""
    rows = [f"\n\n{row['text']}" for row in preparation.load(None).train]
    rng = np.random.default_rng(list(seed))
    start = int(rng.integers(len(rows)))
    from_start = "".join(rows[start:] + rows[:start])
    ids = tokenizer.encode(from_start[: 10 * count])  # a token has 3 to 5 letters
    return list((ids * (count // len(ids) + 1))[:count])


def trial(
    s: BenchmarkModel,
    r: Request,
    seed: Sequence[int],
    peaks: bool = False,
) -> Measurement:
    """One request with a prompt that `seed` chooses.

    peaks: reset MLX's peak of memory, and report the request's own.
    """
    asked = prompt(s.tokenizer, r.prompt, seed)
    cache = load.mlx_lm("models.cache").make_prompt_cache(s.model)
    before_bytes = mx.get_active_memory()
    if peaks:
        mx.reset_peak_memory()
    stamps, tokens = token_times(greedy(s.model, asked, r.answer, cache))
    # mlx-lm has begun one more token, which must not run into the next trial.
    stream.evaluate_now([layer.state for layer in cache])
    peak_bytes = None
    if peaks:
        peak_bytes = mx.get_peak_memory() - before_bytes + s.nbytes
    cached_s = _cached_ttft(s.model, asked, cache)
    mx.clear_cache()
    return Measurement(
        asked=tuple(asked),
        tokens=tuple(tokens),
        stamps_s=tuple(stamps),
        cached_s=cached_s,
        peak_bytes=peak_bytes,
        load_s=s.load_s,
    )


def _cached_ttft(
    model: nn.Module,
    asked: Sequence[int],
    cache: list[Any],
) -> float | None:
    """TTFT with all of a prompt but its last token in the cache; None where that cannot be trimmed.

    cache: of the prompt with its answer.
    """
    caches = load.mlx_lm("models.cache")
    if not caches.can_trim_prompt_cache(cache):
        return None
    answered = cache[0].offset - (len(asked) - 1)
    caches.trim_prompt_cache(cache, answered)
    stamps, _ = token_times(greedy(model, asked[-1:], 1, cache))
    stream.evaluate_now([layer.state for layer in cache])
    return stamps[0]


def token_times(coming: Iterable[int]) -> tuple[list[float], list[int]]:
    """(seconds from now to each token, the tokens).

    The loop below is all that measuring adds between two tokens (benchmarks/throughput.py).
    """
    stamps = []
    tokens = []
    began = time.perf_counter()
    for token in coming:
        stamps.append(time.perf_counter() - began)
        tokens.append(token)
    return stamps, tokens


def need_bytes(checkpoint: Checkpoint, r: Request) -> int:
    """Bytes of one model in stock mlx-lm, its cache, and a piece of the prompt in computation."""
    m = model_of(checkpoint)
    weights = 6 * m.params  # as stored, and as float32
    keys = pass_cost.keys_bytes(m, r.prompt + r.answer)
    return weights + keys + pass_cost.workspace_bytes(m, min(r.prompt, PREFILL), r.prompt)


def rounds(
    models: Mapping[str, Checkpoint],
    together: bool,
    count: int,
    r: Request,
    seed: int = 0,
    delay: float = 0.0,
    peaks: bool = False,
) -> Iterator[tuple[str, Measurement]]:
    """Every trial as it ends, (model's name, measurement), without the warm-up.

    together: all models in turn, A B A B, so that drift hits all alike; otherwise model after
    model, where they do not fit in memory together. count: trials of each. delay: seconds of rest
    before each. No model is yielded: a caller that held one would keep it in memory.
    """
    groups = [[name] for name in models]
    if together and models:
        groups = [list(models)]
    warm_up = r._replace(answer=min(r.answer, WARM_UP))
    for group in groups:
        subjects = {name: load_model(models[name]) for name in group}
        for subject in subjects.values():
            trial(subject, warm_up, (seed, 0))
        for number in range(1, count + 1):
            for name, subject in subjects.items():
                time.sleep(delay)
                yield name, trial(subject, r, (seed, number), peaks=peaks)
        # The next group needs their memory.
        del subject, subjects
        mx.clear_cache()


def figures(
    trials: Sequence[Measurement],
    r: Request,
) -> dict[str, dict[str, float]]:
    """{metric: summary of the trials of one model}; metrics without a value are left out.

    `itl_ms` is over all gaps between tokens.
    """
    every: dict[str, list[float]] = {
        "ttft_ms": [1000 * t.stamps_s[0] for t in trials],
        "ttft_cached_ms": [1000 * t.cached_s for t in trials if t.cached_s is not None],
        "prefill_tps": [r.prompt / t.stamps_s[0] for t in trials],
        "tpot_ms": [1000 * t.tpot_s for t in trials],
        "itl_ms": [],
        "decode_tps": [1 / t.tpot_s for t in trials],
        "peak_mb": [t.peak_bytes / 1e6 for t in trials if t.peak_bytes],
    }
    for t in trials:
        gaps = np.diff(t.stamps_s)
        every["itl_ms"] += [1000 * gap for gap in gaps]
    return {name: summary(values) for name, values in every.items() if values}


def slowdown_note(name: str, trials: Sequence[Measurement]) -> str | None:
    """A sentence where the last trial was much slower than the first; else None.

    Heat does that, or other work on this machine.
    """
    first = 1 / trials[0].tpot_s
    last = 1 / trials[-1].tpot_s
    if last >= SLOWED * first:
        return None
    return f"{name} fell from {first:.1f} to {last:.1f} tokens/s between its first and last trial"


def rows(fixed: Facts, measured: Facts) -> list[Row]:
    """Mean ± standard deviation of everything timed, plain values of the rest."""
    table = []
    for name, values in measured.items():
        facts = fixed[name]
        table.append(Row(name, "params", facts["params"] / 1e6))
        table.append(Row(name, "weights_mb", facts["weight_bytes"] / 1e6))
        table.append(Row(name, "m1_best_tps", facts["m1_best_tps_computed"]))
        for metric, value in values.items():
            if isinstance(value, Mapping):
                table += _timed_rows(name, metric, value)
            else:
                table.append(Row(name, metric, value))
    return table


def _timed_rows(name: str, metric: str, value: Mapping[str, Any]) -> list[Row]:
    """A metric's mean ± standard deviation, and its 95th percentile where there is one."""
    mean = value["mean"]
    sd = value["sd"]
    row = Row(name, metric, mean)
    if value["n"] > 1:
        row = Row(name, metric, mean, low=mean - sd, high=mean + sd)
    if "p95" not in value:
        return [row]
    return [row, Row(name, metric.replace("_ms", "_p95_ms"), value["p95"])]


def m1_tokens_per_s(checkpoint: Checkpoint, r: Request) -> float:
    """The decode rate of an M1, computed, never run.

    Its 68 GB/s over the bytes of a token of one sequence: floats in float16, packed weights as
    they are.
    """
    tables = _table_prefixes(checkpoint.tensors)
    nbytes = 0
    for name, tensor in checkpoint.tensors.items():
        if name.startswith(tables):
            continue
        if tensor.dtype == "U32":
            nbytes += tensor.nbytes
        else:
            nbytes += 2 * math.prod(tensor.shape)
    m = model_of(checkpoint, gpu=True)
    seen = r.prompt + r.answer // 2
    return rates.M1_AIR.memory_bytes_per_s / (nbytes + pass_cost.keys_bytes(m, seen))


def format_name(checkpoint: Checkpoint, dtype: str) -> str:
    """The format that a model computes in: 'float32', '4-bit', '3- to 8-bit' where matrices
    differ.
    """
    settings = checkpoint.config.get("quantization") or {}
    bits = []
    for value in (settings, *settings.values()):
        if isinstance(value, Mapping) and "bits" in value:
            bits.append(value["bits"])
    if not bits:
        return dtype
    fewest = min(bits)
    most = max(bits)
    if fewest == most:
        return f"{fewest}-bit"
    return f"{fewest}- to {most}-bit"
