"""The recovery table: shares and intervals by hand, and sentences that say what the numbers can
bear.
"""

from __future__ import annotations

import re

import numpy as np
import pytest

from mis_mlx.judge.recovery_table import Outcome, markdown
from mis_mlx.maths.stats import interval, recovery

N = 100


def outcome(task: str = "sums", chance: float = 0.5, **right: int) -> Outcome:
    """A task of 100 questions, the first `right` of which each model answers."""
    marks = {name: (np.arange(N) < count).astype(float) for name, count in right.items()}
    return Outcome(
        task=task,
        about="made for a test",
        marks=marks,
        chance=np.full(N, chance),
        constant=(0.5, "option 1"),
        sha256="0" * 64,
    )


def test_recovery_by_hand() -> None:
    """(70 % - 50 %) / (90 % - 50 %) is a half; the teacher recovers all of itself, exactly and in
    every draw.
    """
    o = outcome(teacher=90, student=70)
    value, low, high = recovery(o.marks["student"], o.teacher, o.chance)
    assert value == pytest.approx(0.5)
    assert 0.2 < low < 0.5 < high < 0.8
    assert o.recovered("teacher") == (1.0, 1.0, 1.0)


def test_the_page_says_how_models_were_asked() -> None:
    """In one way, or each in its own; the marks of both stand in one table."""
    o = outcome(teacher=90, student=70)
    same = o._replace(ways={"teacher": "as plain text", "student": "as plain text"})
    assert "made for a test; every model was asked as plain text." in markdown([same])
    ways = {"teacher": "through its chat template", "student": "as plain text"}
    apart = o._replace(ways=ways)
    said = "asked: student as plain text; teacher through its chat template"
    assert said in markdown([apart])
    assert apart.json()["models"]["teacher"]["asked"] == "through its chat template"
    assert "asked" not in o.json()["models"]["teacher"]


def test_the_interval_is_paired() -> None:
    """A student that loses two of the teacher's answers is judged by these two, not by the luck of
    the questions.
    """
    o = outcome(teacher=80, student=78)
    _, low, high = interval(o.marks["student"] - o.teacher)
    assert -0.06 < low < 0
    assert high <= 0
    apart = interval(o.teacher)
    assert high - low < (apart[2] - apart[1]) / 2
    _, low, high = recovery(o.marks["student"], o.teacher, o.chance)
    assert 0.8 < low < high <= 1


def test_an_interval_covers_what_it_should() -> None:
    """95 % of the intervals of students that know half of what the teacher knows hold a half: 200
    experiments.
    """
    rng = np.random.default_rng(5)
    held = 0
    for _ in range(200):
        # what teacher and student know; the rest is guessed
        know = rng.random((2, 200)) < np.array([[0.8], [0.4]])
        marks = np.where(know, 1, rng.random((2, 200)) < 0.5).astype(float)
        _, low, high = recovery(marks[1], marks[0], np.full(200, 0.5))
        held += low <= 0.5 <= high
    assert 180 <= held <= 199  # 95 % of 200 is 190, with a standard deviation of 3


def test_nothing_is_recovered_of_a_teacher_who_knows_nothing() -> None:
    """A dash, and a sentence; nobody divides by noise."""
    o = outcome(teacher=53, student=60)
    assert o.recovered("student") is None
    assert o.json()["models"]["student"]["recovery"] is None
    assert (
        "The teacher is not better than chance on sums: there is nothing to recover (–)."
        in markdown([o])
    )
    assert "| sums | – |" in markdown([o])


def test_the_table_has_chance_and_the_constant() -> None:
    """n, chance, U Zośki, uniform, then the models with ± half of the interval."""
    page = markdown([outcome(teacher=90, student=70)])
    assert "| | n | chance | U Zośki | uniform | teacher | student |" in page
    row = next(line for line in page.splitlines() if line.startswith("| sums | 100 "))
    assert re.fullmatch(
        r"\| sums \| 100 \| 50.0% \| 50.0% \| – \| 90.0% ± [56].\d% \| 70.0% ± [89].\d% \|", row
    )
    assert re.search(r"^\| sums \| 50% \[\d+%, \d+%\] \|$", page, re.M)
    assert "- `sums`: made for a test." in page


def test_differences_are_told_from_noise() -> None:
    """A clear loss, one that may be none, and a gain that luck explains."""
    lost = markdown([outcome(teacher=90, student=60), outcome("bus", teacher=80, student=80)])
    assert "student is worse than the teacher, by more than the noise, on sums." in lost
    assert "On bus, a loss of student against the teacher cannot be told from noise." in lost
    lucky = markdown([outcome(teacher=80, student=81)])
    assert (
        "student scores above the teacher on sums (+1.0 points), within the noise: luck explains "
        "it." in lucky
    )
    clear = markdown([outcome(teacher=70, student=95)])
    assert "by more than the noise on sums. One in 40 tasks does so by luck (here are 1)" in clear


def test_a_constant_as_good_as_the_teacher_is_named() -> None:
    """Better than chance, and yet no better than who always says the same."""
    o = outcome(chance=0.25, teacher=51, student=30)
    assert (
        "U Zośki, the best constant answer, does as well as the teacher on sums (option 1)."
        in markdown([o])
    )


def test_what_counting_tokens_gives_is_not_knowledge() -> None:
    """A teacher who does as well as a model to which all tokens are equally likely has nothing that
    can be recovered, however far above chance both are; one who does better has.
    """
    o = outcome(chance=0.25, teacher=60, student=58)
    counted = o._replace(uniform=np.array([0.0, 1.0, 1.0, 0.5] * 25))
    assert o.recovered("student")
    assert counted.recovered("student") is None
    assert (
        "On sums the teacher is not better than the uniform model, which finds all tokens equally "
        "likely" in markdown([counted])
    )
    assert "not better than chance" not in markdown([counted])
    assert "| sums | 100 | 25.0% | 50.0% | 62.5% |" in markdown([counted])
    assert "| sums | – |" in markdown([counted])
    assert counted.json()["uniform"] == 0.625
    assert o.json()["uniform"] is None
    assert o._replace(uniform=np.full(N, 0.3)).recovered("student") == o.recovered("student")


def test_no_spread_is_not_certainty() -> None:
    """All wrong in 100 questions: 3 % cannot be excluded, whatever a bootstrap says."""
    assert (
        "(sums), ± 0 means that no spread was seen; up to 3% of the opposite is possible"
        in markdown([outcome(teacher=90, student=0)])
    )
    assert "± 0 means" not in markdown([outcome(teacher=90, student=70)])
