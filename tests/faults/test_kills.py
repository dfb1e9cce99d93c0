"""SIGKILL at random moments of every job, again and again: no step lost, no wrong byte, the end of
an undisturbed one.

The processes are forks of one that has imported everything, so that a kill hits the work and not an
import.
"""

from __future__ import annotations

import random

import pytest

from tests.conftest import mostly_slow
from tests.faults.conftest import Note
from tests.faults.test_operations import LONG, SHORT, Benches

KILLS = 300  # in all, of the slow run


@pytest.mark.parametrize(
    "name",
    mostly_slow(
        ["prune", "quantize", "export", "distill", "distill, scales on disk", "logit store"],
        "distill",
        thorough=["export"],
    ),
)
def test_killed_and_gone_on_with(name: str, bench: Benches) -> None:
    """Four kills that came in time, and then the end."""
    b = bench(name)
    b.kills(4, random.Random(len(name)))
    assert not b.bad
    assert b.ends["killed"] >= 4


@pytest.mark.slow
@pytest.mark.parametrize("name", (*SHORT, *LONG))
def test_three_hundred_kills(name: str, bench: Benches, note: Note) -> None:
    """The same, many more."""
    b = bench(name)
    b.kills(KILLS // len((*SHORT, *LONG)), random.Random(KILLS + len(name)))
    note("SIGKILL at a random moment", name, b.ends, len(b.bad))
    assert not b.bad
