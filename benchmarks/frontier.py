"""Bits per byte of text against bytes of weights: the teacher in fewer bits, pruned and rounded,
and `distill --bytes`.

    scripts/mis benchmarks/frontier.py                           # hours on 2 cores; finished rows
    are not run again
    scripts/mis benchmarks/frontier.py --teacher gemma-3-270m
    scripts/mis benchmarks/frontier.py --table                   # what there is, and the curve
    again

Rows: the teacher; it as `mlx_lm.convert -q` rounds it to 8, 6, 5, 4 and 3 bits in groups of 64, and
as Q4_K_M where llama-cpp-python is there, which then judges that file; the default scenario pruned
and rounded to 4 bits, nothing learned; ours at the bytes of the 6-, 4- and 3-bit teacher and at
half of the 4-bit one's. Every model reads its own tokens. Texts: held-out windows of the kind
trained on, English and Polish, and three kinds that nobody trained on (benchmarks/vocabulary.py).
Excess is over the teacher, the mean of all texts. Writes
benchmarks/results/<machine>/frontier-<teacher>.json after every row; then the curve, and a page of
both.
"""

from __future__ import annotations

import base64
import importlib.util
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
from laboratory import RESULTS, picture, stored, write
from laboratory import start as begin
from vocabulary import texts

from mis_mlx import cli, distill, export, prune
from mis_mlx.data import preparation, token_windows
from mis_mlx.data.token_windows import Windows
from mis_mlx.judge import comparison
from mis_mlx.models.opening import compute_type, load, resolve
from mis_mlx.pruning import vocabulary
from mis_mlx.quantization import packed_format
from mis_mlx.reporting import html
from mis_mlx.reporting.text import markdown_table
from mis_mlx.storage.files import DISK

PLAIN = (8, 6, 5, 4, 3)
OURS = {"6-bit": (6, 1.0), "4-bit": (4, 1.0), "3-bit": (3, 1.0), "half of 4-bit": (4, 0.5)}
SCALES = 0.5  # bits of a weight, of scale and bias in groups of 64


@dataclass(frozen=True)
class Settings:
    """Of one teacher."""

    teacher: str | None = None
    """folder, hub id or gemma-3-270m; default: SmolLM2-135M-Instruct"""
    sizes: tuple[str, ...] = ("half of 4-bit", "3-bit", "4-bit", "6-bit")
    """of ours: the bytes of which teacher"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """of ours"""
    eval_windows: int = 8
    """of each text"""
    table: bool = False
    """print what there is, and make nothing"""


class Judge:
    """Bits per byte of any model on windows of every text, each in its own tokens."""

    def __init__(self, teacher: Path, places: dict[str, Path], count: int):
        self.tokenizer = load.tokenizer(teacher)
        self.windows = dict[str, Windows]()
        for name, data in {"": None, **places}.items():
            held_out = preparation.prepare(
                str(data) if data else None, self.tokenizer, 256
            ).held_out
            for text, windows in held_out.items():
                self.windows[name or f"built in, {text}"] = comparison.spread_windows(
                    windows, count
                )

    def bits(self, folder: Path) -> dict[str, float]:
        """{text: bits per byte}, of a model folder or a GGUF."""
        if folder.suffix == ".gguf":
            return {
                n: comparison.per_byte(by_llama_cpp(folder, w), w) / math.log(2)
                for n, w in self.windows.items()
            }
        model = compute_type.open_to_compute(folder)
        found = dict[str, float]()
        trimmed = vocabulary.rows_of(folder) is not None
        for name, windows in self.windows.items():
            own = (
                token_windows.retokenized(windows, self.tokenizer, load.tokenizer(folder))
                if trimmed
                else windows
            )
            values = comparison.compare({"model": model}, own)["model", "nll"]
            found[name] = comparison.per_byte(values, own) / math.log(2)
        return found


def by_llama_cpp(file: Path, windows: Windows) -> np.ndarray:
    """(N,) nats a token of each window, as llama.cpp computes them."""
    import llama_cpp

    model = llama_cpp.Llama(
        str(file), n_ctx=windows.tokens.shape[1], logits_all=True, verbose=False
    )
    found = []
    for ids, loss_mask in zip(windows.tokens, windows.loss_mask, strict=True):
        model.reset()
        model.eval(ids.tolist())
        at = np.flatnonzero(loss_mask[:-1])
        z = mx.array(np.array(model.scores)[at])
        told = mx.take_along_axis(z, mx.array(ids[at + 1].astype(np.int32))[:, None], axis=-1)[:, 0]
        found.append((mx.logsumexp(z, axis=-1) - told).mean().item())
    model.close()
    return np.array(found)


def excess(row: dict[str, Any], teacher: dict[str, Any]) -> float:
    """Bits a byte above the teacher's, the mean of all texts."""
    return sum(row["bits"][text] - teacher["bits"][text] for text in row["bits"]) / len(row["bits"])


