"""Time: what sleep is."""

from __future__ import annotations

import time

from mis_mlx.hardware.clock import Clock


def test_a_mac_is_asked_for_clocks_that_nobody_slews(monkeypatch):
    """Apple's CLOCK_MONOTONIC is slewed by NTP; raw less raw awake is sleep and nothing else."""
    shown = {time.CLOCK_MONOTONIC_RAW: 5000.0, 8: 1400.0}  # 8 is CLOCK_UPTIME_RAW there
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr(time, "CLOCK_UPTIME_RAW", 8, raising=False)
    monkeypatch.setattr(time, "clock_gettime", shown.__getitem__)
    assert (Clock().uptime(), Clock().asleep()) == (5000.0, 3600.0)
