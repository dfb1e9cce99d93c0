"""How the browser is opened: what others on this machine see of it, and that nobody waits."""

from __future__ import annotations

import signal
import stat
import time
from pathlib import Path
from urllib.parse import unquote, urlsplit

import psutil
import pytest

from mis_mlx.studio_page import entrance, runs
from tests.studio_page.driving import PATIENCE_S, Served, needs_extra, page_of

# A browser in the terminal: it has its address as an argument, and stays.
STAYS = """#!/bin/sh
echo "$$" "$@" >seen.new
mv seen.new seen
exec sleep 60
"""


def with_browser(folder: Path, home: dict[str, str], script: str) -> dict[str, str]:
    """The environment of a user whose browser this is."""
    program = folder / "browser"
    program.write_text(script)
    program.chmod(0o755)
    return {**home, "BROWSER": f"{program} %s"}


def seen(folder: Path) -> list[str]:
    """The process and the arguments of the browser."""
    until = time.monotonic() + PATIENCE_S
    while not (folder / "seen").exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    return (folder / "seen").read_text().split()


def in_(served: Served) -> bool:
    """Whether the page lets a browser in, and shows itself to it."""
    _, _, token = served.address.partition("?")
    cookie = served.get(f"/?{token}").cookie
    return served.get("/", Cookie=cookie).status == 200


@needs_extra
def test_nobody_else_sees_the_token_and_nobody_waits(folder: Path, home: dict[str, str]) -> None:
    """The argument is a file that this user alone can read. The page answers while the browser's
    program has not ended. The file goes with the page.
    """
    env = with_browser(folder, home, STAYS)
    with page_of(folder, env, opens=True) as served:
        pid, address = seen(folder)
        assert psutil.pid_exists(int(pid))
        _, _, token = served.address.partition("token=")
        assert token not in address
        file = Path(unquote(urlsplit(address).path))
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert served.address in file.read_text()
        assert in_(served)
        served.process.send_signal(signal.SIGINT)
        assert served.process.wait(PATIENCE_S) == 0
        assert not file.exists()
        psutil.Process(int(pid)).kill()


@needs_extra
def test_without_a_display_the_address_is_printed(folder: Path, home: dict[str, str]) -> None:
    """No browser takes the terminal, and nothing is written."""
    named = ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")
    env = {name: value for name, value in home.items() if name not in named}
    with page_of(folder, env, opens=True) as served:
        assert in_(served)
        assert not (folder / runs.BOOKS).exists()
        assert psutil.Process(served.process.pid).children() == []


def test_a_folder_that_cannot_be_written_opens_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The address is printed all the same."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("a file")
    with entrance.redirecting("http://x/?a=1&b=2", wanted=True) as path:
        assert path is None
    (tmp_path / "runs").unlink()
    with entrance.redirecting("http://x/?a=1&b=2", wanted=True) as path:
        assert path
        assert "url=http://x/?a=1&amp;b=2" in path.read_text()
