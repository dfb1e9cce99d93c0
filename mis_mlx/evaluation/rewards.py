"""Verifiable rewards: does a completion end in the right answer, said once and in the asked format?

Pure functions of text; the caller runs them where they may be stopped (hardware/child_process). A completion answers
only by its last line, "Answer: 450 g", "Odpowiedź: 450 g" or one with \\boxed{450 g}, or by being nothing but the
answer. It must be one value, not hedged, not denied, and no other answer may stand anywhere before it. What cannot be
read so is wrong, whatever it may have meant.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

from mis_mlx.evaluation import answer_parsing
from mis_mlx.evaluation.answer_parsing import Language

CHARACTERS = 20_000  # of a completion; no answer to our tasks needs a tenth of it
FORMAT_REWARD = 0.1
_LABEL = re.compile(
    r"[\s>#*_-]{0,8}(?:odp\.(?=\s)|(?:(?:the |my )?(?:final )?answer(?: is)?|(?:ostateczna )?odpowiedź(?: to)?|odp\.?|"
    r"wynik|result)[*_]{0,2}\s?[:=])[*_]{0,2}(.*)",
    re.I,
)
_BOX = "\\boxed{"
_UNREADABLE = "?"
_DOUBT = re.compile(
    r"\b(?:nie|not|never|nigdy|ani|nor|or|either|albo|lub|czy|może|maybe|perhaps|probably|chyba|około|about|"
    r"approximately|roughly|almost|prawie|between|między|wrong|false|incorrect|błędn\w*|zła|złe|fałsz\w*|unless|except|"
    r"oprócz|guess|zgaduję|none|żaden|żadna|żadne)\b|n['’]t\b|[≠≈?]",
    re.I,
)
_BOUND = re.compile(
    r"(?:\b(?:less|more|mniej|więcej|niż|than|under|over|above|below|least|most|poniżej|powyżej|najmniej|najwyżej|do|"
    r"od|from|minus|[0-9] to)|[<>~≤≥+*/·−–-]|[0-9][.,]?)[\s$]*$",
    re.I,
)


def answer_in(text: str) -> str | None:
    """The one answer that a completion ends in, as it is written there; None when there is none, or more than one."""
    if len(text) > CHARACTERS:
        return None
    lines = [line for line in text.strip().splitlines() if line.strip()]
    if not lines:
        return None
    said, last = _said(lines[-1]), lines[-1]
    if said is None:
        return last if len(lines) == 1 else None
    if len({_bare(a) for line in lines if (a := _said(line)) is not None}) != 1:
        return None
    lead = last.partition(_BOX)[0] if _BOX in last else ""
    # "None of these is right:" or "certainly not", and the answer on a line of its own.
    before = lines[-2] if len(lines) > 1 and lines[-2].rstrip(" \t*_")[-1:] not in (".", "!") else ""
    return None if _DOUBT.search(lead) or _DOUBT.search(before) or _BOUND.search(lead) else said


def marked(text: str) -> bool:
    """Whether the last line says that it is the answer."""
    lines = text[-CHARACTERS:].strip().splitlines()
    return bool(lines) and _said(lines[-1]) is not None


def _said(line: str) -> str | None:
    """What a line gives as an answer: in its one box, with a unit behind it, or behind "Answer:"; None if nothing."""
    label = _LABEL.fullmatch(line)
    if _BOX not in line:
        return label[1].strip() if label else None
    start = line.index(_BOX)
    depth, at = 1, start + len(_BOX)
    while at < len(line) and depth:
        depth += {"{": 1, "}": -1}.get(line[at], 0)
        at += 1
    inner, tail = line[start + len(_BOX) : at - 1].strip(), line[at:].strip(" \t.$*_)]")
    if depth or _BOX in inner or any(c.isdigit() for c in tail) or _BOX in tail:
        return _UNREADABLE
    lead = line[label.start(1) : start].strip(" \t$*_") if label else ""
    return f"{lead} {inner} {tail}".strip()


def _bare(answer: str) -> str:
    return re.sub(r"[\s*_$]", "", answer).rstrip(".")


@cache
def _right(answer: str, language: Language | None) -> answer_parsing.Value | None:
    return answer_parsing.value(answer, language)


def accuracy(completion: str, answer: str, language: Language | None = None) -> float | None:
    """1.0 when the completion's answer is `answer`, exactly; else 0.0. None when `answer` itself is no value."""
    right = _right(answer, language)
    if right is None:
        return None
    read = answer_parsing.value(answer_in(completion) or "", language, right)
    return float(read is not None and answer_parsing.same(read, right))


def well_formed(completion: str, answer: str, language: Language | None = None) -> float | None:
    """1.0 when the last line is marked as the answer and reads as the kind of value that `answer` is, if also wrong."""
    right = _right(answer, language)
    if right is None:
        return None
    said = answer_in(completion) if marked(completion) else None
    return float(answer_parsing.value(said or "", language, right) is not None)


Languages = Sequence[Language | None]


def correct(
    prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], language: Languages = ()
) -> list[float | None]:
    """`accuracy` of every completion. language: other ones than these two count as not known."""
    known = [tongue if tongue in ("pl", "en") else None for tongue in language or [None] * len(completions)]
    return [accuracy(*each) for each in zip(completions, answer, known, strict=True)]


def formatted(
    prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], language: Languages = ()
) -> list[float | None]:
    """`well_formed` of every completion, times 0.1: never worth more than being right."""
    known = [tongue if tongue in ("pl", "en") else None for tongue in language or [None] * len(completions)]
    scores = [well_formed(*each) for each in zip(completions, answer, known, strict=True)]
    return [None if s is None else FORMAT_REWARD * s for s in scores]


FUNCTIONS = {"correct": correct, "format": formatted}
