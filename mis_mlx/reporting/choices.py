"""What a run chose, as parts of its page: blocks, heads and neurons kept, AAIS, bits. And several runs side by side.

Written as `sections` are: left out where there is nothing, KeyError, TypeError or ValueError where there is other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mis_mlx.reporting import figures, html
from mis_mlx.reporting.run_reader import Story

FEW = 8  # matrices that are named one by one


def pruning(story: Story, key: str) -> str:
    """Which blocks, heads and neurons were kept, and how important they are."""
    report, layers = story.keep.get("report") or {}, set(story.keep.get("layers", []))
    pictures = []
    if block := {int(i): float(v) for i, v in (report.get("block_importance") or {}).items()}:
        groups = {"kept": {i: v for i, v in block.items() if i in layers},
                  "removed": {i: v for i, v in block.items() if i not in layers}}  # fmt: skip
        gone = ", ".join(str(i) for i in groups["removed"]) or "none"
        text = f"1 − cosine of each of the teacher's {len(block)} blocks: how far it turns the stream. Removed: {gone}."
        pictures.append(figures.columns(f"{key}blocks", "Blocks", text, ("block", "1 − cosine"), groups))
    pictures += _maps(report.get("profile") or {}, story.keep, key)
    return html.section("What was kept", *_aais(report), html.figures(*pictures))


def _maps(profile: Mapping[str, Any], keep: Mapping[str, Any], key: str) -> list[str]:
    """Heat maps of neurons and of heads, and the share of the importance that stays."""
    pictures, shares = [], {}
    for axis, name in (("ffn", "FFN neurons"), ("heads", "Heads")):
        rows = {int(k.split("/")[0]): v for k, v in profile.items() if k.endswith(f"/{axis}")}
        if not rows:
            continue
        kept = {i: set(keep["kept"].get(f"{i}/{axis}", ())) for i in rows}
        values = np.array([rows[i]["values"] for i in sorted(rows)], dtype=np.float64)
        values /= np.maximum(values.max(axis=1, keepdims=True), 1e-30)
        gone = [row for row, i in enumerate(sorted(rows)) if i not in keep["layers"]]
        count = {len(k) for i, k in kept.items() if i in keep["layers"]}
        if count == {0}:
            stays = f"all {name.lower().removeprefix('ffn ')} of the kept blocks stay"
        else:
            stays = f"{min(count)} stay in each kept block" if len(count) == 1 else f"{min(count)} to {max(count)} stay"
        ranked = axis == "ffn"
        text = f"Importance in each block of the teacher, the highest bright (by square root); {stays}; removed blocks "
        text += "are struck out."
        label = "of 64 runs, the most important first" if ranked else "head"
        off = [] if ranked else [(h, row) for row, i in enumerate(sorted(rows)) if kept[i] and i in keep["layers"]
                                 for h in range(values.shape[1]) if h not in kept[i]]  # fmt: skip
        cut = None
        if ranked and len(count) == 1 and count != {0}:  # the line right of those that stay
            cut = min(count) / rows[min(rows)]["units"] * values.shape[1] - 0.5
            text += " Those left of the line stay."
        if off:
            text += f" {len(off)} removed heads are crossed."
        pictures.append(figures.heat(f"{key}{axis}", name, text, (label, "block"), values, gone, off, cut))
        if count != {0}:
            shares[name] = {i: 100 * rows[i]["kept"] for i in rows if i in keep["layers"]}
    if shares:
        low, high = min(min(s.values()) for s in shares.values()), max(max(s.values()) for s in shares.values())
        text = f"Of the importance of a kept block's {' and '.join(n.lower() for n in shares)}, those that stay hold "
        text = text.replace("ffn", "FFN") + f"{low:.0f} to {high:.0f} %."
        pictures.append(figures.columns(f"{key}share", "Importance that stays", text, ("block", "%"), shares))
    return pictures


def _aais(report: Mapping[str, Any]) -> list[str]:
    """How AAIS differed from plain importance."""
    if not report:
        return []
    used, differ = report.get("importance"), report.get("channels_differing_from_plain", 0)
    text = f"Ranked by {used}. "
    if report.get("ambient_c"):
        low, high = report["ambient_c"]
        text += f"The air had {low:.1f} to {high:.1f} °C. "
    text += f"{differ} of {report.get('channels_kept', '?')} kept channels are others than plain importance keeps."
    if "nll_aais" in report:
        text += f" Held-out loss right after pruning is {report['nll_aais']:.4f} nats a token; with plain importance "
        text += f"{report['nll_plain']:.4f}."
    lines = [f"<p>{html.escape(text)}</p>"]
    if where := report.get("differing"):
        rows = [[*k.split("/"), str(n)] for k, n in where.items()]
        table = html.table(["block", "axis", "channels that differ"], rows)
        lines.append(f"<details><summary>Where they differ</summary>{table}</details>")
    return lines


def bits(story: Story, key: str) -> str:
    """What each block costs in 4 bits, where that was measured, and which matrices got other widths."""
    settings = story.model.get("quantization") or {}
    if not settings:
        return ""
    wide = {k: v["bits"] for k, v in settings.items() if isinstance(v, dict) and v.get("bits") != settings.get("bits")}
    others = [f"{path} {n}" for path, n in wide.items()]
    if len(others) > FEW:
        others = [f"{n} bits {list(wide.values()).count(n)} times" for n in sorted(set(wide.values()))]
    text = f"{settings.get('bits')} bits in groups of {settings.get('group_size')}, {settings.get('mode', 'affine')}; "
    text += f"other widths: {', '.join(others)}." if others else "every matrix the same."
    costs: dict[str, dict[int, float]] = {"all in 4 bits": {}, "as stored": {}}
    for path, cost in (story.sensitivity.get("nats") or {}).items():
        i, stored = int(path.split(".")[2]), wide.get(path, settings.get("bits"))
        for name, n in zip(costs, (4, stored), strict=True):
            costs[name][i] = costs[name].get(i, 0.0) + float(cost[str(n)])
    if not costs["as stored"]:
        return html.section("Bits", f"<p>{html.escape(text)} What each block costs was not measured.</p>")
    worst = max(costs["as stored"], key=lambda i: costs["as stored"][i])
    said = "KL that rounding each block of the student costs, estimated to second order: in all "
    said += f"{' and '.join(f'{sum(c.values()):.4f} nats {n}' for n, c in costs.items())}; "
    said += f"most as stored, {costs['as stored'][worst]:.4f}, in block {worst}."
    picture = figures.columns(f"{key}bits", "Sensitivity", said, ("block", "nats a token"), costs, log=True)
    return html.section("Bits", f"<p>{html.escape(text)}</p>", html.figures(picture))


def comparison(stories: Sequence[Story]) -> str:
    """Several runs side by side: losses on one picture, numbers and their difference to the first run's, settings."""
    names = labels(stories)
    lines = {
        name: [(x - s.began_s, y) for x, y in s.steps.series["loss"].points()]
        for name, s in zip(names, stories, strict=True)
    }
    ends = "; ".join(f"{n} ends at {p[-1][1]:.3f}" for n, p in lines.items() if p)
    picture = ""
    if ends:
        text = f"Training loss of {len(lines)} runs: {ends}."
        picture = figures.over_time("all-loss", "Loss of all runs", text, {"loss, nats a token": lines})
    rows = []
    for name in dict.fromkeys(k for s in stories for k, v in s.result.items() if _is_number(v)):
        values = [s.result.get(name) for s in stories]
        cells = [_cell(v) + _difference(v, values[0]) * (i > 0) for i, v in enumerate(values)]
        rows.append([name, *cells])
    settings = [
        [name, *(str(s.config.get(name, "–")) for s in stories)]
        for name in dict.fromkeys(k for s in stories for k in s.config)
        if len({str(s.config.get(name)) for s in stories}) > 1
    ]
    parts = [html.figures(picture), html.table(["", *names], rows) if rows else ""]
    parts.append(
        "<h3>Settings that differ</h3>" + html.table(["", *names], settings)
        if settings
        else "<p>All settings are the same.</p>"
    )
    return html.section("Side by side", *parts)


def labels(stories: Sequence[Story]) -> list[str]:
    """A name for each run, no two alike."""
    names = [s.name for s in stories]
    return [n if names.count(n) == 1 else f"{n} ({i + 1})" for i, n in enumerate(names)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cell(value: Any) -> str:
    if not _is_number(value):
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _difference(value: Any, first: Any) -> str:
    if not (_is_number(value) and _is_number(first)) or value == first:
        return ""
    return f" ({value - first:+,})" if isinstance(value - first, int) else f" ({value - first:+,.3g})"
