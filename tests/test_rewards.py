"""Verifiable rewards: 273 cases labelled by hand, the parts they are made of, and the process they
run in.
"""

from __future__ import annotations

import json
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from mis_mlx.hardware import child_process
from mis_mlx.judge.tasks import answer_parsing, rewards
from mis_mlx.types import MisError

CASES = [
    json.loads(line)
    for line in (Path(__file__).parent / "fixtures" / "rewards.jsonl").read_text().splitlines()
]
# of right answers; the others are known, and left out for the sake of no false positive
RECALL = 0.93


def completion(case: dict[str, Any]) -> str:
    """The text; `fill` stands for what would make the file large."""
    text = str(case["completion"])
    if "fill" not in case:
        return text
    piece, times = case["fill"]
    return text.replace("{fill}", piece * times)


def test_no_wrong_answer_is_rewarded() -> None:
    """Not one of the 147 that a reader calls wrong; of the 126 right ones at least 93 % are seen.
    No pattern backtracks for seconds: all of it takes about 0.1 s of processor time.
    """
    began = time.process_time()
    scored = [(c, rewards.accuracy(completion(c), c["answer"], c["language"])) for c in CASES]
    assert len(CASES) >= 200
    assert {c["language"] for c in CASES} == {"pl", "en", None}
    assert sum(not c["right"] for c in CASES) >= 100
    assert [c["about"] for c, score in scored if score != 0.0 and not c["right"]] == []
    right = [score for c, score in scored if c["right"]]
    assert None not in right
    assert sum(right) / len(right) >= RECALL
    assert time.process_time() - began < 20


def test_the_format_counts_only_with_an_answer_that_reads() -> None:
    """Marked and of the right kind, if also wrong: yes. Unmarked, of another kind, two: no. Never
    as much as right.
    """
    for text in ("Answer: 7", "Answer: 5"):
        assert rewards.well_formed(text, "5", "en") == 1
    for text in ("7", "Answer: seven", "Answer: 5 or 7"):
        assert rewards.well_formed(text, "5", "en") == 0
    assert rewards.well_formed("Odpowiedź: 6:15", "450 g", "pl") == 0
    assert rewards.formatted(["q"], ["Answer: 7"], ["5"]) == [rewards.FORMAT_REWARD]
    assert 0 < rewards.FORMAT_REWARD <= 0.2


def test_an_answer_key_that_is_no_value_scores_nobody() -> None:
    """None, not 0: the data are at fault, not the answers."""
    assert rewards.accuracy("Answer: see figure 3", "see figure 3") is None
    found = rewards.correct(["q"] * 2, ["Answer: 5", "5"], ["5", "1,250"], ["en", None])
    assert found == [1.0, None]


NUMBERS: tuple[tuple[str, answer_parsing.Language | None, Fraction | None], ...] = (
    ("1 250,5", "pl", Fraction(2501, 2)),
    ("1,250", "pl", Fraction(5, 4)),
    ("1,250", "en", Fraction(1250)),
    ("1,250", None, None),
    ("1.250", "pl", None),
    ("2 1/2", None, Fraction(5, 2)),
    ("−3/4", None, Fraction(-3, 4)),
    *((text, None, None) for text in ("1/0", "9" * 31, "٣", "1_000", "0x10", "1e3", "inf")),
)


def test_numbers() -> None:
    """Exact, by the language's own comma, or none."""
    for text, language, value in NUMBERS:
        found = answer_parsing.quantity(text, language)
        assert (found and found.amount) == value, text


def test_units_by_pencil() -> None:
    """3 zł 5 gr are 305 gr, 1 h 1 s are 3601 s, 2 kg 5 dag are 2.05 kg; kinds do not mix, parts
    fall.
    """
    for text, amount, kind in (
        ("3 zł 5 gr", 305, "złoty"),
        ("1 h 1 s", 3601, "duration"),
        ("2 kg 5 dag", 2050000, "mass"),
    ):
        found = answer_parsing.quantity(text, "pl")
        assert found is not None
        assert (found.amount, found.kind) == (amount, kind)
    mixed = ("1 kg 5 ml", "5 dag 2 kg", "1,5 kg 5 dag", "2 kg -5 dag")
    for text in (*mixed, "5 g 5", "5 5 g", "g", ""):
        assert answer_parsing.quantity(text, "pl") is None, text


def functions(tmp_path: Path, source: str, **given: Any) -> tuple[rewards.Function, ...]:
    """The functions of a user's file with this source."""
    path = tmp_path / "mine.py"
    path.write_text(source)
    return rewards.functions(given.pop("names", None), str(path), **given)


