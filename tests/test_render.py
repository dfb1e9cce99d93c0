"""The benchmarks of speed on tiny models, and the README's tables made of what they leave."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mis_mlx.compute import precision
from mis_mlx.types import MisError
from tests import tiny
from tests.test_docs import program

ROOT = Path(__file__).parent.parent
QUICK: dict[str, Any] = {
    "prompt_tokens": 6,
    "generation_tokens": 4,
    "num_trials": 1,
    "rounds": 1,
    "blocks": 1,
    "four_bit_trials": 1,
    "agreement_tokens": 4,
}


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The programs, which store in `results`."""
    results = tmp_path / "benchmarks" / "results" / "here"
    named = ("benchmarks/throughput", "benchmarks/ttft", "scripts/render")
    made = {name.rpartition("/")[2]: program(ROOT / f"{name}.py") for name in named}
    laboratory = made["throughput"].laboratory
    monkeypatch.setattr(laboratory, "RESULTS", results)
    return SimpleNamespace(results=results, laboratory=laboratory, **made)


@pytest.mark.thorough
def test_parts_are_measured_and_stored(
    lab: SimpleNamespace, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in its second part, the first is there, and the exit says so; the same command goes
    on from there. Every part, its commit, the machine, the weights; no path.
    """
    big = str(tiny.make(tmp_path / "big"))
    small = str(tiny.make(tmp_path / "small", num_hidden_layers=2))
    monkeypatch.setattr(lab.throughput, "READY", 100)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in QUICK.items()]
    argv = ["x", "--student", small, "--teacher", big, "--four-bit", small, *flags]

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sys.argv", list(argv))
        patch.setattr(lab.throughput, "four_bit", stopped)
        with pytest.raises(SystemExit, match="130"):
            lab.laboratory.start(lab.throughput.Settings, lab.throughput.main)
        kept = json.loads((lab.results / "throughput.json").read_text())
        assert "dense" in kept and "4-bit" not in kept
    monkeypatch.setattr("sys.argv", list(argv))
    lab.laboratory.start(lab.throughput.Settings, lab.throughput.main)
    found = json.loads((lab.results / "throughput.json").read_text())
    assert {"chip", "memory_gib", "release", "mlx", "git"} <= found.keys()
    assert found["dense"] == kept["dense"]
    assert str(tmp_path) not in json.dumps(found)
    formats = {name: m["format"] for name, m in found["4-bit"]["models"].items()}
    kind = str(precision.usual_dtype()).removeprefix("mlx.core.")
    assert formats == {"teacher": "4-bit", "student": "4-bit", "student by quantize": kind}
    assert len(found["verdict"]) == 6
    assert len(set(found["given"]["weights_sha256"].values())) == 2
    for lengths in ((8,), (16, 8)):
        asked = lab.ttft.Settings(student=small, teacher=big, lengths=lengths, num_trials=2)
        lab.ttft.main(asked)
    rows = json.loads((lab.results / "ttft.json").read_text())["rows"]
    assert [row["prompt_tokens"] for row in rows] == [8, 16]


def test_drift_is_seen_and_mended(
    lab: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--check fails where one digit was changed by hand, and shows it; rendered, it passes, and the
    text around stays.
    """
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    text = (ROOT / "docs" / "models.md").read_text("utf-8")
    begin = text.index("-->\n|") + 4
    cell = re.search(r"\d+\.\d", text[begin:])
    assert cell
    at = begin + cell.start()
    drifted = f"{text[:at]}9{text[at:]}"
    page = tmp_path / "docs" / "models.md"
    page.parent.mkdir()
    page.write_text(drifted, "utf-8")
    check = lab.render.Settings(check=True, root=str(tmp_path))
    assert lab.render.main(check) == 1
    assert f"9{cell[0]}" in capsys.readouterr().err
    assert page.read_text("utf-8") == drifted
    assert lab.render.main(lab.render.Settings(root=str(tmp_path))) == 0
    assert page.read_text("utf-8") == text
    assert lab.render.main(check) == 0


@pytest.mark.parametrize(
    "text",
    [
        "<!-- table: here/other -->\n<!-- end -->\n",  # no such table
        "<!-- table: speed -->\n<!-- end -->\n",  # of which machine?
        "<!-- table: here/speed -->\n| x |\n\n## More\n",  # no end
    ],
)
def test_a_broken_mark_is_a_sentence(lab: SimpleNamespace, tmp_path: Path, text: str) -> None:
    """Nothing is written."""
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(MisError):
        lab.render.main(lab.render.Settings(root=str(tmp_path)))
    assert (tmp_path / "README.md").read_text() == text


def test_the_pages_of_this_repository_are_what_the_files_say() -> None:
    """What CI runs."""
    line = [sys.executable, str(ROOT / "scripts" / "render.py"), "--check"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
