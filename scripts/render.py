"""Write the tables of README.md, pages under docs and benchmarks/README.md from the files under
benchmarks/results.

    scripts/mis scripts/render.py             # after a measurement
    scripts/mis scripts/render.py --check     # exit 1, with the lines, where a table is not what
    the files say

A table stands between `<!-- table: MACHINE/NAME -->` and `<!-- end -->`, such as
linux-x86_64/throughput; everything else is left alone. Does not measure, and knows no number.
"""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mis_mlx import cli
from mis_mlx.judge import repetition
from mis_mlx.reporting import text as words
from mis_mlx.types import MisError, duration, gib

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    "README.md",
    "docs/compare.md",
    "docs/results.md",
    "docs/machines.md",
    "docs/models.md",
    "docs/quantization.md",
    "benchmarks/README.md",
)
BLOCK = re.compile(
    r"^<!-- table: (\S+) -->\n(.*?)(?:^<!-- end -->|(?=^<!-- table: )|\Z)", re.MULTILINE | re.DOTALL
)
END = "<!-- end -->"

Found = Mapping[str, Any]  # a results file


@dataclass(frozen=True)
class Settings:
    """Which tables, and whether to write them."""

    check: bool = False
    """write nothing; exit 1 when a table is not what the files say"""
    root: str = str(ROOT)
    """the folder that has README.md, docs/ and benchmarks/"""


def where(found: Found, sizes: str) -> str:
    """By which command a table was measured, and on what; the file has all versions."""
    return (
        f"`{found['command']}` on {found['chip']} ({found['computes_on']}), mlx {found['mlx']}, "
        f"mlx-lm {found['mlx-lm']}, commit {found['git']}; {sizes}."
    )


def speed(whole: Found, first: Found) -> str:
    """The short one: teacher, student and their ratio, of decoding and of first tokens."""
    lines = list[list[str]]()

    def line(label: str, big: float, small: float, quicker: float, digits: int = 1) -> None:
        lines.append([label, f"{big:,.{digits}f}", f"{small:,.{digits}f}", f"{quicker:.2f}x"])

    for part in ("dense", "4-bit"):
        models = whole[part]["models"]
        timed = whole[part]["measured"]["models"]
        big, small = (timed[n]["decode_tps"]["median"] for n in ("teacher", "student"))
        line(f"decode, both {models['student']['format']}, tokens/s", big, small, small / big)
    big, small = (
        whole["4-bit"]["models"][n]["m1_best_tps_computed"] for n in ("teacher", "student")
    )
    line(
        "– 4-bit on an M1 at best, computed from its 68 GB/s, tokens/s", big, small, small / big, 0
    )
    for row in (first["rows"][0], first["rows"][-1]):
        big, small = (row[n]["cold_ms"]["median"] for n in ("teacher", "student"))
        line(
            f"first token after {row['prompt_tokens']:,}, {first['format']}, ms",
            big,
            small,
            big / small,
            0,
        )
    given = whole["given"]
    a = whole["agreement"]
    threads = f", OPENBLAS_NUM_THREADS={whole['blas_threads']}" if whole.get("blas_threads") else ""
    on = (
        f"{whole['chip']} ({whole['computes_on']}{threads}), mlx {whole['mlx']}, mlx-lm "
        f"{whole['mlx-lm']}"
    )
    apart = abs(a["bench_over_mlx_lm_benchmark"]["median"] - 1)
    table = words.markdown_table(["", "teacher", "student", ""], lines)
    return (
        f"{table}\n\nMedians on {on}; decoding after {given['prompt_tokens']} tokens. `bench` and "
        f"`mlx_lm.benchmark`, the first token that it counts taken out, are {apart:.1%} apart."
    )


# What a plan's way of training is called in a table.
TRAINED = {
    "resident": "`resident`",
    "blocks": "`blocks`",
    "sharded": "`sharded`",
    "none": "`none`: repaired alone",
    "sft": "`resident`",
}


