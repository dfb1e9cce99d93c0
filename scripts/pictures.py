"""Draw the pictures of README.md and docs/ from stored results and from the code.

    scripts/mis scripts/pictures.py             # after a result was stored again
    scripts/mis scripts/pictures.py --check     # exit 1 where a picture is older than its source

Each picture holds twelve digits of the SHA-256 of what it shows. --check compares them, and only
those that are old are drawn; delete a picture to have it drawn anyway. Nothing is measured here.
"""

from __future__ import annotations

import fcntl
import hashlib
import html
import io
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from rich.console import Console
from rich.text import Text

from mis_mlx import cli

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
RESULTS = ROOT / "benchmarks" / "results"
SHAPE = ROOT / "benchmarks" / "model_configs" / "llama-3.2-1b.json"
MARK = "Source-SHA-256"
MARKED = re.compile(rf"<!-- {MARK}: (\w+) -->")
COLUMNS = 108  # of the terminal that is drawn
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07")
FEW_BITS = "bits-SmolLM2-135M-Instruct"
# How labels of rows begin, of rivals.py and of bits.py: whose they are.
PROGRAMS = {
    "tuned, ": "mis_mlx, scales learn",
    "now, ": "mis_mlx",
    "ours, ": "mis_mlx, scales learn",
    "mlx_lm.convert, 2 bits": "",  # one of its points lies off the picture
    "mlx_lm.convert": "mlx_lm.convert",
    "mlx_lm.dynamic_quant": "mlx_lm.dynamic_quant",
    "mlx_lm.dwq": "mlx_lm.dwq",
    "mlx_lm.gptq": "mlx_lm.gptq",
    "mlx_lm.awq": "mlx_lm.awq",
    "llama.cpp": "llama.cpp",
}
LINES = {  # color, width
    "mlx_lm.convert": ("#8a939e", 1.2),
    "mlx_lm.dynamic_quant": ("#c58f3d", 1.2),
    "mlx_lm.gptq": ("#a05fa8", 1.2),
    "mlx_lm.awq": ("#b0514f", 1.2),
    "mlx_lm.dwq": ("#5f8fa8", 1.2),
    "llama.cpp": ("#555555", 1.2),
    "mis_mlx": ("#1f6fb2", 1.6),
    "mis_mlx, scales learn": ("#2e7d4f", 2.4),
}
TICKS = (0, 0.05, 0.1, 0.2, 0.5, 1, 2, 4)  # of the loss
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mis_mlx",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
}
BADGE_HEIGHT = 20
LETTER_WIDTH = 6.6  # pixels, of 11 px letters


@dataclass(frozen=True)
class Settings:
    """What to do."""

    check: bool = False
    """write nothing; exit 1 when a picture is older than what it shows"""


@dataclass(frozen=True)
class Picture:
    """name: of the file. source: the text that it shows. draw: the picture's bytes of that text."""

    name: str
    source: Callable[[], str]
    draw: Callable[[str], bytes]


