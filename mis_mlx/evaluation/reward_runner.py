"""Score completions by verifiable rewards, ours and the user's, each in a process that can be stopped.

A function that fails on a group of them has scored none of it: None, never a number, so that what breaks a verifier is
not rewarded.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mis_mlx.evaluation import rewards
from mis_mlx.hardware import child_process
from mis_mlx.types import MisError

SECONDS, MEMORY_BYTES = 10.0, 2**30  # of ours; the user's functions have no limit on memory
OURS = {name: function.__name__ for name, function in rewards.FUNCTIONS.items()}


@dataclass(frozen=True)
class Function:
    """A reward: `f(prompts, completions, answer)`, and other columns of the data if it names them."""

    name: str
    source: str
    function: str
    seconds: float = SECONDS


@dataclass(frozen=True)
class Scores:
    """Of one group: total reward and parts of every completion, None where no function could score; what failed."""

    totals: tuple[float | None, ...]
    parts: Mapping[str, tuple[float | None, ...]]
    notes: tuple[str, ...]


def functions(names: str | None, file: str | None, seconds: float = SECONDS) -> tuple[Function, ...]:
    """What --reward-functions and --reward-functions-file ask for; the file is read, not run.

    names None: all public functions of the file, or ours where there is none. MisError names what is unknown.
    """
    theirs = _public(file) if file else []
    chosen = [n.strip() for n in names.split(",")] if names else theirs or list(OURS)
    if unknown := [name for name in chosen if name not in theirs and name not in OURS]:
        known = ", ".join([*theirs, *OURS])
        raise MisError(f"--reward-functions names {unknown[0]}, which is not there: known are {known}")
    return tuple(
        Function(name, str(file), name, seconds) if name in theirs else Function(name, rewards.__name__, OURS[name])
        for name in chosen
    )


def _public(file: str) -> list[str]:
    try:
        tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError) as error:
        raise MisError(f"--reward-functions-file {file} does not read as Python ({error}): fix it") from None
    found = [n.name for n in tree.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")]
    if not found or not file.endswith(".py"):
        raise MisError(f"--reward-functions-file {file} has {len(found)} functions: give a .py file with at least one")
    return found


def unanswerable(functions: Sequence[Function], rows: Sequence[Mapping[str, Any]], where: Sequence[str]) -> list[str]:
    """What is wrong with rows whose right answer our functions, if they are asked for, could never find."""
    if all(f.source != rewards.__name__ for f in functions):
        return []
    answers, languages = [row["answer"] for row in rows], [row.get("language") for row in rows]
    known = rewards.correct(answers, [""] * len(rows), answers, languages)
    return [
        f"{at}: the answer {answer[:40]!r} is no number, time or names that could be checked"
        for at, answer, score in zip(where, answers, known, strict=True)
        if score is None
    ]


def score(
    functions: Sequence[Function], rows: Sequence[Mapping[str, Any]], groups: Sequence[Sequence[str]]
) -> list[Scores]:
    """Rewards of each row's group of completions. MisError where a function returns something else than it owes."""
    by_name = {f.name: _values(f, rows, groups) for f in functions}
    scores = []
    for n in range(len(rows)):
        parts = {name: tuple(each[n][0]) for name, each in by_name.items()}
        totals = []
        for values in zip(*parts.values(), strict=True):
            scored = [v for v in values if v is not None]
            totals.append(sum(scored) if scored else None)
        notes = tuple(f"{name}: {each[n][1]}" for name, each in by_name.items() if each[n][1])
        scores.append(Scores(tuple(totals), parts, notes))
    return scores


def _values(
    f: Function, rows: Sequence[Mapping[str, Any]], groups: Sequence[Sequence[str]]
) -> list[tuple[list[float | None], str]]:
    """(values, why there are none) of each group: asked about all at once; where that fails, about each alone."""
    try:
        flat = iter(_asked(f, rows, groups))
    except child_process.NoAnswer as error:
        if len(rows) == 1:
            return [([None] * len(groups[0]), str(error))]
        return [_values(f, [row], [group])[0] for row, group in zip(rows, groups, strict=True)]
    return [([next(flat) for _ in group], "") for group in groups]


def _asked(f: Function, rows: Sequence[Mapping[str, Any]], groups: Sequence[Sequence[str]]) -> list[float | None]:
    """One call of a function about all completions of these rows."""
    each = [(row, text) for row, group in zip(rows, groups, strict=True) for text in group]
    keys = {key for row in rows for key in row} - {"prompt", "completion"}
    arguments = {key: [row.get(key) for row, _ in each] for key in sorted(keys)}
    arguments |= {"prompts": [row["prompt"] for row, _ in each], "completions": [text for _, text in each]}
    limit = MEMORY_BYTES if f.source == rewards.__name__ else 0
    values = child_process.ask(f.source, f.function, arguments, f.seconds, limit)
    if isinstance(values, list) and len(values) == len(each) and all(isinstance(v, int | float | None) for v in values):
        return [None if v is None else float(v) for v in values]
    owed = f"a list of {len(each)} numbers or None"
    raise MisError(f"the reward function {f.name} returned {str(values)[:60]}: it owes {owed}")