def known_numbers(found: Found) -> str:
    """A line a model: IFEval, BLiMP, our grammar and tools, and what our judge of answers says.

    A measure that no model has leaves its column out.
    """
    rows = found["rows"]
    cells = [known_cells(name, row) for name, row in rows.items()]
    head = [name for name in cells[0] if any(line[name] != "–" for line in cells)]
    lines = [[line[name] for name in head] for line in cells]
    teacher = rows["teacher"]
    asked = []
    labels = {
        "ifeval": "prompts of IFEval",
        "blimp": "pairs of BLiMP",
        "tool-calls": "prompts with tools",
        "tool-rounds": "rounds of calls",
    }
    for measure, label in labels.items():
        if measure in teacher:
            asked.append(f"{teacher[measure]['questions']} {label}")
    sizes = ", ".join(asked)
    if "ifeval" in teacher:
        sizes += f"; answers to IFEval have at most {found['given']['max_tokens']} tokens"
    if "card" in found:
        sizes += f"; the teacher's card says {found['card']}"
    source = where(found, sizes) + counted_by(found)
    return "\n".join([words.markdown_table(head, lines), "", source])


def known_cells(name: str, row: Found) -> dict[str, str]:
    """A model's line by column; a dash where a figure is missing."""
    ifeval = row.get("ifeval", {})
    calls = row.get("tool-calls", {})
    judgement = row.get("answers", {})
    above = "–"
    if calls.get("above_teacher"):
        mean, low, high = calls["above_teacher"]
        above = f"{mean:+.1f} ({low:+.1f} to {high:+.1f})".replace("-", "−")
    return {
        "": spelled(name),
        "MB": f"{row['mb']:.1f}",
        "IFEval, % (95 %)": with_interval(ifeval),
        "BLiMP, %": with_interval(row.get("blimp", {})),
        "`grammar-en`, %": with_interval(row.get("grammar-en", {})),
        "right calls of tools, %": with_interval(calls),
        "points above the teacher's": above,
        "readable, %": figure(100 * calls["shares"]["valid JSON"] if calls else None),
        "right until the first failure, % of 10 rounds": with_interval(row.get("tool-rounds", {})),
        "answers": figure(judgement.get("answers_excess"), 3),
        "loops, %": figure(judgement.get("loops")),
    }


def figure(value: float | None, digits: int = 1) -> str:
    """A number; a dash where there is none."""
    return f"{value:.{digits}f}" if value is not None else "–"


def with_interval(figure: Found) -> str:
    """A mean with its 95 % interval; a dash where there is none."""
    if not figure:
        return "–"
    return f"{figure['mean']:.1f} ({figure['low']:.1f}–{figure['high']:.1f})"


def hours(value: float | None) -> str:
    """Hours as people read them; a dash where there are none."""
    return duration(3600 * value) if value is not None else "–"


def computed(found: Found) -> str:
    """Where a table of plans comes from."""
    given = found["given"]
    return (
        f"Computed by `{found['command']}`, commit {found['git']}: `{given['machine']}` rates "
        f"{given['rates']}."
    )


def models_default(found: Found) -> str:
    """A line a model: what it is, and what comes of it where nothing is said about sizes."""
    head = ["model", "parameters", "bf16", "result", "peak memory", "whole run"]
    head.append("once hot")
    lines = list[list[str]]()
    for row in found["rows"].values():
        student = row["students"]["default"]
        asked = student["hours_of_answers"]
        answers = (asked["before"] or 0.0) + asked["at_end"]
        search = row["hours_of_search"] or 0.0
        line = [row["title"], f"{row['params'] / 1e9:.2f} B", f"{row['bytes'] / 1e9:.2f} GB"]
        line += [f"{student['bytes'] / 1e9:.2f} GB", gib(student["peak_bytes"])]
        whole = hours(search + answers + student["hours"])
        hot = hours(row["hours_of_search_hot"] + asked["hot"] + student["hours_hot"])
        lines.append([*line, *((whole, hot) if student["fits"] else ("**does not fit**", "–"))])
    return "\n".join([words.markdown_table(head, lines), "", computed(found)])


