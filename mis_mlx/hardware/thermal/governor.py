"""The governor: looks at a reading and says run, pause or stop, and how much to nap after a step.

Pure: `(reading, now) -> decision`. Sensor loss counts as hot, never as cool. An M1 Air lives at 95
to 105 °C under load, so 95 °C is no reason to stop. Its parts: a filter, a PI loop on the duty, and
a watch.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Literal, get_args

from mis_mlx.types import MisError, Reading

Mode = Literal["observe", "throughput", "steady", "cool"]

SET_POINT_C: dict[str, float] = {"observe": 92.0, "throughput": 97.0, "steady": 92.0, "cool": 85.0}
PAUSE_C = 101.0
PAUSE_HOLD_S = 3.0
RESUME_C = 90.0
RESUME_HOLD_S = 10.0
RESUME_SAMPLES = 3
STOP_C = 105.0
STOP_HOLD_S = 30.0
LONGEST_PAUSE_S = 900.0
BATTERY_WARM_C = 40.0
BATTERY_STOP_C = 45.0
BATTERY_LOW_PERCENT = 20.0
BATTERY_ENOUGH_PERCENT = 30.0
STOP_PRESSURE = 3
# level 2 is ordinary on an Air: slower, never a stop
HEAVY_PRESSURE = 2
HEAVY_DUTY = 0.7
LOST_S = 10.0
LOST_DUTY = 0.6
APART_S = 10.0  # least time between a pause and what follows it
LONGEST_NAP_S = 5.0  # naps of 2 s keep the die within 4 K, of 10 s within 14 K
PAUSE_LOOK_S = 1.0
LAP = f"--governor cool, which runs on battery down to {BATTERY_LOW_PERCENT:.0f} %"


class DieFilter:
    """Median of three samples, then an exponential mean of 2 s, with a look ahead of 3 s at its
    slope.
    """

    SMOOTH_S = 2.0
    AHEAD_S = 3.0

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=3)
        self._time_s = 0.0
        self._value: float | None = None
        # where the die will be in 3 s if it goes on rising; never below where it is
        self.ahead_c = 0.0

    def add(self, time_s: float, die_c: float) -> None:
        """One fresh sample."""
        self._last.append(die_c)
        middle = median(self._last)
        elapsed = time_s - self._time_s
        self._time_s = time_s
        if self._value is None or elapsed <= 0:
            self._value = self.ahead_c = middle
            return
        change = (middle - self._value) * (1 - math.exp(-elapsed / self.SMOOTH_S))
        self._value += change
        self.ahead_c = self._value + self.AHEAD_S * max(change / elapsed, 0.0)


class Duty:
    """PI control of the share of time that work runs: falls at once, rises by 0.05 a second at
    most.
    """

    # per K, per K·s
    KP = 0.02
    KI = 0.0015
    LOW = 0.2
    RISE_PER_S = 0.05
    LONGEST_S = 5.0  # a longer time between looks is integrated as this

    def __init__(self) -> None:
        self.value = self._integral = 1.0

    def update(self, room_k: float, elapsed_s: float, ceiling: float = 1.0) -> float:
        """The duty after a look: `room_k`: set-point minus temperature, `ceiling`: a limit from
        elsewhere.
        """
        elapsed_s = min(elapsed_s, self.LONGEST_S)
        wanted = self._integral + self.KP * room_k
        # else it winds up
        if not ((wanted >= 1.0 and room_k > 0) or (wanted <= self.LOW and room_k < 0)):
            self._integral = min(1.0, max(self.LOW, self._integral + self.KI * room_k * elapsed_s))
        wanted = min(
            self._integral + self.KP * room_k, ceiling, self.value + self.RISE_PER_S * elapsed_s
        )
        self.value = min(1.0, max(self.LOW, wanted))
        return self.value


class Held:
    """For how long, and over how many fresh samples, something has been true without a break."""

    def __init__(self) -> None:
        self._since_s: float | None = None
        self.samples = 0
        self.seconds = 0.0

    def update(self, true: bool, now_s: float, fresh: bool = True) -> None:
        """Feed one look; a look that brought no fresh sample counts as time, not as a sample."""
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
    """What the loop has to do after this optimizer step. `run`: sleep `sleep_s`, go on; `pause`:
    write a checkpoint if `checkpoint`, sleep, ask again; `stop`: write one and end. `cause`: a word
    to count by; `reason`: a sentence.
    """

    action: Literal["run", "pause", "stop"]
    duty: float = 1.0
    sleep_s: float = 0.0
    cause: str = ""
    reason: str = ""
    checkpoint: bool = False


class Governor:
    """One controller for one run; `decide` after each optimizer step and about once a second in a
    pause. blind: there has never been a die thermometer (a virtual machine), so only the battery is
    watched.
    """

    def __init__(self, mode: Mode = "steady", *, blind: bool = False):
        if mode not in SET_POINT_C:
            raise MisError(
                f"governor mode {mode!r} is not one of {', '.join(get_args(Mode))}: choose one"
            )
        self.mode = mode
        self.blind = blind
        self._filter = DieFilter()
        self._duty = Duty()
        self._hot = Held()
        self._cool = Held()
        self._boiling = Held()
        self._lost = Held()
        self._battery_hot = Held()
        self._last_s: float | None = None
        self._sample_s: float | None = None
        self._valid_s: float | None = None
        self._waiting: Decision | None = None  # the pause we are in
        self._waiting_since_s = 0.0
        self._turned_s = -APART_S
        self._end: Decision | None = None

    def decide(self, reading: Reading, now_s: float, step_s: float | None = None) -> Decision:
        """The decision at `now_s` (the clock of `reading.time_s`). `step_s`: seconds the step just
        done took, `None` in a pause. In mode `observe` always "run", with what another mode would
        have done.
        """
        elapsed_s = max(now_s - self._last_s, 0.0) if self._last_s is not None else 0.0
        self._last_s = now_s
        self._take(reading, now_s)
        decision = self._end or self._judge(reading, now_s, elapsed_s, step_s)
        if decision.action == "stop":
            self._end = decision
        if self.mode == "observe":
            reason = f"only observed: {decision.reason}" if decision.reason else ""
            return replace(
                decision, action="run", duty=1.0, sleep_s=0.0, reason=reason, checkpoint=False
            )
        return decision

    def _take(self, reading: Reading, now_s: float) -> None:
        fresh = reading.time_s != self._sample_s
        self._sample_s = reading.time_s
        seen = reading.die_c is not None and now_s - reading.time_s <= LOST_S
        die_c = (reading.die_c or 0.0) if seen else 0.0
        if seen and fresh:
            self._filter.add(reading.time_s, die_c)
            self._valid_s = reading.time_s
        self._valid_s = now_s if self._valid_s is None else self._valid_s
        self._lost.update(not self.blind and now_s - self._valid_s >= LOST_S, now_s)
        self._hot.update(seen and self._filter.ahead_c >= PAUSE_C, now_s, fresh)
        self._cool.update(seen and self._filter.ahead_c <= RESUME_C, now_s, fresh)
        self._boiling.update(self._waiting is not None and die_c >= STOP_C, now_s, fresh)
        self._battery_hot.update((reading.battery_c or 0.0) >= BATTERY_STOP_C, now_s, fresh)

    def _judge(
        self, reading: Reading, now_s: float, elapsed_s: float, step_s: float | None
    ) -> Decision:
        if why := self._stop(reading, now_s):
            return Decision("stop", self._duty.value, 0.0, *why, checkpoint=True)
        may_turn = now_s - self._turned_s >= APART_S
        if self._waiting is not None:
            cool = self._waiting.cause != "hot" or self._cool.lasted(RESUME_HOLD_S, RESUME_SAMPLES)
            if (
                not (may_turn and cool)
                or self._power_trouble(reading, BATTERY_ENOUGH_PERCENT) is not None
            ):
                return self._waiting
            self._waiting = None
            self._turned_s = now_s
        elif may_turn and (pause := self._pause(reading)) is not None:
            self._waiting = pause
            self._waiting_since_s = now_s
            self._turned_s = now_s
            return pause
        return self._run(reading, elapsed_s, step_s)

    def _stop(self, reading: Reading, now_s: float) -> tuple[str, str] | None:
        """`(cause, reason)` to end the run."""
        if (reading.pressure_level or 0) >= STOP_PRESSURE:
            return "pressure", f"thermal pressure {reading.pressure_level}, stop at {STOP_PRESSURE}"
        if self._battery_hot.lasted(0.0, samples=3):
            return (
                "battery hot",
                f"battery {reading.battery_c:.1f} °C, stop at {BATTERY_STOP_C:.0f}",
            )
        if self._boiling.lasted(STOP_HOLD_S):
            return "hot", f"die {reading.die_c:.1f} °C after {STOP_HOLD_S:.0f} s of pause"
        waited_s = now_s - self._waiting_since_s
        if (
            self._waiting is not None
            and self._waiting.cause == "hot"
            and waited_s > LONGEST_PAUSE_S
        ):
            return "hot", f"not below {RESUME_C:.0f} °C after a pause of {waited_s:.0f} s"
        return None

    def _pause(self, reading: Reading) -> Decision | None:
        """A pause for lack of power lasts until there is power: a checkpoint is on disk, nothing is
        lost.
        """
        if power := self._power_trouble(reading, BATTERY_LOW_PERCENT):
            return Decision("pause", self._duty.value, PAUSE_LOOK_S, *power, checkpoint=True)
        if self._hot.lasted(PAUSE_HOLD_S, samples=2):
            reason = f"die {reading.die_c:.1f} °C, pause at {PAUSE_C:.0f}, go on at {RESUME_C:.0f}"
            return Decision("pause", self._duty.value, PAUSE_LOOK_S, "hot", reason)
        return None

    def _power_trouble(self, reading: Reading, enough_percent: float) -> tuple[str, str] | None:
        """`(cause, reason)`. Mode `cool` is for the lap: it runs on battery until that is low."""
        if reading.plugged is False and self.mode != "cool":
            return "unplugged", f"on battery: plug in to go on, or stop and --resume with {LAP}"
        percent = reading.battery_percent
        if percent is not None and percent < enough_percent:
            return (
                "battery low",
                f"battery {percent:.0f} %, go on at {BATTERY_ENOUGH_PERCENT:.0f}: charge it",
            )
        return None

    def _run(self, reading: Reading, elapsed_s: float, step_s: float | None) -> Decision:
        cause = reason = ""
        if self.blind:
            duty = 1.0
            cause = "blind"
            reason = "no die thermometer: only the battery is governed"
        elif self._lost.samples:
            duty = self._duty.value = min(self._duty.value, LOST_DUTY)
            cause = "sensor lost"
            reason = f"no die temperature for {LOST_S:.0f} s: duty {LOST_DUTY} at most"
        else:
            heavy = (reading.pressure_level or 0) >= HEAVY_PRESSURE
            set_c = SET_POINT_C[self.mode]
            duty = self._duty.update(
                set_c - self._filter.ahead_c, elapsed_s, HEAVY_DUTY if heavy else 1.0
            )
            if duty < 1.0:
                cause = "pressure" if heavy else "warm"
                reason = f"duty {duty:.2f}: die {self._filter.ahead_c:.1f} °C, set {set_c:.0f}"
        if not cause and (reading.battery_c or 0.0) >= BATTERY_WARM_C:
            cause = "battery warm"
            reason = f"battery {reading.battery_c:.1f} °C, stop at {BATTERY_STOP_C:.0f}"
        return Decision(
            "run", duty, min((step_s or 0.0) * (1 - duty) / duty, LONGEST_NAP_S), cause, reason
        )


def governor_for(
    mode: Mode, first: Reading, reasons: Mapping[str, str], *, apple: bool
) -> Governor:
    """The governor of a run, from its first reading. On a Mac without a die temperature only
    `observe` is allowed, as nobody would notice it cooking; elsewhere (a virtual machine) it is
    blind and says so.
    """
    blind = first.die_c is None
    if blind and apple and mode != "observe":
        why = (
            f"no die temperature can be read ({reasons.get('die_c', 'no reason')}), so mode "
            f"{mode} cannot protect"
        )
        raise MisError(
            f"{why} this Mac: see `python -m mis_mlx.thermal doctor`, or choose mode observe and "
            f"stay by it"
        )
    return Governor(mode, blind=blind)


def unfit_for_timing(reading: Reading) -> str | None:
    """Why a benchmark started now would measure the heat and not the program; `None` when it would
    not.
    """
    if reading.die_c is not None and reading.die_c > 80:
        return f"die {reading.die_c:.1f} °C, above 80"
    if (reading.pressure_level or 0) >= 1:
        return f"thermal pressure {reading.pressure_level}, not 0"
    if reading.battery_c is not None and reading.battery_c >= BATTERY_WARM_C:
        return f"battery {reading.battery_c:.1f} °C, {BATTERY_WARM_C:.0f} or more"
    return None
