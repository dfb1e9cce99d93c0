"""Time: what sleep is, and what it is not."""

from __future__ import annotations

import time

from mis_mlx.hardware.clock import Clock, VirtualClock


def test_virtual_sleep_moves_the_clock_and_takes_no_time():
    """An hour of sleep is an hour later on both virtual clocks."""
    clock = VirtualClock(start_s=5.0, wall_s=100.0)
    clock.sleep(3600)
    clock.sleep(-1)
    assert (clock.monotonic(), clock.wall()) == (3605.0, 3700.0)


def test_a_closed_lid_is_seen():
    """The wall clock goes on, `monotonic` does not, and `slept` says for how long."""
    clock = VirtualClock()
    mark = clock.asleep()
    clock.sleep(10)
    assert clock.slept(mark) == 0
    clock.suspend(600)
    assert clock.slept(mark) == 600
    assert clock.monotonic() == 10
    assert clock.wall() == 610


def test_a_wall_clock_that_is_set_is_not_sleep():
    """NTP or a user may move the wall clock by hours."""
    clock = VirtualClock(wall_s=1e9)
    mark = clock.asleep()
    clock.set_wall(2e9)
    assert clock.slept(mark) == 0


def test_the_real_clock_agrees_with_itself():
    """Nobody slept between two lines of a test, and uptime is not below time awake."""
    clock = Clock()
    mark = clock.asleep()
    before = clock.monotonic()
    clock.sleep(0.002)
    assert clock.monotonic() >= before + 0.002
    assert clock.slept(mark) == 0
    assert mark >= -0.5


def test_a_mac_is_asked_for_clocks_that_nobody_slews(monkeypatch):
    """Apple's CLOCK_MONOTONIC is corrected by NTP; the raw one less the raw time awake is sleep and nothing else."""
    shown = {time.CLOCK_MONOTONIC_RAW: 5000.0, 8: 1400.0}  # 8 is CLOCK_UPTIME_RAW there
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr(time, "CLOCK_UPTIME_RAW", 8, raising=False)
    monkeypatch.setattr(time, "clock_gettime", shown.__getitem__)
    assert (Clock().uptime(), Clock().asleep()) == (5000.0, 3600.0)
