"""A fast BLAS under every command on Linux: the library, its place, threads, who has it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from mis_mlx.hardware import blas, child_process
from mis_mlx.types import Checkpoint

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a Mac needs none of this")

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "mis_mlx" / "hardware" / "blas.py"
OURS = (blas.MARK, blas.THREADS, "LD_PRELOAD", "MLX_HOSTFILE", "MLX_RANK")

# Notes how a Python process came to its end: its command line, and whether a BLAS stands before
# MLX's own.
WITNESS = """
import atexit, ctypes, json, os, sys
def note():
    end = {
        "argv": sys.orig_argv[1:],
        "fast": hasattr(ctypes.CDLL(None), "cblas_sgemm"),
        "preload": os.environ.get("LD_PRELOAD"),
        "threads": os.environ.get("OPENBLAS_NUM_THREADS"),
        "mark": os.environ.get("MIS_MLX_BLAS"),
    }
    with open(os.environ["WITNESS"], "a") as file:
        print(json.dumps(end), file=file)
atexit.register(note)
"""


class Bare:
    """Runs Python as from a shell that has set nothing of ours. cache: has this machine's rates."""

    def __init__(self, folder: Path, cache: str):
        (folder / "sitecustomize.py").write_text(WITNESS)
        self.notes = folder / "notes"
        self.env = {name: value for name, value in os.environ.items() if name not in OURS}
        self.env |= {
            "PYTHONPATH": f"{folder}:{ROOT}",
            "WITNESS": str(self.notes),
            "HOME": str(folder),
        }
        self.env |= {
            "HF_HUB_OFFLINE": "1",
            "XDG_CACHE_HOME": str(folder / "cache"),
            "MIS_MLX_CACHE": cache,
        }

    def run(
        self, *argv: object, **env: str
    ) -> tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]]:
        """What came of `python ARGV`, and how each of its Python processes ended."""
        self.notes.unlink(missing_ok=True)
        line = [sys.executable, *map(str, argv)]
        done = subprocess.run(line, env={**self.env, **env}, capture_output=True, text=True)
        return done, [json.loads(note) for note in self.notes.read_text().splitlines()]


@pytest.fixture
def bare(tmp_path: Path, own_home: dict[str, str]) -> Bare:
    """A shell of its own."""
    return Bare(tmp_path, own_home["MIS_MLX_CACHE"])


@pytest.fixture(scope="module")
def library() -> Path:
    """The renamed OpenBLAS of this environment."""
    made = blas.prepared()
    assert made, blas.SLOW
    return made


@pytest.mark.parametrize("content", [b"", b"\x7fELF" + bytes(200), b"no library at all " * 50])
def test_another_file_is_not_renamed(content: bytes) -> None:
    """What is no such library raises an error that `prepared` takes for "not to be had"."""
    with pytest.raises(blas.OTHERWISE):
        blas.renamed(content)


def test_where_the_copy_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the environment; in the cache if that is read-only or has a blank; else nowhere."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "env"))
    made = blas.prepared()
    assert made
    assert made.parent == tmp_path / "env" / "lib"
    made.unlink()  # not overwritten: it is open in this process
    made.write_bytes(b"half")  # as after a power cut
    again = blas.prepared()
    assert again == made
    assert made.stat().st_size > 10**6
    (tmp_path / "file").touch()
    for bad in (tmp_path / "my env", tmp_path / "file"):
        monkeypatch.setattr(sys, "prefix", str(bad))
        made = blas.prepared()
        assert made
        assert made.parent == tmp_path / "cache" / "mis_mlx"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert blas.prepared() is None
    # no half ones
    assert sorted(p.name for p in (tmp_path / "cache" / "mis_mlx").iterdir()) == [made.name]


@pytest.mark.parametrize(
    ("cores", "load", "processes", "count"),
    [
        (2, 0.4, 1, 2),
        (2, 0.6, 1, 1),
        (2, 7.0, 1, 1),
        (8, 3.2, 1, 5),
        (8, 0.0, 3, 3),
        (1.5, 0.0, 1, 2),
    ],
)
def test_threads_follow_cores_and_load(
    cores: float, load: float, processes: int, count: int
) -> None:
    """Cores that others keep busy are left to them; nobody gets none."""
    assert blas.most(cores, load, processes) == count


@pytest.mark.parametrize(
    ("percents", "said", "count"),
    [
        ([0.0], "0.0 busy", "2"),
        ([20.0], "0.4 busy", "2"),
        ([40.0, 40.0, 10.0], "0.2 busy", "2"),  # the kernel wrote what the last command made
        ([50.0] * 20, "1.0 busy; OPENBLAS_NUM_THREADS=2 computes up to 2 times as fast", "1"),
    ],
)
def test_threads_go_by_what_stays_busy(
    monkeypatch: pytest.MonkeyPatch, percents: list[float], said: str, count: str
) -> None:
    """Shares of all cores in some moments, whatever the last minute was like; what ends within
    seconds takes no thread; without psutil nothing is taken as busy.
    """
    moments = iter(percents)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    # no control group, no ring
    monkeypatch.setattr(blas.Path, "read_text", lambda *_: "max 100000")
    monkeypatch.setattr(os, "getloadavg", lambda: (9.0, 9.0, 9.0))
    monkeypatch.setattr(psutil, "cpu_percent", lambda seconds: next(moments))
    found, reason = blas.threads()
    assert found == count
    assert reason.startswith(f"2 cores, {said}")
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert blas.threads() == ("2", "2 cores, 0.0 busy")


