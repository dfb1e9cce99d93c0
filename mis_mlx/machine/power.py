"""Energy of a stretch of work in joules: the chip's own counters, and the whole machine's power over time.

Two different numbers, never mixed: the chip's is an estimate by Apple's firmware, the machine's has the
display in it. Knows nothing of tokens.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

from mis_mlx.machine.clock import Clock
from mis_mlx.types import Reading

WINDOW = "mis_mlx"
PARTS = ("cpu_total_mj", "gpu_mj", "dram_mj", "gpu_sram_mj", "ane_mj")


class Readings(Protocol):
    """What this module wants of a monitor (sensors.Monitor)."""

    clock: Clock

    def history(self, seconds: float) -> list[Reading]:
        """Readings of the last `seconds`."""


@dataclass(frozen=True)
class Energy:
    """Joules of a stretch of `seconds`; `None` = not measured."""

    seconds: float
    chip_j: float | None
    machine_j: float | None


class EnergyMeter:
    """Measures from `begin` to `end`. A stretch must be 0.1 s or longer to mean anything.

    `open_counters` gives the chip's counters: the optional package zeus-apple-silicon, where it is installed.
    """

    def __init__(self, monitor: Readings, open_counters: Callable[[], Any] | None = None):
        self._monitor = monitor
        try:
            self._counters = (open_counters or _zeus)()
        except (ImportError, RuntimeError):
            self._counters = None
        self._since_s = 0.0

    def begin(self) -> None:
        """Start a stretch."""
        self._since_s = self._monitor.clock.monotonic()
        if self._counters is not None:
            self._counters.begin_window(WINDOW)

    def end(self) -> Energy:
        """End it. The GPU must be done by now."""
        counted = self._counters.end_window(WINDOW) if self._counters is not None else None
        until_s = self._monitor.clock.monotonic()
        parts = [part for name in PARTS if (part := getattr(counted, name, None)) is not None]
        seconds = until_s - self._since_s
        history = self._monitor.history(seconds + 5.0)
        chip_j = sum(parts) / 1000 if parts else None
        return Energy(seconds, chip_j, machine_joules(history, self._since_s, until_s))


def machine_joules(history: Sequence[Reading], since_s: float, until_s: float) -> float | None:
    """Power over time by trapezoids, stretched to the whole of `since_s` to `until_s`; `None` when fewer
    than two readings in it carry a power."""
    inside = [(r.time_s, r.power_w) for r in history if since_s <= r.time_s <= until_s and r.power_w is not None]
    if len(inside) < 2 or inside[-1][0] <= inside[0][0]:
        return None
    joules = sum((t1 - t0) * (p0 + p1) / 2 for (t0, p0), (t1, p1) in pairwise(inside))
    return joules * (until_s - since_s) / (inside[-1][0] - inside[0][0])


def _zeus() -> Any:
    return importlib.import_module("zeus_apple_silicon").AppleEnergyMonitor()
