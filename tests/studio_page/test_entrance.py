"""How the browser is opened, and who comes in over real sockets: nobody else, and no path."""

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


@needs_extra
def test_nobody_else_gets_in(folder: Path, home: dict[str, str]) -> None:
    """Over real sockets: no token, another host, another origin, paths, the page's connection.

    The token opens once; with the cookie the page answers, and reports are those of runs.
    """
    (folder / "report.html").write_text("not yours")
    with page_of(folder, home) as served:
        _, _, token = served.address.partition("?")
        outside = "open the address"
        for path in ("/", "/report/x", "/_nicegui_ws/socket.io/?EIO=4&transport=polling", "/docs"):
            answer = served.get(path)
            assert answer.status == 403, path
            assert outside in answer.text.lower()
        assert served.get(f"/?{token}", Host="evil.example").status == 403
        assert served.get(f"/?{token}", Origin="http://evil.example").status == 403
        upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec_WebSocket_Version": "13"}
        upgrade["Sec_WebSocket_Key"] = "AAAAAAAAAAAAAAAAAAAAAA=="
        socket_path = "/_nicegui_ws/socket.io/?EIO=4&transport=websocket"
        assert served.get(socket_path, **upgrade).status == 403
        entered = served.get(f"/?{token}")
        assert entered.status == 200
        assert not served.get("/").cookie
        cookie = entered.cookie
        assert served.get(f"/?{token}").status == 403
        assert served.get("/", Cookie=cookie).status == 200
        assert served.get(socket_path, Cookie=cookie, **upgrade).status == 101
        other = {"Origin": "http://evil.example", **upgrade}
        assert served.get(socket_path, Cookie=cookie, **other).status == 403
        for name in ("..", "%2e%2e", "..%2f..", ".studio", "%2fetc%2fpasswd", "x%00", "a/b"):
            answer = served.get(f"/report/{name}", Cookie=cookie)
            assert answer.status in (403, 404), name
            assert "not yours" not in answer.text
        for path in ("/docs", "/openapi.json", "/redoc", "/static/..%2f..%2fquick.yaml"):
            assert served.get(path, Cookie=cookie).status == 404, path
        listening = psutil.Process(served.process.pid).net_connections("tcp")
        assert {each.laddr.ip for each in listening} == {"127.0.0.1"}


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
