"""Who and what comes in over real sockets: nobody else, and no path."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from tests.studio_page.driving import (
    FORGE,
    RECORD,
    Tab,
    browser,
    needs_browser,
    needs_extra,
    page_of,
    to_the_plan,
)


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


PATHS = ("../../precious", "/etc/passwd", "..", "--out", "runs/../..", -1, 99, "x\0")


@needs_browser
@pytest.mark.slow
def test_no_message_of_the_page_carries_a_path(kept: Path, home: dict[str, str]) -> None:
    """All that the page ever sent, sent again with a path in place of every value of its fields.

    Over its own connection, as the browser has it. Nothing starts, nothing outside is read,
    written or deleted, and the page goes on.
    """
    precious = kept.parent / "precious"
    precious.mkdir()
    (precious / "train.jsonl").write_text("{}\n")
    (precious / "config.yaml").write_text("iters: 1\n")
    outside = tree(kept.parent, but=(kept, kept.parent / "home"))
    inside = tree(kept / "runs", but=(kept / "runs" / ".studio",))
    with page_of(kept, home, "--models", "more") as served, browser() as context:
        tab = Tab(context, served.address)
        to_the_plan(tab)
        tab.page.evaluate(RECORD)
        touch_every_field(tab)
        for path in PATHS:
            assert tab.page.evaluate(FORGE, [path]) > 10
        tab.page.wait_for_timeout(3000)
        another = Tab(context, f"http://{served.place}/")
        another.sees("Which model shall become smaller?")
        another.go("Run")
        another.sees("tiny-001: finished")
        assert served.process.poll() is None
        assert not commands_of(served.process.pid)
    assert tree(kept.parent, but=(kept, kept.parent / "home")) == outside
    assert tree(kept / "runs", but=(kept / "runs" / ".studio",)) == inside
    assert not (kept / "exported").exists()
    assert not list((kept / "runs" / ".studio").glob("*.json"))


def touch_every_field(tab: Tab) -> None:
    """Choose, move and write where there is something to; press nothing that acts."""
    tab.go("Choose")
    tab.choose("Model", "a model of the hub")
    tab.page.get_by_label("Model on the Hugging Face hub").fill("owner/model")
    tab.choose("Text to learn from", "the built-in text")
    tab.choose("Settings file", "none")
    tab.go("Decide")
    for name in ("size", "allowed loss"):
        tab.press(name)
        tab.page.get_by_role("slider").first.press("ArrowRight")
    tab.go("Run")
    tab.page.get_by_role("button", name="tiny-001: finished").click()
    tab.go("Judge")
    tab.page.get_by_label("Ask both").first.fill("What?")
    tab.page.get_by_label("Tokens").fill("8")
    tab.go("Keep")
    tab.choose("Form", "8 bits")
    tab.page.get_by_text("Upload to the Hugging Face hub").click()
    tab.page.get_by_label("Repository").fill("owner/model")
    tab.page.get_by_label("License").fill("mit")
    tab.press("Delete the run")
    tab.press("Delete")
    tab.page.get_by_label("Name of the run").fill("other")
    tab.press("Delete for good")
    tab.sees("Nothing was deleted.")


def tree(folder: Path, but: tuple[Path, ...]) -> dict[str, int]:
    """{path: bytes} of what stands in a folder, without some of its folders."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and not any(path.is_relative_to(skipped) for skipped in but):
            found[str(path)] = path.stat().st_size
    return found


def commands_of(pid: int) -> list[list[str]]:
    """The command lines of a page's children that do more than answer a question."""
    quiet = {"mis_mlx.hardware.child_process", "--dry-run"}
    acting = []
    for child in psutil.Process(pid).children(recursive=True):
        line = child.cmdline()
        if not quiet & set(line):
            acting.append(line)
    return acting
