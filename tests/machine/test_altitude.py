"""Altitude by CoreLocation, on the user's word only. The framework is a stand-in; ours is the judgement."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mis_mlx.machine.altitude import find_altitude
from mis_mlx.machine.clock import VirtualClock
from mis_mlx.machine.replay import Header


class Manager:
    """What CLLocationManager does: a fix after some turns of the run loop, or none."""

    def __init__(self, altitude: float, accuracy: float, after: int):
        self.waits, self.running = after, False
        self.fix = SimpleNamespace(altitude=lambda: altitude, verticalAccuracy=lambda: accuracy)

    def alloc(self) -> Manager:
        return self

    def init(self) -> Manager:
        return self

    def requestWhenInUseAuthorization(self) -> None: ...

    def startUpdatingLocation(self) -> None:
        self.running = True

    def stopUpdatingLocation(self) -> None:
        self.running = False

    def location(self) -> SimpleNamespace | None:
        assert self.running
        return self.fix if self.waits <= 0 else None

    def currentRunLoop(self) -> Manager:
        return self

    def runUntilDate_(self, seconds: float) -> None:
        assert 0 < seconds <= 1
        self.waits -= self.running


@pytest.mark.parametrize(
    ("manager", "found"),
    [
        (Manager(832.0, 4.0, after=3), (832.0, "CoreLocation")),
        (Manager(0.0, -1.0, after=0), (None, "")),  # Wi-Fi positions have no height
        (Manager(832.0, 4.0, after=99), (None, "")),  # never located
    ],
)
def test_a_height_counts_only_with_a_vertical_accuracy(
    manager: Manager, found: tuple[float | None, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for in the configuration file; the location service is stopped again in every case."""
    monkeypatch.setitem(sys.modules, "CoreLocation", SimpleNamespace(CLLocationManager=manager))
    date = SimpleNamespace(dateWithTimeIntervalSinceNow_=lambda seconds: seconds)
    monkeypatch.setitem(sys.modules, "Foundation", SimpleNamespace(NSRunLoop=manager, NSDate=date))
    config = tmp_path / "mis_mlx.toml"
    config.write_text('altitude_m = "location"\n')
    assert find_altitude(None, Header(), config, VirtualClock()) == found
    assert not manager.running


def test_without_the_package_or_the_users_word_nothing_is_asked(tmp_path: Path) -> None:
    """No pyobjc here: the altitude is unknown, not an error; a number in the file is a given one."""
    config = tmp_path / "mis_mlx.toml"
    config.write_text('altitude_m = "location"\n')
    assert find_altitude(None, Header(), config) == (None, "")
    config.write_text("altitude_m = 832\n")
    assert find_altitude(None, Header(), config) == (832.0, "given in mis_mlx.toml")
