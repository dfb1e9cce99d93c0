"""Joules by pencil."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mis_mlx.hardware.clock import VirtualClock
from mis_mlx.hardware.thermal.energy import Energy, EnergyMeter, Rapl, low_power_mode, machine_joules
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


def powercap(root: Path, **packages: tuple[str, int, int]) -> Path:
    """A stand-in for /sys with these counters: name, microjoules, range."""
    for zone, (name, now, most) in packages.items():
        folder = root / "class/powercap" / f"intel-rapl:{zone[1:]}"
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in (("name", name), ("energy_uj", now), ("max_energy_range_uj", most)):
            (folder / file).write_text(f"{text}\n")
    return root


def test_rapl_adds_packages_and_survives_its_own_end(tmp_path: Path) -> None:
    """3 J of one package, and 2 J of one that passed its range of 10 J; the core's own counter is part of both."""
    root = powercap(tmp_path, z0=("package-0", 1_000_000, 10_000_000), z1=("package-1", 9_000_000, 10_000_000))
    powercap(root, **{"z0:0": ("core", 5, 10)})
    bench = Bench([None] * 3)
    meter = EnergyMeter(bench, lambda: Rapl(root))
    meter.begin()
    bench.clock.sleep(2.0)
    powercap(root, z0=("package-0", 4_000_000, 10_000_000), z1=("package-1", 1_000_000, 10_000_000))
    assert meter.end() == Energy(2.0, pytest.approx(5.0), None)
    assert meter.source == "RAPL, processor packages"


def test_no_rapl_is_no_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no zeus RAPL is asked; it may have no powercap, or one that does not read as numbers."""
    monkeypatch.setitem(sys.modules, "zeus_apple_silicon", None)
    monkeypatch.setattr("mis_mlx.hardware.thermal.energy.Rapl", lambda: SimpleNamespace(source="rapl's"))
    assert EnergyMeter(Bench([None])).source == "rapl's"
    for root in (tmp_path, powercap(tmp_path / "odd", z0=("package-0", "x", 1))):  # type: ignore[arg-type]
        meter = EnergyMeter(Bench([None]), lambda root=root: Rapl(root))
        meter.begin()
        assert (meter.source, meter.end().chip_j) == (None, None)


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


def test_low_power_mode_of_linux(tmp_path: Path) -> None:
    """The firmware's profile, or None where there is none."""
    assert low_power_mode("no-such-program", tmp_path) is None
    (tmp_path / "firmware/acpi").mkdir(parents=True)
    for profile, is_on in (("low-power", True), ("balanced", False)):
        (tmp_path / "firmware/acpi/platform_profile").write_text(f"{profile}\n")
        assert low_power_mode("no-such-program", tmp_path) is is_on
