"""A fork is a process like any other, to the tests that use it as one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import forks

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere processes are started")
TOLD = """
import os, sys
print(sys.argv[1:], sys.orig_argv[3:], os.getcwd(), os.environ["WORD"], os.getpid())
sys.exit(5)
"""


def test_argv_folder_environment_and_exit_code(own_home: dict[str, str], tmp_path: Path) -> None:
    """They are what was asked for; the next fork of the same server does not see them."""
    for word in ("a", "b"):
        (tmp_path / word).mkdir()
        process = forks.start(
            ["-c", TOLD, 1, "x y"], {**own_home, "WORD": word}, tmp_path / word, stdout=subprocess.PIPE
        )
        said, nothing = process.communicate(timeout=60)
        assert said == f"['1', 'x y'] ['1', 'x y'] {tmp_path / word} {word} {process.pid}\n" and nothing is None
        assert process.returncode == process.wait() == 5 and process.pid != os.getpid()


def test_an_exception_is_a_traceback_and_1(own_home: dict[str, str]) -> None:
    """As the interpreter does it, after what was registered for the end."""
    done = forks.run(["-c", "import atexit; atexit.register(print, 'end'); print('begin'); 1 / 0"], own_home)
    assert (done.returncode, done.stdout) == (1, "begin\nend\n")
    assert done.stderr.startswith("Traceback") and done.stderr.endswith("ZeroDivisionError: division by zero\n")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_signal_is_its_end(own_home: dict[str, str], number: int) -> None:
    """The code is minus its number; SIGINT raises KeyboardInterrupt."""
    process = forks.start(["-c", "print(1, flush=True); input()"], own_home, None, subprocess.PIPE, subprocess.PIPE)
    assert process.stdout and process.stdout.readline() == "1\n" and process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0)
    process.send_signal(number)
    process.communicate()
    assert process.returncode == -number


def test_ctrl_c_is_an_exception(own_home: dict[str, str]) -> None:
    """The server ignores it, its forks do not."""
    code = "import time\ntry: print(1, flush=True); time.sleep(60)\nexcept KeyboardInterrupt: print(2)"
    process = forks.start(["-c", code], own_home, stdout=subprocess.PIPE)
    assert process.stdout and process.stdout.readline() == "1\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate() == ("2\n", None)


def test_it_computes_what_a_process_computes(own_home: dict[str, str]) -> None:
    """With MLX in its threads, on a stream of its own, several at a time."""
    code = "import mlx.core as mx\nx = mx.random.normal((64, 64), key=mx.random.key(1))\nprint(mx.sum(x @ x.T).item())"
    line, env = [sys.executable, "-c", code], {**own_home, "PYTHONPATH": str(forks.ROOT)}
    started = subprocess.run(line, env=env, capture_output=True, text=True, check=True)
    several = [forks.start(["-c", code], own_home, stdout=subprocess.PIPE) for _ in range(3)]
    assert {process.communicate(timeout=60)[0] for process in several} == {started.stdout}


def test_a_module_is_main(own_home: dict[str, str], tmp_path: Path) -> None:
    """`-m` of what the server has imported, and of a file: usage errors name the command and end with 2."""
    done = forks.run(["-m", "mis_mlx.distill", "--no-such-flag"], own_home)
    assert done.returncode == 2 and "mis_mlx.distill" in done.stderr
    (tmp_path / "x.py").write_text("import sys\nassert __name__ == '__main__'\nprint(sys.argv, sys.path[0])\n")
    done = forks.run([tmp_path / "x.py", 3], own_home)
    assert done.stdout == f"['{tmp_path}/x.py', '3'] {tmp_path}\n", done.stderr
