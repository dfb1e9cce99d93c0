"""The weather of one run: thermometers, governor, tea breaks, and their records on disk."""

import json
import os
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from mis_mlx import cli
from mis_mlx.hardware.thermal import ambient, governor
from mis_mlx.hardware.thermal.governor import Decision, Governor, Mode
from mis_mlx.hardware.thermal.thermal_monitor import Monitor, battery_charge
from mis_mlx.storage.files import DISK
from mis_mlx.types import Air, Celsius, Metres, MisError, Step

PAUSE_LOOK_S = 1.0


def default_mode() -> Mode:
    """MIS_MLX_GOVERNOR, or steady. MisError for an unknown mode.

    Tests train with observe, so that they do not wait for a plug.
    """
    wanted = os.environ.get("MIS_MLX_GOVERNOR", "steady")
    for mode in get_args(Mode):
        if mode == wanted:
            return mode
    raise MisError(
        f"MIS_MLX_GOVERNOR is not one of {', '.join(get_args(Mode))}: set it to one of them, "
        f"or unset it"
    )


@dataclass(frozen=True)
class AirFlags:
    """Air and altitude, of commands whose result depends on them."""

    temperature_c: Celsius | None = None
    """air temperature in °C, from your own thermometer; default: measured, if this machine can"""
    altitude_m: Metres | None = None
    """metres above sea level"""


@dataclass(frozen=True)
class Governed:
    """How hot the machine may get."""

    governor: Mode = field(default_factory=default_mode)
    """observe: only watch; steady, cool: pause (a tea break) at 101, 92 °C, until 90, 82 °C; on
    battery, only observe and cool continue; default: MIS_MLX_GOVERNOR, or steady
    """


@dataclass(frozen=True)
class ThermalFlags(AirFlags, Governed):
    """Air, altitude, and how hot the machine may get."""


def battery(flags: Governed) -> str:
    """A sentence on what the governor does about the battery that this machine runs on now.

    Empty when it does not run on one.
    """
    percent, plugged = battery_charge()
    if plugged is not False:
        return ""
    low = governor.BATTERY_LOW_PERCENT
    enough = governor.BATTERY_ENOUGH_PERCENT
    if flags.governor == "observe":
        does = "does nothing about it: the run ends when the battery does"
    elif flags.governor == "cool":
        does = f"pauses the run below {low:.0f} % until there are {enough:.0f}"
    else:
        does = (
            f"pauses the run after its first step until it is plugged in; plug it in, or use "
            f"{governor.LAP}"
        )
    charge = "" if percent is None else f", {percent:.0f} %"
    return f"on battery{charge}: --governor {flags.governor} {does}"


@dataclass
class PauseCounter:
    """The account of a run; a checkpoint keeps it, and a resumed run goes on with it."""

    count: int = 0
    seconds: float = 0.0  # in pauses
    reasons: dict[str, int] = field(default_factory=dict)  # cause -> pauses


def after_step(monitor: Monitor, judge: Governor, breaks: PauseCounter) -> Iterator[Decision]:
    """Ask the governor after a step, wait as it says, yield its decisions.

    Each comes before its wait, about one a second in a pause, so that the caller can log it, write
    the checkpoint it asks for, or end the run by leaving the `for`; the last one is "run" or
    "stop". Call it outside the timed step, after the GPU is done. A step of more than a few seconds
    heats the die from cool to hot before anyone looks: call it after each part of a long step.
    """
    clock = monitor.clock
    decision = judge.decide(monitor.reading(), clock.monotonic())
    if decision.action == "pause":
        breaks.count += 1
        breaks.reasons[decision.cause] = breaks.reasons.get(decision.cause, 0) + 1
    saved = False
    while decision.action == "pause":
        # one checkpoint a pause
        yield replace(decision, checkpoint=decision.checkpoint and not saved)
        saved = saved or decision.checkpoint
        since_s = clock.monotonic()
        clock.sleep(PAUSE_LOOK_S)
        reading = monitor.reading()
        breaks.seconds += clock.monotonic() - since_s
        decision = judge.decide(reading, clock.monotonic())
    yield decision


class ThermalMonitor(Monitor):
    """The monitor of a run. Use in a `with` statement.

    `breaks` is the account of tea breaks; it survives in a checkpoint.
    """

    def __init__(self, flags: Governed | AirFlags, log: Path | None = None) -> None:
        air = flags if isinstance(flags, AirFlags) else AirFlags()
        super().__init__(given_ambient_c=air.temperature_c, altitude_m=air.altitude_m)
        self.breaks = PauseCounter()
        self._mode: Mode = flags.governor if isinstance(flags, Governed) else "observe"
        self._log = log
        self._governor: Governor | None = None

    def now(self) -> dict[str, float]:
        """The clock that metrics.jsonl and thermal.jsonl share."""
        return {"time_s": round(self.clock.monotonic(), 3), "wall_s": round(self.clock.wall(), 3)}

    def air(self, *, look: bool = True) -> Air:
        """The air by the latest reading; look: False: by the last one that was given."""
        reading = self.reading() if look else self.last()
        if reading is None:
            return Air(source="none: not asked")
        no_air = "none: " + self.reasons.get("ambient_c", "not asked")
        return Air(
            celsius=reading.ambient_c,
            sigma_c=reading.ambient_sigma_c,
            source=reading.sources.get("ambient_c", no_air),
            altitude_m=reading.altitude_m,
            altitude_source=reading.sources.get("altitude_m", "none"),
            spread_c=self._spread_c(),
        )

    def _spread_c(self) -> float:
        """Of the last hour's T_env; 0 unless it was measured."""
        history = self.history()
        air = [reading.ambient_c for reading in history if reading.ambient_c is not None]
        if not air or ambient.t_env_kind(history[-1]) != "measured":
            return 0.0
        return statistics.pstdev(air)

    def after(self, step: Step) -> Iterator[Decision]:
        """Ask the governor after a step, wait as it says, log and yield each decision.

        The last one is run or stop.
        """
        if self._governor is None:
            self._governor = governor.governor_for(
                self._mode, self.reading(), self.reasons, apple=self.apple
            )
            if self._governor.blind:
                why = self.reasons.get("die_c", "no die temperature")
                cli.detail(f"governor: {self._mode}, but without temperatures: {why}")
        pauses = self.breaks.count
        for decision in after_step(self, self._governor, self.breaks):
            if self.breaks.count > pauses:
                pauses = self.breaks.count
                cli.say(f"tea break after step {step.number}: {decision.reason}")
            if self._log and not self._governor.blind:
                reading = self.last()
                values = asdict(reading) if reading else {}
                known = {name: value for name, value in values.items() if value is not None}
                record = {**self.now(), "step": step.number, **known, **asdict(decision)}
                DISK.append(self._log, json.dumps(record, ensure_ascii=False))
            yield decision

    def account(self) -> dict[str, Any]:
        """For a run's JSON: tea breaks, and where T_env and altitude came from."""
        air = self.air(look=False)
        return {
            "tea_breaks": self.breaks.count,
            "throttled_s": round(self.breaks.seconds, 1),
            "tea_reasons": dict(self.breaks.reasons),
            "t_env_c": air.celsius,
            "t_env_sigma_c": air.sigma_c,
            "t_env_source": air.source,
            "altitude_m": air.altitude_m,
            "altitude_source": air.altitude_source,
        }
