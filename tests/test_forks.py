"""A fork is a process like any other, to the tests that use it as one."""

from __future__ import annotations

import os
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
            ["-c", TOLD, 1, "x y"],
            {**own_home, "WORD": word},
            tmp_path / word,
            stdout=subprocess.PIPE,
        )
        said, nothing = process.communicate(timeout=60)
        assert said == f"['1', 'x y'] ['1', 'x y'] {tmp_path / word} {word} {process.pid}\n"
        assert nothing is None
        assert process.returncode == process.wait() == 5
        assert process.pid != os.getpid()


@pytest.mark.parametrize("flags", [[], ["-P"]])
def test_where_a_module_comes_from(
    own_home: dict[str, str], tmp_path: Path, flags: list[str]
) -> None:
    """From the current folder first; with -P not from there."""
    (tmp_path / "here.py").write_text("print(5)")
    done = forks.run([*flags, "-m", "here"], own_home, tmp_path)
    assert (done.stdout, done.returncode) == (("", 1) if flags else ("5\n", 0))


def test_it_computes_what_a_process_computes(own_home: dict[str, str]) -> None:
    """With MLX in its threads, on a stream of its own, several at a time."""
    code = (
        "import mlx.core as mx\nx = mx.random.normal((64, 64), "
        "key=mx.random.key(1))\nprint(mx.sum(x @ x.T).item())"
    )
    line = [sys.executable, "-c", code]
    env = {**own_home, "PYTHONPATH": str(forks.ROOT)}
    started = subprocess.run(line, env=env, capture_output=True, text=True, check=True)
    several = [forks.start(["-c", code], own_home, stdout=subprocess.PIPE) for _ in range(3)]
    assert {process.communicate(timeout=60)[0] for process in several} == {started.stdout}