# Line of the table of runs: the file, what ran.
RUNS = (
    ("distill-default", "SmolLM2-135M-Instruct, default: sizes by a search"),
    ("distill-gemma-half", "gemma-3-270m, half of the tokens"),
    ("distill-gemma", "gemma-3-270m, `half-vocab`, 60 steps"),
    ("distill-qwen-coder-0.5b", "a chat model of 0.5 B, default: sizes by a search"),
    ("distill-gemma-600MiB", "gemma-3-270m, half of the tokens, `--budget 600MiB`"),
)
FOLDER = "../benchmarks/results/linux-x86_64"  # that these runs are of, as docs/ links it


def models_measured(*runs: Found) -> str:
    """A line a run: what really ran here, of which file."""
    head = ["what ran", "file", "parameters", "weights", "student", "result", "peak memory", "time"]
    lines = list[list[str]]()
    for (name, title), run in zip(RUNS, runs, strict=True):
        big = [f"{run['params_teacher'] / 1e6:.1f} M", f"{run['bytes_teacher']:.0f} MB"]
        small = [f"{run['params_student'] / 1e6:.1f} M", f"{run['bytes_4-bit']:.1f} MB"]
        took = [gib(run["peak_bytes"]), duration(run["seconds"])]
        lines.append([title, f"[{name}.json]({FOLDER}/{name}.json)", *big, *small, *took])
    return words.markdown_table(head, lines, words=2)


PHASES = (
    "vocabulary",
    "prune",
    "repair",
    "logit store",
    "distil",
    "quantize",
    "distil scales",
    "measure",
    "sft",
)


def planned_phases(found: Found) -> str:
    """A line a run: what was planned and what was taken in every phase, in MiB."""
    cases = found["cases"]
    columns = [name for name in PHASES if any(name in case["phases"] for case in cases.values())]
    lines = list[list[str]]()
    for title, case in cases.items():
        untouched = case["mode"] == "none" and "repair" not in case["phases"]
        training = "no training needed" if untouched else TRAINED[case["mode"]]
        cells = [f"{title}: {training}"]
        for phase in columns:
            if phase not in case["phases"]:
                cells.append("–")
                continue
            plan, took = case["phases"][phase]
            more = f"{plan / took - 1:+.0%}"
            cells.append(f"{plan / 2**20:,.0f} / {took / 2**20:,.0f} ({more})")
        lines.append([*cells, case.get("git", "–")[:7]])
    return words.markdown_table(["planned / took, MiB", *columns, "commit"], lines)


def rivals(found: Found) -> str:
    """A line a row, by size: what it loses on answers and on text, and what making it takes."""
    rows = sorted(found["rows"].items(), key=lambda item: float(item[1]["mb"]))
    head = ["", "bits per weight", "MB", "answers", "KL", "same top token", "EAR", "loops, %"]
    head += ["CPU minutes", "peak, GiB"]
    lines = list[list[str]]()
    for label, row in rows:
        cells = [spelled(label), f"{row['effective_bits']:.2f}", f"{row['mb']:.1f}"]
        cells += [
            with_margin(row[name]) if name in row else "–" for name in ("answers_excess", "kl")
        ]
        cells += [figure(row[name][0], 3) if name in row else "–" for name in ("top1", "ear")]
        cells.append(f"{row['loops'][0]:.0f}")
        if "seconds" in row:
            cells += [f"{row['cpu_seconds'] / 60:.1f}", f"{row['peak_gib']:.1f}"]
        else:
            cells += ["–", "–"]
        lines.append(cells)
    given = found["given"]
    sizes = f"{given['prompts']} prompts, {given['eval_tokens']:,} tokens of text, "
    sizes += f"{given['windows']} windows of calibration, one seed"
    return "\n".join([words.markdown_table(head, lines), "", where(found, sizes)])


def spelled(label: str) -> str:
    """A row's name: files call this program `ours`."""
    return label.replace("ours, ", "mis_mlx, ")


