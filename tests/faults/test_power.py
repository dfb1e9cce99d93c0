"""The power goes, at random moments of every job: from what the drive may hold then it goes on to
the same end.
"""

from __future__ import annotations

import pytest

from tests.conftest import mostly_slow, mostly_thorough
from tests.faults.conftest import Note
from tests.faults.test_operations import EACH, LONG, SHORT, Benches

CUTS = 2000  # in all, of the slow run: of each job CUTS / number of jobs


@pytest.mark.parametrize(
    "name",
    mostly_thorough((*SHORT, "distill", "distill, scales on disk", "sft"), "export"),
)
def test_a_power_cut_loses_nothing_that_was_safe(name: str, bench: Benches) -> None:
    """Forty cuts a job; from two of a run's different disks it goes on to its end, of a command's
    from all.
    """
    b = bench(name)
    b.power(40, resumed=2 if name in LONG else 10**9)
    assert not b.bad
    assert b.ends == {"power cut": 40}


@pytest.mark.slow
@pytest.mark.parametrize("name", (*SHORT, *LONG))
def test_two_thousand_power_cuts(name: str, bench: Benches, note: Note) -> None:
    """From EACH disks that a cut may leave, the job is gone on with to its end."""
    b = bench(name)
    b.power(CUTS // len((*SHORT, *LONG)), resumed=EACH)
    note("power cut", name, b.ends, len(b.bad))
    assert not b.bad


@pytest.mark.parametrize("forgets", ["file", "folder"])
@pytest.mark.parametrize(
    "name",
    mostly_slow(
        ["prune", "quantize", "export", "distill", "logit store"], "export", thorough=["distill"]
    ),
)
def test_without_a_sync_the_power_cut_is_found_out(name: str, forgets: str, bench: Benches) -> None:
    """A test of the test: without the fsync of files, or of folders, what was safe is lost."""
    b = bench(name)
    b.power(60, forgets, resumed=0)
    assert any("acknowledged but lost" in each for each in b.bad)
