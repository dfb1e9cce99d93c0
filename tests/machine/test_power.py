"""Joules by pencil."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from mis_mlx.machine.clock import VirtualClock
from mis_mlx.machine.power import EnergyMeter, machine_joules
from mis_mlx.types import Reading


class Bench:
    """A monitor whose power is what the test says."""

    def __init__(self, powers: list[float | None]):
        self.clock = VirtualClock()
        self._powers = powers

    def history(self, seconds: float) -> list[Reading]:
        return [Reading(float(t), power_w=p) for t, p in enumerate(self._powers)]


class Counters:
    """Stands in for zeus-apple-silicon, which only exists on a Mac."""

    def begin_window(self, name: str) -> None:
        self.name = name

    def end_window(self, name: str) -> SimpleNamespace:
        assert name == self.name
        return SimpleNamespace(cpu_total_mj=1500, gpu_mj=8000, dram_mj=500, gpu_sram_mj=None, ane_mj=0)


def no_counters() -> Counters:
    raise ImportError


def test_chip_and_machine_are_two_numbers():
    """Millijoules of the parts add up; 10 W for 4 s are 40 J."""
    bench = Bench([10.0] * 5)
    meter = EnergyMeter(bench, Counters)
    meter.begin()
    bench.clock.sleep(4.0)
    energy = meter.end()
    assert (energy.seconds, energy.chip_j, energy.machine_j) == (4.0, 10.0, 40.0)


def test_nothing_measured_is_none():
    """No package, no watts: None and None, not 0."""
    bench = Bench([None] * 5)
    meter = EnergyMeter(bench, no_counters)
    meter.begin()
    bench.clock.sleep(4.0)
    energy = meter.end()
    assert (energy.chip_j, energy.machine_j) == (None, None)


def test_trapezoids_stretched_to_the_whole():
    """Readings at 1, 2 and 3 s of 4, 8 and 12 W hold 16 J in 2 s, so 4 s hold 32 J."""
    history = [Reading(1.0, power_w=4.0), Reading(2.0, power_w=8.0), Reading(3.0, power_w=12.0)]
    assert machine_joules(history, 0.5, 4.5) == pytest.approx(32.0)
    assert machine_joules(history, 2.5, 4.5) is None
