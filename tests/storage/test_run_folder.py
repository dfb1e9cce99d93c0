"""The run folder: made once, found again, and only continued with what it began with."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from mis_mlx.storage import run_folder
from mis_mlx.storage.files import DISK, need_place
from mis_mlx.types import MisError

SETTINGS: dict[str, Any] = {
    "iters": 100,
    "learning_rate": 3e-4,
    "scenario": "goral",
    "budget": None,
    "seed": 0,
}
PLAN = {"mode": "blocks", "micro": 2, "shard": 0}
ORIGIN = {"teacher": "a" * 64, "data": "b" * 64, "held_out": "d" * 64, "mlx": "0.32.4"}
FREE = frozenset({"budget"})


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """runs/ is relative to where the user stands."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def create(out: str | None) -> Path:
    """A new run of which everything is decided."""
    folder = run_folder.make(out, "r")
    run_folder.begin(folder, {"iters": 100})
    run_folder.decide(folder, SETTINGS, PLAN)
    assert run_folder.same_origin(folder, ORIGIN) == []
    return folder


def test_names_are_counted() -> None:
    """runs/NAME-001, then -002; what is in them comes back."""
    first = create(None)
    second = create(None)
    assert [str(first), str(second)] == ["runs/r-001", "runs/r-002"]
    assert run_folder.stored_settings(first) == SETTINGS
    assert run_folder.asked_settings(first) == {"iters": 100}
    # plain, for -c and people
    assert list(yaml.safe_load((first / run_folder.CONFIG).read_text())) == list(SETTINGS)
    assert run_folder.same_origin(first, ORIGIN) == []


def test_two_processes_never_make_the_same_folder(here: Path) -> None:
    """Many at the same moment: as many folders."""
    with ThreadPoolExecutor(16) as pool:
        made = list(pool.map(lambda _: run_folder.make(None, "r"), range(64)))
    assert len(set(made)) == 64
    assert all(folder.is_dir() for folder in made)


def test_a_folder_of_ones_own(here: Path) -> None:
    """--out takes a new, an empty or a just locked folder, and refuses one with something in it;
    again once it is locked, for somebody else may have been there first.
    """
    (here / "empty").mkdir()
    (here / "locked").mkdir()
    (here / "locked" / ".lock").touch()
    for name in ("new/deep", "empty", "locked"):
        assert create(name) == Path(name)
    for name in ("empty", "new"):
        with pytest.raises(MisError, match="not empty: add --resume"):
            run_folder.make(name, "x")
    before = (here / "empty" / run_folder.ASKED).read_text()
    with pytest.raises(MisError, match="not empty: add --resume"):
        run_folder.begin(Path("empty"), {"iters": 3})
    assert (here / "empty" / run_folder.ASKED).read_text() == before
    (here / "file").write_text("x")
    with pytest.raises(MisError, match="not empty|is a file"):
        run_folder.make("file", "x")
    assert (here / "file").read_text() == "x"


def test_a_folder_from_before_the_beginning_is_no_run(here: Path) -> None:
    """Before asked.yaml nothing was done: neither --resume nor a new start is blocked."""
    (here / "half").mkdir()
    (here / "half" / run_folder.TAKEN).write_text("{}")
    (here / "half" / f".tmp-{run_folder.ASKED}-123").write_text("it")
    with pytest.raises(MisError, match="start one there without --resume"):
        run_folder.find("half")
    assert create("half") == run_folder.find("half") == Path("half")


def test_a_run_of_which_little_is_decided_is_one(here: Path) -> None:
    """It is found, as a run that was stopped in its search. Refused before any work it goes, and
    with work in it it stays.
    """
    folder = run_folder.make(None, "r")
    run_folder.begin(folder, {"lose": 0.1, "out": "x"})
    assert run_folder.find(None) == folder
    assert not run_folder.is_decided(folder)
    assert run_folder.asked_settings(folder) == {"lose": 0.1}
    (folder / run_folder.SEARCH).mkdir()
    run_folder.forget_bare(folder)
    assert folder.exists()
    (folder / run_folder.SEARCH).rmdir()
    run_folder.forget_bare(folder)
    assert not folder.exists()


def test_find_takes_the_newest_unfinished(here: Path) -> None:
    """Finished ones are passed over; --out names one; nothing there is a sentence."""
    with pytest.raises(MisError, match="no unfinished run"):
        run_folder.find(None)
    a, b, c = (create(None) for _ in range(3))
    for age, folder in ((30, a), (20, b), (10, c)):
        os.utime(folder / run_folder.CONFIG, (1e9 - age, 1e9 - age))
    (c / run_folder.RESULT).write_text("{}")
    assert run_folder.find(None) == b
    assert run_folder.find(str(a)) == a
    with pytest.raises(MisError, match="no run to continue"):
        run_folder.find(str(here / "elsewhere"))


