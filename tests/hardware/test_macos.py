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

import mlx.core as mx
import pytest

from mis_mlx.checks import kernels
from mis_mlx.hardware import macos
from mis_mlx.reporting import progress

# A program that believes it is on a Mac imports the package, then says what the environment holds.
# MLX must not have been imported by then: with it the device may be open.
ENTRY = """
import os, sys
sys.platform = "darwin"
import mis_mlx
assert "mlx.core" not in sys.modules
print(*(os.environ.get(name, "-") for name in sys.argv[1:]))
"""
# The same for a program that Python's import system meets first as a part of the package.
PART = ENTRY.replace("import mis_mlx\n", "import mis_mlx.hardware.clock\n")


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


def entered(code: str, *names: str, **environment: str) -> list[str]:
    """The values of these variables after the program `code`, which began without them."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if k not in (macos.WATCHDOG, macos.NO_COMPILE, macos.DEVICE)
    }
    done = subprocess.run(
        [sys.executable, "-c", code, *names],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("code", [ENTRY, PART])
def test_the_watchdogs_variable_is_set_on_every_way_in(code: str) -> None:
    """By importing the package or a part of it, before MLX; what the user has set stays; on Linux
    nothing is set.
    """
    assert entered(code, macos.WATCHDOG) == ["1"]
    assert entered(code, macos.WATCHDOG, **{macos.WATCHDOG: "0"}) == ["0"]
    assert entered(code.replace("darwin", "linux"), macos.WATCHDOG) == ["-"]


@pytest.mark.parametrize(("gib", "want"), [(8, "3"), (16, "-")])
def test_command_buffers_are_small_on_8_gb(gib: int, want: str) -> None:
    """Metal holds the temporaries of ten of them; what the user has set stays. How many operations
    one has is left to MLX.
    """
    total = f"os.sysconf = lambda name: 4096 if name == 'SC_PAGE_SIZE' else {gib} * 2**18\n"
    code = ENTRY.replace("import mis_mlx\n", f"{total}import mis_mlx\n")
    assert entered(code, macos.MEGABYTES, "MLX_MAX_OPS_PER_BUFFER") == [want, "-"]
    assert entered(code, macos.MEGABYTES, MLX_MAX_MB_PER_BUFFER="50") == ["50"]


def test_a_reader_does_not_take_what_its_starter_set_for_itself() -> None:
    """`generate` as a child of the page has MLX's own buffers; a user's setting reaches it."""
    total = "os.sysconf = lambda name: 4096 if name == 'SC_PAGE_SIZE' else 8 * 2**18\n"
    code = ENTRY.replace("import mis_mlx\n", f"{total}import mis_mlx\n")
    child = code.replace(
        "import mis_mlx\n", "sys.orig_argv = ['x', '-m', 'mis_mlx.generate']\nimport mis_mlx\n"
    )
    start = f"import subprocess\nsubprocess.run([sys.executable, '-c', {child!r}, *sys.argv[1:]])\n"
    assert entered(code + start, macos.MEGABYTES) == ["3", "-"]
    assert entered(code + start, macos.MEGABYTES, MLX_MAX_MB_PER_BUFFER="3") == ["3", "3"]


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


@pytest.mark.parametrize(
    ("code", "device", "want"), [(0, "cpu", "-"), (2, "cpu", "1"), (2, "gpu", "-")]
)
def test_no_installer_window_for_a_run_on_the_cpu(
    code: int, device: str, want: str, bin: Path
) -> None:
    """MIS_MLX_DEVICE=cpu without the command line tools: MLX compiles nothing."""
    program(bin, "xcode-select", f"[ $# = 1 ] && [ $1 = -p ] && exit {code}; exit 64")
    assert entered(ENTRY, macos.NO_COMPILE, **{macos.DEVICE: device}) == [want]


@pytest.mark.parametrize("installed", [True, False])
def test_the_doctors_witness_calls_no_absent_compiler(
    installed: bool, bin: Path, mac: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checks beside the CPU compile where there is a compiler, and not where its name opens a
    window.
    """
    program(bin, "xcode-select", f"exit {0 if installed else 2}")
    calls = list[str]()
    monkeypatch.delenv(macos.NO_COMPILE, raising=False)
    monkeypatch.setattr(mx, "disable_compile", lambda: calls.append("off"))
    monkeypatch.setattr(mx, "enable_compile", lambda: calls.append("on"))
    with pytest.raises(KeyError), kernels.on_cpu():
        assert calls == ([] if installed else ["off"])
        raise KeyError
    assert calls == ([] if installed else ["off", "on"])


def test_without_xcode_select_there_is_no_compiler(
    mac: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it cannot be asked, nothing is compiled; on Linux nobody asks."""
    monkeypatch.setenv("PATH", "/nowhere")
    assert not macos.compiler_installed()
    monkeypatch.setattr(sys, "platform", "linux")
    assert macos.compiler_installed()


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


def test_without_caffeinate_a_command_runs_all_the_same(
    mac: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Mac that has lost it computes."""
    monkeypatch.setenv("PATH", "/nowhere")
    with macos.awake():
        pass
