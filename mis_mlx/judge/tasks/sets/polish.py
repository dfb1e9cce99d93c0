"""Polish questions that others made: dialects, exams, words, proverbs, sums.

Seven dialects and regional languages have a slot each: a folder with pairs.jsonl, rows
{"polish", "dialect"}, the same sentence in both, attested, not made up. The Silesian slot has
Firefox's translations (MPL-2.0, sets/silesian); six wait for text that the user brings.
The other four sets are in the wheel of OpenAI's `evals`, known to the byte.
"""

import json
import random
import re
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
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
EVALS = "evals"
VERSION = "3.0.1.post1"
# name, version, bytes, sha256
WHEEL = (
    EVALS,
    VERSION,
    46_322_659,
    "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
)
MEMBER = "evals/registry/data/{}/samples.jsonl"
Asked = list[tuple[str, str]]  # (question, right answer)


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


def exams_in(wheel: Path) -> dict[str, list[rows.Row]]:
    """The rows of the four sets' questions, by file; those that are no questions are left out."""
    files = {}
    with zipfile.ZipFile(wheel) as archive:
        for name, (member, convert) in SETS.items():
            text = archive.read(MEMBER.format(member)).decode()
            pairs = []
            for line in text.splitlines():
                sample = json.loads(line)
                question = sample["input"][-1]["content"].strip()
                pairs.append((question, sample["ideal"].strip()))
            asked = []
            for row in convert(pairs):
                if questions.fault(row) is None:
                    asked.append({**row, "language": "pl"})
            files[f"{name}.jsonl"] = asked
    return files


def exam(name: str, folder: Path) -> questions.Task:
    """One of the four sets, from the folder that holds the files of `exams_in`."""
    task = questions.file(folder / f"{name}.jsonl")
    about = f"{EVALS} {VERSION}: {ABOUT['polish'][name]}"
    per_character = name in ("polish-exams", "polish-lexicon")
    return replace(task, about=about, per_character=per_character)


def _exams(pairs: Asked) -> Iterable[dict]:
    """Questions with four options, taken out of the prompts that list them."""
    for text, key in pairs:
        match = re.fullmatch(
            r"(.*)\nA\. (.*)\nB\. (.*)\nC\. (.*)\nD\. (.*)\nAnswer:", text, re.DOTALL
        )
        letter = re.fullmatch(r"\[([A-D])\]", key)
        if match and letter:
            question, *options = (part.strip() for part in match.groups())
            yield {
                "question": question,
                "options": options,
                "answer": options["ABCD".index(letter[1])],
            }


def _lexicon(pairs: Asked) -> Iterable[dict]:
    """Which of two is a word? The made-up one stands right before the word it was made from."""
    for (first, first_key), (second, second_key) in zip(pairs[::2], pairs[1::2], strict=True):
        if {first_key, second_key} == {"Y", "N"}:
            yield {
                "question": "",
                "options": sorted([first, second]),
                "answer": first if first_key == "Y" else second,
            }


def _among_others(pairs: Asked, question: str) -> Iterable[dict]:
    """Each answer among those to other questions. question: a cloze with a place for the text."""
    answers = sorted({answer for _, answer in pairs})
    for number, (text, answer) in enumerate(pairs):
        cloze = question.format(text)
        yield questions.cloze_row(f"others-{number}", cloze, answer, answers)


# {set: (its folder in the wheel, what makes rows of its samples)}
SETS: dict[str, tuple[str, Callable[[Asked], Iterable[dict]]]] = {
    "polish-exams": ("polish-exams-qa", _exams),
    "polish-lexicon": ("polish-lexicon", _lexicon),
    "polish-proverbs": (
        "polish-proverbs",
        partial(_among_others, question=f"{{}} {questions.BLANK}"),
    ),
    "polish-sums": ("math_polish", partial(_among_others, question=f"{{}} to {questions.BLANK}")),
}
