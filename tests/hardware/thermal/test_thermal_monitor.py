"""The monitor: readings with sources or reasons, of Apple's stand-in, /sys, recordings."""

from __future__ import annotations

import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from mis_mlx.hardware.thermal import thermal_monitor
from mis_mlx.hardware.thermal.governor import governor_for
from mis_mlx.hardware.thermal.recording import Header, Raw, recorder
from mis_mlx.hardware.thermal.thermal_monitor import Monitor
from mis_mlx.types import MisError
from tests.hardware.recorded import LidClock, VirtualClock, plug_in, smc_float

DATA = Path(__file__).parents[2] / "data"


@pytest.fixture
def no_sensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without thermometers."""
    monkeypatch.setattr(psutil, "sensors_temperatures", dict, raising=False)


def test_psutil_s_thermometers(monkeypatch):
    """On Linux a die sensor is known by its chip, and its value has that for a source."""
    chips = {
        "nvme": [SimpleNamespace(label="Composite", current=70.0)],
        "k10temp": [SimpleNamespace(label="Tctl", current=61.25)],
    }
    monkeypatch.setattr(psutil, "sensors_temperatures", lambda: chips, raising=False)
    reading = Monitor(clock=VirtualClock()).look()
    assert (reading.die_c, reading.sources["die_c"]) == (61.25, "psutil k10temp Tctl")


def test_a_virtual_machine_measures_nothing_and_says_why(no_sensors):
    """None with a reason for every value, no source, never 0 and never 20 °C."""
    reading = (monitor := Monitor(clock=VirtualClock())).look()
    names = ("die_c", "battery_c", "ambient_c", "ambient_sigma_c", "altitude_m")
    assert [getattr(reading, name) for name in names] == [None] * 5
    assert "psutil shows no thermometer" in monitor.reasons["die_c"]
    assert "--temperature-c" in monitor.reasons["ambient_c"]
    assert "--altitude-m" in monitor.reasons["altitude_m"]
    assert not {"die_c", "ambient_c", "altitude_m"} & set(reading.sources)


@pytest.mark.parametrize("celsius", [-60.1, 300.0, float("nan")])
def test_impossible_ambient_is_refused(celsius):
    """300 is a room in kelvin; a NaN is no number."""
    with pytest.raises(MisError, match="ambient temperature"):
        Monitor(given_ambient_c=celsius)


def test_an_m1_air_through_the_real_calls(fake_apple):
    """HID, SMC and pressure together give one reading, each value with its source."""
    fake_apple.level(1)
    fake_apple.hid("pACC MTR Temp Sensor2", 71.0)
    fake_apple.hid("gas gauge battery", 31.0)
    fake_apple.smc_float("TCMz", 74.5)
    fake_apple.smc_float("TVA0", 21.0)
    fake_apple.smc_float("PSTR", 12.5)
    monitor = Monitor(clock=VirtualClock(), apple_library=fake_apple.path)
    reading = monitor.look()
    monitor.source.close()
    assert reading.die_c == 74.5
    assert reading.sources["die_c"] == "SMC TCMz"
    assert reading.battery_c == 31.0
    assert reading.sources["battery_c"] == "IOHID gas gauge battery"
    assert (reading.ambient_c, reading.ambient_sigma_c) == (22.0, 2.5)
    assert reading.sources["ambient_c"] == "SMC TVA0"
    assert reading.pressure_level == 1
    assert reading.power_w == 12.5
    assert monitor.source.header == Header("MacBookAir10,1", "Apple M1", "24D60")
    assert monitor.apple


def test_a_frozen_die_sensor_is_missing_and_an_hour_is_kept(tmp_path, monkeypatch):
    """74.5 °C for two minutes to the last bit while the power changes is no measurement. Of two
    hours of looks the history has the last one.
    """
    path = tmp_path / "long.jsonl"
    with recorder(path, Header()) as add:
        for second in range(130):
            keys = {"TCMz": smc_float(74.5), "PSTR": smc_float(5.0 + second / 10)}
            add(Raw(float(second), float(second), smc=keys))
        for minute in range(3, 121):
            add(Raw(60.0 * minute, 60.0 * minute, hid=(("PMU tdie1", 40.0),)))
    plug_in(monkeypatch, path)
    monitor = Monitor()
    readings = [monitor.reading() for _ in range(130)]
    assert readings[119].die_c == 74.5
    assert readings[120].die_c is None
    assert monitor.reasons["die_c"] == "stuck at 74.5 °C for 120 s"
    while not monitor.source.ended:
        monitor.reading()
    assert [r.time_s for r in monitor.history()] == [60.0 * minute for minute in range(60, 121)]
    assert monitor.last() == monitor.history()[-1]


def test_rest_is_boot_or_a_long_sleep(no_sensors):
    """The look after 90 min of sleep is rested, the next is not, nor after a nap."""
    clock = LidClock()
    live = thermal_monitor.Live(clock)
    rested = [live.look().rested]
    for act in (
        lambda: clock.suspend(5400),
        lambda: clock.suspend(60),
        lambda: setattr(clock, "wall_s", 1e9),
    ):
        act()
        rested += [live.look().rested, live.look().rested]
    assert rested == [False, True, False, False, False, False, False]


def test_live_monitor_samples_in_a_thread(no_sensors, monkeypatch):
    """A daemon thread adds readings while nobody asks, and is gone after the with statement."""
    monkeypatch.setattr(thermal_monitor, "PERIOD_S", 0.005)
    with Monitor(given_ambient_c=8.0) as monitor:
        first = monitor.reading()
        for _ in range(1000):
            if monitor.reading().time_s > first.time_s:
                break
            time.sleep(0.005)
        assert monitor.reading().time_s > first.time_s
        thread = next(t for t in threading.enumerate() if t.name == "thermometers")
        assert thread.daemon
    assert not thread.is_alive()


@pytest.mark.parametrize(
    ("model", "in_vm", "real"),
    [
        ("VirtualMac2,1", False, False),
        ("MacBookAir10,1", True, False),
        ("MacBookAir10,1", False, True),
    ],
)
def test_a_mac_without_thermometers(fake_apple, model, in_vm, real):
    """A virtual one is governed blindly; on a real one the silence is a fault."""
    fake_apple.model(model, in_vm)
    monitor = Monitor(clock=VirtualClock(), apple_library=fake_apple.path)
    reading = monitor.look()
    monitor.source.close()
    assert (reading.die_c, monitor.apple) == (None, real)
    with pytest.raises(MisError, match="cannot protect this Mac") if real else nullcontext():
        assert governor_for("steady", reading, monitor.reasons, apple=monitor.apple).blind