def facts() -> str:
    """What the badges say, a line each: what, and its value. Of pyproject.toml and of the machines
    that have results.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    mlx = next(part for part in project["dependencies"] if part.startswith("mlx-lm"))
    machines = sorted(path.name for path in RESULTS.iterdir() if path.is_dir())
    values = {
        "license": project["license"],
        "python": project["requires-python"],
        "mlx-lm": mlx.removeprefix("mlx-lm"),
        "measured on": ", ".join(machines),
    }
    return "\n".join(f"{name}\t{value}" for name, value in values.items())


def rivals() -> str:
    """JSON: {model: {program: [[MB, loss]]}}, of everybody's programs in fewer bits.

    Of benchmarks/rivals.py's files; where there is none, of the default model's rows of bits.py.
    """
    folder = RESULTS / "linux-x86_64"
    files = [path for path in sorted(folder.glob("rivals-*.json")) if _of_first_seed(path)]
    named = {path.stem.removeprefix("rivals-"): path for path in files}
    shown = {}
    for model, path in (
        named or {FEW_BITS.removeprefix("bits-"): folder / f"{FEW_BITS}.json"}
    ).items():
        programs: dict[str, list[list[float]]] = {}
        for label, row in json.loads(path.read_text("utf-8"))["rows"].items():
            program = next(
                (name for start, name in PROGRAMS.items() if label.startswith(start)), ""
            )
            if not program:
                continue
            lost = row["lost"]["answers"] if "lost" in row else row["answers_excess"]
            nbytes = row["nbytes"] / 1e6 if "nbytes" in row else row["mb"]
            loss = lost[0] if isinstance(lost, list) else lost
            programs.setdefault(program, []).append([round(nbytes, 1), round(loss, 4)])
        shown[model] = {name: sorted(points) for name, points in programs.items()}
    return json.dumps(shown, indent=1)


def _of_first_seed(path: Path) -> bool:
    """Whether a file of rivals.py is of seed 0."""
    return json.loads(path.read_text("utf-8"))["given"].get("seed", 0) == 0


def curves(source: str) -> bytes:
    """SVG: loss against megabytes, a line a program, a panel a model. source: as of `rivals`."""
    shown = json.loads(source)
    losses = [loss for programs in shown.values() for of in programs.values() for _, loss in of]
    lines = {}
    with matplotlib.rc_context({**STYLE, "axes.spines.left": True}):
        figure = Figure(figsize=(4.4 * max(2, len(shown)), 3.4), layout="constrained")
        panels = figure.subplots(1, len(shown), squeeze=False)[0]
        for axis, (model, programs) in zip(panels, shown.items(), strict=True):
            for name in (name for name in LINES if name in programs):
                points = programs[name]
                color, wide = LINES[name]
                style = {"color": color, "lw": wide, "ms": 4}
                (lines[name],) = axis.plot(*zip(*points, strict=True), "o-", **style)
            axis.set_yscale("symlog", linthresh=0.1, linscale=0.6)
            axis.set_yticks([0, 0.05, 0.1, 0.2, 0.5, 1, 2, 4], labels=TICKS)
            axis.set_ylim(-0.01, 1.3 * max(losses))
            axis.minorticks_off()
            axis.set_title(model, fontsize=10)
            axis.set_xlabel("file, MB")
            axis.grid(axis="y", alpha=0.25)
        panels[0].set_ylabel("loss on the model's own answers,\nbits per byte (less is better)")
        named = [name for name in LINES if name in lines]
        handles = [lines[name] for name in named]
        figure.legend(handles, named, frameon=False, fontsize=8, loc="outside right center")
        svg = io.StringIO()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return svg.getvalue().encode()


def badges(source: str) -> bytes:
    """SVG: a row of labels with their values."""
    parts = []
    left = 0.0
    for line in source.splitlines():
        color = "#555"
        for words in line.split("\t"):
            width = len(words) * LETTER_WIDTH + 12
            middle = left + width / 2
            box = (
                f'<rect x="{left:.1f}" width="{width:.1f}" height="{BADGE_HEIGHT}" fill="{color}"/>'
            )
            parts += [box, f'<text x="{middle:.1f}" y="14">{html.escape(words)}</text>']
            left += width
            color = "#00796b"
        left += 6
    style = 'fill="#fff" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11"'
    size = f'width="{left:.0f}" height="{BADGE_HEIGHT}"'
    body = "\n".join(parts)
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">\n'
    return f'{svg}<g text-anchor="middle" {style}>\n{body}\n</g>\n</svg>\n'.encode()


def screen(words: list[str], folder: Path) -> str:
    """What Python with these arguments writes to a terminal, without the line for programs."""
    terminal, inside = pty.openpty()
    fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 50, COLUMNS, 0, 0))
    # Where it is not set, a line on the threads would come before all else.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-P", *words]
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=inside, stderr=inside):
        os.close(inside)
        shown = bytearray()
        while True:
            try:
                part = os.read(terminal, 65536)
            except OSError:  # Linux says so when the other end is closed
                break
            if not part:
                break
            shown += part
    os.close(terminal)
    lines = ESCAPES.sub("", shown.decode()).replace("\r", "").splitlines()
    return "\n".join(line.rstrip() for line in lines if not line.startswith("{")).strip("\n")


def plan() -> str:
    """The terminal after a plan of Llama 3.2 1B for an 8 GB M1, by published rates."""
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp) / SHAPE.stem
        folder.mkdir()
        shutil.copyfile(SHAPE, folder / "config.json")
        flags = ["--teacher", SHAPE.stem, "--machine", "m1-air", "--budget", "5GiB"]
        return screen(["-m", "mis_mlx", "plan", *flags], Path(temp))


def terminal(title: str) -> Callable[[str], bytes]:
    """SVG of a terminal, with this title, that shows a text."""

    def draw(lines: str) -> bytes:
        console = Console(record=True, width=COLUMNS, file=io.StringIO())
        console.print(Text(lines), soft_wrap=False)
        svg = console.export_svg(title=title, unique_id="terminal")
        return re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL).encode()  # of another host

    return draw


PICTURES = (
    Picture("rivals.svg", rivals, curves),
    Picture("badges.svg", facts, badges),
    Picture("plan.svg", plan, terminal("mis_mlx plan --machine m1-air")),
)


def digits(source: str) -> str:
    """What a picture of this text holds."""
    return hashlib.sha256(source.encode()).hexdigest()[:12]


def mark_of(path: Path) -> str | None:
    """The digits that a picture holds; None without a picture or without digits."""
    if not path.is_file():
        return None
    found = MARKED.search(path.read_text(encoding="utf-8"))
    return found[1] if found else None


def write(path: Path, picture: bytes, mark: str) -> None:
    """Store a picture with its digits."""
    path.parent.mkdir(exist_ok=True)
    lines = [line.rstrip() for line in picture.decode().splitlines()]
    path.write_text("\n".join([*lines, f"<!-- {MARK}: {mark} -->", ""]), encoding="utf-8")


def main(s: Settings) -> None:
    """Draw what is old, or say what is."""
    old = []
    for picture in PICTURES:
        source = picture.source()
        mark = digits(source)
        path = IMAGES / picture.name
        if mark_of(path) == mark:
            continue
        old.append(picture.name)
        if not s.check:
            write(path, picture.draw(source), mark)
            cli.say(f"{path.relative_to(ROOT)}: drawn")
    if s.check and old:
        sys.exit(f"older than what they show: {', '.join(old)}: scripts/mis scripts/pictures.py")


if __name__ == "__main__":
    main(cli.parse(Settings))
