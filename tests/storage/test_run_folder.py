"""The run folder: made once, found again, and only continued with what it began with."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from mis_mlx.storage import run_folder
from mis_mlx.storage.files import DISK
from mis_mlx.types import MisError

SETTINGS: dict[str, Any] = {
    "iters": 100,
    "learning_rate": 3e-4,
    "scenario": "goral",
    "budget": None,
    "seed": 0,
}
PLAN = {"mode": "resident", "micro": 2, "shard": 0}
ORIGIN = {"teacher": "a" * 64, "data": "b" * 64, "mlx": "0.32.4"}
FREE = frozenset({"budget"})


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """runs/ is relative to where the user stands."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_names_are_counted() -> None:
    """runs/NAME-001, then -002; what is in them comes back."""
    first, second = (
        run_folder.create(
            None, "tiny-goral", settings=SETTINGS, origin=ORIGIN, plan=PLAN, files=DISK
        )
        for _ in range(2)
    )
    assert [str(first), str(second)] == ["runs/tiny-goral-001", "runs/tiny-goral-002"]
    assert run_folder.stored_settings(first) == SETTINGS
    # plain, for -c and people
    assert list(yaml.safe_load((first / run_folder.CONFIG).read_text())) == list(SETTINGS)
    assert run_folder.same_origin(first, ORIGIN) == []


def test_a_folder_of_ones_own(here: Path) -> None:
    """--out takes a new, an empty or a just locked folder, and refuses one with something in it."""
    (here / "empty").mkdir()
    (here / "locked").mkdir()
    (here / "locked" / ".lock").touch()
    for name in ("new/deep", "empty", "locked"):
        assert run_folder.create(
            name, "x", settings=SETTINGS, origin=ORIGIN, plan=PLAN, files=DISK
        ) == Path(name)
    for name in ("empty", "new"):
        with pytest.raises(MisError, match="not empty: add --resume"):
            run_folder.create(name, "x", settings=SETTINGS, origin=ORIGIN, plan=PLAN, files=DISK)
    (here / "file").write_text("x")
    with pytest.raises(MisError, match="not empty|is a file"):
        run_folder.create("file", "x", settings=SETTINGS, origin=ORIGIN, plan=PLAN, files=DISK)
    assert (here / "file").read_text() == "x"


def test_a_run_killed_while_it_was_made_can_be_made_again(here: Path) -> None:
    """Before config.yaml is there nothing was done: neither --resume nor a new start may be blocked
    for good.
    """
    (here / "half").mkdir()
    (here / "half" / run_folder.ORIGIN).write_text("{}")
    (here / "half" / f".tmp-{run_folder.CONFIG}-123").write_text("it")
    with pytest.raises(MisError, match="start one there without --resume"):
        run_folder.find("half")
    run_folder.create("half", "x", settings=SETTINGS, origin=ORIGIN, plan=PLAN, files=DISK)
    assert run_folder.find("half") == Path("half")
    assert run_folder.same_origin(Path("half"), ORIGIN) == []


def test_find_takes_the_newest_unfinished(here: Path) -> None:
    """Finished ones are passed over; --out names one; nothing there is a sentence."""
    with pytest.raises(MisError, match="no unfinished run"):
        run_folder.find(None)
    a, b, c = (
        run_folder.create(None, "r", settings=SETTINGS, origin=ORIGIN, plan=PLAN, files=DISK)
        for _ in range(3)
    )
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
    """Named, with both hashes; a version may change last bits, no more."""
    folder = run_folder.create(None, "r", settings=SETTINGS, origin=ORIGIN, plan=PLAN, files=DISK)
    for what in ("teacher", "data"):
        with pytest.raises(
            MisError, match=rf"The {what} changed.*{ORIGIN[what][:12]} is now cccccccccccc"
        ):
            run_folder.same_origin(folder, {**ORIGIN, what: "c" * 64})
    (note,) = run_folder.same_origin(folder, {**ORIGIN, "mlx": "0.33.0"})
    assert "mlx was 0.32.4, is now 0.33.0" in note


@pytest.mark.parametrize("content", [None, b"", b"[1]", b"{", b"\xff", b"null"])
def test_damage_is_a_sentence(content: bytes | None) -> None:
    """config.yaml, origin.json or plan.json gone, empty or garbled."""
    folder = run_folder.create(None, "r", settings=SETTINGS, origin=ORIGIN, plan=PLAN, files=DISK)
    assert run_folder.stored_settings(folder, run_folder.PLAN) == PLAN
    for name, read in (
        (run_folder.CONFIG, run_folder.stored_settings),
        (run_folder.ORIGIN, lambda f: run_folder.same_origin(f, ORIGIN)),
        (run_folder.PLAN, lambda f: run_folder.stored_settings(f, run_folder.PLAN)),
    ):
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)
        with pytest.raises(MisError, match="damaged"):
            read(folder)


def test_metrics_forgive_a_torn_line_and_a_repeated_step() -> None:
    """A crash tore line 3; after the resume step 2 came again: the last one counts, in order."""
    folder = run_folder.create(None, "r", settings=SETTINGS, origin=ORIGIN, plan=PLAN, files=DISK)
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
