"""What a run's files tell, and what other hands have done to them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mis_mlx.reporting import run_reader


def log(path: Path, *records: Any) -> Path:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def test_only_numbers_count() -> None:
    """Text, truth, NaN, infinity and what no float holds do not; of two records the last does."""
    odd = ["2", True, None, [], {}, float("nan"), float("inf"), 10**400]
    records: list[dict[str, Any]] = [{"number": 1, "loss": value} for value in odd]
    records += [{"number": 2, "loss": 3}, {"number": 1, "loss": 5}, {"number": 2, "loss": 4}]
    assert run_reader.points_of(records, "number", "loss") == [(1.0, 5.0), (2.0, 4.0)]


def test_torn_and_foreign_lines_are_counted(tmp_path: Path) -> None:
    """A line cut off in the middle, no JSON, no object, nesting without end: passed over."""
    path = log(tmp_path / "metrics.jsonl", {"number": 1, "loss": 1.0}, [1, 2], "text")
    with path.open("ab") as file:
        file.write(b"[" * 50_000 + b"\n" + b"\xff\xfe\n" + b'{"number": 2, "loss": 3.')
    story = run_reader.read(tmp_path)
    assert list(story.steps) == [{"number": 1, "loss": 1.0}]
    assert any("metrics.jsonl has 5 of 6 lines" in text for text in story.missing)


def test_a_phase_that_was_resumed_has_all_its_seconds(tmp_path: Path) -> None:
    log(tmp_path / "phases.jsonl", *({"phase": "distil", "seconds": s} for s in (5, 7)))
    assert run_reader.read(tmp_path).took() == {"distil": 12}
