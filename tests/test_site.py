"""The documentation site: mkdocs.yml names every page, and mkdocs takes all of them.

Building needs the extra `docs`; without it only the navigation is checked.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


NAVIGATION = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:\n")[2]
PAGES = re.findall(r"(?m)^ +- (?:[^:]+: )?([\w/.-]+\.md)$", NAVIGATION)


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


def test_llms_txt_lists_every_page(site: Path) -> None:
    """In the navigation's order, with a sentence each; the address is that of the Markdown. No page
    loads anything from another host.
    """
    text = (site / "llms.txt").read_text("utf-8")
    assert re.findall(r"(?m)^- \[.+?\]\(([^)]+)\): .+\.$", text) == PAGES
    assert all((site / page).is_file() for page in PAGES)
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|img|iframe)[^>]* src=[\"']?([^\"' >]+)", page.read_text("utf-8")
        )
        assert not [link for link in loaded if "//" in link], page
