"""Logs thinned for pictures: what stays, what is counted, and what other hands have done to a
file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mis_mlx.reporting import run_reader


def log(path: Path, *records: Any) -> Path:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def test_few_values_stay_and_of_many_every_spike() -> None:
    """Below the limit nothing is thinned; of 100,000 values every lone spike stays where it was,
    and the last value.
    """
    few = run_reader.Series()
    many = run_reader.Series()
    for i in range(run_reader.MOST_POINTS):
        few.add(i, -i)
    assert few.points() == [(i, -i) for i in range(few.count)]
    assert few.count == run_reader.MOST_POINTS
    spikes = {0: 9.0, 12_345: -7.5, 77_777: 8.25, 99_998: -8.0}
    for i in range(100_000):
        many.add(float(i), spikes.get(i, (i % 10) / 10))
    points = many.points()
    assert len(points) <= run_reader.MOST_POINTS
    assert {(float(i), y) for i, y in spikes.items()} <= set(points)
    assert points[-1] == (99_999.0, 0.9)
    assert [x for x, _ in points] == sorted(x for x, _ in points)


def test_only_numbers_count(tmp_path: Path) -> None:
    """Text, truth, NaN, infinity and what no float holds are passed over; speeds are of the
    rest.
    """
    odd = ["2", True, None, [], {}, float("nan"), float("inf"), 10**400]
    path = log(
        tmp_path / "log",
        *({"wall_s": 1, "loss": v, "tokens": v} for v in odd),
        {"wall_s": 2, "loss": 3, "tokens": 8, "seconds": 2},
        {"wall_s": 3, "tokens": 8, "seconds": 0},
    )
    history = run_reader.history_of(path, ("loss", "tokens", "seconds"))
    assert history.series["loss"].points() == [(2.0, 3.0)]
    assert history.series["tokens_per_s"].points() == [(2.0, 4.0)]
    assert history.torn == 0


def test_torn_and_foreign_lines_are_counted(tmp_path: Path) -> None:
    """A line cut off in the middle, no JSON, no object, no clock, nesting without end, a line too
    long: passed over.
    """
    path = log(tmp_path / "log", {"wall_s": 1, "loss": 1.0}, [1, 2], "text", {"loss": 1.0})
    with path.open("ab") as file:
        file.write(
            b"[" * 50_000
            + b"\n"
            + b"\xff\xfe\n"
            + b'{"loss": '
            + b" " * run_reader.LINE_BYTES
            + b"1}\n"
        )
        file.write(b'{"wall_s": 2, "loss": 2.0}\n{"wall_s": 3, "loss": 3.')
    history = run_reader.history_of(path, ("loss",))
    assert history.series["loss"].points() == [(1.0, 1.0), (2.0, 2.0)]
    assert history.torn == 8
    assert history.lines == 10
    assert run_reader.history_of(tmp_path / "none", ("loss",)).lines == 0


def test_time_never_falls(tmp_path: Path) -> None:
    """A clock set back, or a replay begun again, goes on where it was."""
    walls = (100.0, 110.0, 50.0, 60.0)
    path = log(
        tmp_path / "log",
        *({"wall_s": w, "number": n} for w, n in zip(walls, (1, 2, 2, 3), strict=True)),
    )
    history = run_reader.history_of(path, ("number",))
    # step 2 twice, in one place
    assert [x for x, _ in history.series["number"].points()] == [100.0, 110.0, 120.0]
    assert (history.first_s, history.last_s) == (100.0, 120.0)


def test_pauses_become_stretches(tmp_path: Path) -> None:
    """From the first line that pauses to the first that does not, with its cause."""
    actions = ("run", "pause", "pause", "run", "run", "pause")
    path = log(
        tmp_path / "log",
        *({"wall_s": i, "action": a, "cause": "hot"} for i, a in enumerate(actions)),
    )
    assert run_reader.history_of(path, ()).pauses == [(1.0, 3.0, "hot"), (5.0, 5.0, "hot")]


def test_answers_are_missed_only_where_they_were_judged(tmp_path: Path) -> None:
    """By the result; records of ours are kept in their order, torn and foreign lines passed
    over.
    """
    (tmp_path / "result.json").write_text(json.dumps({"seconds": 1}))
    assert run_reader.read(tmp_path).answers == []
    assert not any("answers" in text for text in run_reader.read(tmp_path).missing)

    (tmp_path / "result.json").write_text(json.dumps({"answers_prompts": 72}))
    assert (
        "answers.jsonl is missing: what teacher and student answered"
        in run_reader.read(tmp_path).missing
    )
    path = log(tmp_path / "answers.jsonl", [1], {"prompt": "no text"})
    assert (
        "answers.jsonl is damaged: what teacher and student answered"
        in run_reader.read(tmp_path).missing
    )

    log(path, {"text": "one"}, {"text": "two"})
    with path.open("ab") as file:
        file.write(b'{"text": "tor')
    story = run_reader.read(tmp_path)
    assert [row["text"] for row in story.answers] == ["one", "two"]
    assert not any("answers" in text for text in story.missing)
