"""Draw docs/images/overview.svg, the README's picture, from the stored result of the default run.

    scripts/mis scripts/picture.py             # after that result changed
    scripts/mis scripts/picture.py --check     # exit 1 where the picture is not of that result

Size, quality and speed of the four models. Does not measure.
"""

from __future__ import annotations

import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from mis_mlx import cli

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "linux-x86_64" / "distill-default.json"
PICTURE = ROOT / "docs" / "images" / "overview.svg"
MODELS = ("teacher", "pruned", "distilled", "4-bit")
COLORS = ("#8a939e", "#c7ccd1", "#1f6fb2", "#2e7d4f")
PANELS = {  # title: (key in the result, format of a number, where the axis begins)
    "file, MB": ("bytes_{}", "{:.0f}", 0.0),
    "loss on new text, bits per byte\n(less is better; the axis begins at 0.8)": (
        "bits_per_byte_{}",
        "{:.3f}",
        0.8,
    ),
    "decode on a CPU, tokens/s\n(MLX has no fast 4-bit kernel there)": (
        "decode_tps_{}",
        "{:.1f}",
        0.0,
    ),
}


@dataclass(frozen=True)
class Settings:
    """What to do."""

    check: bool = False
    """write nothing; exit 1 when the picture is not of the stored result"""


def drawn(found: dict[str, Any]) -> str:
    """The picture, SVG."""
    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": "mis_mlx",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(8.4, 2.3), layout="constrained")
        for axis, (title, (key, form, start)) in zip(
            figure.subplots(1, 3), PANELS.items(), strict=True
        ):
            values = [found[key.format(name)] for name in MODELS]
            axis.bar(
                MODELS, [value - start for value in values], bottom=start, color=COLORS, width=0.7
            )
            for place, value in enumerate(values):
                axis.text(place, value, form.format(value), ha="center", va="bottom")
            axis.set_title(title, fontsize=9)
            axis.set_yticks([])
            axis.tick_params(axis="x", length=0)
            axis.margins(y=0.15)
        figure.savefig(raw := io.StringIO(), format="svg", metadata={"Date": None, "Creator": None})
    return "".join(line.rstrip() + "\n" for line in raw.getvalue().splitlines())


def main(s: Settings) -> None:
    """Write the picture, or say that it is old. Compared are its words: matplotlib's versions
    differ in curves.
    """
    found = json.loads(RESULT.read_text(encoding="utf-8"))
    if s.check:
        there = PICTURE.read_text(encoding="utf-8")
        if missing := [
            text
            for key, form, _ in PANELS.values()
            for name in MODELS
            if f">{(text := form.format(found[key.format(name)]))}<" not in there
        ]:
            sys.exit(
                f"{PICTURE.name} lacks {', '.join(missing)}: scripts/mis scripts/picture.py draws "
                f"it again"
            )
        return
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(drawn(found), encoding="utf-8")


if __name__ == "__main__":
    main(cli.parse(Settings))
