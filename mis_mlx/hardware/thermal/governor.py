"""The governor: judge a reading and say run, pause or stop, with hysteresis.

Pure: `(reading, now) -> decision`. Sensor loss counts as hot, never as cool. An M1 Air lives at 95
to 105 °C under load, so 95 °C is no reason to stop. Timers watch how long something has been true.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from mis_mlx.types import MisError, Reading

Mode = Literal["observe", "steady", "cool"]

# (pause, resume) by mode
LIMITS_C: dict[str, tuple[float, float]] = {
    "observe": (101.0, 90.0),
    "steady": (101.0, 90.0),
    "cool": (92.0, 82.0),
}
PAUSE_HOLD_S = 1.0
RESUME_HOLD_S = 10.0
RESUME_SAMPLES = 3
STOP_C = 105.0
STOP_HOLD_S = 30.0
LONGEST_PAUSE_S = 900.0
BATTERY_WARM_C = 40.0
BATTERY_STOP_C = 45.0
BATTERY_LOW_PERCENT = 20.0
BATTERY_ENOUGH_PERCENT = 30.0
STOP_PRESSURE = 3  # 2 is ordinary on an Air: slower, never a stop
LOST_S = 10.0
SHORTEST_PAUSE_S = 10.0  # no chatter
LAP = f"--governor cool, which runs on battery down to {BATTERY_LOW_PERCENT:.0f} %"


class Held:
    """How long, and over how many fresh samples, something has been true without a break."""

    def __init__(self) -> None:
        self._since_s: float | None = None
        self.samples = 0
        self.seconds = 0.0

    def update(self, true: bool, now_s: float, fresh: bool = True) -> None:
        """Feed one look; a look without a fresh sample counts as time, not as a sample."""
        if not true:
            self._since_s = None
            self.samples = 0
            self.seconds = 0.0
            return
        if self._since_s is None:
            self._since_s = now_s
        self.seconds = now_s - self._since_s
        self.samples += fresh

    def lasted(self, seconds: float, samples: int = 1) -> bool:
        """Whether it has been true that long and that often."""
        return self.samples >= samples and self.seconds >= seconds


@dataclass(frozen=True)
class Decision:
    """What the loop has to do after this optimizer step.

    `run`: go on; `pause`: write a checkpoint if `checkpoint`, wait, ask again; `stop`: write one
    and end. `cause`: a word to count by; `reason`: a sentence.
    """

    action: Literal["run", "pause", "stop"]
    cause: str = ""
    reason: str = ""
    checkpoint: bool = False


class Governor:
    """One controller for one run.

    `decide` after each optimizer step and about once a second in a pause. blind: there has never
    been a die thermometer (a virtual machine), so only the battery is watched.
    """

    def __init__(self, mode: Mode = "steady", *, blind: bool = False):
        if mode not in LIMITS_C:
            raise MisError(
                f"governor mode {mode!r} is not one of {', '.join(get_args(Mode))}: choose one"
            )
        self.mode = mode
        self.blind = blind
        self.pause_c, self.resume_c = LIMITS_C[mode]
        self._hot = Held()
        self._cool = Held()
        self._boiling = Held()
        self._battery_hot = Held()
        self._sample_s: float | None = None  # of the last reading, with a die temperature or not
        self._valid_s: float | None = None  # of the last die temperature
        self._waiting: Decision | None = None  # the pause we are in
        self._waiting_since_s = 0.0
        self._end: Decision | None = None  # a stop, which is final

    def decide(self, reading: Reading, now_s: float) -> Decision:
        """The decision at `now_s` (the clock of `reading.time_s`).

        In mode `observe` always "run", with what `steady` would have done.
        """
        lost = self._take(reading, now_s)
        decision = self._end or self._judge(reading, now_s, lost=lost)
        if decision.action == "stop":
            self._end = decision
        if self.mode == "observe":
            reason = f"only observed: {decision.reason}" if decision.reason else ""
            return replace(decision, action="run", reason=reason, checkpoint=False)
        return decision

    def _take(self, reading: Reading, now_s: float) -> bool:
        """Feed the timers, whatever is decided then; whether the die's thermometer is lost."""
        # The monitor looks once a second; after a short step its last reading is the same again,
        # which must not count as another sample.
        fresh = reading.time_s != self._sample_s
        self._sample_s = reading.time_s
        # An old temperature says nothing of now: it counts as none.
        seen = reading.die_c is not None and now_s - reading.time_s < LOST_S
        die_c = (reading.die_c or 0.0) if seen else 0.0
        if seen:
            self._valid_s = reading.time_s
        if self._valid_s is None:  # the first look has none: the wait for one begins now
            self._valid_s = now_s
        # A blind governor has no thermometer that could be lost.
        lost = not self.blind and not seen and now_s - self._valid_s >= LOST_S
        # Without a temperature neither hot nor cool holds, so that no pause ends on a lost sensor.
        self._hot.update(seen and die_c >= self.pause_c, now_s, fresh)
        self._cool.update(seen and die_c <= self.resume_c, now_s, fresh)
        # 105 °C is ordinary under load; in a pause it means that pausing does not help.
        self._boiling.update(self._waiting is not None and die_c >= STOP_C, now_s, fresh)
        self._battery_hot.update((reading.battery_c or 0.0) >= BATTERY_STOP_C, now_s, fresh)
        return lost

    def _judge(self, reading: Reading, now_s: float, *, lost: bool) -> Decision:
        """Stop, else begin, keep or end a pause, else run."""
        stop = self._stop(reading, now_s)
        if stop:
            cause, reason = stop
            return Decision("stop", cause=cause, reason=reason, checkpoint=True)
        if self._waiting is None:
            self._waiting = self._pause(reading, lost=lost)
            self._waiting_since_s = now_s
        elif now_s - self._waiting_since_s >= SHORTEST_PAUSE_S and self._may_resume(reading):
            self._waiting = None
        if self._waiting is not None:
            return self._waiting
        if self.blind:
            reason = "no die thermometer: only the battery is governed"
            return Decision("run", cause="blind", reason=reason)
        if (reading.battery_c or 0.0) >= BATTERY_WARM_C:
            reason = f"battery {reading.battery_c:.1f} °C, stop at {BATTERY_STOP_C:.0f}"
            return Decision("run", cause="battery warm", reason=reason)
        return Decision("run")

    def _may_resume(self, reading: Reading) -> bool:
        """Whether the pause's cause is gone, and power does not fail."""
        hot = self._waiting is not None and self._waiting.cause in ("hot", "sensor lost")
        if hot and not self._cool.lasted(RESUME_HOLD_S, RESUME_SAMPLES):
            return False
        return self._power_trouble(reading, BATTERY_ENOUGH_PERCENT) is None

    def _stop(self, reading: Reading, now_s: float) -> tuple[str, str] | None:
        """(cause, reason) to end the run."""
        if (reading.pressure_level or 0) >= STOP_PRESSURE:
            return "pressure", f"thermal pressure {reading.pressure_level}, stop at {STOP_PRESSURE}"
        if self._battery_hot.lasted(0.0, samples=3):  # one wrong sample ends no run
            reason = f"battery {reading.battery_c:.1f} °C, stop at {BATTERY_STOP_C:.0f}"
            return "battery hot", reason
        if self._boiling.lasted(STOP_HOLD_S):
            return "hot", f"die {reading.die_c:.1f} °C after {STOP_HOLD_S:.0f} s of pause"
        waited_s = now_s - self._waiting_since_s
        if self._waiting is None or waited_s <= LONGEST_PAUSE_S:
            return None
        if self._waiting.cause == "sensor lost":
            return "sensor lost", f"no die temperature for {waited_s:.0f} s"
        if self._waiting.cause == "hot":
            return "hot", f"not below {self.resume_c:.0f} °C after a pause of {waited_s:.0f} s"
        return None

    def _pause(self, reading: Reading, *, lost: bool) -> Decision | None:
        """The pause to begin now, if any.

        A pause for lack of power lasts until there is power: a checkpoint is on disk, nothing is
        lost.
        """
        power = self._power_trouble(reading, BATTERY_LOW_PERCENT)
        if power is not None:
            cause, reason = power
        elif lost:
            cause = "sensor lost"
            reason = f"no die temperature for {LOST_S:.0f} s, which counts as hot"
        elif self._hot.lasted(PAUSE_HOLD_S, samples=2):
            cause = "hot"
            limits = f"pause at {self.pause_c:.0f}, continue at {self.resume_c:.0f}"
            reason = f"die {reading.die_c:.1f} °C, {limits}"
        else:
            return None
        return Decision("pause", cause=cause, reason=reason, checkpoint=power is not None)

    def _power_trouble(self, reading: Reading, enough_percent: float) -> tuple[str, str] | None:
        """(cause, reason) to wait for power. Mode `cool` runs on battery until that is low."""
        if reading.plugged is False and self.mode != "cool":
            return "unplugged", f"on battery: plug in to continue, or stop and --resume with {LAP}"
        percent = reading.battery_percent
        if percent is not None and percent < enough_percent:
            reason = f"battery {percent:.0f} %, continue at {BATTERY_ENOUGH_PERCENT:.0f}: charge it"
            return "battery low", reason
        return None


