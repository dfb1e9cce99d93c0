"""Energy of a stretch of work in joules: the chip's own counters, and the whole machine's power over time.

Two numbers, never mixed: the chip's is an estimate by Apple's firmware, the machine's has the display in it.
"""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from mis_mlx.hardware.thermal.thermal_monitor import Monitor
from mis_mlx.types import Reading

WINDOW = "mis_mlx"
PARTS = ("cpu_total_mj", "gpu_mj", "dram_mj", "gpu_sram_mj", "ane_mj")
ZEUS = "zeus-apple-silicon, the chip's firmware"


@dataclass(frozen=True)
class Energy:
    """Joules of a stretch of `seconds`; `None` = not measured."""

    seconds: float
    chip_j: float | None
    machine_j: float | None

    def beyond(self, idle: Energy) -> float | None:
        """Joules more than the same machine took while idle, for as long: the chip's, else the whole machine's.
        None where neither was measured both times."""
        for mine, others in ((self.chip_j, idle.chip_j), (self.machine_j, idle.machine_j)):
            if mine is not None and others is not None:
                return mine - others / idle.seconds * self.seconds
        return None


def _counters() -> Any:
    return importlib.import_module("zeus_apple_silicon").AppleEnergyMonitor()


class EnergyMeter:
    """Measures from `begin` to `end`. A stretch must be 0.1 s or longer to mean anything.

    `open_counters` gives the chip's counters: by default those of the optional package zeus-apple-silicon, where it is
    installed. `source` names them, None where there are none.
    """

    def __init__(self, monitor: Monitor, open_counters: Callable[[], Any] = _counters):
        self._monitor = monitor
        self._counters, self.source = None, None
        with suppress(ImportError, RuntimeError):
            self._counters, self.source = open_counters(), ZEUS
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


def low_power_mode(pmset: str = "pmset") -> bool | None:
    """Whether a Mac is in Low Power Mode, which costs speed; None where nothing says so."""
    if (tool := shutil.which(pmset)) is None:
        return None
    settings = subprocess.run([tool, "-g"], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    mode = re.search(r"^\s*lowpowermode\s+(\d)", settings.stdout, re.MULTILINE)
    return None if mode is None else mode[1] == "1"
