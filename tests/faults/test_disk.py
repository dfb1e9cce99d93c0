"""Real disks that are full, too small, gone or read-only: a sentence with numbers, and later the
same end.

A small file system in memory needs root; a limit on the size of files (RLIMIT_FSIZE) needs nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mis_mlx.storage import checkpoint as protocol
from mis_mlx.storage import run_folder
from mis_mlx.types import MisError
from tests import disks
from tests.conftest import files_up_to, mostly_thorough
from tests.faults import jobs
from tests.faults.conftest import Note
from tests.faults.verdicts import Bench

Benches = Callable[[str], Bench]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """`small_disk(kib)`: a folder on a disk of that size, or from now on of that size."""
    with disks.small_disk(tmp_path / "disk") as sized:
        yield sized


def refused(job: jobs.Job, place: Path) -> str:
    """What the job says."""
    with pytest.raises(MisError) as caught:
        job.run(place)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "name",
    mostly_thorough(["prune", "quantize", "export", "distill", "sft", "logit store"], "export"),
)
def test_a_full_disk_is_waited_out(
    name: str, bench: Benches, small_disk: Callable[[int], Path], note: Note
) -> None:
    """On ever larger disks: a sentence each time; on one large enough, the same bytes."""
    b = bench(name)
    place = small_disk(8) / "place"
    said = list[str]()
    place.mkdir()
    for kib in (8, 16, 64, 300, 700, 1300, 2100, 3300, 64_000):
        small_disk(kib)
        steps = protocol.newest(place / "run" / "steps")
        try:
            b.job.run(place)
            break
        except MisError as error:
            assert "\n" not in str(error)
            assert "Not enough disk space" in str(error) and " free; " in str(error), error
            said.append(str(error))
        after = protocol.newest(place / "run" / "steps")
        assert steps is None or (after is not None and after.number >= steps.number)
    assert said
    assert b.job.outcome(place) == b.whole
    ends = {"said so": len(said), "the same end": 1}
    sentence = said[-1].replace(str(place), "...")
    note("A5 a real full disk, ever larger", name, ends, said=sentence)


@pytest.mark.parametrize("name", mostly_thorough(["quantize", "distill", "sft"], "quantize"))
def test_a_write_that_stops_halfway(name: str, bench: Benches, tmp_path: Path, note: Note) -> None:
    """In the middle of a file of weights: a sentence, no half file, and then the same bytes."""
    b = bench(name)
    place = tmp_path / "place"
    place.mkdir()
    with files_up_to(60_000):
        said = refused(b.job, place)
    assert "The disk does not accept files this large" in said
    assert not [p for p in place.rglob("*.safetensors") if ".tmp-" not in str(p)]
    b.job.run(place)
    assert b.job.outcome(place) == b.whole
    ends = {"said so": 1, "the same end": 1}
    sentence = said.replace(str(tmp_path), "...")
    note("A5 a write that stops halfway (RLIMIT_FSIZE)", name, ends, said=sentence)


@pytest.mark.parametrize("name", ["export", "distill"])
def test_a_disk_that_is_read_only(
    name: str, all_jobs: dict[str, jobs.Job], small_disk: Callable[[int], Path], note: Note
) -> None:
    """Said, in one line."""
    place = small_disk(64_000)
    disks.mount("-o", "remount,ro", place)
    said = refused(all_jobs[name], place)
    assert "The disk is read-only" in said
    sentence = said.replace(str(place), "...")
    note("A7 a read-only disk", name, {"said so": 1}, said=sentence)


@pytest.mark.parametrize("name", ["distill", "sft"])
def test_a_disk_pulled_out(name: str, bench: Benches, note: Note) -> None:
    """The folder is gone after a checkpoint, as with a cable; put back, the run ends alike."""
    b = bench(name)
    place = jobs.clean(b.place)
    away = b.room / "away"

    def pull(said: jobs.Said) -> None:
        if (said.step or 0) >= 1 and said.path.parent.name == "steps" and not away.exists():
            place.rename(away)

    with jobs.acknowledged(pull), pytest.raises(MisError) as caught:
        b.job.run(place)
    assert "vanished" in str(caught.value)
    assert "\n" not in str(caught.value)
    jobs.clean(place).rmdir()
    away.rename(place)
    b.job.run(place)
    assert b.job.outcome(place) == b.whole
    assert len(run_folder.metrics(place / "run")) >= 2
    ends = {"said so": 1, "the same end": 1}
    sentence = str(caught.value).replace(str(place), "...")
    note("A7 a disk that is pulled out", name, ends, said=sentence)
