"""The documentation site: mkdocs.yml names every page, and what mkdocs builds is what GitHub shows.

Building needs the extra `docs`; without it only the navigation is checked. Relative links and
anchors of the pages themselves are tests/test_docs.py's.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import yaml
from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
COUNTED = ("h1", "h2", "h3", "table", "tr", "li", "pre", "img", "blockquote", "strong", "em")
LOADED = {"script": "src", "img": "src", "iframe": "src"}
needs_mkdocs = pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None, reason="needs pip install -e '.[docs]'"
)


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


def navigation(text: str) -> list[str]:
    """Pages that a mkdocs.yml names, in order."""
    return list(named(yaml.load(text, Loader=Plain)["nav"]))


def nav_problems(pages: list[str], root: Path = ROOT) -> list[str]:
    """Pages of docs/ that are missing, named twice, or named and not there."""
    wanted = {str(path.relative_to(root / "docs")) for path in (root / "docs").rglob("*.md")}
    outside = {page for page in pages if page.startswith("repository/")}
    there = {page for page in outside if (root / page.removeprefix("repository/")).is_file()}
    found = set(pages) - outside - {"index.md"}
    problems = [f"{page} is missing" for page in sorted(wanted - found)]
    problems += [f"{page} does not exist" for page in sorted(found - wanted | outside - there)]
    return problems + [f"{page} stands twice" for page, n in Counter(pages).items() if n > 1]


def test_the_navigation_names_every_page_and_only_these() -> None:
    """README.md first, every page of docs/ once, and files of the repository."""
    pages = navigation((ROOT / "mkdocs.yml").read_text("utf-8"))
    assert pages[0] == "index.md"
    assert nav_problems(pages) == []


def test_a_bad_navigation_is_found_out(tmp_path: Path) -> None:
    """One page too few, one too many, one twice."""
    (tmp_path / "docs" / "sub").mkdir(parents=True)
    for name in ("a.md", "b.md", "sub/c.md"):
        (tmp_path / "docs" / name).write_text("# A\n")
    text = "site_url: !ENV [X, '']\nnav: [index.md, {A: [a.md, {B: b.md}]}, a.md, d.md]\n"
    problems = nav_problems(navigation(text), tmp_path)
    assert problems == ["sub/c.md is missing", "d.md does not exist", "a.md stands twice"]


def test_only_main_is_published_and_only_what_was_built_strictly() -> None:
    """docs.yml: a pull request builds and tests; the artifact is what that build wrote."""
    text = (ROOT / ".github" / "workflows" / "docs.yml").read_text("utf-8")
    workflow = yaml.safe_load(text)
    build_job = workflow["jobs"]["build"]
    steps = [step.get("run") or step["uses"] for step in build_job["steps"]]
    order = ["mkdocs build --strict", "python -m pytest tests/test_site.py"]
    order.append("actions/upload-pages-artifact@v3")
    assert steps[-3:] == order
    settings = yaml.load((ROOT / "mkdocs.yml").read_text("utf-8"), Loader=Plain)
    upload = build_job["steps"][-1]
    assert upload["with"]["path"] == settings["site_dir"]
    publish = workflow["jobs"]["publish"]
    assert publish["needs"] == "build"
    assert publish["if"] == upload["if"]
    assert "refs/heads/main" in publish["if"]
    assert workflow["permissions"] == {"contents": "read"}
    assert "permissions" not in build_job


class Page(HTMLParser):
    """What a page has: ids, links, what it loads, and how many of each tag in its article."""

    def __init__(self, html: str, article: bool) -> None:
        super().__init__()
        self.inside = not article
        self.ids = set[str]()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.tags = Counter[str]()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note it."""
        values = {name: value or "" for name, value in attrs}
        self.ids |= {values[name] for name in ("id", "name") if name in values}
        if tag == "article":
            self.inside = True
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag in LOADED and LOADED[tag] in values:
            self.loads.append(values[LOADED[tag]])
        if tag == "link" and values.get("rel") in ("stylesheet", "icon"):
            self.loads.append(values["href"])
        if self.inside and tag in COUNTED:
            self.tags[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        """The article's end."""
        if tag == "article":
            self.inside = False


def build(root: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """`mkdocs build` of a repository."""
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    return subprocess.run(line, cwd=root, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This repository's site."""
    out = tmp_path_factory.mktemp("site")
    done = build(ROOT, out)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


def html_of(page: str) -> str:
    """The file in the site of a page that the navigation names."""
    path = Path(page)
    index = path.stem in ("index", "README")
    return str(path.parent / "index.html" if index else path.with_suffix("") / "index.html")


def source_of(page: str) -> Path:
    """The file in the repository of a page that the navigation names."""
    if page == "index.md":
        return ROOT / "README.md"
    if page.startswith("repository/"):
        return ROOT / page.removeprefix("repository/")
    return ROOT / "docs" / page


@needs_mkdocs
def test_pages_are_what_github_shows(site: Path) -> None:
    """As many headings, tables, rows, items, blocks, pictures and stressed words as CommonMark
    has.
    """
    renderer = MarkdownIt("commonmark").enable("table")
    pages = navigation((ROOT / "mkdocs.yml").read_text("utf-8"))
    assert len(pages) > 25
    for page in pages:
        wanted = Page(renderer.render(source_of(page).read_text("utf-8")), article=False).tags
        shown = Page((site / html_of(page)).read_text("utf-8"), article=True).tags
        assert shown == wanted, page


def target_of(site: Path, path: Path, link: str) -> tuple[Path, str]:
    """(file, anchor) to which a link of a page leads."""
    name, _, anchor = unquote(link).partition("#")
    target = path
    if name:
        start = site if name.startswith("/") else path.parent
        target = (start / name.lstrip("/")).resolve()
    return target / "index.html" if target.is_dir() else target, anchor


@needs_mkdocs
def test_every_link_and_picture_of_the_site_is_there(site: Path) -> None:
    """In the HTML, also between pages that were taken along; and nothing is loaded from another
    host.
    """
    skipped = site / "404.html"  # its links are absolute
    pages = {path: path.read_text("utf-8") for path in site.rglob("*.html") if path != skipped}
    ours = {}
    for path, text in pages.items():
        if 'name="generator" content="mkdocs' in text:  # not a stored result
            ours[path] = Page(text, article=True)
    assert len(ours) > 30
    bad = []
    for path, page in ours.items():
        bad += [f"{path}: {link} is another host's" for link in page.loads if "//" in link]
        for link in [*page.links, *page.loads]:
            if re.match("[a-z]+:", link):
                continue
            target, anchor = target_of(site, path, link)
            if not target.is_file():
                bad.append(f"{path}: {link}")
            elif anchor and target in ours and anchor not in ours[target].ids:
                bad.append(f"{path}: {link} has no such heading")
    assert not bad, "\n".join(bad)


@needs_mkdocs
def test_llms_txt_lists_every_page(site: Path) -> None:
    """In the navigation's order, with a sentence each; the address is that of the Markdown."""
    pages = navigation((ROOT / "mkdocs.yml").read_text("utf-8"))
    lines = [line for line in (site / "llms.txt").read_text().splitlines() if line.startswith("- ")]
    found = [re.fullmatch(r"- \[(.+?)\]\(([^)]+)\): (.+)\.", line) for line in lines]
    assert None not in found
    assert [match[2] for match in found if match] == pages
    for page in pages:
        assert (site / page).read_text("utf-8").startswith(("# ", "<")), page


@needs_mkdocs
def test_a_small_site(tmp_path: Path) -> None:
    """What a page links to outside of docs/ comes along: a program, a result, a folder. A table
    below a comment is one. A link to nothing stops the build.
    """
    root = tmp_path / "small"
    for name in ("docs", "scripts", "results", "tools"):
        (root / name).mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "docs_site.py", root / "scripts")
    settings = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:")[0]
    (root / "mkdocs.yml").write_text(f"{settings}\nnav: [Home: index.md, A: [a.md, b/c.md]]\n")
    (root / "README.md").write_text("# Small\n\nIt is small. See [a](docs/a.md#two-words).\n")
    (root / "docs" / "a.md").write_text(
        "# A\n\n```\ncat [x](nowhere.md)\n```\n\n## Two words\n\nSee [it](../tools/t.py), "
        "[them](../results) and [this](../results/r.json#x).\n\n"
        "<!-- table: x -->\n| a | b |\n|---|---|\n| 1 | 2 |\n<!-- end -->\n"
    )
    (root / "docs" / "b").mkdir()
    (root / "docs" / "b" / "c.md").write_text(
        "# C\n\nBack to [a](../a.md), [up](../../README.md).\n"
    )
    (root / "tools" / "t.py").write_text("answer = 42\n")
    (root / "results" / "r.json").write_text('{"x": 1}')
    done = build(root, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    a = (tmp_path / "site" / "a" / "index.html").read_text()
    assert "<td>1</td>" in a
    assert "table: x" not in a
    assert "[x](nowhere.md)" in a
    links = Page(a, article=True).links
    for name in ("tools/t.py", "results", "results/r.json#x"):
        assert [link for link in links if f"../repository/{name}" in link], name
    assert "42" in (tmp_path / "site" / "repository" / "tools" / "t.py" / "index.html").read_text()
    assert json.loads((tmp_path / "site" / "repository" / "results" / "r.json").read_text())
    listing = (tmp_path / "site" / "repository" / "results" / "index.html").read_text()
    assert "r.json" in listing
    listed = (tmp_path / "site" / "llms.txt").read_text()
    assert "- [Small](index.md): It is small." in listed
    assert "[a](../a.md)" in (tmp_path / "site" / "b" / "c.md").read_text()
    (root / "docs" / "b" / "c.md").write_text("# C\n\nBack to [a](../a.md#three-words).\n")
    done = build(root, tmp_path / "site")
    assert done.returncode != 0
    assert "three-words" in done.stderr
