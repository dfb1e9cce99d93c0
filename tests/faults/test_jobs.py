"""A job's disk is full or answers no more, or its process ends, at operation N = 1, 2, 3 ...; it is
killed at random moments; the power goes.

After each: what was said to be safe is there with its bytes, and the job, gone on with, ends with
those of a job that nothing happened to.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mis_mlx.maths import stats
from mis_mlx.storage import checkpoint as protocol
from mis_mlx.storage.files import DISK
from tests.conftest import mostly_slow, mostly_thorough
from tests.faults.conftest import Note
from tests.faults.verdicts import FATES, Bench

TUNED = "quantize, tuned"  # short, with hundreds of operations
SHORT = ("prune", "quantize", TUNED, "export", "logit store", "spool")
LONG = (
    "distill",
    "distill, scales on disk",
    "distill, block by block",
    "distill, blocks in turn",
    "sft",
    "sft of scales",
    "dpo",
    "grpo",
)
ONCE = [name for name in SHORT if name != TUNED]
QUICK = (TUNED, "sft", "dpo")
FEW = 4  # operations of a long job in the quick run
# Operations at which a job is stopped and gone on with in the slow run, spread over all it has. A
# job has up to a thousand, and some seconds for each would make a day of it.
EACH = 60

KILLS = 300  # in all, of the slow run
CUTS = 2000  # in all, of the slow run: of each job CUTS / number of jobs

Benches = Callable[[str], Bench]


@pytest.mark.parametrize("name", mostly_thorough(ONCE, "prune", "logit store"))
def test_whichever_operation_fails_nothing_is_lost(name: str, bench: Benches) -> None:
    """Every operation, one after the other; the fate changes from one to the next."""
    b = bench(name)
    fates = list(FATES.values())
    for at in range(1, b.operations + 1):
        b.operation(at, fates[at % len(fates)])
    assert not b.bad
    assert b.ends["said so"] > 0
    assert b.ends["killed"] > 0


@pytest.mark.parametrize(
    "name",
    mostly_slow(
        (TUNED, *LONG),
        *QUICK,
        thorough=set(LONG),
    ),
)
def test_a_run_goes_on_after_any_operation(name: str, bench: Benches) -> None:
    """A few operations all over a run."""
    b = bench(name)
    fates = list(FATES.values())
    for i in range(FEW):
        b.operation(1 + (2 * i + 1) * b.operations // (2 * FEW), fates[i])
    assert not b.bad


@pytest.mark.slow
@pytest.mark.parametrize("name", (*SHORT, *LONG))
def test_operations_refused(name: str, bench: Benches, note: Note) -> None:
    """Full or no answer, by turns, at EACH operations of a job; under a short one both at each."""
    b = bench(name)
    fates = [FATES["I/O error"], FATES["disk full"]]
    for number, at in enumerate(stats.spread(b.operations, EACH)):
        for fate in fates if name in SHORT else [fates[number % 2]]:
            b.operation(int(at) + 1, fate)
    note("the disk refuses an operation", name, b.ends, len(b.bad))
    assert not b.bad
    assert b.ends.total() >= min(b.operations, EACH)


@pytest.mark.slow
@pytest.mark.parametrize("name", (*SHORT, *LONG))
def test_the_end_of_the_process_at_every_operation(name: str, bench: Benches, note: Note) -> None:
    """Half of operation N is done, and nothing after it, for every N: nothing is lost. From EACH
    disks that differ the job is gone on with.
    """
    b = bench(name)
    b.ends_at_each(EACH)
    note("the end of the process, at every operation in turn", name, b.ends, len(b.bad))
    assert not b.bad
    assert b.ends["killed"] == b.operations


@contextmanager
def in_place(final: Path, *_: Any) -> Iterator[Path]:
    """What a program without a protocol does: it writes where the model will be."""
    DISK.make_folder(final)
    yield final


def test_without_the_protocol_it_is_found_out(
    bench: Benches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A test of the test: written in place, half a model is taken for a whole one."""
    b = bench("prune")
    monkeypatch.setattr(protocol, "commit_folder", in_place)
    for at in range(1, b.operations + 1, 4):
        b.operation(at, FATES["end of the process"])
    assert b.bad


@pytest.mark.thorough
def test_a_step_overwritten_is_found_out(bench: Benches, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test of the test: the old step gone before the new one is there, a step is lost."""
    b = bench("distill")
    commit = protocol.commit_folder

    @contextmanager
    def greedy(final: Path, *arguments: Any, **more: Any) -> Iterator[Path]:
        if protocol.STEP.fullmatch(final.name):
            for old in final.parent.glob("step-*"):
                shutil.rmtree(old)
        with commit(final, *arguments, **more) as tmp:
            yield tmp

    monkeypatch.setattr(protocol, "commit_folder", greedy)
    for at in range(b.operations // 3, 2 * b.operations // 3, 10):
        b.operation(at, FATES["end of the process"])
        if b.bad:
            break
    assert any("acknowledged but lost" in each for each in b.bad)


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
