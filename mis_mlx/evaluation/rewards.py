"""Verifiable rewards, ours and the user's, each scored in a process that can be stopped.

A function that fails on a group of completions has scored none of it: None, never a number, so that
what breaks a verifier is not rewarded. Ours ask whether a completion ends in the right answer, in
the asked form: it answers only by its last line, "Answer: 450 g", "Odpowiedź: 450 g" or one with
\\boxed{450 g}, or by being nothing but the answer. It must be one value, not hedged, not denied,
with no other answer anywhere before it. What cannot be read so is wrong.
"""

import ast
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

from mis_mlx.data.rows import Row
from mis_mlx.evaluation import answer_parsing
from mis_mlx.hardware import child_process
from mis_mlx.types import MisError

CHARACTERS = 20_000  # of a completion; no answer to our tasks needs a tenth of it
FORMAT_REWARD = 0.1
# of ours; the user's functions have no limit on memory
SECONDS = 10.0
MEMORY_BYTES = 2**30
_LABEL = re.compile(
    r"(?i)[\s>#*_-]{0,8}(?:odp\.(?=\s)|(?:(?:the |my )?(?:final )?answer(?: is)?|(?:ostateczna "
    r")?odpowiedź(?: to)?|"
    r"odp\.?|wynik|result)[*_]{0,2}\s?[:=])[*_]{0,2}(.*)"
)
_BOX = "\\boxed{"
_UNREADABLE = "?"
# words, Polish and English
_HEDGES = json.loads((Path(__file__).parent / "hedges.json").read_text("utf-8"))
_DOUBT = re.compile(rf"(?i)\b(?:{'|'.join(_HEDGES['doubt'])})\b|n['’]t\b|[≠≈?]")
_BOUND = re.compile(
    rf"(?i)(?:\b(?:{'|'.join(_HEDGES['bound'])}|[0-9] to)|[<>~≤≥+*/·−–-]|[0-9][.,]?)[\s$]*$"
)


def answer_in(text: str) -> str | None:
    """The one answer that a completion ends in, as it is written there; None when there is none, or
    more than one.
    """
    if len(text) > CHARACTERS:
        return None
    lines = [line for line in text.strip().splitlines() if line.strip()]
    if not lines:
        return None
    said = _said(lines[-1])
    last = lines[-1]
    if said is None:
        return last if len(lines) == 1 else None
    answers = [answer for line in lines if (answer := _said(line)) is not None]
    if len({re.sub(r"[\s*_$]", "", answer).rstrip(".") for answer in answers}) != 1:
        return None
    lead = last.partition(_BOX)[0] if _BOX in last else ""
    # "None of these is right:" or "certainly not", and the answer on a line of its own.
    before = (
        lines[-2] if len(lines) > 1 and lines[-2].rstrip(" \t*_")[-1:] not in (".", "!") else ""
    )
    return None if _DOUBT.search(lead) or _DOUBT.search(before) or _BOUND.search(lead) else said


def _said(line: str) -> str | None:
    """What a line gives as an answer: in its one box, with a unit behind it, or behind "Answer:";
    None if nothing.
    """
    label = _LABEL.fullmatch(line)
    if _BOX not in line:
        return label[1].strip() if label else None
    start = line.index(_BOX)
    depth = 1
    at = start + len(_BOX)
    while at < len(line) and depth:
        depth += {"{": 1, "}": -1}.get(line[at], 0)
        at += 1
    inner = line[start + len(_BOX) : at - 1].strip()
    tail = line[at:].strip(" \t.$*_)]")
    if depth or _BOX in inner or any(c.isdigit() for c in tail) or _BOX in tail:
        return _UNREADABLE
    lead = line[label.start(1) : start].strip(" \t$*_") if label else ""
    return f"{lead} {inner} {tail}".strip()


# of an answer of the data, which many completions are compared with
_right = cache(answer_parsing.value)


def accuracy(
    completion: str, answer: str, language: answer_parsing.Language | None = None
) -> float | None:
    """1.0 when the completion's answer is `answer`, exactly; else 0.0. None when `answer` itself is
    no value.
    """
    right = _right(answer, language)
    if right is None:
        return None
    read = answer_parsing.value(answer_in(completion) or "", language, right)
    return float(read is not None and answer_parsing.same(read, right))


def well_formed(
    completion: str, answer: str, language: answer_parsing.Language | None = None
) -> float:
    """1.0 when the last line is marked as the answer and reads as the kind of value that `answer`
    is, if also wrong.
    """
    last = completion[-CHARACTERS:].strip().splitlines()[-1:]
    said = answer_in(completion) if last and _said(last[0]) is not None else None
    return float(answer_parsing.value(said or "", language, _right(answer, language)) is not None)


Texts = Sequence[str]
Languages = Sequence[answer_parsing.Language | None]
Values = list[float | None]  # of completions; None: it could not be scored


