"""Dialects of Polish, and regional languages beside it.

Seven dialects and regional languages have a slot each: a folder with pairs.jsonl, rows
{"polish", "dialect"}, the same sentence in both, attested, not made up. The Silesian slot has
Firefox's translations (MPL-2.0, sets/silesian); six wait for text that the user brings.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mis_mlx.data import rows
from mis_mlx.judge.tasks import questions
from mis_mlx.types import MisError

ABOUT = json.loads((Path(__file__).parent / "about.json").read_text("utf-8"))
# {slot: [its name after "po" (adverb-like), its name as a language (locative)]}, in Polish
SLOTS: dict[str, list[str]] = ABOUT["slots"]
PAIRS = "pairs.jsonl"
ROW = 'one {"polish": ..., "dialect": ...} a line'


def read_pairs(slot: str, folder: Path) -> list[rows.Row]:
    """The rows of a slot. MisError says what to bring where it is empty, and lists bad rows."""
    path = folder / PAIRS
    if not path.is_file():
        raise MisError(f"the slot {slot} is empty: put attested pairs into {path}, {ROW}")
    good, problems = rows.judged(rows.parsed(path), f"{path.name} line", _fault)
    rows.refuse(problems)
    if not good:
        raise MisError(f"{path} is empty: put attested pairs there, {ROW}")
    return [row for row, _ in good]


def _fault(row: Any) -> str | None:
    """Why a row is no pair; None where it is one."""
    reason = rows.fault(row, {"pair": ("polish", "dialect")})
    if reason:
        return reason
    if row["polish"].strip() == row["dialect"].strip():
        return "both sentences are the same"
    return None


def dialect(
    slot: str,
    pairs: Sequence[rows.Row],
    origin: str,
) -> list[questions.Task]:
    """Two tasks: is a text Polish or dialect (half of each), and which of two is in the dialect?"""
    adverb, language = SLOTS[slot]
    labels = []
    texts = []
    for number, row in enumerate(pairs):
        if number % 2:
            shown = row["polish"]
            label = "polskim"
        else:
            shown = row["dialect"]
            label = language
        label_row = {
            "text": f"Tekst: {shown}\nTo jest tekst w języku {questions.BLANK}",
            "options": ["polskim", language],
            "answer": label,
        }
        labels.append(label_row)
        rng = random.Random(f"{slot}-{number}")
        text_row = {
            "text": f"To samo {adverb}: {questions.BLANK}",
            "options": questions.drawn_items(rng, (row["polish"], row["dialect"]), 2),
            "answer": row["dialect"],
        }
        texts.append(text_row)
    about = f"{len(pairs)} pairs, {origin}"
    about_labels = f"{about}; Polish or {slot}: which one is a text in"
    about_texts = f"{about}; the {slot} one of two sentences"
    return [
        questions.task(f"{slot}-label", labels, about_labels),
        questions.task(f"{slot}-text", texts, about_texts, per_character=True),
    ]
