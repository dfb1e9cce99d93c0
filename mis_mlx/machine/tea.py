"""Tea breaks: waits as long as the governor says after each step, and counts what that took.

Knows nothing of training: the loop hands in how long its step was and gets decisions to log.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from mis_mlx.machine.clock import Clock
from mis_mlx.machine.governor import Decision, Governor
from mis_mlx.types import Reading


class Thermometer(Protocol):
    """What this module wants of a monitor (sensors.Monitor)."""

    clock: Clock

    def reading(self) -> Reading:
        """The latest reading."""


@dataclass
class TeaBreaks:
    """The account of a run; `TeaBreaks(**saved)` goes on with the one of the run that was interrupted."""

    count: int = 0
    seconds: float = 0.0  # in pauses
    napped_s: float = 0.0  # between steps, for the duty
    reasons: dict[str, int] = field(default_factory=dict)  # cause -> pauses

    def as_json(self) -> dict[str, Any]:
        """`tea_breaks`, `throttled_s` (all seconds held back) and `tea_reasons`, for a run's JSON."""
        held_s = round(self.seconds + self.napped_s, 1)
        return {"tea_breaks": self.count, "throttled_s": held_s, "tea_reasons": dict(self.reasons)}

    def saved(self) -> dict[str, Any]:
        """What `TeaBreaks(**saved)` wants."""
        return asdict(self)


def after_step(monitor: Thermometer, governor: Governor, breaks: TeaBreaks, step_s: float) -> Iterator[Decision]:
    """Ask the governor after a step of `step_s` seconds and wait as it says.

    Gives each decision before its wait is served, about one a second in a pause, so that the caller can
    log it, write the checkpoint it asks for, or end the run by leaving the `for`. The last one given is
    "run" or "stop". Call it outside the timed step, after the GPU is done. A step of more than a few
    seconds heats the die from cool to hot before anyone looks: call it after each part of such a step
    (parts of one size, as their times are compared).
    """
    clock = monitor.clock
    decision = governor.decide(monitor.reading(), clock.monotonic(), step_s)
    if decision.action == "pause":
        breaks.count += 1
        breaks.reasons[decision.cause] = breaks.reasons.get(decision.cause, 0) + 1
    asked = False
    while decision.action == "pause":
        yield replace(decision, checkpoint=decision.checkpoint and not asked)  # one checkpoint a pause
        asked = asked or decision.checkpoint
        since_s = clock.monotonic()
        clock.sleep(decision.sleep_s)
        reading = monitor.reading()
        breaks.seconds += clock.monotonic() - since_s
        decision = governor.decide(reading, clock.monotonic())
    yield decision
    if decision.sleep_s:
        clock.sleep(decision.sleep_s)
        breaks.napped_s += decision.sleep_s
