"""Energy of a stretch of work in joules: the whole machine's power over time, its display included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from mis_mlx.hardware.thermal.thermal_monitor import Monitor
from mis_mlx.types import Reading


@dataclass(frozen=True)
class Energy:
    """Joules of a stretch of `seconds`; `None` = not measured."""

    seconds: float
    joules: float | None

    def beyond(self, idle: Energy) -> float | None:
        """Joules more than the same machine took while idle, for as long. None where one of the two is not measured."""
        if self.joules is None or idle.joules is None:
            return None
        return self.joules - idle.joules / idle.seconds * self.seconds


class EnergyMeter:
    """Measures from `begin` to `end`. A stretch must be 0.1 s or longer to mean anything."""

    def __init__(self, monitor: Monitor):
        self._monitor = monitor
        self._since_s = 0.0

    def begin(self) -> None:
        """Start a stretch."""
        self._since_s = self._monitor.clock.monotonic()

    def end(self) -> Energy:
        """End it. The GPU must be done by now."""
        until_s = self._monitor.clock.monotonic()
        seconds = until_s - self._since_s
        history = self._monitor.history(seconds + 5.0)
        return Energy(seconds, machine_joules(history, self._since_s, until_s))


def machine_joules(history: Sequence[Reading], since_s: float, until_s: float) -> float | None:
    """Power over time by trapezoids, stretched to the whole of `since_s` to `until_s`; `None` when fewer
    than two readings in it carry a power."""
    inside = [(r.time_s, r.power_w) for r in history if since_s <= r.time_s <= until_s and r.power_w is not None]
    if len(inside) < 2 or inside[-1][0] <= inside[0][0]:
        return None
    joules = sum((t1 - t0) * (p0 + p1) / 2 for (t0, p0), (t1, p1) in pairwise(inside))
    return joules * (until_s - since_s) / (inside[-1][0] - inside[0][0])
