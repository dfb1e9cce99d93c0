"""Joules by pencil."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from mis_mlx.hardware.clock import VirtualClock
from mis_mlx.hardware.thermal.energy import Energy, EnergyMeter, low_power_mode, machine_joules
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


@pytest.mark.parametrize(
    ("watts", "counters", "energy"),
    [(10.0, Counters, Energy(4.0, 10.0, 40.0)), (None, no_counters, Energy(4.0, None, None))],
)
def test_chip_and_machine_are_two_numbers(watts, counters, energy):
    """Millijoules of the parts add up; 10 W for 4 s are 40 J; what is not measured is None, not 0."""
    bench = Bench([watts] * 5)
    meter = EnergyMeter(bench, counters)
    meter.begin()
    bench.clock.sleep(4.0)
    assert meter.end() == energy


def test_trapezoids_stretched_to_the_whole():
    """Readings at 1, 2 and 3 s of 4, 8 and 12 W hold 16 J in 2 s, so 4 s hold 32 J."""
    history = [Reading(1.0, power_w=4.0), Reading(2.0, power_w=8.0), Reading(3.0, power_w=12.0)]
    assert machine_joules(history, 0.5, 4.5) == pytest.approx(32.0)
    assert machine_joules(history, 2.5, 4.5) is None


def test_rest_is_taken_off() -> None:
    """40 J in 4 s, 2 J of rest in 2 s: 36 J. The chip's two numbers go together, or the machine's."""
    assert Energy(4.0, 40.0, 90.0).beyond(Energy(2.0, 2.0, 10.0)) == 36.0
    assert Energy(4.0, None, 90.0).beyond(Energy(2.0, 2.0, 10.0)) == 70.0
    assert Energy(4.0, 40.0, None).beyond(Energy(2.0, None, 10.0)) is None


@pytest.mark.parametrize(
    ("said", "is_on"), [(" lowpowermode         1", True), (" lowpowermode 0", False), (" x", None)]
)
def test_low_power_mode_of_a_mac(tmp_path: Path, said: str, is_on: bool | None) -> None:
    """What `pmset -g` says, by a program in its place."""
    tool = tmp_path / "pmset"
    tool.write_text(f"#!/bin/sh\n[ \"$1\" = -g ] && echo 'System-wide power settings:' && echo '{said}'\n")
    tool.chmod(0o755)
    assert low_power_mode(str(tool)) is is_on
    assert low_power_mode("no-such-program") is None
