"""What 4 bits cost: ours beside mlx_lm's convert, gptq, awq, dwq and dynamic_quant and llama.cpp's
Q4_K_M, in one run.

    scripts/mis benchmarks/quality_4bit.py --model RUN/distilled --name student   # about an hour on
    2 cores
    scripts/mis benchmarks/quality_4bit.py                                        # the default
    teacher

A row is one model in fewer bits: KL(model || model in fewer bits) and the held-out loss that it
adds, over all tokens of the same windows (± one standard error over tokens). All MLX rows have
groups of 64 and learn from the same windows: 32 for whoever calibrates, 2 a step for whoever
trains. mlx_lm's programs run as they are, on our text: `convert` and `dwq` round the embedding to 4
bits, `gptq` and `awq` to 8. Bits are of all weights. Rows are written when they are done, so a run
that was stopped goes on. Writes benchmarks/results/<machine>/quality_4bit/<name>-<row>.json.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import laboratory
import mlx.core as mx
import numpy as np
import other_quantizers
from laboratory import stored, write

from mis_mlx import cli
from mis_mlx.data import preparation
from mis_mlx.judge import comparison
from mis_mlx.models.architectures import arch
from mis_mlx.models.opening import compute_type, load, resolve
from mis_mlx.models.passing.stream import Stream
from mis_mlx.quantization import stage
from mis_mlx.reporting.text import markdown_table
from mis_mlx.settings.recipe import QuantizationConfig
from mis_mlx.storage.files import DISK
from mis_mlx.types import Checkpoint


@dataclass(frozen=True)
class Settings:
    """What is compared; the defaults are what the README shows."""

    model: str | None = None
    """folder of an unquantized model; default: the default teacher"""
    teacher: str | None = None
    """what scales may learn from beside the model itself; default: the default teacher, where
    --model is another
    """
    name: str = "teacher"
    """what to call the model in the results"""
    only: tuple[str, ...] = ()
    """rows; default: all"""
    num_samples: int = 32
    """windows of calibration"""
    max_seq_length: int = 256
    """tokens in a window"""
    q_iters: int = 20
    """steps of two windows, ours and dwq's"""
    eval_windows: int = 16
    """held-out English windows; a third as many Polish ones"""
    table: bool = False
    """print what there is, and make nothing"""


