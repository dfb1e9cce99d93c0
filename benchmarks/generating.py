"""Is `mis_mlx.generate` as quick as `mlx_lm.generate` where the model fits? Both commands, whole,
in turn.

    scripts/mis benchmarks/generating.py        # nothing else may run

The default teacher in float32 (half precision is emulated on this CPU, and mlx-lm computes in what
is stored), greedy, one prompt. Seconds are of the processes from start to end, so imports and
reading the model are in them; those of one token, too, are what a longer answer adds to a short
one. Writes benchmarks/results/<machine>/generating.json.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laboratory import busy, start, write

from mis_mlx import cli
from mis_mlx.models.opening import load, resolve

PROMPT = "Write a long story about a shepherd and a bear in the mountains."
COMMANDS = {
    "mis_mlx.generate": ("-m", "mis_mlx.generate"),
    "mlx_lm.generate": ("-m", "mlx_lm", "generate", "--temp", "0", "--verbose", "False"),
}


@dataclass(frozen=True)
class Settings:
    """How much."""

    short: int = 16
    """tokens"""
    long: int = 128
    rounds: int = 3


def once(model: str, command: tuple[str, ...], tokens: int) -> float:
    """Seconds of one process."""
    line = [
        sys.executable,
        *command,
        "--model",
        model,
        "--prompt",
        PROMPT,
        "--max-tokens",
        str(tokens),
    ]
    began = time.perf_counter()
    subprocess.run(line, check=True, capture_output=True)
    return time.perf_counter() - began


def main(s: Settings) -> None:
    """All rounds."""
    taken: dict[str, dict[int, list[float]]] = {
        name: {s.short: [], s.long: []} for name in COMMANDS
    }
    noted = busy("before")
    with tempfile.TemporaryDirectory() as temp:
        model = str(Path(temp) / "float32")
        load.mlx_lm("convert").convert(
            str(resolve.resolve_model(None).path), model, dtype="float32"
        )
        for number in range(s.rounds + 1):
            for name, command in COMMANDS.items():
                for tokens, seconds in taken[name].items():
                    found = once(model, command, tokens)
                    if number:  # the first round warms up
                        seconds.append(found)
            cli.say(f"{number}/{s.rounds}: {taken}")
    rows: dict[str, Any] = {}
    for name, by_tokens in taken.items():
        middle = {tokens: statistics.median(seconds) for tokens, seconds in by_tokens.items()}
        each = (middle[s.long] - middle[s.short]) / (s.long - s.short)
        rows[name] = {"seconds": middle, "token_ms": 1000 * each, "all_seconds": by_tokens}
    ours, theirs = rows.values()
    ratios = {
        str(tokens): ours["seconds"][tokens] / theirs["seconds"][tokens]
        for tokens in ours["seconds"]
    }
    ratios["a token"] = ours["token_ms"] / theirs["token_ms"]
    cli.say(f"ours over mlx_lm's: {ratios}")
    write(
        "generating",
        "scripts/mis benchmarks/generating.py",
        {"busy": noted, "ratios": ratios, "rows": rows},
    )


if __name__ == "__main__":
    start(Settings, main)
