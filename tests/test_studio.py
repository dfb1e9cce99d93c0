"""The page: refusals without a browser; in Chromium from the first page to an exported model."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import psutil
import pytest

from mis_mlx import studio
from mis_mlx.models import policy
from mis_mlx.studio_page import runs
from mis_mlx.types import MisError
from tests import forks, tiny

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
EXTRA = importlib.util.find_spec("nicegui") is not None
DRIVER = importlib.util.find_spec("playwright") is not None
needs_extra = pytest.mark.skipif(
    not EXTRA, reason="NiceGUI is not installed: pip install 'mis-mlx[studio]'"
)
needs_browser = pytest.mark.skipif(
    not (EXTRA and DRIVER and CHROMIUM),
    reason="needs NiceGUI, Chromium and playwright: pip install 'mis-mlx[studio]' playwright",
)
PATIENCE_S = 180
MOST_BYTES = 150 * 10**6  # of the page's process
QUICK = {
    "max_seq_length": 32, "num_samples": 4, "reconstruct_samples": 4, "eval_windows": 3,
    "scenario": "goral", "iters": 150, "save_every": 4, "learning_rate": 0.01, "q_iters": 2,
    "q_group_size": 32, "bench_tokens": 3, "eval_prompts": 4, "conversations": 0,
}  # fmt: skip


def test_without_the_extra_one_sentence_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Before anything else: nothing is listened to, nothing is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(studio, "find_spec", lambda name: None)
    with pytest.raises(MisError) as error:
        studio.run(studio.Settings(models=("nowhere",)))
    assert re.search(r"needs NiceGUI, which is not installed: .*pip install 'nicegui", str(error))
    assert not list(tmp_path.iterdir())


def test_nothing_imports_the_extra() -> None:
    """Neither the list of commands, nor the help of this one, nor its modules."""
    names = sorted(path.stem for path in (forks.ROOT / "mis_mlx" / "studio_page").glob("*.py"))
    code = """
import contextlib, importlib, io, sys
import mis_mlx.__main__, mis_mlx.studio
from mis_mlx import cli
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    cli.parse(mis_mlx.studio.Settings, ["--help"])
light = {"mis_mlx.studio_page", "mlx", "nicegui", "fastapi", "uvicorn"} & set(sys.modules)
assert not light, light
for name in sys.argv[1:]:
    importlib.import_module(f"mis_mlx.studio_page.{name}")
assert not {"nicegui", "fastapi", "uvicorn"} & set(sys.modules)
"""
    env = {**os.environ, "PYTHONPATH": str(forks.ROOT)}
    done = subprocess.run([sys.executable, "-c", code, *names], env=env, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


@needs_extra
def test_a_folder_that_is_none_and_a_port_that_is_taken(tmp_path: Path) -> None:
    """Two sentences."""
    with pytest.raises(MisError, match="nowhere is not a folder: give one that holds"):
        studio.run(studio.Settings(models=(str(tmp_path / "nowhere"),)))
    with contextlib.closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(MisError, match=f"--port {port} is taken"):
            studio.run(studio.Settings(port=port, no_browser=True))


class Answered(NamedTuple):
    """Status, text, and the cookie that came with it."""

    status: int
    text: str
    cookie: str


class Served(NamedTuple):
    """A page's process and its address."""

    process: subprocess.Popen[str]
    address: str
    folder: Path

    @property
    def place(self) -> str:
        """Host and port."""
        return urlsplit(self.address).netloc

    def get(self, path: str, **headers: str) -> Answered:
        """An answer to a request with these headers, as any program can send it."""
        connection = http.client.HTTPConnection(self.place, timeout=PATIENCE_S)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        with contextlib.closing(connection):
            connection.request("GET", path, headers=named)
            with connection.getresponse() as answer:
                cookie = (answer.getheader("set-cookie") or "").partition(";")[0]
                return Answered(answer.status, answer.read().decode(), cookie)


@contextlib.contextmanager
def page_of(folder: Path, env: dict[str, str], *flags: str) -> Iterator[Served]:
    """The page's process; a run that it started ends with the test."""
    line = [sys.executable, "-m", "mis_mlx.studio", "--no-browser", *flags]
    whole = {**env, "PYTHONPATH": str(forks.ROOT)}
    whole.pop("PYTEST_CURRENT_TEST", None)  # NiceGUI would take it for a test of itself
    with (
        (folder / "studio.err").open("w") as err,
        subprocess.Popen(
            line, cwd=folder, env=whole, stdout=subprocess.PIPE, stderr=err, text=True
        ) as process,
    ):
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            assert address, (folder / "studio.err").read_text()
            yield Served(process, address, folder)
        finally:
            process.kill()
            for path in (folder / runs.BOOKS).glob("*.json"):
                with contextlib.suppress(psutil.Error):
                    psutil.Process(json.loads(path.read_text())["pid"]).kill()