class Rows:
    """What is made, one folder at a time."""

    def __init__(self, s: Settings, place: Path):
        self.s = s
        self.place = place
        self.teacher = resolve.resolve_model(s.teacher).path
        self.name = f"frontier-{self.teacher.name}"
        before = stored(self.name)
        self.given = {"eval_windows": s.eval_windows}
        self.rows: dict[str, Any] = before["rows"] if before.get("given") == self.given else {}
        for row in self.rows.values():
            row["excess"] = excess(row, self.rows["teacher"])
        self.judge = Judge(self.teacher, texts(place), s.eval_windows)

    def add(self, label: str, make: Any) -> None:
        """Make a model's folder, judge it, and keep the numbers."""
        if label in self.rows:
            return
        with tempfile.TemporaryDirectory(dir=self.place) as temp:
            folder, more = make(Path(temp) / "made")
            row = {
                **(
                    {}
                    if "bytes" in more
                    else {"bytes": compute_type.open_to_compute(folder).nbytes}
                ),
                **more,
            }
            self.rows[label] = row | {"bits": self.judge.bits(folder)}
        over = self.rows[label]["excess"] = excess(self.rows[label], self.rows["teacher"])
        cli.say(f"{label}: {self.rows[label]['bytes'] / 1e6:.1f} MB, {over:+.3f} bits per byte")
        self.keep()

    def keep(self) -> None:
        """Write what there is."""
        command = "scripts/mis benchmarks/frontier.py" + (
            f" --teacher {self.s.teacher}" if self.s.teacher else ""
        )
        write(self.name, command, {"given": self.given, "rows": self.rows})

    def plain(self, bits: int) -> Any:
        """mlx_lm.convert -q."""

        def make(out: Path) -> tuple[Path, dict[str, Any]]:
            convert = load.mlx_lm("convert").convert
            convert(
                str(self.teacher),
                str(out),
                quantize=True,
                q_group_size=64,
                q_bits=bits,
                dtype="float16",
            )
            return out, {}

        return make

    def k_quant(self, out: Path) -> tuple[Path, dict[str, Any]]:
        """llama.cpp's own; bytes are those of its tensors."""
        made = export.run(export.Settings(model=self.s.teacher, out=str(out), out_type="q4_k_m"))
        file = out / made["file"]
        return file, {"bytes": sum(int(t.n_bytes) for t in gguf.GGUFReader(file).tensors)}

    def pruned(self, out: Path) -> tuple[Path, dict[str, Any]]:
        """The default scenario, rounded to 4 bits."""
        teacher = compute_type.open_to_compute(self.teacher)
        scenario = vocabulary.defaults(None, None, teacher.config, self.teacher)
        prune.run(
            prune.Settings(model=self.s.teacher, mlx_path=str(out.with_name("pruned")), **scenario)
        )
        student = compute_type.open_to_compute(out.with_name("pruned"))
        plan = packed_format.formats_of(
            student.config, 64, packed_format.blocks_after_removed(student)
        )
        packed_format.write_quantized(student, out, plan, DISK)
        return out, scenario

    def ours(self, nbytes: int, seed: int) -> Any:
        """distill --bytes."""

        def make(out: Path) -> tuple[Path, dict[str, Any]]:
            asked = distill.Settings(
                teacher=self.s.teacher,
                bytes=str(nbytes),
                seed=seed,
                out=str(out),
                eval_windows=3,
                bench_tokens=0,
            )
            result = distill.run(asked)
            model = compute_type.open_to_compute(out / "model")
            config = {
                key: model.config[key]
                for key in (
                    "num_hidden_layers",
                    "intermediate_size",
                    "vocab_size",
                    "num_attention_heads",
                )
            }
            return out / "model", {
                "params": result["params_student"],
                "config": config,
                "seed": seed,
            }

        return make


