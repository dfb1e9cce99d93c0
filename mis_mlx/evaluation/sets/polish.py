"""Polish questions that others made: seven dialects and regional languages beside Polish, exams,
words, proverbs, sums.

A dialect's slot is a folder with pairs.jsonl, rows {"polish", "dialect"}: the same said in both,
attested, not made up. Only the Silesian one can be filled from here, by Firefox's translations
(MPL-2.0); six wait for text that somebody brings. The other four sets are in the wheel of OpenAI's
`evals`, known to the byte.
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
from mis_mlx.evaluation import questions
from mis_mlx.types import MisError

ABOUT = json.loads((Path(__file__).parent / "about.json").read_text("utf-8"))
# Slot: what it is called after "po" (adverb-like), and as a language (locative), in Polish.
SLOTS: dict[str, list[str]] = ABOUT["slots"]
PAIRS = "pairs.jsonl"
ROW = 'one {"polish": ..., "dialect": ...} a line'
PACKS = ("langpack-pl", "langpack-szl")  # how the names of Firefox's language packs begin
PACKAGES = ("firefox-esr-l10n-pl", "firefox-esr-l10n-szl")  # of Debian, which hold one each
LEAST_WORDS = 4
_PROPERTY = re.compile(r"^(?!#)[ \t]*([^=\n]*?)[ \t]*=[ \t]*(.*?)[ \t\r]*$", re.M)
_TERM = re.compile(r"(-?[\w-]+)\s*=\s*(.*)")
_ATTRIBUTE = re.compile(r"\s+\.([\w-]+)\s*=\s*(.*)")
EVALS = "evals"
VERSION = "3.0.1.post1"
# bytes, sha256
WHEEL = (
    EVALS,
    VERSION,
    46_322_659,
    "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
)
MEMBER = "evals/registry/data/{}/samples.jsonl"
Asked = list[tuple[str, str]]  # (question, right answer)


def read_pairs(slot: str, folder: Path) -> list[rows.Row]:
    """The rows of a slot. MisError says what to bring where it is empty, and which rows are
    none.
    """
    path = folder / PAIRS
    if not path.is_file():
        raise MisError(f"the slot {slot} is empty: put attested pairs into {path}, {ROW}")
    good, problems = rows.judged(rows.parsed(path), f"{path.name} line", _fault)
    rows.refuse(problems)
    if not good:
        raise MisError(f"{path} is empty: put attested pairs there, {ROW}")
    return [row for row, _ in good]


def _fault(row: Any) -> str | None:
    if why := rows.fault(row, {"pair": ("polish", "dialect")}):
        return why
    return (
        "both sentences are the same" if row["polish"].strip() == row["dialect"].strip() else None
    )


def dialect(slot: str, pairs: Sequence[rows.Row], origin: str) -> list[questions.Task]:
    """Two tasks: whether a text is Polish or dialect, half of each; and which of two texts is in
    the dialect.
    """
    adverb, language = SLOTS[slot]
    labels = []
    texts = []
    for number, row in enumerate(pairs):
        polish = row["polish"]
        dialect = row["dialect"]
        shown, label = (polish, "polskim") if number % 2 else (dialect, language)
        text = f"Tekst: {shown}\nTo jest tekst w języku {questions.BLANK}"
        labels.append({"text": text, "options": ["polskim", language], "answer": label})
        both = questions.some(random.Random(f"{slot}-{number}"), (polish, dialect), 2)
        texts.append(
            {"text": f"To samo {adverb}: {questions.BLANK}", "options": both, "answer": dialect}
        )
    about = f"{len(pairs)} pairs, {origin}"
    return [
        questions.task(
            f"{slot}-label", labels, f"{about}; Polish or {slot}: which one is a text in"
        ),
        questions.task(
            f"{slot}-text", texts, f"{about}; the {slot} one of two sentences", per_character=True
        ),
    ]


def from_firefox(folder: Path) -> list[rows.Row]:
    """Rows of what Firefox's two language packs in a folder, Polish and Silesian, have under one
    name. Left out: fewer than four words, the same in both, no letter that English lacks (never
    translated), cases to choose from.
    """
    polish, silesian = (_messages(folder, start) for start in PACKS)
    pairs = dict[str, str]()
    for key, raw in silesian.items():
        one = _plain(polish.get(key, ""))
        other = _plain(raw)
        translated = any(c.isalpha() and not c.isascii() for c in other)
        if one and len(other.split()) >= LEAST_WORDS and one != other and translated:
            pairs.setdefault(other, one)
    return [{"polish": one, "dialect": other} for other, one in pairs.items()]


def _messages(folder: Path, start: str) -> dict[tuple[str, str], str]:
    """{(file, key): message} of all Fluent and properties files of the language pack whose name
    begins so.
    """
    messages = dict[tuple[str, str], str]()
    packs = sorted(folder.rglob(f"{start}*.xpi"))
    if not packs:
        raise MisError(
            f"{folder} has no {start}*.xpi: put Firefox's language packs for pl and szl there"
        )
    with zipfile.ZipFile(packs[0]) as archive:
        for name in archive.namelist():
            if name.endswith((".properties", ".ftl")):
                text = archive.read(name).decode()
                place = re.sub(r"\b(pl|szl)/", "", name)
                pairs = _fluent(text).items() if name.endswith(".ftl") else _PROPERTY.findall(text)
                messages |= {(place, key): value for key, value in pairs}
    return messages


def _fluent(text: str) -> dict[str, str]:
    """{term or term.attribute: message} of a Fluent file; lines that go on are joined."""
    messages = dict[str, str]()
    term = ""
    for line in re.sub(r"\n +(?!\.[\w-]+\s*=)(?=\S)", " ", text).splitlines():
        if match := _TERM.match(line):
            term = match[1]
            messages[term] = match[2]
        elif term and (match := _ATTRIBUTE.match(line)):
            messages[f"{term}.{match[1]}"] = match[2]
        else:
            term = ""
    return messages


def _plain(message: str) -> str:
    """A message without marks and places to fill; empty where it has cases to choose from."""
    if "->" in message or "*[" in message:
        return ""
    message = re.sub(r"\{\s*-brand[^}]*\}", "Firefox", re.sub(r"<[^>]+>", "", message))
    return " ".join(re.sub(r"\{+[^}]*\}+|%\d?\$?S", "X", message).split())


def exams_in(wheel: Path) -> dict[str, list[rows.Row]]:
    """The rows of the four sets' questions, by file."""
    files = {}
    with zipfile.ZipFile(wheel) as archive:
        for name, (member, convert) in SETS.items():
            samples = [
                json.loads(line)
                for line in archive.read(MEMBER.format(member)).decode().splitlines()
            ]
            pairs = [(row["input"][-1]["content"].strip(), row["ideal"].strip()) for row in samples]
            asked = (row for row in convert(pairs) if questions.fault(row) is None)
            files[f"{name}.jsonl"] = [{**row, "language": "pl"} for row in asked]
    return files