def test_program_becomes_the_command(bare: Bare) -> None:
    """The same process, arguments to the letter, with BLAS and threads said in one line. -S: an
    environment without the library, which the first line says; the command runs all the same.
    """
    line = ("-X", "utf8", "-c", "import sys; print(sys.argv[1:])", "a b", "--x=*", "")
    done, (note,) = bare.run("-I", PROGRAM, sys.executable, *line)
    assert done.stdout == "['a b', '--x=*', '']\n"
    assert note["argv"] == list(line)
    assert note["fast"]
    assert note["mark"] == blas.CHOSEN
    assert int(note["threads"]) >= 1
    assert done.stderr.startswith(f"mis: OPENBLAS_NUM_THREADS={note['threads']} (")
    assert done.stderr.count("\n") == 1
    done, (note,) = bare.run("-I", "-S", PROGRAM, sys.executable, "-c", "print(5)")
    assert done.stdout == "5\n"
    assert not note["fast"]
    assert f"{sys.executable} -m pip install" in done.stderr.splitlines()[0]


def test_what_is_set_already_stays(bare: Bare, library: Path, tmp_path: Path) -> None:
    """Threads, a preloaded BLAS, another preloaded library; "off" leaves everything out."""
    command = ("-I", PROGRAM, sys.executable, "-c", "0")
    theirs = tmp_path / "libopenblas.so.0"
    theirs.write_bytes(library.read_bytes())
    done, (note,) = bare.run(*command, OPENBLAS_NUM_THREADS="7", LD_PRELOAD=str(theirs))
    assert note["threads"] == "7"
    assert note["preload"] == str(theirs)
    assert done.stderr == ""
    assert bare.run(*command, LD_PRELOAD="libm.so.6")[1][0]["preload"] == f"{library}:libm.so.6"
    done, (note,) = bare.run(*command, MIS_MLX_BLAS="off")
    assert not note["fast"]
    assert note["threads"] is None
    assert done.stderr == ""


@pytest.mark.parametrize(
    "way", [["mis_mlx", "plan"], pytest.param(["mis_mlx.plan"], marks=pytest.mark.slow)]
)
@pytest.mark.thorough
def test_commands_start_again_with_it_once(bare: Bare, llama: Checkpoint, way: list[str]) -> None:
    """`python -m mis_mlx plan` and `python -m mis_mlx.plan`: Python's flags and ours as they were,
    all of them.
    """
    line = ["-X", "utf8", "-W", "error", "-P", "-m", *way, "--teacher", str(llama.path)]
    done, notes = bare.run(*line)
    assert done.returncode == 0, done.stderr
    # A stranger's tokenizer is tried in a process of its own, with what its parent has.
    tried = ["-P", "-m", child_process.__name__]
    assert [note["argv"] for note in notes if note["argv"] != tried] == [line]
    assert all(note["fast"] for note in notes)
    assert done.stderr.count("mis: OPENBLAS_NUM_THREADS=") == 1
    json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("flags", [["--help"], ["--no-such-flag"]])
def test_nothing_starts_again_where_nothing_is_computed(bare: Bare, flags: list[str]) -> None:
    """Help, version and wrong usage answer at once."""
    done, (note,) = bare.run("-m", "mis_mlx.plan", *flags)
    assert done.returncode == (2 if "no-such" in flags[0] else 0)
    assert not note["fast"]
    assert "OPENBLAS" not in done.stderr


@pytest.mark.parametrize("first", ["mlx.core", "mis_mlx"])
def test_a_program_that_imported_mlx_first_is_told(bare: Bare, first: str) -> None:
    """MLX has linked its own products by then, which are slow and add up in another order."""
    code = f"import {first}, mis_mlx; mis_mlx.quantize; from mis_mlx.hardware import blas_threads; "
    done, _ = bare.run("-c", f"{code}print(blas_threads.name())", OPENBLAS_NUM_THREADS="1")
    late = first == "mlx.core"
    assert done.stdout == ("MLX's own\n" if late else "OpenBLAS\n")
    assert (blas.LATE in done.stderr) == late


CHANGE = """
import hashlib, os, sys
import mis_mlx
mis_mlx.quantize
import mlx.core as mx
import numpy as np
from mis_mlx.hardware import blas_threads
cores, *wanted = map(int, sys.argv[1:])
os.sched_getaffinity = lambda process: range(cores)
for threads in wanted:
    blas_threads.go_on_with(threads)
a, b = (np.random.default_rng(i).standard_normal((130, 1000), np.float32) for i in (1, 2))
by_mlx = mx.matmul(mx.array(a), mx.array(b).T, stream=mx.cpu)
bits = hashlib.sha256(np.array(by_mlx).tobytes() + (a @ b.T).tobytes()).hexdigest()
print(blas_threads.at_start(), os.environ["OPENBLAS_NUM_THREADS"], bits)
"""


@pytest.mark.slow
def test_threads_of_a_beginning_come_back(bare: Bare) -> None:
    """Of MLX's products and of numpy's, which have a library of their own: the bits are those of a
    process that began with as many. More than there are cores are not taken.
    """

    def computed(begins: str, *argv: int) -> list[str]:
        done, _ = bare.run("-c", CHANGE, *argv, OPENBLAS_NUM_THREADS=begins)
        return done.stdout.split()

    one = computed("1", 2)
    two = computed("2", 2)
    assert [one[:2], two[:2]] == [["1", "1"], ["2", "2"]]
    assert computed("1", 2, 2) == two
    assert computed("2", 2, 1) == one
    assert computed("1", 1, 2) == one
