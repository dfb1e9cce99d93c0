"""The gated delta rule in chunks and as mlx-lm has it, token by token: time and memory of a
gradient; and what the plan says of a block's way back, for Qwen 3.5's blocks and LFM2's.

    scripts/mis benchmarks/hybrids.py    # minutes on 2 cores

One window, float32, random numbers. The rule has 16 heads of 128 channels, as in the published
0.8B as far as we know its shape. A block has 1,024 channels and 3,584 neurons. The peak is MLX's,
without inputs and weights; the time is the quickest of some rounds. Writes
benchmarks/results/<machine>/hybrids.json.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
from laboratory import busy, start, write

from mis_mlx.models.architectures import arch, gated_delta
from mis_mlx.models.architectures.families import family
from mis_mlx.models.opening import load
from mis_mlx.models.opening.model_size import model_of
from mis_mlx.models.passing import residency

LENGTHS = (256, 1024)
HEADS = 16
CHANNELS = 128
BLOCKS: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {
        "num_hidden_layers": 4,
        "full_attention_interval": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "linear_num_key_heads": HEADS,
        "linear_num_value_heads": HEADS,
        "linear_key_head_dim": CHANNELS,
        "linear_value_head_dim": CHANNELS,
        "linear_conv_kernel_dim": 4,
    },
    "lfm2": {
        "num_hidden_layers": 2,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "conv_L_cache": 3,
        "layer_types": ["conv", "full_attention"],
    },
}
COMMON = {
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "vocab_size": 4096,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Settings:
    """How long."""

    rounds: int = 2
    """how often each time is taken"""


def measured(work: Callable[[], Any], rounds: int) -> dict[str, float]:
    """Seconds and peak bytes of what `work` returns, evaluated."""
    seconds = []
    peaks = []
    for _ in range(rounds):
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        began = time.perf_counter()
        mx.eval(work())
        seconds.append(time.perf_counter() - began)
        peaks.append(mx.get_peak_memory() - before)
    return {"seconds": round(min(seconds), 3), "peak_bytes": max(peaks)}


def rule_inputs(length: int) -> list[mx.array]:
    """q, k, v, log g, beta of one window."""
    keys = mx.random.split(mx.random.key(length), 5)
    shape = (1, length, HEADS)
    q, k, v = (mx.random.normal((*shape, CHANNELS), key=key) for key in keys[:3])
    module = load.mlx_lm("models.gated_delta")
    q, k = module.normalize_qk(q, k, inv_scale=CHANNELS**-0.5, eps=1e-6)
    log_g = -0.1 * mx.abs(mx.random.normal(shape, key=keys[3]))
    beta = mx.sigmoid(mx.random.normal(shape, key=keys[4]))
    arrays = [q, k, v, log_g, beta]
    mx.eval(arrays)
    return arrays


def token_by_token(*arrays: mx.array) -> mx.array:
    """mlx-lm's own form without a kernel."""
    q, k, v, log_g, beta = arrays
    module = load.mlx_lm("models.gated_delta")
    out: mx.array = module.gated_delta_ops(q, k, v, g=mx.exp(log_g), beta=beta)[0]
    return out


def in_chunks(*arrays: mx.array) -> mx.array:
    """Ours."""
    return gated_delta.delta_rule(*arrays)[0]


def gradient(form: Callable[..., mx.array], arrays: Sequence[mx.array]) -> Any:
    """Of the sum of squares of what the form gives, in all inputs."""
    numbers = list(range(len(arrays)))
    return mx.grad(lambda *a: mx.square(form(*a)).sum(), argnums=numbers)(*arrays)


def rules(length: int, rounds: int) -> dict[str, Any]:
    """Both forms, forward and with their gradients."""
    arrays = rule_inputs(length)
    row = {}
    for name, form in (("chunks", in_chunks), ("token by token", token_by_token)):
        row[name] = {
            "forward": measured(partial(form, *arrays), rounds),
            "gradient": measured(partial(gradient, form, arrays), rounds),
        }
    return row


def block_of(kind: str, length: int, rounds: int) -> dict[str, Any]:
    """The way back through the largest block without attention: measured and planned."""
    config = family({"model_type": kind, **COMMON, **BLOCKS[kind]}).own_config()
    architecture = family(config)
    number = [architecture.attends(i) for i in range(architecture.layers)].index(False)
    block = architecture.new_block(architecture.model_args(), number)
    x = mx.random.normal((1, length, int(COMMON["hidden_size"])), key=mx.random.key(1))
    mx.eval(x, block.parameters())
    weights = block.trainable_parameters()

    def loss(weights: Any, x: mx.array) -> mx.array:
        block.update(weights)
        return mx.square(block(x, None)).sum()

    found = measured(lambda: mx.grad(loss, argnums=[0, 1])(weights, x), rounds)
    block.update(weights)
    shapes = arch.layer_tensors(config, block=number).values()
    params = sum(map(math.prod, shapes))
    planned = residency.backward_bytes(model_of(config), 1, length) + 4 * params
    return {**found, "planned_bytes": planned, "ratio": round(planned / found["peak_bytes"], 2)}


def main(s: Settings) -> None:
    """Measure, print, store."""
    found: dict[str, Any] = {"busy": busy("before"), "rule": {}, "block": {}}
    for length in LENGTHS:
        found["rule"][length] = rules(length, s.rounds)
        print(length, found["rule"][length], flush=True)
    for kind in BLOCKS:
        found["block"][kind] = {}
        for length in LENGTHS:
            found["block"][kind][length] = block_of(kind, length, s.rounds)
            print(kind, length, found["block"][kind][length], flush=True)
    write("hybrids", "scripts/mis benchmarks/hybrids.py", found)


if __name__ == "__main__":
    start(Settings, main)