def with_margin(value: list[float]) -> str:
    """A number, with half the width of its 95 % interval where there is one."""
    mean, *interval = value
    if not interval:
        return f"{mean:.3f}"
    low, high = interval
    return f"{mean:.3f} ± {(high - low) / 2:.3f}"


def gemma_models(found: Found) -> str:
    """Two lines a model, one for each student: its bytes, and memory and hours by machine."""
    machines = list(found["given"]["machines"])
    head = ["model", "bf16", "tokens", "result"]
    for method in ("gptq", "round"):
        head += [f"`{method}`, {machine}" for machine in machines]
    lines = list[list[str]]()
    for row in found["rows"].values():
        for tokens, plans in row["students"].items():
            first = next(iter(plans.values()))
            cells = [row["title"], f"{row['bytes'] / 1e9:.2f} GB", tokens]
            cells.append(f"{first['bytes'] / 1e9:.2f} GB")
            for plan in plans.values():
                peak = gib(plan["peak_bytes"])
                fits = f"{peak}, {hours(plan['hours'])}"
                cells.append(fits if plan["fits"] else f"does not fit: {peak}")
            lines.append(cells)
    return "\n".join([words.markdown_table(head, lines, words=3), "", computed(found)])


def true_shape(found: Found) -> str:
    """A line a command: what it made of a model of random weights, and what that took."""
    head = ["what ran", "parameters", "bytes", "planned", "measured", "MLX's part", "time"]
    whole = found["rows"]["whole"]
    lines = [["made in slices", *sizes_of(whole), "–", "–", "–", duration(whole["seconds"])]]
    rows = dict(found["rows"])
    rows.pop("whole")
    for label, row in rows.items():
        took = [gib(row[key]) for key in ("planned_bytes", "grown_bytes", "mlx_bytes")]
        lines.append([label, *sizes_of(row), *took, duration(row["seconds"])])
    given = found["given"]
    source = (
        f"`{found['command']}`, commit {found['git']}: random weights of {given['model']}'s shape "
        f"in 4 bits, `--budget {given['budget']}`, on {found['chip']} next to other jobs."
    )
    return "\n".join([words.markdown_table(head, lines), "", source])


def counted_by(found: Found) -> str:
    """A sentence where loops were counted by another version than today's."""
    version = found.get("given", {}).get("loops_version", 1)
    if version == repetition.VERSION:
        return ""
    return f" Loops by version {version} of what counts as one; now it is {repetition.VERSION}."


def lose(found: Found) -> str:
    """What was allowed, expected and reached."""
    head = ["run", "MB", "expected", "reached", "loops, %", "teacher's, %"]
    lines = []
    by_bytes = sorted(found["rows"].items(), key=lambda item: -float(item[1]["bytes_4-bit"]))
    for name, row in by_bytes:
        # A teacher that is only packed expects nothing; one without a chat template has no answers.
        cells = [name, f"{row['bytes_4-bit']:.1f}"]
        cells += [figure(row.get(key), 3) for key in ("expected_loss", "reached_loss")]
        cells += [figure(row.get(key), 0) for key in ("loops_4-bit", "loops_teacher")]
        lines.append(cells)
    source = (
        f"`{found['command']}`, on {found['chip']} next to other jobs, with one thread of BLAS."
    )
    return "\n".join([words.markdown_table(head, lines), "", source + counted_by(found)])


def sizes_of(row: Found) -> list[str]:
    """Parameters and bytes of a model on disk."""
    return [f"{row['params'] / 1e9:.2f} B", f"{row['bytes'] / 1e9:.2f} GB"]