class Bench:
    """One dense model, its text, and ways to fewer bits; each writes a folder."""

    def __init__(self, s: Settings):
        self.s, self.path = s, resolve.resolve_model(s.model).path
        self.dense = compute_type.open_to_compute(self.path)
        data = preparation.prepare(None, load.tokenizer(self.path), s.max_seq_length)
        self.train = data.train
        self.batches = preparation.calibration(data.train, s.num_samples, 0)
        self.held_out = {
            name: comparison.spread_windows(text, max(1, s.eval_windows // (1 if at == 0 else 3)))
            for at, (name, text) in enumerate(data.held_out.items())
        }
        self.mine = {
            name: comparison.final_hidden(self.dense, text) for name, text in self.held_out.items()
        }

    def judge(self, other: Checkpoint) -> dict[str, Any]:
        """Mean KLD and added loss with standard errors, agreement; by text."""
        found: dict[str, Any] = {}
        for name, text in self.held_out.items():
            mine = Stream(self.dense), self.mine[name]
            theirs = Stream(other), comparison.final_hidden(other, text)
            at = np.concatenate([*comparison.by_window(mine, theirs, text)]).T
            f = comparison.figures(*at[:4])
            added = at[1] - at[0]
            found[name] = {
                key: f[key] for key in ("mean_kld", "p999_kld", "same_top_p", "ppl_ratio")
            }
            found[name]["added_nats"] = (
                float(added.mean()),
                float(added.std(ddof=1) / len(added) ** 0.5),
            )
        return found

    def ours(self, out: Path, how: QuantizationConfig, taught: str | None = None) -> None:
        """`quantize`, then steps against the model itself or the folder `taught`."""
        rounded = out.parent / "rounded" if how.q_iters else out
        stage.quantize(
            self.dense,
            rounded,
            rounding=how,
            files=DISK,
            batches=self.batches,
            held=len(self.batches),
        )
        if how.q_iters:
            taught_by = self.dense
            if taught:
                taught_by = compute_type.open_to_compute(taught)
            laboratory.tuned(
                rounded,
                out,
                taught_by=taught_by,
                train=self.train,
                q_iters=how.q_iters,
            )

    def convert(self, out: Path) -> None:
        """mlx_lm.convert -q."""
        laboratory.packed(self.path, out)

    def gptq(self, out: Path) -> None:
        """mlx_lm.gptq's function."""
        other_quantizers.gptq(self.path, out, self.batches, embedding_bits=8)

    def awq(self, out: Path) -> None:
        """mlx_lm.awq's function, on a quarter of the windows."""
        other_quantizers.awq(
            self.path, out, self.batches, embedding_bits=8, embedding_group=64, steps=10
        )

    def dwq(self, out: Path) -> None:
        """mlx_lm.dwq's function, for as many steps as ours."""
        other_quantizers.dwq(self.path, out, self.train, self.s.q_iters)

    def dynamic_quant(self, out: Path) -> None:
        """mlx_lm.dynamic_quant's functions, for the bits of our default."""
        target_bpw = MIXED.target_bpw
        assert target_bpw is not None
        other_quantizers.dynamic_quant(self.path, out, self.batches, target_bpw)

    def q4_k_m(self, out: Path) -> None:
        """llama.cpp's own program, read back by gguf-py into a dense folder."""
        self.nbytes = other_quantizers.llama_cpp(self.dense, out, "Q4_K_M", {})


FOUR = QuantizationConfig(target_bpw=None, q_iters=0)
MIXED = QuantizationConfig(q_iters=0)
ROWS: dict[str, Callable[[Bench, Path], None]] = {
    "mlx_lm convert": Bench.convert,
    "mlx_lm gptq": Bench.gptq,
    "mlx_lm awq": Bench.awq,
    "mlx_lm dwq": Bench.dwq,
    "mlx_lm dynamic_quant": Bench.dynamic_quant,
    "Q4_K_M": Bench.q4_k_m,
    "ours, rounded": lambda b, out: b.ours(out, replace(FOUR, q_method="round")),
    "ours, mxfp4": lambda b, out: b.ours(out, replace(FOUR, q_mode="mxfp4")),
    "ours, nvfp4": lambda b, out: b.ours(out, replace(FOUR, q_mode="nvfp4")),
    "ours, gptq": lambda b, out: b.ours(out, FOUR),
    "ours, mixed": lambda b, out: b.ours(out, replace(MIXED, q_method="round")),
    "ours, mixed gptq": lambda b, out: b.ours(out, MIXED),
    "ours, gptq tuned": lambda b, out: b.ours(out, replace(FOUR, q_iters=b.s.q_iters)),
    "ours, mixed gptq tuned": lambda b, out: b.ours(out, replace(MIXED, q_iters=b.s.q_iters)),
    "ours, 5.2 bits": lambda b, out: b.ours(
        out, replace(MIXED, target_bpw=5.2, q_iters=b.s.q_iters)
    ),
    "ours, as large as Q4_K_M": lambda b, out: b.ours(
        out, replace(MIXED, target_bpw=6.4, q_iters=b.s.q_iters)
    ),
    "ours, mixed gptq tuned, from the teacher": lambda b, out: b.ours(
        out, replace(MIXED, q_iters=b.s.q_iters), str(resolve.resolve_model(b.s.teacher).path)
    ),
}


def row(bench: Bench, make: Callable[[Bench, Path], None]) -> dict[str, Any]:
    """One model made, measured and thrown away."""
    began = time.monotonic()
    with TemporaryDirectory() as temp:
        make(bench, out := Path(temp) / "model")
        made = compute_type.open_to_compute(out)
        seconds = time.monotonic() - began
        nbytes = made.nbytes if arch.is_quantized(made.tensors) else bench.nbytes
        bits = 8 * nbytes / arch.params(made.config)
        return {
            "bits_per_weight": bits,
            "nbytes": nbytes,
            "seconds": round(seconds),
            **bench.judge(made),
        }


def table(name: str) -> str:
    """Markdown of all rows there are."""
    head = [name, "bits per weight", "MB"]
    head += ["mean KLD, English", "added nats", "mean KLD, Polish", "added nats"]
    rows = []
    for label in ROWS:
        if r := stored(f"quality_4bit/{name}-{label.replace(', ', '-').replace(' ', '-')}"):
            texts = [r["English"], r["Polish"]]
            values = []
            for text in texts:
                for mean, error in (text["mean_kld"], text["added_nats"]):
                    values.append(f"{mean:.3f} ± {error:.3f}")
            rows.append([label, f"{r['bits_per_weight']:.2f}", f"{r['nbytes'] / 1e6:.1f}", *values])
    return markdown_table(head, rows)


def main(s: Settings) -> None:
    """Every row that was asked for and is not there yet."""
    if s.table:
        print(table(s.name))
        return
    files = {
        label: f"quality_4bit/{s.name}-{label.replace(', ', '-').replace(' ', '-')}"
        for label in ROWS
    }
    todo = [label for label in ROWS if (not s.only or label in s.only) and not stored(files[label])]
    if s.name == "teacher":  # which is its own
        todo = [label for label in todo if "from the teacher" not in label]
    cli.say(f"{len(todo)} rows to make")
    bench = Bench(s) if todo else None
    for label in todo:
        assert bench
        command = f"scripts/mis benchmarks/quality_4bit.py --name {s.name} --q-iters {s.q_iters}"
        try:
            found = row(bench, ROWS[label])
        # somebody else's program that does not run here is a finding too
        except Exception as error:
            if not label.startswith(("mlx_lm", "Q4")):
                raise
            cli.say(f"{label}: {type(error).__name__}: {error}")
            continue
        write(files[label], command, {"row": label, **found})
        english = found["English"]
        cli.say(
            f"{label}: {found['bits_per_weight']:.2f} bits, KLD {english['mean_kld'][0]:.4f}, "
            f"{english['added_nats'][0]:+.4f} nats, {found['seconds']} s"
        )
        mx.clear_cache()


if __name__ == "__main__":
    main(cli.parse(Settings))
