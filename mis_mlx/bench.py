"""Time one or more models on this machine: time to first token, decode tokens per second, bytes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mis_mlx import cli
from mis_mlx.machine import governor
from mis_mlx.model import load, speak, teacher
from mis_mlx.training.weather import Weather, WeatherFlags
from mis_mlx.types import MisError, Row

PROMPT = (
    "In the evening the wind came down from the pass and the shepherds put the fire out. The youngest of them "
    "asked the old one how far it was to the next hut, and whether there would be milk. The old one looked at "
    "the sky, counted on his fingers and said that it depended on the bear."
)


@dataclass(frozen=True)
class Settings(WeatherFlags):
    """The same prompt and length for every model; medians over trials."""

    model: tuple[str, ...] = ()
    """model folders; default: SmolLM2-135M-Instruct"""
    p: int = 64
    """tokens in the prompt"""
    g: int = 32
    """tokens generated"""
    n: int = 3
    """trials, after one warm-up that does not count"""
    delay: float = 0.0
    """seconds of rest before each trial"""
    config: cli.ConfigFile = None
    """YAML file with any of these flags"""


def measure(
    folders: Sequence[Path], names: Sequence[str], prompt_tokens: int, tokens: int, trials: int, delay: float = 0.0
) -> list[Row]:
    """Rows for each model: medians over trials, one model after the other, one in memory at a time.

    TTFT runs from a tokenized prompt to the first sampled token; decode is (tokens - 1) / (last - first), so
    fewer than two tokens are not timed: `tokens` is at least 2.
    """
    tokens = max(tokens, 2)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for folder, name in zip(folders, names, strict=True):
        model, tokenizer = speak.open_model(folder)
        ids = speak.prompt_ids(tokenizer, PROMPT, prompt_tokens)
        for trial in range(trials + 1):
            time.sleep(delay)
            stamps = speak.token_times(model, ids, tokens if trial else min(tokens, 4))
            if trial:
                times[name].append((stamps[1] - stamps[0], (len(stamps) - 2) / (stamps[-1] - stamps[1])))
        del model
        mx.clear_cache()
    rows = []
    for name in names:
        first, rate = (sorted(t[i] for t in times[name])[trials // 2] for i in (0, 1))
        rows += [Row(name, "ttft_ms", first * 1000, n=trials), Row(name, "decode_tps", rate, n=trials)]
    return rows


def run(settings: Settings) -> dict[str, Any]:
    """The command. A machine that is hot at the start or the end is said to be, in the JSON too."""
    if min(settings.p, settings.g, settings.n) < 1 or settings.delay < 0:
        given = f"--p {settings.p} --g {settings.g} --n {settings.n} --delay {settings.delay:g}"
        raise MisError(f"{given} cannot be timed: give 1 or more of each, and a delay of 0 or more")
    folders = [Path(m) for m in settings.model] or [teacher.find().path]
    names = load.labels(folders)
    with Weather(settings) as weather:
        hot = [governor.unfit_for_timing(weather.reading())]
        rows = measure(folders, names, settings.p, settings.g, settings.n, settings.delay)
        hot.append(governor.unfit_for_timing(weather.reading()))
    rows += [Row(n, "bytes", load.open_checkpoint(f).nbytes / 1e6) for f, n in zip(folders, names, strict=True)]
    print(cli.table(rows, names, speak.METRICS))
    flags = [f"{when}: {why}" for when, why in zip(("before", "after"), hot, strict=True) if why]
    for flag in flags:
        cli.say(f"these times measure the heat too ({flag}): let it cool, or use --delay")
    values = {f"{r.metric}_{r.model}": r.value for r in rows}
    return {"p": settings.p, "g": settings.g, "n": settings.n, **values, "hot": flags}


if __name__ == "__main__":
    cli.main(Settings, run)
