"""What a block of the default teacher takes on a CPU: its matrix products beside all else.

    scripts/mis benchmarks/hottest.py    # a minute of one thread

Seconds are those of the process, so other jobs change them little: the best of several runs.
Products at the machine's speed for their shapes; SiLU and causal attention by MLX and by
compute/quick_exp; a matrix that is rounded, and opened again, in every number of bits. All of it
for a window of 256 tokens. Where the time of a whole run goes, benchmarks/phases.py shows.

Writes benchmarks/results/<machine>/hottest.json.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import laboratory
import mlx.core as mx
import mlx.nn as nn

from mis_mlx.compute import quick_exp
from mis_mlx.maths import rounding
from mis_mlx.reporting.text import markdown_table

RUNS = 7
TOKENS = 256
HIDDEN = 576
FFN = 1536
HEADS = 9
KEY_HEADS = 3
WIDTH = 64
SCALE = WIDTH**-0.5


def seconds(work: Callable[[], Any]) -> float:
    """Seconds of the process, the least of RUNS; what is made once is made before."""
    mx.eval(work())
    best = float("inf")
    for _ in range(RUNS):
        began = time.process_time()
        mx.eval(work())
        best = min(best, time.process_time() - began)
    return best


def product(inputs: int, outputs: int) -> dict[str, Any]:
    """A window's product with a matrix (outputs, inputs): milliseconds, and GFLOP/s."""
    x = mx.random.normal((TOKENS, inputs))
    weight = mx.random.normal((outputs, inputs))
    mx.eval(x, weight)
    took = seconds(lambda: x @ weight.T)
    rate = 2 * TOKENS * inputs * outputs / took
    return {"ms": 1e3 * took, "gflops_per_s": rate / 1e9}


def gated(function: Callable[[mx.array, mx.array], mx.array]) -> dict[str, float]:
    """SiLU of a window's gates, forward, and back from there."""
    gate = mx.random.normal((TOKENS, FFN))
    x = mx.random.normal((TOKENS, FFN))
    mx.eval(gate, x)
    forward = seconds(lambda: function(gate, x))
    both = seconds(lambda: mx.vjp(function, [gate, x], [x])[1])
    return {"ms": 1e3 * forward, "and_back_ms": 1e3 * both}


def attended(function: Callable[..., mx.array]) -> dict[str, float]:
    """A window's attention without its matrices, forward, and back from there."""
    queries = mx.random.normal((1, HEADS, TOKENS, WIDTH))
    keys = mx.random.normal((1, KEY_HEADS, TOKENS, WIDTH))
    values = mx.random.normal((1, KEY_HEADS, TOKENS, WIDTH))
    mx.eval(queries, keys, values)
    causal = partial(function, scale=SCALE, mask="causal")
    forward = seconds(lambda: causal(queries, keys, values))
    both = seconds(lambda: mx.vjp(causal, [queries, keys, values], [queries])[1])
    return {"ms": 1e3 * forward, "and_back_ms": 1e3 * both}


def stored(bits: int) -> dict[str, float]:
    """A matrix of the FFN to its nearest values, and opened again."""
    weight = mx.random.normal((FFN, HIDDEN))
    packed = rounding.nearest(weight, 64, bits)
    mx.eval(weight, packed)
    rounded = seconds(lambda: rounding.nearest(weight, 64, bits))
    opened = seconds(lambda: rounding.values(packed, 64, bits))
    return {"ms": 1e3 * rounded, "opened_ms": 1e3 * opened}


def silu_by_mlx(gate: mx.array, x: mx.array) -> mx.array:
    """As mlx-lm's blocks have it."""
    return nn.silu(gate) * x


def main() -> None:
    """All rows, printed and kept."""
    mx.random.seed(0)
    rows = {
        "product 576 to 576": product(HIDDEN, HIDDEN),
        "product 576 to 1536": product(HIDDEN, FFN),
        "product 1536 to 576": product(FFN, HIDDEN),
        "product with the head, 36,864 tokens": product(HIDDEN, 36_864),
        "SiLU by MLX": gated(silu_by_mlx),
        "SiLU by quick_exp": gated(quick_exp.swiglu),
        "attention by MLX": attended(mx.fast.scaled_dot_product_attention),
        "attention by quick_exp": attended(quick_exp.attention),
    }
    for bits in rounding.CANDIDATE_BITS:
        rows[f"a matrix of the FFN in {bits} bits"] = stored(bits)
    heads = ["ms", "and_back_ms", "opened_ms", "gflops_per_s"]
    body = []
    for name, row in rows.items():
        cells = [f"{row[head]:.1f}" if head in row else "–" for head in heads]
        body.append([name, *cells])
    print(markdown_table(["", *heads], body))
    laboratory.write("hottest", "scripts/mis benchmarks/hottest.py", {"rows": rows})


if __name__ == "__main__":
    main()
