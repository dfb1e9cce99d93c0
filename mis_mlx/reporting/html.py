"""One HTML page that needs nothing else: its style, its few lines of script, tables, and what the browser must refuse.

Whatever is put into a table or a paragraph is text: `escape` is applied here. Does not know what a run is.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Mapping, Sequence

escape = html.escape

STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1d2127;--muted:#5b6470;--line:#d9dde2;--soft:#f3f5f7;
--c0:#1f6fb2;--c1:#c2410c;--c2:#2e7d4f;--c3:#8b5cb8}
@media (prefers-color-scheme:dark){:root{--paper:#14171b;--ink:#e6e9ed;--muted:#a3acb8;--line:#353b43;--soft:#1e2329;
--c0:#62b0f0;--c1:#f29a5b;--c2:#6cc795;--c3:#c3a0e8}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:72rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5rem;line-height:1.25;margin:.5rem 0}h2{font-size:1.2rem;margin:2rem 0 .5rem}
h3{font-size:1rem;margin:1.2rem 0 .3rem}p{margin:.5rem 0;max-width:46rem}
.lead{font-size:1.1rem}.note{color:var(--muted);font-size:.9rem}
.wide{overflow-x:auto;margin:.5rem 0}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .6rem;border-bottom:1px solid var(--line);text-align:right;vertical-align:top;white-space:nowrap;
overflow-wrap:normal}
th:first-child,td:first-child{text-align:left;white-space:normal;min-width:8rem;position:sticky;left:0;
background:var(--paper)}
.facts th,.facts td{text-align:left;white-space:normal;overflow-wrap:anywhere}
.texts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,15rem),1fr));gap:.8rem}
.texts>div{background:var(--soft);padding:.5rem .7rem;font-size:.9rem}.texts p{white-space:pre-wrap;margin:.2rem 0}
th button{all:unset;cursor:pointer;font-weight:600}th button:focus-visible{outline:2px solid var(--c0)}
th button::after{content:" ↕";color:var(--muted)}th[aria-sort=ascending] button::after{content:" ↑"}
th[aria-sort=descending] button::after{content:" ↓"}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,25rem),1fr));gap:1.2rem}
figure{margin:0;max-width:36rem;break-inside:avoid}
figcaption{font-size:.85rem;color:var(--muted)}figcaption b{color:var(--ink)}
svg{display:block;max-width:100%;width:100%;height:auto;stroke-linejoin:round}svg text{font-family:system-ui,sans-serif}
svg image{image-rendering:pixelated}
pre{white-space:pre-wrap;background:var(--soft);padding:.6rem;margin:.5rem 0}
@media (max-width:37rem){th,td{white-space:normal;padding:.25rem .3rem;font-size:.8rem}
th:first-child,td:first-child{min-width:5rem;overflow-wrap:anywhere}}
@media print{body{max-width:none;font-size:10pt}h2,h3{break-after:avoid}tr{break-inside:avoid}
.figures{grid-template-columns:1fr 1fr}th button::after{content:""}.wide{overflow:visible}}
"""
LIGHT = dict(re.findall(r"(--\w+):(#\w+)", STYLE.partition("@media")[0]))  # the colours of the page by day
# Numbers sort as numbers, also with a unit or ± behind; a second press turns the order round.
SCRIPT = """
for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
  const head = button.parentElement, body = head.closest("table").tBodies[0], at = head.cellIndex;
  const up = head.getAttribute("aria-sort") !== "ascending";
  for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const text = row => row.cells[at].textContent.trim(), number = row => parseFloat(text(row).replace(/,/g, ""));
  const order = (a, b) => {
    const x = number(a), y = number(b);
    if (isNaN(x) !== isNaN(y)) return isNaN(x) ? 1 : -1;
    return (up ? 1 : -1) * (isNaN(x) ? text(a).localeCompare(text(b)) : x - y);
  };
  body.append(...[...body.rows].sort(order));
});
"""


def page(title: str, body: str, every_s: int | None = None) -> str:
    """The whole document. The browser may load nothing and run only the script above, whatever `body` holds.

    every_s: how often a browser opens it anew, while the run goes on.
    """
    seal = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{seal}'; "
    policy += "base-uri 'none'; form-action 'none'"
    again = f'<meta http-equiv="refresh" content="{every_s}">\n' if every_s else ""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n{again}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n"
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, facts: bool = False) -> str:
    """A table of texts that sorts by any column with a name, and scrolls by itself where it is wider than the page.

    facts: names and long values, which are broken rather than scrolled.
    """
    cells = [f"<button>{escape(h)}</button>" if h else escape(h) for h in head]
    lines = ["<thead><tr>" + "".join(f'<th scope="col">{c}</th>' for c in cells) + "</tr></thead><tbody>"]
    lines += ["<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows]
    inside = f"<table{' class=facts' if facts else ''}>{''.join(lines)}</tbody></table>"
    return f'<div class="wide" tabindex="0" role="group" aria-label="table">{inside}</div>'


def texts(said: Mapping[str, str]) -> str:
    """Texts beside each other, or below where there is no room: {who: what}."""
    parts = [f"<div><b>{escape(who)}</b><p>{escape(what)}</p></div>" for who, what in said.items()]
    return f'<div class="texts">{"".join(parts)}</div>'


def markdown(text: str) -> str:
    """Tables and paragraphs of a Markdown page of ours as HTML; anything else in it is shown as it is."""
    parts = []
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = [line.strip().replace("± ", "±\N{NO-BREAK SPACE}") for line in block.splitlines()]
        if len(lines) > 2 and lines[0].startswith("|") and set(lines[1]) <= set("|-: "):
            head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
            parts.append(table(head, rows))
        else:
            parts.append(f"<p>{escape(block)}</p>")
    return "".join(parts)


def section(title: str, *parts: str) -> str:
    """A heading and what is under it; nothing when all of that is empty."""
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>" if any(parts) else ""


def figures(*pictures: str) -> str:
    """Pictures beside each other where there is room."""
    return f'<div class="figures">{"".join(pictures)}</div>' if any(pictures) else ""