def machines(*runs: Found) -> str:
    """A line a machine: what the phases of a run were to take there, and took (`doctor --run`)."""
    lines = []
    for run in runs:
        seconds = [f"{name} {p:.0f} / {took:.0f}" for name, (p, took) in run["phases"].items()]
        planned, taken = map(gib, run["peak_bytes"])
        lines.append(
            [
                f"{run['chip']}, {run['cores_used']} of {run['cores']} cores, {run['memory_gib']} "
                f"GiB, {run['release']}",
                f"{run['computes_on']}, {run['mlx']}",
                run["commit"],
                ", ".join(f"{name}: {value}" for name, value in run["asked"].items()) or "–",
                ", ".join(seconds),
                duration(run["seconds"]),
                f"{planned} / {taken}",
            ]
        )
    head = ["machine", "MLX", "commit", "flags", "phases, s", "whole run", "memory"]
    return words.markdown_table(head, lines, words=5)


# Table: what arranges it, the files it is made of.
TABLES: dict[str, tuple[Callable[..., str], tuple[str, ...]]] = {
    "speed": (speed, ("throughput.json", "ttft.json")),
    "lose": (lose, ("lose.json",)),
    "doctor": (machines, ("doctor-small.json",)),
    "lose-gemma-3-270m": (lose, ("lose-gemma-3-270m.json",)),
    "planned": (planned_phases, ("planned.json",)),
    "rivals-qwen-coder-0.5b": (rivals, ("rivals-qwen-coder-0.5b.json",)),
    "rivals-smollm2": (rivals, ("rivals-smollm2.json",)),
    "known-numbers": (known_numbers, ("known_numbers.json",)),
    "known-numbers-qwen-coder-0.5b": (known_numbers, ("known_numbers-qwen-coder-0.5b.json",)),
    "models-default": (models_default, ("models.json",)),
    "gemma-models": (gemma_models, ("gemma_models.json",)),
    "gemma-4-e2b": (true_shape, ("gemma-4-e2b.json",)),
    "models-measured": (models_measured, tuple(f"{name}.json" for name, _ in RUNS)),
}


def table(root: Path, name: str) -> str:
    """What belongs between the marks: `name` is MACHINE/TABLE."""
    machine, _, kind = name.rpartition("/")
    if kind not in TABLES or not machine:
        raise MisError(
            f"there is no table {name!r}: write MACHINE/NAME with a NAME of {', '.join(TABLES)}"
        )
    arrange, names = TABLES[kind]
    paths = [root / "benchmarks" / "results" / machine / name for name in names]
    for path in paths:
        if not path.is_file():
            raise MisError(f"the table {name} needs {path}, which is not there: measure it again")
    try:
        return arrange(*(json.loads(path.read_text("utf-8")) for path in paths))
    except KeyError as error:
        raise MisError(
            f"{kind} of {paths[0].parent} has no {error}: measure it again, whole"
        ) from None


def rendered(root: Path, text: str, page: str) -> str:
    """The page with its tables made anew."""

    def block(match: re.Match[str]) -> str:
        if not match[0].endswith(END):
            raise MisError(f"{page}: the table {match[1]} has no {END} after it: add that line")
        return f"<!-- table: {match[1]} -->\n{table(root, match[1])}\n{END}"

    return BLOCK.sub(block, text)


def main(s: Settings) -> int:
    """0 when every table is what the files say, at last; 1 with --check when one was not."""
    root = Path(s.root)
    drifted = 0
    for page in PAGES:
        if not (root / page).is_file():
            continue
        before = (root / page).read_text("utf-8")
        after = rendered(root, before, page)
        if after == before:
            continue
        drifted += 1
        if s.check:
            lines = (text.splitlines(keepends=True) for text in (before, after))
            sys.stderr.writelines(
                difflib.unified_diff(*lines, f"{page}, as it is", f"{page}, as the files say", n=0)
            )
        else:
            (root / page).write_text(after, "utf-8")
            cli.say(f"{page}: written")
    if s.check and drifted:
        cli.say("tables are not what benchmarks/results says: run `scripts/mis scripts/render.py`")
    return 1 if s.check and drifted else 0


if __name__ == "__main__":
    try:
        sys.exit(main(cli.parse(Settings)))
    except MisError as error:
        sys.exit(f"mis_mlx: {error}")
