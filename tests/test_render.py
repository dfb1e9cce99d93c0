"""The benchmarks of speed on tiny models, and the README's tables made of what they leave."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mis_mlx.compute import precision
from mis_mlx.hardware.rates import Roof
from mis_mlx.types import MisError
from tests import tiny

ROOT = Path(__file__).parent.parent
PARTS = ("dense", "4-bit", "agreement")
QUICK: dict[str, Any] = {
    "prompt_tokens": 6,
    "generation_tokens": 4,
    "num_trials": 1,
    "rounds": 1,
    "blocks": 1,
}
QUICK |= {"four_bit_trials": 1}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """The programs, two models, and a results folder (`root`/benchmarks/results/here); the roof is
    given.
    """
    root = tmp_path_factory.mktemp("lab")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIS_MLX_CACHE", str(root / "cache"))
        patch.setattr(
            "mis_mlx.hardware.rates.measure_roof",
            lambda: Roof(
                device="this one",
                threads="1",
                memory_bytes_per_s=1e9,
                flops_per_s=1e9,
                source="given",
            ),
        )
        patch.syspath_prepend(ROOT / "benchmarks")
        patch.syspath_prepend(ROOT / "scripts")
        import laboratory
        import render
        import throughput
        import ttft

        patch.setattr(laboratory, "RESULTS", root / "benchmarks" / "results" / "here")
        patch.setattr(throughput, "READY", 100)
        big = tiny.make(root / "big")
        small = tiny.make(root / "small", num_hidden_layers=2)
        yield SimpleNamespace(
            root=root,
            results=laboratory.RESULTS,
            big=str(big),
            small=str(small),
            laboratory=laboratory,
            render=render,
            throughput=throughput,
            ttft=ttft,
        )
    for name in ("laboratory", "render", "throughput", "ttft"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def measured(lab: SimpleNamespace) -> dict[str, dict[str, Any]]:
    """Both results files: throughput's parts in two calls, the lengths of ttft too, as after a
    kill.
    """
    s = lab.throughput.Settings(
        student=lab.small, teacher=lab.big, four_bit=lab.small, agreement_tokens=4, **QUICK
    )
    for parts in (("dense",), PARTS):
        lab.throughput.main(replace(s, parts=parts))
    for lengths in ((8,), (16, 8)):
        lab.ttft.main(
            lab.ttft.Settings(student=lab.small, teacher=lab.big, lengths=lengths, num_trials=2)
        )
    return {
        name: json.loads((lab.results / f"{name}.json").read_text())
        for name in ("throughput", "ttft")
    }


@pytest.mark.thorough
def test_all_parts_are_measured_and_stored(
    lab: SimpleNamespace, measured: dict[str, dict[str, Any]]
) -> None:
    """Every part, its commit, the machine, the weights; the two of one format beside each other."""
    found = measured["throughput"]
    assert set(PARTS) <= found.keys()
    assert {"chip", "memory_gib", "release", "mlx", "git"} <= found.keys()
    assert found["command"].startswith(
        "scripts/mis benchmarks/throughput.py --student RUN/distilled"
    )
    assert lab.root.name not in json.dumps(found)
    assert list(found["dense"]["measured"]["models"]) == ["teacher", "student"]
    formats = {name: m["format"] for name, m in found["4-bit"]["models"].items()}
    kind = str(precision.usual_dtype()).removeprefix("mlx.core.")
    assert formats == {"teacher": "4-bit", "student": "4-bit", "student by quantize": kind}
    assert len(found["verdict"]) == 6
    assert len(set(found["given"]["weights_sha256"].values())) == 2


@pytest.mark.thorough
def test_what_was_finished_stays_after_ctrl_c(
    lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in its second part, the first is there; the exit says so. A folder that is none is a
    sentence, first.
    """

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(lab.throughput, "four_bit", stopped)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in QUICK.items()]
    argv = ["x", "--student", lab.small, "--teacher", lab.big, "--name", "stopped", *flags]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit, match="130"):
        lab.laboratory.start(lab.throughput.Settings, lab.throughput.main)
    kept = json.loads((lab.results / "stopped.json").read_text())
    assert "dense" in kept
    assert "4-bit" not in kept
    monkeypatch.setattr(
        sys, "argv", [*argv, "--four-bit", str(lab.root / "nowhere"), "--name", "nowhere"]
    )
    with pytest.raises(SystemExit, match="nowhere"):
        lab.laboratory.start(lab.throughput.Settings, lab.throughput.main)
    assert not (lab.results / "nowhere.json").exists()


def rate(tps: float) -> dict[str, Any]:
    """One format's `bench`, as far as the verdict looks."""
    models = {"teacher": 10.0, "student": tps}
    return {
        "measured": {"models": {n: {"decode_tps": {"median": v}} for n, v in models.items()}},
        "models": {"student": {"format": "float32"}},
    }


def test_the_verdict_by_pencil(lab: SimpleNamespace) -> None:
    """1.45x holds, 1.44x does not; 2 % apart and 1 % of overhead hold, more does not, each by
    itself.
    """

    def holds(tps: float, **agreement: Any) -> list[bool]:
        found: dict[str, Any] = {"dense": rate(tps)}
        if agreement:
            found["agreement"] = {
                "bench_over_mlx_lm": {"median": agreement["ratio"]},
                "bench_over_mlx_lm_benchmark": {"median": 1.0},
                "overhead": {"median": agreement["overhead"]},
                "own_share": 0.0,
            }
        return [one["holds"] for one in lab.throughput.verdict(found).values()]

    assert (holds(14.5), holds(14.4)) == ([True], [False])
    assert holds(14.5, ratio=0.981, overhead=0.01) == [True] * 5
    assert holds(14.5, ratio=0.979, overhead=0.011) == [True, False, True, False, True]
    rows = {n: {"speed_up": {"cold_ms": lead}} for n, lead in ((32, 1.5), (64, 0.9))}
    (said,) = lab.ttft.verdict(rows).items()
    assert "at 64 tokens" in said[0]
    assert not said[1]["holds"]
    assert said[1]["shown"] == "0.90x"


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