@pytest.fixture
def home(tmp_path: Path, own_home: dict[str, str]) -> dict[str, str]:
    """The environment of a user whose home is empty."""
    return {
        **own_home,
        policy.POLICY: os.environ.get(policy.POLICY, ""),
        "HOME": str(tmp_path / "home"),
    }


@pytest.fixture
def folder(tmp_path: Path, text_folder: Path) -> Path:
    """A user's folder: a model that talks, a text, a settings file."""
    place = tmp_path / "here"
    place.mkdir()
    (place / "text").symlink_to(text_folder)
    shutil.copytree(text_folder, place / "notes")
    tiny.talking(place / "more" / "tiny", ending=0.3)
    lines = [f"{name}: {value}" for name, value in QUICK.items()]
    (place / "quick.yaml").write_text("\n".join(lines) + "\n")
    return place


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
        assert entered.status == 303
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


class Tab:
    """A page in Chromium, by what a person sees."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.errors: list[str] = []
        page.set_default_timeout(1000 * PATIENCE_S)
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def press(self, name: str) -> None:
        """A button."""
        self.page.get_by_role("button", name=name, exact=True).click()

    def sees(self, text: str) -> None:
        """Until it does."""
        self.page.get_by_text(text).first.wait_for()

    def choose(self, label: str, option: str) -> None:
        """An option of a list."""
        self.page.bring_to_front()
        self.page.get_by_label(label, exact=True).click()
        options = self.page.get_by_role("option")
        options.filter(has_text=option).first.click()
        options.first.wait_for(state="hidden")

    def go(self, tab: str) -> None:
        """To one of the five panels."""
        self.page.get_by_role("tab", name=tab).click()

    def wide(self) -> bool:
        """Whether the page has to be pushed sideways."""
        return self.page.evaluate("document.documentElement.scrollWidth > innerWidth + 1")


@contextlib.contextmanager
def browser(**context: Any) -> Iterator[Any]:
    """A context of Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield chromium.new_context(**context)
        finally:
            chromium.close()


def to_the_plan(tab: Tab) -> None:
    """Choose and decide."""
    tab.sees("Which model shall become smaller?")
    tab.choose("Model", "more/tiny")
    tab.choose("Text to learn from", "notes")
    tab.choose("Settings file", "quick.yaml")
    tab.press("Decide")
    tab.press("as the settings file says")
    tab.sees("million parameters")


@needs_browser
@pytest.mark.slow
def test_from_the_first_page_to_an_export(folder: Path, home: dict[str, str]) -> None:
    """Chosen, planned, started, killed, resumed, judged, talked with, exported, deleted.

    Two tabs start one run; the page is closed while it works, and finds it again. Nothing came
    from another host, no script failed, and the page's process stays small.
    """
    with page_of(folder, home, "--models", "more") as served, browser() as context:
        asked: list[str] = []
        context.on("request", lambda request: asked.append(request.url))
        tab = Tab(context.new_page())
        tab.page.goto(served.address)
        other = Tab(context.new_page())
        other.page.goto(f"http://{served.place}/")
        to_the_plan(tab)
        to_the_plan(other)
        tab.press("Start the run")
        tab.sees("tiny-001: running")
        other.press("Start the run")
        other.sees("tiny-001 is running, and one run at a time fits")
        tab.sees("loss 0.")
        tab.page.close()
        assert _state(folder) == "running"
        other.go("Run")
        other.press("Stop at once")
        other.sees("tiny-001: stopped")
        other.press("Resume")
        other.sees("tiny-001: running")
        other.page.close()
        tab = Tab(context.new_page())
        tab.page.goto(f"http://{served.place}/")
        tab.go("Run")
        tab.sees("tiny-001: finished")
        _judge(tab, context)
        tab.go("Keep")
        tab.press("Export")
        tab.sees("Written: exported/tiny-001-gguf")
        assert list((folder / "exported" / "tiny-001-gguf").glob("*.gguf"))
        tab.press("Give to Ollama")
        tab.sees("no Ollama: install it")
        _delete(tab, folder)
        assert not tab.errors
        foreign = [url for url in asked if urlsplit(url).netloc != served.place]
        assert not [url for url in foreign if not url.startswith(("data:", "blob:"))]
        held = psutil.Process(served.process.pid).memory_info().rss
        assert held < MOST_BYTES, f"{held / 1e6:.0f} MB"


