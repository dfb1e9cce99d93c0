"""How far 6 and 8 bits move when they are rounded a second time, for llama.cpp.

    scripts/mis benchmarks/rerounding.py    # a minute

All matrices of a teacher are packed in so many bits, in groups of 64, and made a GGUF of. Errors
are root mean squares, as shares of the original weights' own. Writes
benchmarks/results/<machine>/rerounding.json.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
from laboratory import start, write

from mis_mlx import cli
from mis_mlx.gguf_export import tensors
from mis_mlx.gguf_export.rerounding import Rerounding
from mis_mlx.models.opening import compute_type, load, resolve
from mis_mlx.quantization import packed_format
from mis_mlx.types import Checkpoint

BITS = (6, 8)
GROUP = 64


@dataclass(frozen=True)
class Settings:
    """Which teachers."""

    models: tuple[str, ...] = (resolve.DEFAULT, resolve.GEMMA)


def wide(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """A tensor's values in float32."""
    return np.array(load.dense(checkpoint, name).astype(mx.float32))


def errors(teacher: Checkpoint, packed: Checkpoint) -> dict[str, float]:
    """What packing adds to all matrices, and what the GGUF adds to that."""
    first = Rerounding()
    second = Rerounding()
    for part in tensors.parts(packed, tensors.out_type(packed)):
        if len(part.shape) > 1:
            first.add(wide(teacher, part.source), wide(packed, part.source))
            for _ in tensors.rows(packed, part, second):
                pass
    both = math.sqrt((first.change + second.change) / first.total)
    return {
        "packed": round(first.relative, 5),
        "rounded_again": round(second.relative, 5),
        "together": round(both, 5),
    }


def main(s: Settings) -> None:
    """A row for each model and number of bits."""
    rows = {}
    for name in s.models:
        teacher = compute_type.open_to_compute(resolve.resolve_model(name).path)
        for bits in BITS:
            kind = packed_format.Format(bits, GROUP)
            layout = dict.fromkeys(packed_format.formats_of(teacher.config, GROUP), kind)
            with tempfile.TemporaryDirectory() as temp:
                out = Path(temp) / "packed"
                packed_format.write_quantized(teacher, out, layout)
                row = f"{name}, {bits} bits"
                rows[row] = errors(teacher, compute_type.open_to_compute(out))
            cli.say(f"{row}: {rows[row]}")
    write("rerounding", "scripts/mis benchmarks/rerounding.py", {"rows": rows})


if __name__ == "__main__":
    start(Settings, main)
