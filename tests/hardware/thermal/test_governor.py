"""The governor: its limits one by one. The tea breaks it makes are in test_run_monitor.py."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mis_mlx.hardware.thermal.governor import (
    Decision,
    Governor,
    governor_for,
    unfit_for_timing,
)
from mis_mlx.types import MisError, Reading

GOOD = Reading(
    0.0, die_c=70.0, battery_c=30.0, pressure_level=0, battery_percent=90.0, plugged=True
)


def feed(governor: Governor, seconds: int, start: int = 0, **changes) -> Decision:
    """One look a second; the last decision."""
    for second in range(start, start + seconds):
        reading = replace(GOOD, time_s=float(second), **changes)
        decision = governor.decide(reading, float(second))
    return decision


def test_readings_that_grow_old_count_as_lost():
    """A sampling thread that hangs gives the same reading for ever: after 10 s that is hot."""
    governor = Governor("steady")
    old = replace(GOOD, time_s=100.0, die_c=50.0)
    assert governor.decide(old, 105.0).action == "run"
    assert governor.decide(old, 109.0).action == "run"
    lost = governor.decide(old, 110.0)
    assert (lost.cause, lost.action) == ("sensor lost", "pause")
    assert feed(Governor("steady"), 10, die_c=None).action == "run"  # it never saw a temperature
    never = Governor("steady")
    assert feed(never, 11, die_c=None).action == "pause"
    assert feed(never, 30, 11, die_c=60.0).action == "run"
    assert feed(never, 950, 41, die_c=None).action == "stop"


def test_95_degrees_is_no_reason_to_stop_or_pause():
    """An M1 Air lives at 95 to 100 °C under load."""
    governor = Governor("steady")
    assert {feed(governor, 10, start, die_c=95.0).action for start in range(0, 600, 10)} == {"run"}


def test_pause_resume_and_their_holds():
    """101 °C for 1 s pauses; 90 °C for 10 s, in 3 fresh samples, goes on, not a second before."""
    governor = Governor("steady")
    feed(governor, 30, die_c=80.0)
    actions = [feed(governor, 1, second, die_c=104.0).action for second in range(30, 45)]
    first = actions.index("pause")
    assert first == 1
    assert "run" not in actions[first:]
    cooling = [feed(governor, 1, second, die_c=85.0) for second in range(45, 75)]
    resumed = [decision.action for decision in cooling].index("run")
    assert 10 <= resumed <= 22
    assert cooling[0].reason.startswith("die 104.0 °C, pause at 101")
    assert cooling[0].checkpoint is False


def test_one_spike_is_not_heat():
    """A single look of 125 °C among looks of 80 changes nothing."""
    governor = Governor("steady")
    feed(governor, 20, die_c=80.0)
    assert feed(governor, 1, 20, die_c=125.0).action == "run"
    assert feed(governor, 10, 21, die_c=80.0).action == "run"


def test_stop_when_a_pause_does_not_cool():
    """105 °C for 30 s after pausing stops; so does a pause of 15 minutes that stays above 90 °C."""
    boiling = Governor("steady")
    stopped = feed(boiling, 60, die_c=106.0)
    assert (stopped.action, stopped.checkpoint, stopped.cause) == ("stop", True, "hot")
    assert feed(boiling, 5, 60, die_c=60.0).action == "stop"  # for good
    warm = Governor("steady")
    feed(warm, 20, die_c=102.0)
    assert feed(warm, 880, 20, die_c=95.0).action == "pause"
    ended = feed(warm, 30, 900, die_c=95.0)
    assert ended.action == "stop"
    assert "pause of" in ended.reason


def test_pressure():
    """2 is ordinary, 3 stops."""
    assert feed(Governor(), 600, pressure_level=2).action == "run"
    assert feed(Governor(), 1, pressure_level=3).action == "stop"


def test_battery_temperature():
    """40 °C is a warning, one look of 45 °C nothing more, three stop."""
    assert feed(Governor(), 20, battery_c=41.0).cause == "battery warm"
    governor = Governor()
    assert feed(governor, 2, battery_c=46.0).action == "run"
    assert feed(governor, 1, 2, battery_c=46.0).action == "stop"


def test_unplugged_and_low():
    """On battery: a checkpoint and a pause without end; `cool` goes on to 20 %."""
    governor = Governor("steady")
    feed(governor, 20)
    pause = feed(governor, 1, 20, plugged=False)
    assert (pause.action, pause.cause, pause.checkpoint) == ("pause", "unplugged", True)
    assert feed(governor, 2000, 21, plugged=False).action == "pause"
    assert feed(governor, 1, 2021).action == "run"
    lap = Governor("cool")
    assert feed(lap, 20, plugged=False, battery_percent=50.0).action == "run"
    assert feed(lap, 20, 20, plugged=False, battery_percent=19.0).cause == "battery low"
    assert feed(lap, 20, 40, battery_percent=25.0).action == "pause"
    assert feed(lap, 20, 60, battery_percent=31.0).action == "run"


def test_observe_never_interferes():
    """It says what it would have done, and always runs."""
    governor = Governor("observe")
    decision = feed(governor, 60, die_c=106.0, plugged=False)
    assert (decision.action, decision.checkpoint) == ("run", False)
    assert decision.reason.startswith("only observed: ")


def test_blind_and_unattended():
    """A virtual machine is governed blindly; a Mac without a die's heat only observed."""
    unseen = replace(GOOD, die_c=None)
    blind = governor_for("steady", unseen, {}, apple=False)
    assert blind.blind
    seeing_nothing = feed(blind, 100, die_c=None)
    assert (seeing_nothing.action, seeing_nothing.cause) == ("run", "blind")
    assert feed(blind, 1, 100, die_c=None, plugged=False).action == "pause"
    with pytest.raises(MisError, match=r"no sensor answered.*mis_mlx.thermal"):
        governor_for("steady", unseen, {"die_c": "no sensor answered"}, apple=True)
    assert governor_for("observe", unseen, {}, apple=True).blind
    assert not governor_for("steady", GOOD, {}, apple=True).blind
    with pytest.raises(MisError, match="warp"):
        Governor("warp")  # type: ignore[arg-type]


def test_benchmarks_refuse_heat():
    """A hot die, any pressure, a warm battery: each with its two numbers; unknown is not hot."""
    assert unfit_for_timing(GOOD) is None
    assert unfit_for_timing(Reading(0.0)) is None
    assert unfit_for_timing(replace(GOOD, die_c=90.0)) == "die 90.0 °C, above 80"
    assert unfit_for_timing(replace(GOOD, pressure_level=1)) == "thermal pressure 1, not 0"
    assert unfit_for_timing(replace(GOOD, battery_c=41.0)) == "battery 41.0 °C, 40 or more"
