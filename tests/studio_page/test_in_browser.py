"""In Chromium: from the first page to a talk with both models, on all widths, by keyboard."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from tests.studio_page.driving import (
    MOST_BYTES,
    NAMELESS,
    SMALL,
    Tab,
    browser,
    needs_browser,
    page_of,
    state,
    to_the_plan,
)


@needs_browser
@pytest.mark.slow
def test_from_the_first_page_to_a_talk(folder: Path, home: dict[str, str]) -> None:
    """Chosen, planned, started, killed, resumed, judged, talked with; how to export it is said.

    Two tabs start one run; the page is closed while it works, and finds it again. Nothing came
    from another host, no script failed, and the page's process stays small.
    """
    with page_of(folder, home, "--models", "more") as served, browser() as context:
        asked: list[str] = []
        context.on("request", lambda request: asked.append(request.url))
        tab = Tab(context, served.address)
        other = Tab(context, f"http://{served.place}/")
        to_the_plan(tab)
        to_the_plan(other)
        tab.press("Start the run")
        tab.sees("tiny-001: running")
        other.press("Start the run")
        other.sees("tiny-001 is running, and one run at a time fits")
        tab.sees("loss 0.")
        tab.page.close()
        assert state(folder) == "running"
        other.go("Run")
        other.press("Stop at once")
        other.sees("tiny-001: stopped")
        other.press("Resume")
        other.sees("tiny-001: running")
        other.page.close()
        tab = Tab(context, f"http://{served.place}/")
        tab.go("Run")
        tab.sees("tiny-001: finished")
        tab.press("Make the report")
        report = tab.page.frame_locator("iframe[title=Report]")
        report.get_by_text("tiny-001").first.wait_for()
        tab.sees("-m mis_mlx export --model runs/tiny-001/model")
        _judge(tab)
        assert not tab.errors
        foreign = [url for url in asked if urlsplit(url).netloc != served.place]
        assert not [url for url in foreign if not url.startswith(("data:", "blob:"))]
        held = psutil.Process(served.process.pid).memory_info().rss
        assert held < MOST_BYTES, f"{held / 1e6:.0f} MB"


def _judge(tab: Tab) -> None:
    """Both models answer."""
    tab.press("Judge")
    prompts = tab.page.get_by_role("group", name="Held-out prompts")
    prompts.get_by_role("button").first.click()
    assert tab.page.get_by_label("Ask both").first.input_value()
    tab.page.get_by_label("Ask both").first.fill("<img src=x onerror=alert(1)> What?")
    tab.page.get_by_label("Tokens").fill("8")
    tab.press("Ask both")
    first = context_used(tab, answers=2)
    tab.sees("<img src=x onerror=alert(1)> What?")
    _talk_on(tab, first)


def context_used(tab: Tab, answers: int) -> list[int]:
    """Tokens of context that each answer's figures tell, once there are so many answers."""
    figures = tab.page.get_by_text(re.compile(r"of 512 tokens of context"))
    figures.nth(answers - 1).wait_for()
    texts = figures.all_inner_texts()
    assert len(texts) == answers
    return [int(re.findall(r"(\d+) of 512 tokens", text)[0]) for text in texts]


def _talk_on(tab: Tab, first: list[int]) -> None:
    """A second turn has the first one before it; one too long is refused, not cut; anew."""
    ask = tab.page.get_by_label("Ask both").first
    ask.fill("And?")
    tab.press("Ask both")
    both = context_used(tab, answers=4)
    assert both[2] > first[0] + 8
    assert both[3] > first[1] + 8
    ask.fill("Too long?")
    tab.page.get_by_label("Tokens").fill("512")
    tab.press("Ask both")
    refusal = re.compile(r"The conversation has \d+ tokens .* may have 512, but .* is 512 tokens")
    tab.page.get_by_text(refusal).nth(1).wait_for()
    tab.sees("This turn is not remembered")
    assert ask.input_value() == "Too long?"
    tab.page.get_by_label("Tokens").fill("8")
    tab.press("Begin anew")
    ask.fill("And?")
    tab.press("Ask both")
    again = context_used(tab, answers=2)
    assert max(again) < both[2]


SIGHTS = [(390, 844, "light"), (390, 844, "dark"), (1280, 900, "light"), (1280, 900, "dark")]


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize(("width", "height", "scheme"), SIGHTS)
def test_it_fits_a_phone_and_a_desk(
    kept: Path, home: dict[str, str], width: int, height: int, scheme: str
) -> None:
    """No panel is wider than the window; its colours follow the system's. What takes the focus can
    be named by a screen reader, and on a phone nothing is smaller than a finger can hit.
    """
    sight = {"viewport": {"width": width, "height": height}, "color_scheme": scheme}
    with page_of(kept, home, "--models", "more") as served, browser(**sight) as context:
        tab = Tab(context, served.address)
        for name in tab.panels(wait_ms=2500):
            assert not tab.wide(), name
            assert tab.page.evaluate(NAMELESS) == [], name
            assert width > 390 or tab.page.evaluate(SMALL) == [], name
        colour = tab.page.evaluate("getComputedStyle(document.body).color")
        numbers = [int(number) for number in re.findall(r"\d+", colour)[:3]]
        assert (sum(numbers) > 384) is (scheme == "dark"), colour
