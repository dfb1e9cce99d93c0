"""Verifiable rewards, ours and the user's, each scored in a process that can be stopped.

A function that fails on a group of completions has scored none of it: the result is None, never a
number, so that a text that breaks a verifier is not rewarded. Ours ask whether a completion ends in
the right answer, in the form that the prompt asks for. A completion answers only by its last line,
"Answer: 450 g", "Odpowiedź: 450 g" or one with \\boxed{450 g}, or by being nothing but the answer.
It must give one value, not hedged, not denied, with no other answer anywhere before it. Anything
that cannot be read so is wrong.
"""

import ast
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

from mis_mlx.data.rows import Row
from mis_mlx.hardware import child_process
from mis_mlx.judge.tasks import answer_parsing
from mis_mlx.types import MisError

Texts = Sequence[str]
Languages = Sequence[answer_parsing.Language | None]
Values = list[float | None]  # of completions; None: it could not be scored
CHARACTERS = 20_000  # of a completion, at most; no answer to our tasks needs a tenth of it
FORMAT_REWARD = 0.1
# limits of our functions; the user's have none on memory
SECONDS = 10.0
MEMORY_BYTES = 2**30
_LABEL = re.compile(
    r"(?i)[\s>#*_-]{0,8}(?:odp\.(?=\s)|(?:(?:the |my )?(?:final )?answer(?: is)?|(?:ostateczna "
    r")?odpowiedź(?: to)?|"
    r"odp\.?|wynik|result)[*_]{0,2}\s?[:=])[*_]{0,2}(.*)"
)
_BOX = "\\boxed{"
_UNREADABLE = "?"
# words of doubt and bounds, Polish and English
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
    last = lines[-1]
    answer = _marked_answer(last)
    if answer is None:
        # A completion of one line may be the answer and nothing else.
        return last if len(lines) == 1 else None
    if not _agree(lines):
        return None
    lead = ""
    if _BOX in last:
        lead, _, _ = last.partition(_BOX)
    doubted = _DOUBT.search(lead) or _DOUBT.search(_line_before(lines)) or _BOUND.search(lead)
    return None if doubted else answer


def _agree(lines: Texts) -> bool:
    """Whether all lines that are marked as the answer give the same one."""
    answers = set[str]()
    for line in lines:
        answer = _marked_answer(line)
        if answer is not None:
            answers.add(re.sub(r"[\s*_$]", "", answer).rstrip("."))
    return len(answers) == 1


def _line_before(lines: Texts) -> str:
    """The line before the last, where the last one goes on with its sentence; else "".

    So that "None of these is right:" or "certainly not" counts, with the answer on the next line.
    """
    if len(lines) == 1:
        return ""
    line = lines[-2]
    ended = line.rstrip(" \t*_")[-1:] in (".", "!")
    return "" if ended else line


def _marked_answer(line: str) -> str | None:
    """The answer that a line gives: in its one box, with a unit behind it, or behind "Answer:".

    None where there is neither; _UNREADABLE where the box holds or has more than one value.
    """
    label = _LABEL.fullmatch(line)
    if _BOX not in line:
        return label[1].strip() if label else None
    start = line.index(_BOX)
    inside = start + len(_BOX)
    depth = 1
    end = inside
    while end < len(line) and depth:
        if line[end] == "{":
            depth += 1
        elif line[end] == "}":
            depth -= 1
        end += 1
    inner = line[inside : end - 1].strip()
    tail = line[end:].strip(" \t.$*_)]")
    digits_behind = any(character.isdigit() for character in tail)
    if depth or digits_behind or _BOX in inner or _BOX in tail:
        return _UNREADABLE
    lead = ""
    if label:
        lead = line[label.start(1) : start].strip(" \t$*_")
    return f"{lead} {inner} {tail}".strip()


# Many completions are compared with one answer of the data.
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
    text = answer_in(completion) or ""
    read = answer_parsing.value(text, language, right)
    return float(read is not None and answer_parsing.same(read, right))


def well_formed(
    completion: str, answer: str, language: answer_parsing.Language | None = None
) -> float:
    """1.0 when the last line is marked as an answer and reads as the same kind of value as
    `answer`, right or wrong; else 0.0.
    """
    last = completion[-CHARACTERS:].strip().splitlines()[-1:]
    text: str | None = None
    if last and _marked_answer(last[0]) is not None:
        text = answer_in(completion)
    read = answer_parsing.value(text or "", language, _right(answer, language))
    return float(read is not None)


def correct(prompts: Texts, completions: Texts, answer: Texts, language: Languages = ()) -> Values:
    """`accuracy` of every completion. A language other than Polish and English counts as not
    known.
    """
    languages = language or repeat(None)
    return list(map(accuracy, completions, answer, languages))


def formatted(
    prompts: Texts, completions: Texts, answer: Texts, language: Languages = ()
) -> Values:
    """`well_formed` of every completion, times 0.1: never worth more than being right."""
    languages = language or repeat(None)
    scores = map(well_formed, completions, answer, languages)
    return [FORMAT_REWARD * score for score in scores]


OURS = {"correct": correct.__name__, "format": formatted.__name__}


