"""The documentation site: mkdocs.yml names every page, and what mkdocs builds is what GitHub shows.

Building needs the extra `docs`; without it only the navigation is checked.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
COUNTED = ("h1", "h2", "h3", "table", "tr", "li", "pre", "img", "blockquote", "strong", "em")


class Plain(yaml.SafeLoader):
    """YAML whose tags (!ENV and Python's) are let through as nothing."""


Plain.add_multi_constructor("!", lambda loader, suffix, node: None)
Plain.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)


def named(entry: Any) -> Iterator[str]:
    """Pages of a navigation, in order."""
    if isinstance(entry, str):
        yield entry
        return
    for part in entry.values() if isinstance(entry, dict) else entry:
        yield from named(part)


PAGES = list(named(yaml.load((ROOT / "mkdocs.yml").read_text("utf-8"), Loader=Plain)["nav"]))


def test_the_navigation_names_every_page_and_only_these() -> None:
    """README.md first, every page of docs/ once, and files of the repository."""
    outside = [page for page in PAGES if page.startswith("repository/")]
    docs = [str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")]
    assert PAGES[0] == "index.md"
    assert sorted(PAGES) == sorted(["index.md", *docs, *outside])
    assert all((ROOT / page.removeprefix("repository/")).is_file() for page in outside)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built so strictly that links between its pages lead somewhere."""
    pytest.importorskip("mkdocs", reason="needs pip install -e '.[docs]'")
    out = tmp_path_factory.mktemp("site")
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


def html_of(page: str) -> str:
    """The file in the site of a page that the navigation names."""
    path = Path(page)
    index = path.stem in ("index", "README")
    return str(path.parent / "index.html" if index else path.with_suffix("") / "index.html")


class Page(HTMLParser):
    """What a page loads, its links, and how many of each tag are in its article."""

    def __init__(self, html: str, article: bool) -> None:
        super().__init__()
        self.inside = not article
        self.links: list[str] = []
        self.loads: list[str] = []
        self.tags = Counter[str]()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note it."""
        values = dict(attrs)
        self.inside |= tag == "article"
        if tag == "a":
            self.links.append(values.get("href") or "")
        elif tag == "link" and values.get("rel") in ("stylesheet", "icon"):
            self.loads.append(values.get("href") or "")
        elif tag in ("script", "img", "iframe"):
            self.loads.append(values.get("src") or "")
        self.tags[tag] += self.inside and tag in COUNTED

    def handle_endtag(self, tag: str) -> None:
        """The article's end."""
        self.inside &= tag != "article"


def test_pages_are_what_github_shows(site: Path) -> None:
    """As many headings, tables, rows, items, blocks and pictures as CommonMark has; nothing is
    loaded from another host, and what lies outside of docs/ came along.
    """
    renderer = MarkdownIt("commonmark").enable("table")
    for page in PAGES:
        source = ROOT / ("README.md" if page == "index.md" else f"docs/{page}")
        if page.startswith("repository/"):
            source = ROOT / page.removeprefix("repository/")
        wanted = Page(renderer.render(source.read_text("utf-8")), article=False)
        shown = Page((site / html_of(page)).read_text("utf-8"), article=True)
        assert +shown.tags == +wanted.tags, page
        assert not [link for link in shown.loads if "//" in link], page
        folder = (site / html_of(page)).parent
        for link in [*shown.links, *shown.loads]:
            path = folder / link.partition("#")[0]
            assert re.match("[a-z]+:", link) or path.exists(), (page, link)


def test_llms_txt_lists_every_page(site: Path) -> None:
    """In the navigation's order, with a sentence each; the address is that of the Markdown."""
    text = (site / "llms.txt").read_text("utf-8")
    assert re.findall(r"(?m)^- \[.+?\]\(([^)]+)\): .+\.$", text) == PAGES
    assert all((site / page).is_file() for page in PAGES)
