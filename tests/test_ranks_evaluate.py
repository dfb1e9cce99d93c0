"""`evaluate` on several machines: the figures of one, said once and kept once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mis_mlx.types import Checkpoint
from tests import tiny
from tests.conftest import last_line
from tests.machines import ended, started


@pytest.mark.parametrize(
    ("n", "spread"),
    [
        pytest.param(2, "whole", marks=pytest.mark.thorough),
        *(pytest.param(n, "layers", marks=pytest.mark.slow) for n in (2, 3)),
    ],
)
def test_evaluate_says_what_one_machine_says(
    n: int,
    spread: str,
    tmp_path: Path,
    llama: Checkpoint,
    text_folder: Path,
    own_home: dict[str, str],
) -> None:
    """Options, answers that are written, and held-out text: the same figures; the first
    machine keeps answers and writes the page, the others say nothing; what is kept is not asked
    again.
    """
    student = tiny.make(tmp_path / "student", seed=3)
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    options = [
        {"question": f"{k} if", "options": ["loop", "while", "for"], "answer": "for"}
        for k in range(9)
    ]
    written = [{"prompt": f"{k}?", "answer": str(k), "language": "en"} for k in range(9)]
    for name, rows in (("options", options), ("written", written)):
        (tasks / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = [
        "--teacher",
        llama.path,
        "--students",
        student,
        "--data",
        text_folder,
        "--max-seq-length",
        64,
    ]
    common += ["--eval-windows", 5]
    said = {}
    for machines in (1, n):
        home = tmp_path / f"home-{machines}"
        # with this machine's rates, and no answers that another test keeps
        (home / "cache").mkdir(parents=True)
        shutil.copy(Path(own_home["MIS_MLX_CACHE"]) / "rates.json", home / "cache")
        env = {**own_home, "MIS_MLX_CACHE": str(home / "cache")}
        how = [*common, "--spread", spread]
        for kind, flags in (
            ("table", ["--tasks", tasks, "text", "--num-questions", 9, "--out", home / "out"]),
            ("again", ["--tasks", tasks, "--num-questions", 9]),
        ):
            if (kind, machines) == ("again", 1):  # what one machine keeps: tests/test_evaluate.py
                continue
            with started(machines, ["-m", "mis_mlx.evaluate", *how, *flags], env) as made:
                done = ended(made)
            assert [d.returncode for d in done] == [0] * machines, [d.stderr for d in done]
            assert not any(d.stdout or d.stderr for d in done[1:])
            said[kind, machines] = done[0]
    assert "4 of 4 reused from an earlier run" in said["again", n].stderr
    one, many = (last_line(said["table", machines]) for machines in (1, n))
    one.pop("out", None), many.pop("out", None)
    _alike(one, many)
    one_page, page = (
        (tmp_path / f"home-{machines}" / "out" / "recovery.md").read_text() for machines in (1, n)
    )
    assert one_page == page

    def kept(machines: int) -> list[list[str]]:
        files = sorted((tmp_path / f"home-{machines}").rglob("*.jsonl"))
        # Answers are kept as they end, which is another order where machines share the questions.
        return [sorted(file.read_text().split("\n")) for file in files]

    assert kept(1) == kept(n)
    assert len(kept(1)) == 4


def _alike(one: object, other: object) -> None:
    """The same JSON, numbers to 1e-9: sums over machines are made in another order."""
    if isinstance(one, dict) and isinstance(other, dict):
        assert one.keys() == other.keys()
        for key in one:
            _alike(one[key], other[key])
    elif isinstance(one, float):
        assert other == pytest.approx(one, rel=1e-9, abs=1e-12)
    else:
        assert one == other