ROWS = [
    {"prompt": "p", "answer": "5", "language": "en", "task": "sums"},
    {"prompt": "q", "answer": "7"},
]
GROUPS = [["Answer: 5", "Answer: 6"], ["Answer: 7", "7", ""]]


def test_ours_are_scored_in_a_child() -> None:
    """Right and in form 1.1, right 1, in form 0.1; the prompt's language is passed on."""
    found = rewards.score(rewards.functions(None, None), ROWS, GROUPS)
    assert [s.totals for s in found] == [(1.1, 0.1), (1.1, 1.0, 0.0)]


def test_the_users_functions(tmp_path: Path) -> None:
    """Called with lists; further columns by name; what they print is not their answer; None is no
    score.
    """
    source = (
        "def long(prompts, completions, answer):\n"
        "    print('hello')\n"
        "    return [len(c) for c in completions]\n"
        "def mine(completions, answer, task):\n"
        "    return [None if t is None else 1 for t in task]\n"
        "def _hidden():\n    pass\n"
    )
    found = rewards.score(functions(tmp_path, source), ROWS, GROUPS)
    assert [s.totals for s in found] == [(10.0, 10.0), (9.0, 1.0, 0.0)]
    assert found[1].parts == {"long": (9.0, 1.0, 0.0), "mine": (None, None, None)}
    both = functions(tmp_path, source, names="long,correct")
    assert [f.name for f in both] == ["long", "correct"]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("import os; os._exit(0)", "its process ended with 0"),
        ("raise ValueError('oh')", "ValueError: oh"),
        ("return [float('nan')] * len(completions)", "ValueError"),
    ],
)
def test_what_breaks_a_function_is_no_reward(tmp_path: Path, body: str, why: str) -> None:
    """Only the group with the text that broke it goes unscored, and the note says why. (What else a
    child may do: tests/faults/test_strangers.py.)
    """
    source = (
        f"def f(prompts, completions, answer):\n    if '6' in completions[1]:\n        {body}\n"
        "    return [1.0] * len(completions)\n"
    )
    found = rewards.score(functions(tmp_path, source), ROWS, GROUPS)
    assert [s.totals for s in found] == [(None, None), (1.0, 1.0, 1.0)]
    assert found[1].notes == ()
    (note,) = found[0].notes
    assert why in note


HUNGRY = """
import subprocess, sys
EAT = "import time; held = []\\nwhile True: held.append(bytearray(b'x') * 2**24); time.sleep(0.02)"
def itself():
    exec(EAT, {})
def another():
    subprocess.run([sys.executable, "-c", EAT])
"""


def test_memory_is_watched(tmp_path: Path) -> None:
    """By the watchdog on macOS, which also sees what a process has started, says both numbers, and
    limits time as ever.
    """
    (tmp_path / "f.py").write_text(HUNGRY)
    for name, memory_bytes, seconds, said in (
        ("another", 200 * 2**20, 60.0, "MemoryError.* 200 MiB"),
        ("itself", 2**40, 1.0, "1 s"),
    ):
        limits = {"seconds": seconds, "memory_bytes": memory_bytes, "watched": True}
        with pytest.raises(child_process.NoAnswer, match=said):
            child_process.ask(str(tmp_path / "f.py"), name, arguments={}, **limits)


@pytest.mark.parametrize(
    ("source", "names", "said"),
    [
        ("def f(prompts): return [0]\n", "nice", "nice.* correct, format"),
        ("def f(:\n", None, "mine.py"),
        ("x = 1\n", None, "0 functions"),
        ("def f(prompts, completions, answer):\n    return [1]\n", None, r"\bf .*5 numbers"),
    ],
)
def test_refusals(source: str, names: str | None, said: str, tmp_path: Path) -> None:
    """Unknown names, a file that is no Python or has no function, a list of the wrong length."""
    with pytest.raises(MisError, match=said):
        rewards.score(functions(tmp_path, source, names=names), ROWS, GROUPS)


def test_the_users_file_is_not_run_here(tmp_path: Path) -> None:
    """Its names are read from its text; it runs in the child alone."""
    mark = tmp_path / "mark"
    found = functions(
        tmp_path, f"open({str(mark)!r}, 'w')\ndef f(prompts, completions, answer): return [0]\n"
    )
    assert [f.name for f in found] == ["f"]
    assert not mark.exists()
