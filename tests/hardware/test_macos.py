"""What macOS is told, with programs of our making in the place of its own. On a Mac nobody has run
these yet.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mis_mlx.checks import kernels
from mis_mlx.hardware import macos
from mis_mlx.reporting import progress

# A program that believes it is on a Mac imports the package, or first a part of it, then says what
# the environment holds. MLX must not have been imported by then: with it the device may be open.
ENTRY = """
import os, sys
sys.platform = "{platform}"
os.sysconf = lambda name: 4096 if name == "SC_PAGE_SIZE" else {gib} * 2**18
import {way}
assert "mlx.core" not in sys.modules
print(*(os.environ.get(name, "-") for name in sys.argv[1:]))
"""
SET = (macos.WATCHDOG, macos.MEGABYTES, "MLX_MAX_OPS_PER_BUFFER", macos.NO_COMPILE)


def program(folder: Path, name: str, lines: str) -> None:
    """An executable shell script in `folder`."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o755)


@pytest.fixture(name="bin")
def _bin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of programs that are found first."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


@pytest.fixture(name="mac")
def _mac(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process believes that it is on a Mac."""
    monkeypatch.setattr(sys, "platform", "darwin")


def entered(code: str, environment: dict[str, str]) -> list[str]:
    """The values of SET after the program `code`, which began with these and no others."""
    ours = (*SET, macos.DEVICE, macos.OURS)
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    line = [sys.executable, "-c", code, *SET]
    done = subprocess.run(line, env={**kept, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


OWN = {macos.WATCHDOG: "0", macos.MEGABYTES: "50"}
ON_CPU = {macos.DEVICE: "cpu"}


@pytest.mark.parametrize(
    ("how", "xcode", "given", "want"),
    [
        ({"gib": 8}, 0, {}, "1 3 - -"),
        ({"gib": 16, "way": "mis_mlx.hardware.clock"}, 2, {}, "1 - - -"),
        ({"gib": 8}, 0, OWN, "0 50 - -"),
        ({"gib": 8, "platform": "linux"}, 2, {}, "- - - -"),
        ({"gib": 16}, 0, ON_CPU, "1 - - -"),
        ({"gib": 16}, 2, ON_CPU, "1 - - 1"),
        ({"gib": 16}, 2, {macos.DEVICE: "gpu"}, "1 - - -"),
    ],
)
def test_what_is_set_on_every_way_in(
    how: dict[str, Any], xcode: int, given: dict[str, str], want: str, bin: Path
) -> None:
    """Before MLX: the watchdog's variable; small command buffers on 8 GB, of which Metal holds the
    temporaries of ten; no compiling for a run on the CPU without the command line tools, which
    would open an installer's window. What the user has set stays; on Linux nothing is set.
    """
    program(bin, "xcode-select", f"[ $# = 1 ] && [ $1 = -p ] && exit {xcode}; exit 64")
    code = ENTRY.format(**{"way": "mis_mlx", "platform": "darwin", **how})
    assert entered(code, given) == want.split()


def test_a_reader_does_not_take_what_its_starter_set_for_itself() -> None:
    """`generate` as a child of the page has MLX's own buffers; a user's setting reaches it."""
    code = ENTRY.format(way="mis_mlx", platform="darwin", gib=8)
    child = "import sys\nsys.orig_argv = ['x', '-m', 'mis_mlx.generate']\n" + code
    start = f"import subprocess\nsubprocess.run([sys.executable, '-c', {child!r}, *sys.argv[1:]])\n"
    found = entered(code + start, {})
    assert (found[1], found[5]) == ("3", "-")
    found = entered(code + start, {macos.MEGABYTES: "3"})
    assert (found[1], found[5]) == ("3", "3")


@pytest.mark.parametrize(
    ("line", "want"),
    [
        ("python -m mis_mlx.generate --prompt x", True),
        ("python -m mis_mlx bench -p 512", True),
        (".venv/bin/python .venv/bin/mis_mlx.bench", True),
        ("python -m mis_mlx.distill --out bench", False),
        ("python -m mis_mlx distill -c generate", False),
        ("python -c print(1) generate", False),
        ("python program.py", False),
    ],
)
def test_readers_of_a_model_keep_mlx_s_own(line: str, want: bool) -> None:
    """`bench` and `generate` decode with small arrays, and each buffer costs them time."""
    assert macos.reads_only(line.split()) == want


@pytest.mark.parametrize("installed", [True, False])
def test_the_doctors_witness_calls_no_absent_compiler(
    installed: bool, bin: Path, mac: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checks beside the CPU compile where that opens no installer's window."""
    program(bin, "xcode-select", f"exit {0 if installed else 2}")
    calls = list[str]()
    monkeypatch.delenv(macos.NO_COMPILE, raising=False)
    monkeypatch.setattr(mx, "disable_compile", lambda: calls.append("off"))
    monkeypatch.setattr(mx, "enable_compile", lambda: calls.append("on"))
    with pytest.raises(KeyError), kernels.on_cpu():
        assert calls == ([] if installed else ["off"])
        raise KeyError
    assert calls == ([] if installed else ["off", "on"])


CAFFEINATE = 'echo "$@" >"$0.seen"; echo $$ >"$0.pid"; exec sleep 60'


def until(true: Callable[[], bool]) -> bool:
    """Whether it becomes true within ten seconds."""
    end = time.monotonic() + 10
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return true()


def alive(pid: int) -> bool:
    """Whether there is such a process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_command_keeps_a_mac_awake_until_it_ends(bin: Path, mac: None) -> None:
    """`caffeinate -i -w OURS` runs beside a command, once, in a session of its own, so that Ctrl-C
    is not for it.
    """
    program(bin, "caffeinate", CAFFEINATE)
    seen = bin / "caffeinate.seen"
    pid = bin / "caffeinate.pid"
    with pytest.raises(KeyboardInterrupt), progress.run("distill"):
        assert until(lambda: pid.is_file() and bool(pid.read_text()))
        assert seen.read_text().split() == ["-i", "-w", str(os.getpid())]
        child = int(pid.read_text())
        assert alive(child)
        assert os.getsid(child) == child
        seen.unlink()
        with progress.bar("targets", 3):
            time.sleep(0.2)
        assert not seen.exists()
        assert alive(child)
        raise KeyboardInterrupt
    assert not alive(child)


def test_a_mac_that_has_lost_its_programs(mac: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It computes without caffeinate; where xcode-select cannot be asked, nothing is compiled. On
    Linux nobody asks.
    """
    monkeypatch.setenv("PATH", "/nowhere")
    with macos.awake():
        pass
    assert not macos.compiler_installed()
    monkeypatch.setattr(sys, "platform", "linux")
    assert macos.compiler_installed()
