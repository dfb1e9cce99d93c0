"""Nothing in the package opens a connection but the download of a model, a wheel or a data set that
the user named.

Read in the source, and watched: an audit hook of Python's in every process of a real run.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import mostly_thorough
from tests.faults import jobs
from tests.faults.conftest import Note

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "mis_mlx"
TALKATIVE = {
    *("socket", "http", "urllib", "requests", "httpx", "socketserver", "ssl", "ftplib", "smtplib"),
    *("asyncio", "xmlrpc", "telnetlib", "websockets", "aiohttp", "huggingface_hub", "datasets"),
}
# Who may, and what for.
MAY = {
    "storage/hub.py": "a model from the Hugging Face hub",
    "data/preparation.py": "a data set from the hub",
    "judge/tasks/questions.py": "a data set from the hub",
    "studio_page/decide.py": "asyncio's threads; opens nothing",
    "studio_page/run_panel.py": "quotes a name for an address of the page",
    "studio_page/judge.py": "asyncio's threads; opens nothing",
    "studio_page/guard.py": "takes the addresses of requests to the page apart",
    "hardware/jobs.py": "asyncio's child processes; opens nothing",
    "hardware/sockets.py": "asks of connections that mlx.launch made whether the other end lives; "
    "opens none to others; finds a free port of this machine for the page of `studio`",
}
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


def talkers(path: Path) -> set[str]:
    """Modules that can talk to a network and are imported by a file, anywhere in it."""
    found = set[str]()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        found |= {name.split(".")[0] for name in names} & TALKATIVE
    return found


def test_only_downloads_can_talk() -> None:
    """No other module imports anything that opens a connection."""
    every = {str(path.relative_to(PACKAGE)): talkers(path) for path in PACKAGE.rglob("*.py")}
    found = {name: modules for name, modules in every.items() if modules}
    assert found.keys() <= MAY.keys(), found
    assert "storage/hub.py" in found


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