def test_a_flag_left_out_asks_for_nothing() -> None:
    """Stored values come back; free ones follow the new command; another value is refused with
    both. A value that equals the default asks for it.
    """
    stored = {**SETTINGS, "iters": 7, "budget": "1GiB"}

    def merged(**given: Any) -> dict[str, Any]:
        return run_folder.merged(given, SETTINGS, stored, FREE)

    assert merged() == stored
    assert merged(iters=7, budget="2GiB") == {**stored, "budget": "2GiB"}
    assert merged(budget=SETTINGS["budget"])["budget"] == SETTINGS["budget"]
    for iters in (8, SETTINGS["iters"]):
        with pytest.raises(MisError, match=f"--iters is {iters}, but the run has 7"):
            merged(iters=iters)
    # What began a run may be said again, though it was decided otherwise, as micro-batches are.
    for said in (7, 9):
        again = run_folder.merged({"iters": said}, SETTINGS, stored, FREE, asked={"iters": 9})
        assert again["iters"] == 7
    with pytest.raises(MisError, match="--iters is 8, but the run has 7"):
        run_folder.merged({"iters": 8}, SETTINGS, stored, FREE, asked={"iters": 9})
    # Which YAML holds as a list.
    several = {"languages": ["pl", "de"]}
    given = {"languages": ("pl", "de")}
    assert run_folder.merged(given, {"languages": ()}, several, FREE) == given
    assert run_folder.merged({}, {"languages": ()}, several, FREE) == given
    # A setting that an older version did not have is at its default in its runs.
    newer = {**SETTINGS, "later": 1}
    assert run_folder.merged({}, newer, stored, FREE)["later"] == 1
    with pytest.raises(MisError, match="--later is 2, but the run has 1"):
        run_folder.merged({"later": 2}, newer, stored, FREE)


def test_another_teacher_or_text_is_refused_another_version_is_said() -> None:
    """Named, with both hashes; a version may change last bits, no more; another text to judge by
    is said, and refused where that matters.
    """
    folder = create(None)
    for what in ("teacher", "data"):
        with pytest.raises(
            MisError, match=rf"The {what} changed.*{ORIGIN[what][:12]} is now cccccccccccc"
        ):
            run_folder.same_origin(folder, {**ORIGIN, what: "c" * 64})
    (note,) = run_folder.same_origin(folder, {**ORIGIN, "mlx": "0.33.0"})
    assert "mlx was 0.32.4, is now 0.33.0" in note
    other = {**ORIGIN, "held_out": "c" * 64}
    (note,) = run_folder.same_origin(folder, other)
    assert "held-out text changed" in note
    with pytest.raises(MisError, match="The held-out text changed since"):
        run_folder.same_origin(folder, other, (*run_folder.SAME, "held_out"))


@pytest.mark.parametrize("content", [None, b"", b"[1]", b"\xff"])
def test_damage_is_a_sentence(content: bytes | None) -> None:
    """config.yaml, origin.json or plan.json gone, empty or garbled."""
    folder = create(None)
    assert run_folder.stored_settings(folder, run_folder.PLAN) == PLAN
    for name, read in (
        (run_folder.CONFIG, run_folder.stored_settings),
        (run_folder.ORIGIN, lambda f: run_folder.same_origin(f, ORIGIN)),
        (run_folder.PLAN, lambda f: run_folder.stored_settings(f, run_folder.PLAN)),
    ):
        (folder / name).unlink()
        (folder / run_folder.METRICS).touch()  # it was at work
        if content is not None:
            (folder / name).write_bytes(content)
        with pytest.raises(MisError, match="damaged"):
            read(folder)


def test_metrics_forgive_a_torn_line_and_a_repeated_step() -> None:
    """A crash tore line 3; after the resume step 2 came again: the last one counts, in order."""
    folder = create(None)
    assert run_folder.metrics(folder) == []
    lines = [{"number": 1, "loss": 3.0}, {"number": 2, "loss": 2.5}]
    with (folder / run_folder.METRICS).open("ab") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
        file.write(b'{"number": 3, "lo')
    DISK.append(folder / run_folder.METRICS, json.dumps({"number": 2, "loss": 2.4}))
    DISK.append(folder / run_folder.METRICS, json.dumps({"number": 3, "loss": 2.2}))
    with (folder / run_folder.METRICS).open("ab") as file:
        file.write(b"\xff\xfe\n[1]\n7\n" + b'{"loss": 1}\n')
    assert [(r["number"], r["loss"]) for r in run_folder.metrics(folder)] == [
        (1, 3.0),
        (2, 2.4),
        (3, 2.2),
    ]


def test_a_folder_that_the_finder_has_seen_is_empty(tmp_path: Path) -> None:
    """.DS_Store is nobody's run; a name that is no UTF-8 is refused before any work."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".DS_Store").touch()
    assert run_folder.make(str(tmp_path / "run"), "x") == tmp_path / "run"
    with pytest.raises(MisError, match="cannot be written"):
        need_place("--out", os.fsdecode(bytes(tmp_path / "run") + b"\xff"))
