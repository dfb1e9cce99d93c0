"""Which format every matrix gets under a limit on bits: sensitivities measured on text, the best allocation of bits.

Does not round. One block is in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from mis_mlx.maths.allocation import allocate
from mis_mlx.maths.rounding import BITS
from mis_mlx.models import arch, stream
from mis_mlx.quantization import packed_format, sensitivity
from mis_mlx.types import Checkpoint, MisError


def mixed(
    checkpoint: Checkpoint,
    batches: Sequence[mx.array],
    group: int,
    target_bpw: float,
    seed: int = 0,
    kept: stream.Hidden | None = None,
) -> tuple[packed_format.Layout, dict[str, Any]]:
    """(a format for every matrix, at most `target_bpw` bits per weight of the blocks; what was found, for a JSON).

    Token ids [(B, T)]. The embedding and the head stay in 8 bits. kept: as in `backward_pass.backwards`.
    """
    check(target_bpw, group)
    plan = packed_format.layout(checkpoint.config, group)
    costs = sensitivity.costs(checkpoint, batches, group, BITS, seed, kept)
    shapes = arch.tensors_of(checkpoint.config)
    sizes = {path: math.prod(shapes[f"{path}.weight"]) for path in costs}
    chosen = allocate(costs, sizes, target_bpw - packed_format.Format(0, group).bits_per_weight)
    found = {
        "group_size": group,
        "target_bpw": target_bpw,
        "windows": len(batches),
        "nats": {path: {str(bits): round(nats, 9) for bits, nats in cost.items()} for path, cost in costs.items()},
        "bits": chosen,
        "predicted_nats": sum(costs[path][bits] for path, bits in chosen.items()),
    }
    return {**plan, **{path: packed_format.Format(bits, group) for path, bits in chosen.items()}}, found


def check(target_bpw: float | None, group: int) -> None:
    """MisError when no allocation of BITS can have so few bits per weight, or needs so many."""
    least, most = (packed_format.Format(bits, group).bits_per_weight for bits in (min(BITS), max(BITS)))
    if target_bpw is not None and target_bpw > most:
        raise MisError(
            f"--target-bpw {target_bpw:g} is above {most:g}, which {max(BITS)} bits in groups of {group} take: "
            f"give {most:g} or less"
        )
    if target_bpw is not None and not target_bpw >= least:
        raise MisError(
            f"--target-bpw {target_bpw:g} is below {least:g}, which {min(BITS)} bits in groups of {group} take: "
            f"give {least:g} or more" + (", or --q-group-size 128" if group < 128 else "")
        )
