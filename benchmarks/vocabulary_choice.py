"""Which tokens should stay? The teacher, untrained, with half and a third of its tokens, chosen in several ways.

    scripts/mis benchmarks/vocabulary_choice.py    # 6 minutes on 2 cores

SmolLM2-135M-Instruct; bits per byte of 5,000 characters of each text, relative to the teacher with all of its tokens.
The texts chose nothing: held-out parts of Python's manual and of the Miś texts, and five of other kinds (Debian's
vim-runtime and base-files, numpy). `counted` in the default training text; `expected` there by the teacher;
`both`: half of each, the default. `--languages de`, which needs the package wordfreq, adds German words.
Writes benchmarks/results/<machine>/vocabulary_choice.json.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import vocabulary as kinds
from laboratory import start, write

from mis_mlx import cli
from mis_mlx.data import preparation
from mis_mlx.evaluation import comparison
from mis_mlx.models import load, resolve
from mis_mlx.models.trimmed_tokenizer import Vocabulary
from mis_mlx.planner.recipe import VOCABULARY_WINDOWS
from mis_mlx.pruning import vocabulary

WINDOW, BEFORE = 384, 128  # tokens that are judged at once, and that are read before them
LICENCE = Path("/usr/share/common-licenses/GPL-3")


@dataclass(frozen=True)
class Settings:
    """How much, and which words."""

    characters: int = 5000
    """of each text"""
    languages: tuple[str, ...] = ()
    """whose words count in one more row of each size"""


def texts(characters: int) -> dict[str, str]:
    """By name."""
    found = {"Python's manual": "\n\n".join(str(row["text"]) for row in preparation.load(None).test)}
    found["Miś texts"] = "\n\n".join(str(row.get("text") or row) for row in preparation.load("mis").test)
    found |= kinds.other_texts() | {"Vim's tutor in German": kinds.tutor("tutor1.de.utf-8")}
    found["GNU GPL 3"] = LICENCE.read_text("utf-8")
    return {name: text[2000 : 2000 + characters] for name, text in found.items()}


def bits_per_byte(model: nn.Module, tokenizer: Any, text: str) -> float:
    """Of a text, every token but the first after what stands before it."""
    ids, nll = tokenizer.encode(text, add_special_tokens=False), 0.0
    for at in range(0, len(ids), WINDOW):
        window = mx.array([ids[max(0, at - BEFORE) : at + WINDOW]])
        each: Any = nn.losses.cross_entropy(model(window[:, :-1]).astype(mx.float32), window[:, 1:])
        nll += each[0, -(min(WINDOW, len(ids) - at) - (at == 0)) :].sum().item()
    return nll / len(text.encode()) / math.log(2)


def main(s: Settings) -> None:
    """All rows."""
    teacher = load.open_checkpoint(resolve.resolve_model(None).path)
    tokenizer, tokens = load.tokenizer(teacher.path), Vocabulary(teacher.path)
    train = preparation.prepare(None, tokenizer, 256).train
    model, needed = load.resident(teacher, mx.float32), vocabulary.needed(tokens, teacher.path)
    weight, read = model.model.embed_tokens.weight, texts(s.characters)
    counted = np.bincount(train.tokens.reshape(-1), minlength=len(weight)).astype(float)
    also = vocabulary.expected(teacher, comparison.chosen(train, VOCABULARY_WINDOWS))
    ways = {"merge order": np.zeros(len(weight)), "counted": counted, "expected": also}
    ways["both"] = counted / counted.sum() + also / also.sum()
    if s.languages:
        ways["both, words"] = ways["both"].copy()
        for word, share in vocabulary.words(s.languages).items():
            np.add.at(ways["both, words"], tokenizer.encode(f" {word}", add_special_tokens=False), share)
    whole = {name: bits_per_byte(model, tokenizer, text) for name, text in read.items()}
    rows: dict[str, Any] = {"bits per byte with all tokens": whole}
    for size in (len(weight) // 2, len(weight) // 3):
        for way, counts in ways.items():
            kept = tokens.chosen(needed, counts, size)
            with tempfile.TemporaryDirectory() as place:
                for file, content in tokens.files(kept):
                    (Path(place) / file).write_bytes(content)
                own = load.tokenizer(Path(place))
            model.model.embed_tokens.weight = weight[mx.array(kept)]
            found = {name: bits_per_byte(model, own, text) / whole[name] - 1 for name, text in read.items()}
            rows[f"{size:,} tokens, {way}"] = found
            cli.say(f"{size:,} {way:12} " + ", ".join(f"{name} {more:+.1%}" for name, more in found.items()))
    write("vocabulary_choice", "scripts/mis benchmarks/vocabulary_choice.py", {"languages": s.languages, "rows": rows})


if __name__ == "__main__":
    start(Settings, main)