def governor_for(
    mode: Mode, first: Reading, reasons: Mapping[str, str], *, apple: bool
) -> Governor:
    """The governor of a run, from its first reading.

    On a Mac without a die temperature only `observe` is allowed, as nobody would notice the Mac
    overheating (MisError); elsewhere (a virtual machine) the governor is blind and says so.
    """
    blind = first.die_c is None
    if blind and apple and mode != "observe":
        why = (
            f"no die temperature can be read ({reasons.get('die_c', 'no reason')}), so mode "
            f"{mode} cannot protect"
        )
        raise MisError(
            f"{why} this Mac: see `python -m mis_mlx.thermal`, or choose mode observe and "
            f"stay with the machine"
        )
    return Governor(mode, blind=blind)


def unfit_for_timing(reading: Reading) -> str | None:
    """Why a benchmark started now would measure heat and not the program; None: it would not."""
    if reading.die_c is not None and reading.die_c > 80:
        return f"die {reading.die_c:.1f} °C, above 80"
    if (reading.pressure_level or 0) >= 1:
        return f"thermal pressure {reading.pressure_level}, not 0"
    if reading.battery_c is not None and reading.battery_c >= BATTERY_WARM_C:
        return f"battery {reading.battery_c:.1f} °C, {BATTERY_WARM_C:.0f} or more"
    return None