def _state(folder: Path) -> str:
    """Of the run, asked by a process in that folder."""
    code = "from mis_mlx.studio_page import runs; print(runs.named('tiny-001').state)"
    env = {**os.environ, "PYTHONPATH": str(forks.ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True)
    return done.stdout.decode().strip()


def _judge(tab: Tab, context: Any) -> None:
    """The report opens in a tab of its own; both models answer."""
    tab.press("Judge")
    tab.press("Make the report")
    with context.expect_page() as opened:
        tab.page.get_by_role("link", name="Open the report").click()
    report = opened.value
    report.wait_for_load_state()
    assert "tiny-001" in report.title()
    report.close()
    prompts = tab.page.get_by_role("group", name="Held-out prompts")
    prompts.get_by_role("button").first.click()
    assert tab.page.get_by_label("Ask both").first.input_value()
    tab.page.get_by_label("Ask both").first.fill("<img src=x onerror=alert(1)> What?")
    tab.page.get_by_label("Tokens").fill("8")
    tab.press("Ask both")
    tab.page.get_by_text(re.compile(r"\d+ tokens.*of memory")).nth(1).wait_for()
    tab.sees("<img src=x onerror=alert(1)> What?")


def _delete(tab: Tab, folder: Path) -> None:
    """Asked twice; a wrong name keeps everything."""
    for name, kept in (("tiny", True), ("tiny-001", False)):
        tab.press("Delete the run")
        tab.press("Delete")
        tab.page.get_by_label("Name of the run").fill(name)
        tab.press("Delete for good")
        tab.sees("Nothing was deleted." if kept else "tiny-001 is deleted")
        assert (folder / "runs" / "tiny-001").exists() is kept


SIGHTS = [(390, 844, "light"), (390, 844, "dark"), (1280, 900, "light"), (1280, 900, "dark")]


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize(("width", "height", "scheme"), SIGHTS)
def test_it_fits_a_phone_and_a_desk(
    folder: Path, home: dict[str, str], width: int, height: int, scheme: str
) -> None:
    """No panel is wider than the window; its colours follow the system's."""
    sight = {"viewport": {"width": width, "height": height}, "color_scheme": scheme}
    with page_of(folder, home, "--models", "more") as served, browser(**sight) as context:
        tab = Tab(context.new_page())
        tab.page.goto(served.address)
        to_the_plan(tab)
        for name in ("Choose", "Decide", "Run", "Judge", "Keep"):
            tab.go(name)
            tab.page.wait_for_timeout(300)
            assert not tab.wide(), name
        colour = tab.page.evaluate("getComputedStyle(document.body).color")
        numbers = [int(number) for number in re.findall(r"\d+", colour)[:3]]
        assert (sum(numbers) > 384) is (scheme == "dark"), colour


@needs_browser
@pytest.mark.slow
def test_by_keyboard_alone(folder: Path, home: dict[str, str]) -> None:
    """Tab, arrows, Enter and Space: from the first page to a started run, and to its stop."""
    with page_of(folder, home, "--models", "more") as served, browser() as context:
        tab = Tab(context.new_page())
        tab.page.goto(served.address)
        tab.sees("Which model shall become smaller?")
        for label, option in (("Model", "more/tiny"), ("Text to learn from", "notes")):
            _pick(tab, label, option)
        _pick(tab, "Settings file", "quick.yaml")
        _reach(tab, "Decide")
        tab.page.keyboard.press("Enter")
        tab.sees("How small, how long")
        _reach(tab, "as the settings file says")
        tab.page.keyboard.press("Enter")
        tab.sees("million parameters")
        _reach(tab, "Start the run")
        tab.page.keyboard.press("Space")
        tab.sees("tiny-001: running")
        _reach(tab, "Stop at once")
        tab.page.keyboard.press("Enter")
        tab.sees("tiny-001: stopped")


FOCUSED = """() => {
  const one = document.activeElement;
  return [one.getAttribute('aria-label'), one.innerText].join(' ');
}"""


def _reach(tab: Tab, name: str) -> None:
    """Press Tab until the focus is on it."""
    for _ in range(60):
        tab.page.keyboard.press("Tab")
        if name.lower() in tab.page.evaluate(FOCUSED).lower():
            return
    raise AssertionError(f"{name} is not reached by Tab")


def _pick(tab: Tab, label: str, option: str) -> None:
    """An option of a list."""
    _reach(tab, label)
    tab.page.keyboard.press("Enter")
    options = tab.page.get_by_role("option")
    options.first.wait_for()
    words = options.all_inner_texts()
    wanted = next(number for number, text in enumerate(words) if option in text)
    for _ in range(len(words)):
        active = tab.page.locator("[role=option].q-manual-focusable--focused")
        if active.count() and option in active.inner_text():
            break
        tab.page.keyboard.press("ArrowDown")
    assert wanted < len(words)
    tab.page.keyboard.press("Enter")
    tab.sees(option)


@needs_browser
@pytest.mark.slow
def test_the_first_page_is_quick(folder: Path, home: dict[str, str]) -> None:
    """How long it takes is told, not asserted: machines differ. What it loads is."""
    began = time.monotonic()
    with page_of(folder, home) as served:
        _, _, token = served.address.partition("?")
        cookie = served.get(f"/?{token}").cookie
        page = served.get("/", Cookie=cookie).text
        print(f"first page: {time.monotonic() - began:.2f} s, {len(page):,} characters")
        assert len(page) < 200_000
        assert psutil.Process(served.process.pid).memory_info().rss < MOST_BYTES
