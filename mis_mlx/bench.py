"""Time one or more models on this machine: time to first token, decode tokens per second, bytes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mis_mlx import cli
from mis_mlx.model import load, speak
from mis_mlx.types import Row

METRICS = (
    ("ttft_ms", "time to first token, ms", ".0f"),
    ("decode_tps", "decode, tokens/s", ".1f"),
    ("bytes", "weights on disk, MB (10^6)", ".1f"),
)
PROMPT = (
    "In the evening the wind came down from the pass and the shepherds put the fire out. The youngest of them "
    "asked the old one how far it was to the next hut, and whether there would be milk. The old one looked at "
    "the sky, counted on his fingers and said that it depended on the bear."
)


@dataclass(frozen=True)
class Settings:
    """Interleaved trials, so that a warming machine treats all models alike."""

    model: tuple[str, ...]
    """model folders"""
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
    """Rows for each model: medians over trials. One model is loaded at a time, round after round.

    TTFT runs from a tokenized prompt to the first sampled token; decode is (tokens - 1) / (last - first).
    """
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
    for folder, name in zip(folders, names, strict=True):
        first, rate = (sorted(t[i] for t in times[name])[trials // 2] for i in (0, 1))
        nbytes = load.open_checkpoint(folder).nbytes
        rows += [
            Row(name, "ttft_ms", first * 1000, n=trials),
            Row(name, "decode_tps", rate, n=trials),
            Row(name, "bytes", nbytes / 1e6),
        ]
    return rows


def run(settings: Settings) -> dict[str, Any]:
    """The command."""
    folders = [Path(m) for m in settings.model]
    names = [f.name for f in folders]
    rows = measure(folders, names, settings.p, settings.g, settings.n, settings.delay)
    print(cli.table(rows, names, METRICS))
    return {"p": settings.p, "g": settings.g, "n": settings.n, **{f"{r.metric}_{r.model}": r.value for r in rows}}


if __name__ == "__main__":
    cli.main(Settings, run)
