"""What a model could do at best on a machine, beside what it did: bytes over bandwidth, operations over arithmetic."""

import math
from collections.abc import Mapping
from typing import Any

from mis_mlx.evaluation.speed.timing import Request
from mis_mlx.hardware import rates
from mis_mlx.planner import estimates
from mis_mlx.types import Checkpoint


def decoding(checkpoint: Checkpoint, weight_bytes: int, r: Request) -> tuple[float, float]:
    """(bytes to move, float operations) of one token, half-way through the answer: all weights, the keys and values."""
    m, seen = estimates.model_of(checkpoint), r.prompt + r.answer // 2
    flops = estimates.forward_flops(m, 1, 2 * seen)  # 2: it sees all, not the half
    return weight_bytes + estimates.keys_bytes(m, seen), flops


def first_token(checkpoint: Checkpoint, weight_bytes: int, r: Request) -> tuple[float, float]:
    """(bytes to move, float operations) of the prompt through all blocks, then its last row through the head."""
    m = estimates.model_of(checkpoint)
    blocks = estimates.forward_flops(m, r.prompt, r.prompt, head=False)
    return weight_bytes + estimates.keys_bytes(m, r.prompt), blocks + 2.0 * m.head_params


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
    best = 1 / at.seconds(*token)
    return {
        "moved_mb": token[0] / 1e6,
        "decode_best_tps": best,
        "reached": tokens_per_s / best,
        "bound": at.bound(*token),
        "ttft_best_ms": 1000 * at.seconds(*first),
    }


def kind(checkpoint: Checkpoint, dtype: str) -> str:
    """The format that a model computes in: 'float32', '4-bit', '3- to 8-bit' where matrices differ."""
    settings = checkpoint.config.get("quantization") or {}
    bits = {s["bits"] for s in (settings, *settings.values()) if isinstance(s, Mapping) and "bits" in s}
    return (f"{min(bits)}- to {max(bits)}-bit" if len(bits) > 1 else f"{min(bits)}-bit") if bits else dtype
