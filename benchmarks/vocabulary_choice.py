"""Which tokens should stay? The teacher, untrained, with a part of its tokens, chosen in several
ways.

    scripts/mis benchmarks/vocabulary_choice.py    # 10 minutes on 2 cores
    scripts/mis benchmarks/vocabulary_choice.py --teacher gemma-3-270m --divisors 2 4 --ways both
    scripts/mis benchmarks/vocabulary_choice.py --table

SmolLM2-135M-Instruct, or another; bits per byte of 5,000 characters of each text, relative to the
teacher with all of its tokens. The texts chose nothing: held-out parts of Python's manual and of
the Miś texts, those of teacher_text.py, and the GPL (Debian's base-files). `counted` in the default
training text; `expected` there by the teacher, in 16 windows; `both`: half of each, the default;
`written`: counted, and expected in 64 windows of what a model wrote; `both, merge order`: and, with
as much weight, 1 / (1,000 + a token's place in the order of merges). `--languages de`, which needs
the package wordfreq, adds German words. Writes
benchmarks/results/<machine>/vocabulary_choice[-<teacher>].json.
"""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import teacher_text
from laboratory import start, stored, write

from mis_mlx import cli
from mis_mlx.data import preparation, token_windows
from mis_mlx.data.token_windows import Windows
from mis_mlx.judge import comparison
from mis_mlx.models.opening import compute_type, load, resolve
from mis_mlx.pruning import vocabulary
from mis_mlx.reporting.text import markdown_table
from mis_mlx.types import Checkpoint

# tokens that are judged at once, and that are read before them
WINDOW = 384
BEFORE = 128
LICENCE = Path("/usr/share/common-licenses/GPL-3")
WAYS = "merge order", "counted", "expected", "both", "written", "both, merge order"
WHOLE = "bits per byte with all tokens"
PLACES = 1000
MORE_WINDOWS = 64


@dataclass(frozen=True)
class Settings:
    """How much, and which words."""

    teacher: str | None = None
    """default: SmolLM2-135M-Instruct"""
    divisors: tuple[int, ...] = (2, 3)
    """2: half of the tokens stay, 3: a third"""
    ways: tuple[str, ...] = WAYS
    """of choosing"""
    characters: int = 5000
    """of each text"""
    languages: tuple[str, ...] = ()
    """whose words count in one more row of each size"""
    table: bool = False
    """print what there is, and make nothing"""


def texts(s: Settings, place: Path) -> dict[str, str]:
    """By name."""
    found = {
        "Python's manual": "\n\n".join(str(row["text"]) for row in preparation.load(None).test)
    }
    found["Miś texts"] = "\n\n".join(
        str(row.get("text") or row) for row in preparation.load("mis").test
    )
    for name, folder in teacher_text.texts(place, s.teacher).items():
        rows = map(json.loads, (folder / "test.jsonl").read_text("utf-8").splitlines())
        found[name] = "\n\n".join("\n".join(row.values()) for row in rows)
    found["GNU GPL 3"] = LICENCE.read_text("utf-8")
    return {name: text[2000 : 2000 + s.characters] for name, text in found.items()}


def bits_per_byte(model: nn.Module, tokenizer: Any, text: str) -> float:
    """Of a text, every token but the first after what stands before it."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    start = token_windows.start_tokens(tokenizer)
    nll = 0.0
    for at in range(0, len(ids), WINDOW):
        window = mx.array([[*start, *ids[max(0, at - BEFORE) : at + WINDOW]]])
        each: Any = nn.losses.cross_entropy(model(window[:, :-1]).astype(mx.float32), window[:, 1:])
        nll += each[0, -(min(WINDOW, len(ids) - at) - (at == 0)) :].sum().item()
    return nll / len(text.encode()) / math.log(2)


def weights(
    s: Settings, teacher: Checkpoint, tokenizer: Any, train: Windows, count: int
) -> dict[str, np.ndarray]:
    """(V,) how much each token is wanted, by the way of choosing."""
    of_model = train.pick(train.kind == list(preparation.TEXT_SHARES).index("written by a model"))
    counted = np.bincount(train.tokens.reshape(-1), minlength=count).astype(float)
    also = vocabulary.expected(
        teacher, comparison.spread_windows(train, vocabulary.VOCABULARY_WINDOWS)
    )
    more = vocabulary.expected(teacher, comparison.spread_windows(of_model, MORE_WINDOWS))
    place = 1 / (PLACES + np.arange(count))
    one, two, three, four = (each / each.sum() for each in (counted, also, more, place))
    ways = {"merge order": np.zeros(count), "counted": one, "expected": two, "both": one + two}
    ways |= {"written": one + three, "both, merge order": one + two + four}
    ways = {name: ways[name] for name in s.ways}
    if s.languages:
        ways["both, words"] = one + two
        for word, share in vocabulary.words(s.languages).items():
            np.add.at(
                ways["both, words"], tokenizer.encode(f" {word}", add_special_tokens=False), share
            )
    return ways


def table(rows: dict[str, dict[str, float]]) -> str:
    """Markdown: bits per byte of the whole, and how many % more."""
    names = list(rows.get(WHOLE, {}))
    body = []
    for way, row in rows.items():
        form = ".3f" if way == WHOLE else "+.1%"
        body.append([way, *(format(row[name], form) for name in names)])
    return markdown_table(["", *names], body)


def main(s: Settings) -> None:
    """All rows."""
    name = "vocabulary_choice" + f"-{s.teacher}" * bool(s.teacher)
    if s.table:
        print(table(stored(name)["rows"]))
        return
    teacher = compute_type.open_to_compute(resolve.resolve_model(s.teacher).path)
    tokenizer = load.tokenizer(teacher.path)
    train = preparation.prepare(None, tokenizer, 256).train
    model = load.resident_model(teacher, mx.float32)
    tokens, needed = vocabulary.needed(teacher.path)
    weight = model.model.embed_tokens.weight
    ways = weights(s, teacher, tokenizer=tokenizer, train=train, count=len(weight))
    with tempfile.TemporaryDirectory() as place:
        read = texts(s, Path(place))
    whole = {what: bits_per_byte(model, tokenizer, text) for what, text in read.items()}
    rows: dict[str, Any] = {WHOLE: whole}
    for size in (len(weight) // divisor for divisor in s.divisors):
        for way, counts in ways.items():
            kept = tokens.chosen(needed, counts, size)
            with tempfile.TemporaryDirectory() as place:
                for file, content in tokens.files(kept):
                    (Path(place) / file).write_bytes(content)
                own = load.tokenizer(Path(place))
            model.model.embed_tokens.weight = weight[mx.array(kept)]
            found = {
                what: bits_per_byte(model, own, text) / whole[what] - 1
                for what, text in read.items()
            }
            rows[f"{size:,} tokens, {way}"] = found
            cli.say(
                f"{size:,} {way:12} "
                + ", ".join(f"{what} {more:+.1%}" for what, more in found.items())
            )
    given = (
        f" --teacher {s.teacher}" * bool(s.teacher)
        + f" --divisors {' '.join(map(str, s.divisors))}"
    )
    given += f" --ways {' '.join(s.ways)}" * (s.ways != WAYS)
    write(
        name,
        "scripts/mis benchmarks/vocabulary_choice.py" + given,
        {"languages": s.languages, "rows": rows},
    )
    print(table(rows))


if __name__ == "__main__":
    start(Settings, main)
