"""Nothing opens a connection but the download of what the user named: an audit hook of Python's
watches every process of a real run. test_source.py reads who could.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import mostly_thorough
from tests.faults import jobs
from tests.faults.conftest import Note

ROOT = Path(__file__).parents[2]
WATCH = """
import os, sys
CALLS = ("connect", "bind", "sendto", "getaddrinfo", "gethostbyname")
EVENTS = [f"socket.{call}" for call in CALLS]
def hook(event, arguments):
    if event in EVENTS:
        with open(os.environ["MIS_MLX_SEEN"], "a") as file:
            file.write(f"{event} {arguments[1:]}\\n")
sys.addaudithook(hook)
"""


def watched(argv: list[str], env: dict[str, str], place: Path) -> tuple[str, str]:
    """Run a program: (what it and its children tried to connect to, what it said)."""
    place.mkdir()
    (place / "sitecustomize.py").write_text(WATCH)
    seen = place / "seen"
    seen.write_text("")
    own = {**env, "PYTHONPATH": f"{place}:{ROOT}", "MIS_MLX_SEEN": str(seen)}
    done = subprocess.run(
        [sys.executable, *argv], env=own, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return seen.read_text(), done.stdout + done.stderr


@pytest.mark.parametrize("command", mostly_thorough(["distill", "generate", "export"]))
def test_a_run_talks_to_nobody(
    command: str,
    all_jobs: dict[str, jobs.Job],
    own_home: dict[str, str],
    tmp_path: Path,
    note: Note,
) -> None:
    """A whole run, its children included, with the hub not switched off: no connect, no look-up of
    a name.

    And its user's token is in nothing that it says or leaves behind.
    """
    model, text = all_jobs["distill"].made
    few = "--max-seq-length 32 --num-samples 2 --ffn 256 --iters 2 --eval-windows 1"
    more = "--reconstruct-samples 2 --q-iters 1 --out"
    flags = {
        "distill": ["--teacher", model, "--data", text, *few.split(), *more.split()],
        "generate": ["--max-tokens", 3, "--model"],
        "export": ["--model", model, "--out"],
    }[command]
    last = model if command == "generate" else tmp_path / "out"
    secret = "hf_" + "S" * 34
    env = {**{k: v for k, v in own_home.items() if k != "HF_HUB_OFFLINE"}, "HF_TOKEN": secret}
    seen, said = watched(
        ["-m", f"mis_mlx.{command}", *map(str, [*flags, last])], env, tmp_path / "watch"
    )
    assert seen == ""
    left = [p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert secret not in said
    assert not any(secret.encode() in each for each in left)
    note("no connection is opened, children included", command, {"none": 1})


def test_the_watch_sees_a_connection(own_home: dict[str, str], tmp_path: Path) -> None:
    """A test of the test: one try to connect to this machine itself, in a child of the program."""
    code = "import socket; socket.socket().connect_ex(('127.0.0.1', 9))"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    assert "socket.connect" in watched(["-c", program], own_home, tmp_path / "watch")[0]
