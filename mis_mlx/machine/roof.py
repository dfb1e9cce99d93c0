"""The most this machine could do: bytes read from memory and float operations a second, measured in seconds.

Does not know models, nor where the figures are kept. What a program reaches of it is that program's affair: the
reading here is the quickest of a few kinds, by other code than MLX's where a CPU has better.
"""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mis_mlx.machine import rates
from mis_mlx.machine.about import cores

SAMPLE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Roof:
    """Bytes and float operations per second (float32 on a CPU, float16 on Metal), and where they come from."""

    device: str
    threads: str  # what the CPU's arithmetic may use: another number makes it another machine
    memory_bytes_per_s: float
    flops_per_s: float
    source: str

    def seconds(self, nbytes: float, flops: float) -> float:
        """The least that moving `nbytes` and doing `flops` takes: they overlap (Williams et al. 2009)."""
        return max(nbytes / self.memory_bytes_per_s, flops / self.flops_per_s)

    def bound(self, nbytes: float, flops: float) -> str:
        """Which of the two takes longer."""
        memory = nbytes / self.memory_bytes_per_s >= flops / self.flops_per_s
        return "memory bandwidth" if memory else "arithmetic"

    def __str__(self) -> str:
        per = f"{self.memory_bytes_per_s / 1e9:.1f} GB/s, {self.flops_per_s / 1e9:,.0f} GFLOP/s"
        return f"{self.device}: {per} ({self.source})"


# One figure of Apple's and one of mlx's users; nothing of it was measured by us.
M1 = Roof(
    rates.M1_AIR.device, "", rates.M1_AIR.memory_bytes_per_s, rates.M1_AIR.forward_flops_per_s, "published, not ours"
)


def read_bytes(nbytes: int) -> float:
    """Bytes per second that one pass over `nbytes` reads: a scalar product on a CPU, a maximum on Metal."""
    if mx.default_device() == mx.gpu:
        halves = mx.zeros((nbytes // 2,), mx.float16)
        return nbytes / rates.quickest(lambda: mx.max(halves).item(), 1.0)
    one, other = (np.ones(nbytes // 8, np.float32) for _ in range(2))
    return nbytes / rates.quickest(lambda: np.dot(one, other), 1.0)


def measure() -> Roof:
    """Both rates here and now, in about 5 s."""
    memory = max(read_bytes(SAMPLE_BYTES), rates.copy_bytes(SAMPLE_BYTES))
    source = f"measured {datetime.date.today().isoformat()}"
    return Roof(rates.device_name(), threads(), memory, rates.matmul_flops(1.5), source)


def threads() -> str:
    """How much of the CPU this process may use."""
    return f"{cores()} cores, OPENBLAS_NUM_THREADS={os.environ.get('OPENBLAS_NUM_THREADS', 'not set')}"


def load(path: Path) -> Roof | None:
    """The figures in `path`; None when there are none, or they are another device's or another number of threads'."""
    found = rates.load(path, Roof)
    return found if found and found.threads == threads() else None
