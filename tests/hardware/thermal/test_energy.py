"""Joules by pencil."""

from __future__ import annotations

import pytest

from mis_mlx.hardware.clock import VirtualClock
from mis_mlx.hardware.thermal.energy import Energy, EnergyMeter, machine_joules
from mis_mlx.types import Reading


class Bench:
    """A monitor whose power is what the test says."""

    def __init__(self, powers: list[float | None]):
        self.clock = VirtualClock()
        self._powers = powers

    def history(self, seconds: float) -> list[Reading]:
        return [Reading(float(t), power_w=p) for t, p in enumerate(self._powers)]


@pytest.mark.parametrize(("watts", "energy"), [(10.0, Energy(4.0, 40.0)), (None, Energy(4.0, None))])
def test_power_over_time(watts, energy):
    """10 W for 4 s are 40 J; what is not measured is None, not 0."""
    bench = Bench([watts] * 5)
    meter = EnergyMeter(bench)
    meter.begin()
    bench.clock.sleep(4.0)
    assert meter.end() == energy


def test_trapezoids_stretched_to_the_whole():
    """Readings at 1, 2 and 3 s of 4, 8 and 12 W hold 16 J in 2 s, so 4 s hold 32 J."""
    history = [Reading(1.0, power_w=4.0), Reading(2.0, power_w=8.0), Reading(3.0, power_w=12.0)]
    assert machine_joules(history, 0.5, 4.5) == pytest.approx(32.0)
    assert machine_joules(history, 2.5, 4.5) is None


def test_rest_is_taken_off() -> None:
    """40 J in 4 s, 2 J of rest in 2 s: 36 J."""
    assert Energy(4.0, 40.0).beyond(Energy(2.0, 2.0)) == 36.0
    assert Energy(4.0, 40.0).beyond(Energy(2.0, None)) is None