class Function(NamedTuple):
    """A reward: `f(prompts, completions, answer)`, and other columns of the data if it names them.

    source: a module's dotted name, or a path to a .py file. seconds: for one call.
    """

    name: str
    source: str
    function: str
    seconds: float = SECONDS


class Scores(NamedTuple):
    """The rewards of one group of completions.

    totals: of each completion, over all functions; None where no function could score it. parts:
    the same by function. notes: which functions failed, and why.
    """

    totals: tuple[float | None, ...]
    parts: Mapping[str, tuple[float | None, ...]]
    notes: tuple[str, ...]


def functions(
    names: str | None, file: str | None, seconds: float = SECONDS
) -> tuple[Function, ...]:
    """The functions of --reward-functions and --reward-functions-file; the file is read, not run.

    names None: all public functions of the file, or ours where there is no file. MisError names
    what is unknown.
    """
    theirs = _public(file) if file else []
    chosen = theirs or list(OURS)
    if names:
        chosen = [name.strip() for name in names.split(",")]
    unknown = [name for name in chosen if name not in theirs and name not in OURS]
    if unknown:
        known = ", ".join([*theirs, *OURS])
        raise MisError(
            f"--reward-functions names {unknown[0]}, which does not exist. Known functions: {known}"
        )
    rewards = []
    for name in chosen:
        if name in theirs:
            rewards.append(Function(name, str(file), name, seconds))
        else:
            rewards.append(Function(name, __name__, OURS[name]))
    return tuple(rewards)


def _public(file: str) -> list[str]:
    """The names of a Python file's public functions. MisError where there are none."""
    try:
        tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError) as error:
        raise MisError(
            f"--reward-functions-file {file} is not valid Python ({error}): fix it"
        ) from None
    names = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            names.append(node.name)
    if not names or not file.endswith(".py"):
        raise MisError(
            f"--reward-functions-file {file} has {len(names)} functions: give a .py file with at "
            f"least one"
        )
    return names


def unanswerable(functions: Sequence[Function], rows: Sequence[Row], where: Texts) -> list[str]:
    """Problems of rows whose right answer our functions, if they are asked for, could never find.

    where: each row's place, for people.
    """
    if all(function.source != __name__ for function in functions):
        return []
    problems = []
    for place, row in zip(where, rows, strict=True):
        answer = row["answer"]
        if _right(answer, row.get("language")) is None:
            problems.append(
                f"{place}: the answer {answer[:40]!r} is not a number, a time or names, so it "
                f"cannot be checked"
            )
    return problems


def score(
    functions: Sequence[Function], rows: Sequence[Row], groups: Sequence[Texts]
) -> list[Scores]:
    """Rewards of each row's group of completions.

    MisError where a function returns something other than a number or None for each completion.
    """
    by_name = {function.name: _values(function, rows, groups) for function in functions}
    scores = []
    for number in range(len(rows)):
        parts = dict[str, tuple[float | None, ...]]()
        notes = []
        for name, results in by_name.items():
            values, failure = results[number]
            parts[name] = tuple(values)
            if failure:
                notes.append(f"{name}: {failure}")
        totals = [_total(values) for values in zip(*parts.values(), strict=True)]
        scores.append(Scores(tuple(totals), parts, tuple(notes)))
    return scores


def _total(values: Sequence[float | None]) -> float | None:
    """The sum of the functions that could score a completion; None where none could."""
    scored = [value for value in values if value is not None]
    return sum(scored) if scored else None


def _values(
    function: Function, rows: Sequence[Row], groups: Sequence[Texts]
) -> list[tuple[Values, str]]:
    """(values, why there are none) of each group.

    One call for all groups; where that fails, one call for each, so that only the group that breaks
    the function goes without.
    """
    row_of = list[Row]()
    completions = list[str]()
    for row, group in zip(rows, groups, strict=True):
        row_of += [row] * len(group)
        completions += group
    arguments = dict[str, list[Any]]()
    for key in sorted(set().union(*rows) - {"prompt", "completion"}):
        arguments[key] = [row.get(key) for row in row_of]
    arguments["prompts"] = [row["prompt"] for row in row_of]
    arguments["completions"] = completions
    limit = MEMORY_BYTES if function.source == __name__ else 0
    try:
        values = child_process.ask(
            function.source, function.function, arguments, function.seconds, memory_bytes=limit
        )
    except child_process.NoAnswer as error:
        if len(rows) == 1:
            return [([None] * len(completions), str(error))]
        alone = list[tuple[Values, str]]()
        for row, group in zip(rows, groups, strict=True):
            alone += _values(function, [row], [group])
        return alone
    _check_returned(function, values, len(completions))
    numbers: Values = [None if value is None else float(value) for value in values]
    results = []
    start = 0
    for group in groups:
        end = start + len(group)
        results.append((numbers[start:end], ""))
        start = end
    return results


def _check_returned(function: Function, values: Any, count: int) -> None:
    """MisError where a function has not returned `count` numbers or None."""
    right = isinstance(values, list) and len(values) == count
    if not right or not all(isinstance(value, int | float | None) for value in values):
        owed = f"a list of {count} numbers or None"
        returned = str(values)[:60]
        raise MisError(
            f"the reward function {function.name} returned {returned}: it must return {owed}"
        )