def exam(name: str, folder: Path) -> questions.Task:
    """One of the four sets that `unpack` wrote."""
    by_character = name in ("polish-exams", "polish-lexicon")
    about = f"{EVALS} {VERSION}: {ABOUT['polish'][name]}"
    return replace(
        questions.file(folder / f"{name}.jsonl"), about=about, per_character=by_character
    )


def _exams(pairs: Asked) -> Iterable[dict]:
    for text, key in pairs:
        match = re.fullmatch(
            r"(.*)\nA\. (.*)\nB\. (.*)\nC\. (.*)\nD\. (.*)\nAnswer:", text, re.DOTALL
        )
        letter = re.fullmatch(r"\[([A-D])\]", key)
        if match and letter:
            options = [option.strip() for option in match.groups()[1:]]
            yield {
                "question": match[1].strip(),
                "options": options,
                "answer": options["ABCD".index(letter[1])],
            }


def _lexicon(pairs: Asked) -> Iterable[dict]:
    """The made-up word comes right before the word it was made from."""
    for (one, key), (other, other_key) in zip(pairs[::2], pairs[1::2], strict=True):
        if {key, other_key} == {"Y", "N"}:
            yield {
                "question": "",
                "options": sorted([one, other]),
                "answer": one if key == "Y" else other,
            }


def _among_others(pairs: Asked, question: str) -> Iterable[dict]:
    answers = sorted({answer for _, answer in pairs})
    for number, (text, answer) in enumerate(pairs):
        yield questions.among_others(f"others-{number}", question.format(text), answer, answers)


SETS: dict[str, tuple[str, Callable[[Asked], Iterable[dict]]]] = {
    "polish-exams": ("polish-exams-qa", _exams),
    "polish-lexicon": ("polish-lexicon", _lexicon),
    "polish-proverbs": (
        "polish-proverbs",
        partial(_among_others, question=f"{{}} {questions.BLANK}"),
    ),
    "polish-sums": ("math_polish", partial(_among_others, question=f"{{}} to {questions.BLANK}")),
}