def correct(prompts: Texts, completions: Texts, answer: Texts, language: Languages = ()) -> Values:
    """`accuracy` of every completion; another language than Polish and English counts as not
    known.
    """
    return list(map(accuracy, completions, answer, language or repeat(None)))


def formatted(
    prompts: Texts, completions: Texts, answer: Texts, language: Languages = ()
) -> Values:
    """`well_formed` of every completion, times 0.1: never worth more than being right."""
    return [
        FORMAT_REWARD * score
        for score in map(well_formed, completions, answer, language or repeat(None))
    ]


OURS = {"correct": correct.__name__, "format": formatted.__name__}


class Function(NamedTuple):
    """A reward: `f(prompts, completions, answer)`, and other columns of the data if it names
    them.
    """

    name: str
    source: str
    function: str
    seconds: float = SECONDS


class Scores(NamedTuple):
    """Of one group: total reward and parts of every completion, None where no function could score;
    what failed.
    """

    totals: tuple[float | None, ...]
    parts: Mapping[str, tuple[float | None, ...]]
    notes: tuple[str, ...]


def functions(
    names: str | None, file: str | None, seconds: float = SECONDS
) -> tuple[Function, ...]:
    """What --reward-functions and --reward-functions-file ask for; the file is read, not run. names
    None: all public functions of the file, or ours where there is none. MisError names what is
    unknown.
    """
    theirs = _public(file) if file else []
    chosen = [n.strip() for n in names.split(",")] if names else theirs or list(OURS)
    if unknown := [name for name in chosen if name not in theirs and name not in OURS]:
        known = ", ".join([*theirs, *OURS])
        raise MisError(
            f"--reward-functions names {unknown[0]}, which is not there: known are {known}"
        )
    theirs_or_ours = (
        (n, str(file), n, seconds) if n in theirs else (n, __name__, OURS[n]) for n in chosen
    )
    return tuple(Function(*given) for given in theirs_or_ours)


def _public(file: str) -> list[str]:
    try:
        tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError) as error:
        raise MisError(
            f"--reward-functions-file {file} does not read as Python ({error}): fix it"
        ) from None
    found = [
        n.name for n in tree.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")
    ]
    if not found or not file.endswith(".py"):
        raise MisError(
            f"--reward-functions-file {file} has {len(found)} functions: give a .py file with at "
            f"least one"
        )
    return found


def unanswerable(functions: Sequence[Function], rows: Sequence[Row], where: Texts) -> list[str]:
    """What is wrong with rows whose right answer our functions, if they are asked for, could never
    find.
    """
    if all(f.source != __name__ for f in functions):
        return []
    every = ((at, row["answer"], row.get("language")) for at, row in zip(where, rows, strict=True))
    lost = [(at, answer[:40]) for at, answer, language in every if _right(answer, language) is None]
    return [
        f"{at}: the answer {said!r} is no number, time or names that could be checked"
        for at, said in lost
    ]


def score(
    functions: Sequence[Function], rows: Sequence[Row], groups: Sequence[Texts]
) -> list[Scores]:
    """Rewards of each row's group of completions. MisError where a function returns something else
    than it owes.
    """
    by_name = {f.name: _values(f, rows, groups) for f in functions}
    scores = []
    for n in range(len(rows)):
        parts = {name: tuple(each[n][0]) for name, each in by_name.items()}
        scored = [
            [v for v in values if v is not None] for values in zip(*parts.values(), strict=True)
        ]
        notes = tuple(f"{name}: {each[n][1]}" for name, each in by_name.items() if each[n][1])
        scores.append(
            Scores(tuple(sum(values) if values else None for values in scored), parts, notes)
        )
    return scores


def _values(f: Function, rows: Sequence[Row], groups: Sequence[Texts]) -> list[tuple[Values, str]]:
    """(values, why there are none) of each group: asked about all at once; where that fails, about
    each alone.
    """
    each = [(row, text) for row, group in zip(rows, groups, strict=True) for text in group]
    keys = sorted(set().union(*rows) - {"prompt", "completion"})
    arguments = {key: [row.get(key) for row, _ in each] for key in keys}
    arguments |= {
        "prompts": [row["prompt"] for row, _ in each],
        "completions": [text for _, text in each],
    }
    limit = MEMORY_BYTES if f.source == __name__ else 0
    try:
        values = child_process.ask(f.source, f.function, arguments, f.seconds, limit)
    except child_process.NoAnswer as error:
        if len(rows) == 1:
            return [([None] * len(each), str(error))]
        return [_values(f, [row], [group])[0] for row, group in zip(rows, groups, strict=True)]
    numbers = isinstance(values, list) and all(isinstance(v, int | float | None) for v in values)
    if not numbers or len(values) != len(each):
        owed = f"a list of {len(each)} numbers or None"
        raise MisError(f"the reward function {f.name} returned {str(values)[:60]}: it owes {owed}")
    flat = iter(None if v is None else float(v) for v in values)
    return [([next(flat) for _ in group], "") for group in groups]
