"""How many tokens one pass of a streamed teacher settles when its distilled student guesses a tree
of them.

    scripts/mis benchmarks/speculative.py --draft RUN/model        # about 20 minutes on 2 cores

The default teacher, streamed with nothing kept: every pass reads every weight. 20 prompts, up to 32
tokens each, through the chat template. Plain streamed decoding reads all weights for each token;
`bytes` is the share of that. Every drafted text is compared with the plain one, token for token.
Writes benchmarks/results/<machine>/speculative.json.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from itertools import chain
from typing import Any

import laboratory
import mlx.core as mx

from mis_mlx import cli
from mis_mlx.models.opening import compute_type, load, resolve
from mis_mlx.models.passing.stream import Stream
from mis_mlx.models.writing import mlx_generate, streamed_decode

PROMPTS = (
    "What is a shepherd?",
    "Write a haiku about rain.",
    "Explain to a child why the sky is blue.",
    "List five things to pack for a mountain hike.",
    "How do I boil an egg?",
    "Write a Python function that returns the larger of two numbers.",
    "Translate to French: Good morning, how are you?",
    "Give me three tips for better sleep.",
    "Who wrote Romeo and Juliet, and what is it about?",
    "Summarize: The bridge was closed for repairs, so the buses took the long way round and "
    "everyone was late.",
    "What is the difference between a crocodile and an alligator?",
    "Write a short email asking for a day off.",
    "If a train goes 60 km in one hour, how far does it go in three?",
    "Name the planets of the solar system.",
    "Tell me a story about a bear who likes cheese.",
    "What does the if statement do in Python?",
    "Co to jest oscypek?",
    "Napisz krótki wiersz o górach.",
    "Podaj przepis na kwaśnicę.",
    "O której odjeżdża autobus do Nowego Targu?",
)


@dataclass(frozen=True)
class Settings:
    """What is compared."""

    draft: str
    """folder of the student"""
    note: str = ""
    """how the student was made, for the results file"""
    sizes: tuple[int, ...] = (16, 64, 256)
    """rows of a pass: the nodes of the tree, and one"""
    prompts: int = len(PROMPTS)
    max_tokens: int = 32
    name: str = "speculative"
    """of the results file"""


def main(s: Settings) -> None:
    """Plain decoding first, then every size; one line each, one JSON file."""
    checkpoint = compute_type.open_to_compute(resolve.resolve_model().path)
    small = compute_type.open_to_compute(s.draft)
    tokenizer = load.tokenizer(checkpoint.path)
    asked = [mlx_generate.encode(tokenizer, p) for p in PROMPTS[: s.prompts]]
    draft = Stream(small, mx.float32, None)
    plain: list[list[int]] = []
    rows: list[dict[str, Any]] = []
    for size in (1, *s.sizes):
        big = Stream(checkpoint, mx.float32)
        began = time.perf_counter()
        each = []
        same = 0
        made = 0
        for n, ids in enumerate(asked):
            passes = list(
                streamed_decode.decode(
                    big,
                    ids,
                    count=s.max_tokens,
                    ends=tokenizer.eos_token_ids,
                    draft=draft,
                    size=size,
                )
            )
            tokens = list(chain.from_iterable(passes))
            if size == 1:
                plain.append(tokens)
            same += tokens == plain[n]
            made += len(passes)
            each.append(len(tokens) / len(passes))
        count = sum(map(len, plain))
        row = {
            "rows": size,
            "tokens_per_pass": round(count / made, 3),
            "bytes_per_token": round(big.reader.nbytes / count),
            "seconds_per_token": round((time.perf_counter() - began) / count, 3),
            "same_text": same,
            "each": [round(e, 2) for e in each],
        }
        row["bytes"] = (
            round(row["bytes_per_token"] / rows[0]["bytes_per_token"], 3) if rows else 1.0
        )
        rows.append(row)
        print(json.dumps(row), flush=True)
        write(s, len(asked), rows)


def write(s: Settings, prompts: int, rows: list[dict[str, Any]]) -> None:
    """The results so far: a run that is stopped leaves the sizes it has done."""
    flags = (
        f"--max-tokens {s.max_tokens} --prompts {s.prompts} --name {s.name} --sizes "
        f"{' '.join(map(str, s.sizes))}"
    )
    command = f"scripts/mis benchmarks/speculative.py --draft RUN/model {flags}"
    laboratory.write(s.name, command, {"draft": s.note, "prompts": prompts, "rows": rows})


if __name__ == "__main__":
    main(cli.parse(Settings))
