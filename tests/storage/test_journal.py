"""What work has found is there after a kill, beside a second process, and for nobody else."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from mis_mlx.storage.journal import Journal
from mis_mlx.types import MisError

EACH = 40  # records of each process
LONG = "ż" * 50_000  # in one record: more than one write(2) of a buffered file


def test_a_record_is_found_by_its_key_and_the_later_one_counts(tmp_path: Path) -> None:
    """Also by a key of which a field is missing; a torn line and one without a key cost nothing."""
    journal = Journal(tmp_path / "new" / "x.jsonl", ("axis", "size"))
    assert journal.begin() == {}
    journal.add({"axis": "ffn", "size": 512, "nats": 1.0})
    journal.add({"axis": "bits", "nats": 2.0})
    journal.add({"axis": "ffn", "size": 512.0, "nats": 3.0})
    with journal.path.open("a") as file:
        file.write('{"size": 1}\n{"axis": ["list"]}\n[1, 2]\n{"axis": "ff')
    journal.add({"axis": "heads", "size": 3, "nats": None})
    found = journal.read()
    assert found["ffn", 512]["nats"] == 3.0
    assert found["bits", None]["nats"] == 2.0
    assert list(found) == [("ffn", 512), ("bits", None), ("heads", 3)]
    assert journal.key_of({"size": 512, "axis": "ffn"}) in found


def test_records_of_another_identity_are_nobodys(tmp_path: Path) -> None:
    """A file that began otherwise is begun anew; who goes on adding to it is told so."""
    first = Journal(tmp_path / "x", ("n",), {"seed": 1, "kinds": ("a", "b")})
    first.begin()
    first.add({"n": 0})
    assert list(first.begin()) == [(0,)]
    second = Journal(first.path, ("n",), {"seed": 2})
    assert second.read() == {}
    assert second.begin() == {}
    second.add({"n": 5})
    assert list(second.read()) == [(5,)]
    with pytest.raises(MisError, match="begun anew by another process"):
        first.add({"n": 1})
    assert list(second.read()) == [(5,)]


def test_what_one_journal_lacks_comes_from_another(tmp_path: Path) -> None:
    """Only that: its own records stay as they are."""
    ours = Journal(tmp_path / "ours", ("n",))
    theirs = Journal(tmp_path / "theirs", ("n",))
    ours.add({"n": 1, "by": "us"})
    theirs.add({"n": 1, "by": "them"})
    theirs.add({"n": 2, "by": "them"})
    for _ in range(2):
        ours.add_missing(theirs)
    assert ours.path.read_text().count("\n") == 2
    assert [record["by"] for record in ours.read().values()] == ["us", "them"]


def _add(path: str, process: int) -> None:
    for number in range(EACH):
        Journal(Path(path), ("process", "n")).add({"process": process, "n": number, "text": LONG})


def test_two_processes_add_to_one_file(tmp_path: Path) -> None:
    """No line of theirs is torn by the other's."""
    path = tmp_path / "x.jsonl"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_add, args=(str(path), number)) for number in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(Journal(path, ("process", "n")).read()) == 2 * EACH
    assert path.read_bytes().count(b"\n") == 2 * EACH
