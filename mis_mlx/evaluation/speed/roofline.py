"""What a model could do at best on a machine, beside what it did: bytes over bandwidth, operations over arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mis_mlx.evaluation.speed.timing import Request
from mis_mlx.hardware import rates
from mis_mlx.planner import estimates
from mis_mlx.types import Checkpoint

BOUND = 0.6  # of the roof: from here on the roof is what bounds (published decoding on M1 reaches 0.63 to 0.82)


@dataclass(frozen=True)
class Work:
    """What one step has to move and to do at least."""

    nbytes: float
    flops: float


def decoding(checkpoint: Checkpoint, weight_bytes: int, r: Request) -> Work:
    """One token, half-way through the answer: all weights once, and the keys and values."""
    m, seen = estimates.model_of(checkpoint), r.prompt + r.answer // 2
    nbytes = weight_bytes + estimates.keys_bytes(m, seen)
    return Work(nbytes, estimates.forward_flops(m, 1, 2 * seen))  # 2: it sees all, not the half


def first_token(checkpoint: Checkpoint, weight_bytes: int, r: Request) -> Work:
    """The prompt through all blocks, then its last row through the head."""
    m = estimates.model_of(checkpoint)
    blocks = estimates.forward_flops(m, r.prompt, r.prompt, head=False)
    return Work(weight_bytes + estimates.keys_bytes(m, r.prompt), blocks + 2.0 * m.head_params)


def m1_tokens_per_s(checkpoint: Checkpoint, r: Request) -> float:
    """Computed, never run: an M1's 68 GB/s over the bytes of one sequence's token, floats in float16, packed as is."""
    tied = not any(name.startswith("lm_head.") for name in checkpoint.tensors)
    nbytes = sum(
        t.nbytes if t.dtype == "U32" else 2 * math.prod(t.shape)
        for name, t in checkpoint.tensors.items()
        if tied or not name.startswith("model.embed_tokens.")
    )
    m, seen = estimates.model_of(checkpoint, gpu=True), r.prompt + r.answer // 2
    return rates.M1_AIR.memory_bytes_per_s / (nbytes + estimates.keys_bytes(m, seen))


def beside(
    checkpoint: Checkpoint, weight_bytes: int, r: Request, at: rates.Roof, tokens_per_s: float
) -> dict[str, Any]:
    """What goes beside a model's figures: MB a token moves, the best times there could be, the share reached, and
    what the limit is. weight_bytes: those that a token reads, in memory."""
    token, first = (f(checkpoint, weight_bytes, r) for f in (decoding, first_token))
    best = 1 / at.seconds(token.nbytes, token.flops)
    return {
        "moved_mb": token.nbytes / 1e6,
        "decode_best_tps": best,
        "reached": tokens_per_s / best,
        "bound": at.bound(token.nbytes, token.flops),
        "ttft_best_ms": 1000 * at.seconds(first.nbytes, first.flops),
    }


def kind(checkpoint: Checkpoint, dtype: str) -> str:
    """The format that a model computes in: 'float32', '4-bit', '3- to 8-bit' where matrices differ."""
    settings = checkpoint.config.get("quantization") or {}
    bits = {s["bits"] for s in (settings, *settings.values()) if isinstance(s, Mapping) and "bits" in s}
    return (f"{min(bits)}- to {max(bits)}-bit" if len(bits) > 1 else f"{min(bits)}-bit") if bits else dtype


def bound(facts: Mapping[str, Any]) -> str:
    """What bounds decoding here, in a sentence. facts: {name, kind, best, tps (tokens/s), bound}."""
    reached, limit = facts["tps"] / facts["best"], facts["bound"]
    said = f"{facts['name']} ({facts['kind']}) decodes {facts['tps']:.1f} tokens/s, {reached:.0%} of what {limit} "
    said += f"here allows ({facts['best']:.1f})"
    if reached > 1:
        return f"{said}: {limit} was measured on a busy machine, run it again."
    if reached >= BOUND:
        return f"{said}: {limit} bounds it."
    return f"{said}: the kernels and the calls between them bound it, not {limit}."


def against(first: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """What the other model's size alone should give over the first's, and what it gave; facts as in `bound`. Formats
    are not mixed into a speed-up: their kernels differ more than the sizes."""
    one, two = f"{first['name']} ({first['kind']})", f"{other['name']} ({other['kind']})"
    if first["kind"] != other["kind"]:
        return f"{one} and {two} differ in format: the ratio of their speeds says more of kernels than of size."
    size, speed = other["best"] / first["best"], other["tps"] / first["tps"]
    return f"By size alone {two} should decode {size:.2f}x as fast as {one}; it decodes {speed:.2f}x as fast."
