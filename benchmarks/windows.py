"""What it costs to let some blocks see the last tokens only, and how much earlier the first token
comes for that.

    scripts/mis benchmarks/windows.py --model RUN/distilled
    scripts/mis benchmarks/windows.py --table

`layer_types` and `sliding_window` in a llama's config.json are all that it takes: stock mlx_lm
reads them and keeps only the last tokens of such a block (transformers' and llama.cpp's llama do
not know them). Nothing is trained. Blocks are ranked by KL(the model as it is || with this block
alone windowed) on `--rank-windows` windows of `--length` tokens, then the cheapest so many of them
are windowed together; judged on held-out English and Polish, in bits per byte. Seconds to the first
token are mlx-lm's, the prompt in parts of 512 tokens, models in turn. Writes
benchmarks/results/<machine>/windows.json after every step.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import laboratory
import mlx.core as mx
import numpy as np

from mis_mlx import cli
from mis_mlx.data import preparation, token_windows
from mis_mlx.judge import comparison
from mis_mlx.models.opening import compute_type, load, resolve
from mis_mlx.models.passing import stream
from mis_mlx.reporting.text import markdown_table


@dataclass(frozen=True)
class Settings:
    """How much."""

    model: str | None = None
    """folder; default: the default teacher"""
    name: str = "windows"
    """of the results file"""
    window: int = 512
    """tokens that such a block sees"""
    length: int = 2048
    """tokens of a text"""
    rank_windows: int = 1
    """training texts that rank blocks"""
    eval_windows: int = 2
    """held-out texts of each language"""
    shares: tuple[float, ...] = (0.25, 0.5, 0.75, 0.9)
    """of all blocks"""
    prompts: tuple[int, ...] = (512, 4096)
    """tokens before the first token"""
    rounds: int = 2
    """of each, the least counts; 0: time nothing"""
    table: bool = False
    """print what there is, and make nothing"""


class Bench:
    """The model as it is, its text, and the same with windows."""

    def __init__(self, s: Settings):
        self.s = s
        self.path = resolve.resolve_model(s.model).path
        tokenizer = load.tokenizer(self.path)
        data = preparation.prepare(None, tokenizer, s.length)
        self.checkpoint = compute_type.open_to_compute(self.path)
        self.layers = int(self.checkpoint.config["num_hidden_layers"])
        self.rank = comparison.spread_windows(data.train, s.rank_windows)
        self.held_out = {
            name: comparison.spread_windows(text, s.eval_windows)
            for name, text in data.held_out.items()
        }
        self.base = self.windowed(())
        self.states = {name: self.hidden(self.base, text) for name, text in self.texts.items()}

    @property
    def texts(self) -> dict[str, token_windows.Windows]:
        """All of them, that of the ranking first."""
        return {"rank": self.rank, **self.held_out}

    def windowed(self, blocks: tuple[int, ...]) -> Any:
        """mlx-lm's model in float32."""
        kinds = ["full_attention"] * self.layers
        for block in blocks:
            kinds[block] = "sliding_attention"
        how = {"layer_types": kinds, "sliding_window": self.s.window}
        model, _ = load.mlx_lm("utils").load_model(self.path, model_config=how)
        model.set_dtype(mx.float32)
        return model

    def hidden(self, model: Any, text: token_windows.Windows) -> list[mx.array]:
        """Final states (1, T, D) of every text."""
        states = [model.model(mx.array(tokens[None])) for tokens in text.tokens]
        mx.eval(states)
        return states

    def judge(self, model: Any, name: str) -> dict[str, float]:
        """Mean KL from the model as it is in nats a token, of windows; bits per byte where bytes
        are known.
        """
        text = self.texts[name]
        before = (stream.Stream(self.checkpoint), self.states[name])
        after = (stream.Stream(self.checkpoint), self.hidden(model, text))
        each = comparison.by_window(before, after, text)
        _, nll, kl, *_ = np.array([values.mean(axis=0) for values in each]).T
        found = {"kl": float(kl.mean())}
        if text.text_bytes is not None and text.text_bytes.any():
            found["bits_per_byte"] = comparison.per_byte(nll, text) / math.log(2)
        return found

    def first_token(self, model: Any, tokens: int) -> float:
        """Seconds."""
        ids = mx.array(np.resize(self.rank.tokens[0], tokens))
        generate_step = load.mlx_lm("generate").generate_step
        began = time.perf_counter()
        next(generate_step(ids, model, max_tokens=1, prefill_step_size=512))
        return time.perf_counter() - began


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    names = [name for name in rows[0] if name not in ("windowed", "first_s")]
    prompts = list(rows[0].get("first_s", ()))
    lines = []
    for row in rows:
        cells = [str(row["windowed"])]
        for name in names:
            judged = row[name]
            cells.append(f"{judged['bits_per_byte']:.3f} (KL {judged['kl']:.3f})")
        for prompt in prompts:
            sooner = rows[0]["first_s"][prompt] / row["first_s"][prompt]
            cells.append(f"{sooner:.2f}x")
        lines.append(cells)
    head = [
        *(f"bits per byte, {n}" for n in names),
        *(f"first token at {p} tokens" for p in prompts),
    ]
    return markdown_table(["blocks windowed", *head], lines)


def asked(s: Settings) -> dict[str, Any]:
    """What the rows depend on."""
    given = {}
    for name, value in asdict(s).items():
        if name not in ("model", "table", "name", "rounds", "prompts"):
            given[name] = list(value) if isinstance(value, tuple) else value
    return given


def first_tokens(bench: Bench, models: dict[int, Any]) -> dict[tuple[int, int], float]:
    """{(blocks windowed, tokens of the prompt): seconds}, the least of all rounds."""
    taken: dict[tuple[int, int], float] = {}
    for _ in range(bench.s.rounds):
        for prompt in bench.s.prompts:
            for count, model in models.items():
                seconds = bench.first_token(model, prompt)
                taken[count, prompt] = min(seconds, taken.get((count, prompt), math.inf))
    return taken


def main(s: Settings) -> None:
    """Rank, then window more and more."""
    given = asked(s)
    found = laboratory.resumed(s.name, given, ["costs", "rows"])
    costs = found.get("costs", {})
    rows = found.get("rows", [])
    command = "scripts/mis benchmarks/windows.py" + " --model RUN/distilled" * bool(s.model)
    if not s.table:
        bench = Bench(s)

        def keep() -> None:
            laboratory.write(s.name, command, {"given": given, "costs": costs, "rows": rows})

        for block in range(bench.layers):
            if str(block) not in costs:
                cost = bench.judge(bench.windowed((block,)), "rank")["kl"]
                cli.say(f"block {block}: {cost:.5f} nats")
                costs[str(block)] = cost
                keep()
        order = [int(block) for block in sorted(costs, key=lambda name: costs[name])]
        counts = [0, *(round(share * bench.layers) for share in s.shares)]
        models = {count: bench.windowed(tuple(order[:count])) for count in counts}
        if not rows:
            for count, model in models.items():
                judged = {name: bench.judge(model, name) for name in bench.held_out}
                rows.append({"windowed": count, **judged})
            keep()
        taken = first_tokens(bench, models)
        for row in rows if taken else ():
            count = row["windowed"]
            row["first_s"] = {str(prompt): taken[count, prompt] for prompt in s.prompts}
        keep()
    print(table(rows))


if __name__ == "__main__":
    laboratory.start(Settings, main)
