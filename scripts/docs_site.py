"""What mkdocs does not know about these pages: a hook of mkdocs.yml.

    .venv/bin/pip install -e '.[docs]'
    .venv/bin/mkdocs serve     # the site on this machine; `mkdocs build` writes it to build/site

docs/ is also read on GitHub, where links lead anywhere in the repository. So the site takes along
what its pages link to: README.md becomes its first page, other Markdown a page each, programs and
folders pages that show them, and results (.json, .html, .svg) stay files. All but README.md and
docs/ is below repository/. Nothing links to a host that may have moved, so the strict build checks
every link, the site works without a network, and a stored .html opens as a page, which GitHub shows
as source. llms.txt lists the pages for programs that read; each page is also there as Markdown.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
README = "README.md"
OUTSIDE = "repository"
PROGRAMS = {".py": "python", ".sh": "sh", ".yml": "yaml", ".yaml": "yaml", ".toml": "toml"}
FENCED = re.compile(r"^ *```.*?^ *```[ \t]*$", re.MULTILINE | re.DOTALL)
LINKS = (re.compile(r"(\]\()([^)\s]+)(?=\))"), re.compile(r'(\b(?:src|href)=")([^"]+)(?=")'))
COMMENT = re.compile(r"^ *<!--.*?-->[ \t]*$", re.MULTILINE | re.DOTALL)
SENTENCE_END = re.compile(r"(?<=[.!?])\s")


def repository_path(source: str, link: str) -> str | None:
    """Where in the repository a link of the file `source` leads; None: to the page itself, or to
    another host.
    """
    target = link.partition("#")[0]
    if not target or re.match(r"[a-z][a-z0-9+.-]*:", target):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    readme = posixpath.join(path, README)
    return readme if (ROOT / readme).is_file() else path  # a folder is shown by its README.md


def site_path(path: str) -> str:
    """Where the site has a file of the repository, as the source of a page or as a file."""
    if path == README:
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if (ROOT / path).is_dir():
        return f"{OUTSIDE}/{path}/index.md"
    shown = ".md" if Path(path).suffix in PROGRAMS else ""
    return f"{OUTSIDE}/{path}{shown}"


def source_path(page: str) -> str:
    """The file of the repository that a page of the site shows."""
    if page == "index.md":
        return README
    if page.startswith(f"{OUTSIDE}/"):
        return page.removeprefix(f"{OUTSIDE}/")
    return f"docs/{page}"


def in_prose(text: str, change: Callable[[str], str]) -> str:
    """The text with everything outside of its fenced blocks changed."""
    blocks = FENCED.findall(text)
    prose = [change(part) for part in FENCED.split(text)]
    joined = prose[0]
    for block, part in zip(blocks, prose[1:], strict=True):
        joined += block + part
    return joined


def linked(text: str, source: str) -> Iterator[str]:
    """Files and folders of the repository to which a page links."""
    prose = FENCED.sub("", text)
    for pattern in LINKS:
        for match in pattern.finditer(prose):
            path = repository_path(source, match[2])
            if path is not None:
                yield path


def relinked(text: str, source: str) -> str:
    """The Markdown of `source`, its links led to where the site has their targets."""
    here = posixpath.dirname(site_path(source))

    def led(match: re.Match[str]) -> str:
        path = repository_path(source, match[2])
        if path is None:
            return match[0]
        anchor = match[2].partition("#")[1:]
        return match[1] + posixpath.relpath(site_path(path), here or ".") + "".join(anchor)

    def change(prose: str) -> str:
        for pattern in LINKS:
            prose = pattern.sub(led, prose)
        return prose

    return in_prose(text, change)


def without_comments(text: str) -> str:
    """Marks of generated tables left out: Python-Markdown takes a table right below a comment for
    text.
    """
    return in_prose(text, lambda prose: COMMENT.sub("", prose))


def taken_along(path: str) -> str | None:
    """A page's Markdown for a file or folder outside of docs/; None: it stays a file."""
    file = ROOT / path
    if file.is_dir():
        names = sorted(
            entry.name for entry in file.iterdir() if not entry.name.startswith((".", "_"))
        )
        return f"# {path}\n\n" + "".join(f"- [{name}]({name})\n" for name in names)
    language = PROGRAMS.get(file.suffix)
    if language:
        source = file.read_text(encoding="utf-8").strip()
        hidden = "---\nsearch:\n  exclude: true\n---\n\n"
        return f"{hidden}# {path}\n\n````{language}\n{source}\n````\n"
    return file.read_text(encoding="utf-8") if file.suffix == ".md" else None


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Where GitHub builds the site, it links to the repository that it is built from."""
    name = os.environ.get("GITHUB_REPOSITORY")
    if name:
        server = os.environ.get("GITHUB_SERVER_URL", "https://github.com")
        config.repo_url = f"{server}/{name}"
        config.repo_name = name
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """README.md, and every file outside docs/ that a page links to, or a page taken along."""
    waiting = [README, *named_outside(config.nav)]
    for file in files.documentation_pages():
        waiting += linked(file.content_string, source_path(file.src_uri))
    seen = set[str]()
    while waiting:
        path = waiting.pop()
        uri = site_path(path)
        if uri in seen or path.startswith("docs/") or not (ROOT / path).exists():
            continue  # mkdocs itself says what does not exist
        seen.add(uri)
        text = taken_along(path)
        if text is None:
            files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
            continue
        files.append(File.generated(config, uri, content=text))
        waiting += linked(text, source_path(uri))
    return files


def named_outside(entry: Any) -> Iterator[str]:
    """Files of the repository that the navigation names."""
    for page in pages_of(entry):
        if page.startswith(f"{OUTSIDE}/"):
            yield source_path(page)


def pages_of(entry: Any) -> Iterator[str]:
    """Pages of the navigation, in order."""
    if isinstance(entry, str):
        yield entry
    for part in entry.values() if isinstance(entry, dict) else entry:
        if not isinstance(entry, str):
            yield from pages_of(part)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as the site needs them, no comments."""
    return without_comments(relinked(markdown, source_path(page.file.src_uri)))


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Each page as Markdown, too, at the address that its source has."""
    copy = Path(config.site_dir, page.file.src_uri)
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_text(page.markdown or "", encoding="utf-8")
    return output


def on_post_build(config: MkDocsConfig) -> None:
    """llms.txt: every page of the navigation with its title and first sentence."""
    lines = [f"# {config.site_name}", "", f"> {config.site_description}", ""]
    for section in config.nav or []:
        for title, pages in section.items():
            lines += [f"## {title}", ""]
            lines += [listed(uri, config) for uri in pages_of(pages)]
            lines.append("")
    Path(config.site_dir, "llms.txt").write_text("\n".join(lines), encoding="utf-8")


def listed(uri: str, config: MkDocsConfig) -> str:
    """A line of llms.txt: the page's own title, its address as Markdown, its first sentence."""
    text = Path(config.site_dir, uri).read_text(encoding="utf-8")
    title = next((line[2:] for line in text.splitlines() if line.startswith("# ")), uri)
    return f"- [{title}]({config.site_url or ''}{uri}): {first_sentence(text)}"


def first_sentence(text: str) -> str:
    """Of the first paragraph of a page, without its links; "" for a page without a paragraph."""
    for block in re.split(r"\n\s*\n", FENCED.sub("", text)):
        words = " ".join(block.split())
        if words and words[0] not in "#!>|<-":
            plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", words)
            sentence = SENTENCE_END.split(plain)[0]
            return sentence.removesuffix(":").removesuffix(".") + "."
    return ""