def table(rows: dict[str, Any]) -> str:
    """Markdown: bytes, excess in all texts and in each."""
    kinds = list(rows["teacher"]["bits"])
    lines = []
    for label, row in sorted(rows.items(), key=lambda item: -item[1]["bytes"]):
        each = (f"{row['bits'][k] - rows['teacher']['bits'][k]:+.3f}" for k in kinds)
        lines.append([label, f"{row['bytes'] / 1e6:.1f}", f"{row['excess']:+.3f}", *each])
    return markdown_table(["", "MB", "excess, mean", *kinds], lines)


def draw(rows: dict[str, Any]) -> Any:
    """The curve: a line for the teacher in fewer bits, points for all else."""

    def on(axes: Any) -> None:
        kinds = {
            "teacher in": ("o-", "the teacher in fewer bits (mlx_lm.convert)"),
            "llama.cpp": ("^", "the teacher in llama.cpp's Q4_K_M"),
            "pruned": ("s", "pruned, 4 bits, nothing learned"),
            "ours": ("D", "distill --bytes"),
        }
        for kind, (mark, label) in kinds.items():
            mine = [row for name, row in rows.items() if name.startswith(kind)]
            points = sorted(
                (row["bytes"] / 1e6, row["excess"]) for row in mine if row["excess"] > 0
            )
            if points:
                axes.plot([x for x, _ in points], [y for _, y in points], mark, label=label)
        axes.set_xlabel("MB of weights")
        axes.set_ylabel("bits per byte above the teacher")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.figure.legend(loc="outside lower center", ncols=2, fontsize=8.5)

    return on


def page(name: str, teacher: str, rows: dict[str, Any]) -> None:
    """Put benchmarks/results/<machine>/<name>.html in place: the curve and all rows, in one file
    that loads nothing.
    """
    said = (
        "Bits per byte above the teacher's, in the mean of all texts and in each; MB are of the "
        "weights."
    )
    body = f"<h1>{teacher}: what a budget of bytes buys</h1>"
    if (drawn := RESULTS / f"{name}.svg").is_file():  # not where matplotlib is missing
        curve = base64.b64encode(drawn.read_bytes()).decode()
        body += (
            f'<img alt="Bits per byte above the teacher\'s against MB" '
            f'src="data:image/svg+xml;base64,{curve}">'
        )
    path = RESULTS / f"{name}.html"
    path.write_text(
        html.page(teacher, body + html.markdown(f"{said}\n\n{table(rows)}")), encoding="utf-8"
    )
    cli.say(f"page: {path}")


def main(s: Settings) -> None:
    """Every row that is not there yet."""
    with tempfile.TemporaryDirectory() as temp:
        rows = Rows(s, Path(temp))
        if not s.table:
            rows.add("teacher", lambda _: (rows.teacher, {}))
            for bits in PLAIN:
                rows.add(f"teacher in {bits} bits", rows.plain(bits))
            if importlib.util.find_spec("llama_cpp"):
                rows.add("llama.cpp's Q4_K_M", rows.k_quant)
            rows.add("pruned, 4 bits", rows.pruned)
            for seed in s.seeds:
                for size in s.sizes:
                    bits, share = OURS[size]
                    nbytes = int(share * rows.rows[f"teacher in {bits} bits"]["bytes"])
                    rows.add(f"ours, {size}, seed {seed}", rows.ours(nbytes, seed))
        rows.keep()
        print(table(rows.rows))
        picture(rows.name, draw(rows.rows))
        page(rows.name, rows.teacher.name, rows.rows)


if __name__ == "__main__":
    begin(Settings, main)
