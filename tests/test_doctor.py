"""`doctor`: it passes here by both policies, each group of its checks can fail, its report names
nobody.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx import doctor
from mis_mlx.checks import engine, groups, kernels
from mis_mlx.compute import precision
from mis_mlx.hardware import child_process
from mis_mlx.maths import importance, losses
from mis_mlx.models.opening import load
from mis_mlx.models.passing import stream
from mis_mlx.models.writing import streamed_batch
from mis_mlx.storage import run_folder
from mis_mlx.types import MisError
from tests.conftest import ROOT, Done, last_line, mostly_thorough


@pytest.mark.slow
@pytest.mark.parametrize("word", ["cpu", "metal"])
def test_it_passes_here(word: str, own_home: dict[str, str], tmp_path: Path) -> None:
    """As a user runs it: exit code 0, every check with a number within its bound, the report in the
    file too.
    """
    home = tmp_path / "zofia-gasienica"
    home.mkdir()
    env = {**own_home, "TMPDIR": str(home), "HOME": str(home), precision.POLICY: word}
    env["PYTHONPATH"] = str(ROOT)
    line = [sys.executable, "-m", "mis_mlx.doctor", "--out", str(home / "report.md")]
    done = subprocess.run(line, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = last_line(done)
    report = (home / "report.md").read_text()
    assert found["failed"] == []
    assert found["checks"] == len(found["rows"]) > 25
    assert found["policy"] == word
    assert all(row["number"] <= row["bound"] for row in found["rows"])
    assert report.strip() == done.stdout[: done.stdout.rindex("\n{")].strip()
    assert report.count("| ✓ |") == found["checks"]
    for private in ("gasienica", str(ROOT), os.uname().nodename, "/tmp", "/home"):
        assert private not in done.stdout


def test_a_nan_in_one_array_is_the_error() -> None:
    """Whatever the other arrays are, and no check passes with it."""
    assert np.isnan(kernels.relative_error([np.array([np.nan, 1.0]), np.ones(2)], [np.ones(2)] * 2))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> engine.Models:
    """The doctor's tiny model in two formats."""
    return engine.make(tmp_path_factory.mktemp("models"))


WITNESSES = list[None]()  # not empty while the witness on the CPU computes


@pytest.fixture(autouse=True)
def _noted_witness(monkeypatch: pytest.MonkeyPatch) -> None:
    """`WITNESSES` tells the faults below when the witness computes."""
    on_cpu = kernels.on_cpu

    @contextmanager
    def noted() -> Iterator[None]:
        with on_cpu():
            WITNESSES.append(None)
            try:
                yield
            finally:
                WITNESSES.pop()

    for module in (kernels, engine):
        monkeypatch.setattr(module, "on_cpu", noted)


def wrong(work: Callable[..., Any]) -> Callable[..., Any]:
    """The function with 5 % added to what it gives, except to the witness on the CPU."""

    def give(*args: Any, **kwargs: Any) -> Any:
        right = work(*args, **kwargs)
        return right if WITNESSES else right * 1.05

    return give


def greedy_for_memory(work: Callable[..., Any]) -> Callable[..., Any]:
    """A pass that takes 16 MiB which nobody planned."""

    def embed(self: stream.Stream, *rest: Any) -> Any:
        mx.eval(mx.zeros((2**24,), mx.uint8))
        return work(self, *rest)

    return embed


LARGE = ("RoPE, float32", "logits, 128 x 24,576, float32")
# check: (owner and name of a function, what is done to it)
FAULTS: dict[str, tuple[Any, str, Callable[[Any], Any]]] = {
    "RoPE, float32": (mx.fast, "rope", wrong),
    "packing and values of all formats": (mx, "dequantize", wrong),
    "log-probabilities of 24,576 tokens, gradients, float32": (mx, "softmax", wrong),
    "logits, 128 x 24,576, float32": (losses, "wide_product", wrong),
    "gradient of a head, 24,576 x 576, float32": (mx, "addmm", wrong),
    "attention, 512 tokens, float32": (mx.fast, "scaled_dot_product_attention", wrong),
    "packed products, 4,608 x 576, float32": (mx, "quantized_matmul", wrong),
    "RMSNorm of 576 and 8,192, float32": (mx.fast, "rms_norm", wrong),
    "softmax of 24,576 and 49,152": (mx, "logsumexp", wrong),
    "sorting 49,152, errors": (mx, "argsort", lambda f: lambda *a, **k: f(*a, **k)[..., ::-1]),
    "states, bf16, against the CPU": (mx.fast, "rms_norm", wrong),
    "states, 4-bit, against the CPU": (
        load,
        "mask",
        lambda f: lambda *a: f(*a) if WITNESSES else None,
    ),
    "training steps, against the CPU": (mx, "softmax", wrong),
    "calibration, against the CPU": (importance, "square_sample", wrong),
    "generate, 4-bit, against mlx_lm": (
        streamed_batch,
        "log_probs",
        lambda f: lambda *a: -f(*a),
    ),
    "peak of a streamed pass / plan": (stream.Stream, "embed", greedy_for_memory),
}


EVERY = (*kernels.CHECKS, *engine.CHECKS)
SMALL = {"VOCAB": 512, "ALL_TOKENS": 2048, "HIDDEN": 64, "TOKENS": 64}


