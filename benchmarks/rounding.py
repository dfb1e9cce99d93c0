"""What 4 bits cost, part by part: held-out loss of a student with only some of its matrices in 4
bits.

    scripts/mis benchmarks/rounding.py RUN/distilled        # about 3 minutes on 2 cores

Every other matrix is in 8 bits, which cost nothing. Loss is that of the de-quantized weights, in
nats per token over 12 held-out windows. Writes benchmarks/results/<machine>/rounding.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
from laboratory import write
from mlx.utils import tree_flatten

from mis_mlx.data import preparation
from mis_mlx.judge import comparison
from mis_mlx.models.opening import compute_type, load
from mis_mlx.models.passing import stream
from mis_mlx.quantization import packed_format


def rounded(weight: mx.array, bits: int, group: int) -> mx.array:
    """The weight as it comes back from packing with float16 scales."""
    packed, *scales = mx.quantize(weight, group_size=group, bits=bits)
    scale, bias = (s.astype(mx.float16).astype(mx.float32) for s in scales)
    return mx.dequantize(packed, scale, bias, group_size=group, bits=bits)


def main(folder: Path) -> None:
    """Print and store one row per set of matrices."""
    student = compute_type.open_to_compute(folder)
    model = stream.load_checked(load.resident_model(student, mx.float32))
    dense = dict(tree_flatten(model.parameters()))
    held_out = comparison.spread_windows(
        preparation.prepare(None, load.tokenizer(folder), 256).held_out["English"], 12
    )
    batches = [mx.array(w[None]) for w in held_out.tokens]

    def loss() -> float:
        total = 0.0
        for tokens in batches:
            z = model.model(tokens)[0, :-1] @ load.head_weight(model).T
            at = mx.take_along_axis(z, tokens[0, 1:, None], axis=-1)[:, 0]
            total += (mx.logsumexp(z, axis=-1) - at).mean().item()
        return total / len(batches)

    bridges = [f".layers.{i}.mlp.down_proj" for i in packed_format.blocks_after_removed(student)]

    def bridge(name: str) -> bool:
        return any(b in name for b in bridges)

    sets: dict[str, Callable[[str], bool]] = {
        "none": lambda n: False,
        "all but embedding": lambda n: "embed" not in n,
        "all but embedding and bridges": lambda n: "embed" not in n and not bridge(n),
        "down_proj": lambda n: "down_proj" in n,
        "down_proj of bridges": bridge,
        "gate_proj, up_proj": lambda n: "gate_proj" in n or "up_proj" in n,
        "attention": lambda n: "self_attn" in n,
    }
    start = loss()
    rows = []
    for group in (64, 32):
        for name, four in sets.items():
            cut = dict(dense)
            for label, weight in dense.items():
                if weight.ndim == 2:
                    cut[label] = rounded(weight, 4 if four(label) else 8, group)
            model.load_weights(list(cut.items()))
            rows.append({"group_size": group, "in 4 bits": name, "nats": round(loss() - start, 4)})
            print(json.dumps(rows[-1]), flush=True)
    write(
        "rounding",
        f"scripts/mis benchmarks/rounding.py {folder.name}",
        {"nll": start, "rows": rows},
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