@pytest.mark.parametrize("name", mostly_thorough(EVERY, *(set(EVERY) - set(LARGE))))
def test_checks_pass_and_can_fail(
    name: str, made: engine.Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What passes does not when a device computes it otherwise than the witness, or takes more than
    the plan.
    """

    def checked() -> kernels.Found:
        return kernels.CHECKS[name]() if name in kernels.CHECKS else engine.CHECKS[name](made)

    assert FAULTS.keys() <= set(EVERY)
    if "float16" in name:  # which is emulated here
        for size, count in SMALL.items():
            monkeypatch.setattr(kernels, size, count)
    found, bound = checked()
    assert found <= bound
    if name in FAULTS:
        owner, attribute, fault = FAULTS[name]
        monkeypatch.setattr(owner, attribute, fault(getattr(owner, attribute)))
        found, bound = checked()
        assert not found <= bound


def test_aliased_blocks_are_found(
    metal: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kept packed blocks whose buffer is used again (as once was on Metal): ✗ in the report,
    check_failed, and the others go on; so they do where one raises.
    """
    begin = stream.Stream.__init__

    def faulty(self: stream.Stream, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        self._copies = True

    def raising(models: engine.Models) -> kernels.Found:
        raise RuntimeError(f"no room in {tmp_path}/deep/file.bin\nand more")

    aliased = "streamed = resident = again, 4-bit"
    checks = {name: engine.CHECKS[name] for name in (aliased, "states, bf16, against the CPU")}
    monkeypatch.setattr(stream.Stream, "__init__", faulty)
    monkeypatch.setattr(
        engine, "CHECKS", {"raises": raising, "no number": lambda _: (np.nan, 1.0), **checks}
    )
    monkeypatch.setattr(groups, "GROUPS", {"the engine": groups.of_engine})
    monkeypatch.setattr(
        doctor, "ask", lambda source, function, where, seconds, look: groups.run(**where)
    )
    monkeypatch.setenv("MIS_MLX_CACHE", str(tmp_path))
    found = doctor.run(doctor.Settings())
    report = capsys.readouterr().out
    assert found["failed"] == ["raises", "no number", aliased]
    assert found["check_failed"]
    assert "| ✗ | raises | RuntimeError: no room in …/file.bin |" in report
    assert "and more" not in report
    assert "| ✗ | no number | not a number | 1 |" in report
    assert f"| ✗ | {aliased} |" in report
    assert "| ✓ | states, bf16" in report
    assert str(tmp_path) not in report
    json.dumps(found, allow_nan=False)


# A group of two checks, of which the second one ends the process, after it has said what it does.
BROKEN = """
import os
from mis_mlx.checks import groups

def broken(folder, emit):
    groups.check("a right one", lambda: (0.5, 1.0), emit)
    groups.check("the last one", os.abort, emit)

groups.GROUPS["kernels"] = broken
run = groups.run
"""


def test_a_group_that_dies_is_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What was found before stays, the check under way has the reason, and the next group is
    examined.
    """
    source = tmp_path / "broken.py"
    source.write_text(BROKEN)

    def ask(_: str, function: str, where: dict[str, Any], seconds: float, look: Any) -> None:
        if where["group"] == "kernels":
            child_process.ask(str(source), function, where, seconds, look=look)
        else:
            groups.run(**where)

    monkeypatch.setattr(
        groups,
        "GROUPS",
        {"kernels": None, "after": lambda folder, emit: groups.check("b", right, emit)},
    )
    monkeypatch.setattr(doctor, "ask", ask)
    found = doctor.run(doctor.Settings())
    assert [(row["name"], row["passed"], row["error"]) for row in found["rows"]] == [
        ("a right one", True, ""),
        ("the last one", False, "its process ended with -6"),
        ("b", True, ""),
    ]
    out, err = capfd.readouterr()
    assert "| ✗ | the last one | its process ended with -6 |" in out
    assert "**2 of 3 checks passed**" in out
    assert "Fatal Python error: Aborted" in err  # faulthandler, with where it was


def right() -> kernels.Found:
    """A check that passes."""
    return 0.0, 1.0


def test_rows_are_written_as_they_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """While a group goes on, what it has found is on stdout and in the file; half a line of the
    journal waits.
    """
    out = tmp_path / "report.md"

    def ask(source: str, function: str, where: dict[str, Any], seconds: float, look: Any) -> None:
        journal = Path(where["journal"])
        row = json.dumps({"row": groups.Row("early", True, 1.0, 2.0)}) + "\n"
        journal.write_text(row + row[:9])
        look()
        look()
        assert out.read_text().endswith("| ✓ | early | 1 | 2 |\n")
        assert out.read_text().count("early") == 1
        assert capsys.readouterr().out.endswith("| ✓ | early | 1 | 2 |\n")
        journal.write_text(row + row.replace("early", "late"))

    monkeypatch.setattr(doctor, "ask", ask)
    monkeypatch.setattr(groups, "GROUPS", {"one": None})
    found = doctor.run(doctor.Settings(out=out))
    assert [row["name"] for row in found["rows"]] == ["early", "late"]
    assert not found["check_failed"]


def test_a_run_is_a_line_of_json(
    finished: tuple[Path, Done],
    own_home: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A run that was stopped goes on to its end; the report ends with what each phase was to take,
    and took. Where no run can be, a sentence says so.
    """
    monkeypatch.setattr(groups, "GROUPS", {})
    for name, value in own_home.items():
        monkeypatch.setenv(name, value)
    run = shutil.copytree(finished[0], tmp_path / "run")
    (run / run_folder.RESULT).unlink()
    doctor.run(doctor.Settings(run=str(run)))
    told = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert told["phases"].keys() > {"distil", "quantize", "measure"}
    assert all(planned > 0 and took > 0 for planned, took in told["phases"].values())
    assert told["seconds"] > last_line(finished[1])["seconds"]
    git = ["git", "rev-parse", "--short=12", "HEAD"]
    head = subprocess.run(git, cwd=ROOT, capture_output=True, text=True)
    assert told["commit"].removesuffix("-dirty") == head.stdout.strip()
    with pytest.raises(MisError, match="ended with 1: the same command"):
        doctor.run(doctor.Settings(run=str(ROOT / "docs")))
