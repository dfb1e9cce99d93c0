"""The governor: judge a reading and say run, pause or stop, and how long to nap after a step.

Pure: `(reading, now) -> decision`. Sensor loss counts as hot, never as cool. An M1 Air lives at 95
to 105 °C under load, so 95 °C is no reason to stop. Its parts: a filter that smooths the die's
temperature, a PI loop that sets the duty (the share of time that work runs), and timers that watch
how long something has been true.
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
# thermal pressure 2 is ordinary on an Air: slower, never a stop
HEAVY_PRESSURE = 2
HEAVY_DUTY = 0.7
LOST_S = 10.0
LOST_DUTY = 0.6
APART_S = 10.0  # least time between a pause and what follows it
LONGEST_NAP_S = 5.0  # naps of 2 s keep the die within 4 K, of 10 s within 14 K
PAUSE_LOOK_S = 1.0
LAP = f"--governor cool, which runs on battery down to {BATTERY_LOW_PERCENT:.0f} %"


class DieFilter:
    """Median of three samples, then an exponential mean of 2 s, then a look ahead of 3 s.

    The look ahead follows the mean's slope.
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
        """Add one fresh sample."""
        # The median drops a single wrong sample, which a mean would follow.
        self._last.append(die_c)
        middle = median(self._last)
        elapsed = time_s - self._time_s
        self._time_s = time_s
        # The first sample has no slope, and neither has one that is not later than the last.
        if self._value is None or elapsed <= 0:
            self._value = self.ahead_c = middle
            return
        # Samples come at uneven times, so the weight of the new one depends on the time since.
        weight = 1 - math.exp(-elapsed / self.SMOOTH_S)
        change = (middle - self._value) * weight
        self._value += change
        # Only a rise is carried on: a falling die is still as hot as it is.
        self.ahead_c = self._value + self.AHEAD_S * max(change / elapsed, 0.0)


class Duty:
    """PI control of the share of time that work runs.

    It falls at once and rises by 0.05 a second at most.
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
        """The duty after a look.

        room_k: set point minus temperature, in K. ceiling: a limit from elsewhere.
        """
        elapsed_s = min(elapsed_s, self.LONGEST_S)
        wanted = self._integral + self.KP * room_k
        # At a limit the integral stands still, unless the error leads away from it: else it winds
        # up, and the duty stays at the limit long after the temperature has turned.
        too_high = wanted >= 1.0 and room_k > 0
        too_low = wanted <= self.LOW and room_k < 0
        if not too_high and not too_low:
            self._integral = self._bounded(self._integral + self.KI * room_k * elapsed_s)
        wanted = self._integral + self.KP * room_k
        risen = self.value + self.RISE_PER_S * elapsed_s
        self.value = self._bounded(min(wanted, ceiling, risen))
        return self.value

    def _bounded(self, duty: float) -> float:
        """The duty within LOW and 1."""
        return min(1.0, max(self.LOW, duty))


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

    `run`: sleep `sleep_s`, go on; `pause`: write a checkpoint if `checkpoint`, sleep, ask again;
    `stop`: write one and end. `cause`: a word to count by; `reason`: a sentence.
    """

    action: Literal["run", "pause", "stop"]
    duty: float = 1.0
    sleep_s: float = 0.0
    cause: str = ""
    reason: str = ""
    checkpoint: bool = False


class Governor:
    """One controller for one run.

    `decide` after each optimizer step and about once a second in a pause. blind: there has never
    been a die thermometer (a virtual machine), so only the battery is watched.
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
        self._last_s: float | None = None  # of the last decision
        self._sample_s: float | None = None  # of the last reading, with a die temperature or not
        self._valid_s: float | None = None  # of the last die temperature
        self._waiting: Decision | None = None  # the pause we are in
        self._waiting_since_s = 0.0
        self._turned_s = -APART_S  # when a pause last began or ended
        self._end: Decision | None = None  # a stop, which is final

    def decide(self, reading: Reading, now_s: float, step_s: float | None = None) -> Decision:
        """The decision at `now_s` (the clock of `reading.time_s`).

        step_s: seconds the step just done took, None in a pause. In mode `observe` always "run",
        with what another mode would have done.
        """
        elapsed_s = 0.0
        if self._last_s is not None:
            elapsed_s = max(now_s - self._last_s, 0.0)
        self._last_s = now_s
        # Timers and filter are fed on every look, whatever is decided then: a hot die counts from
        # when it became hot.
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
        """Feed the filter and the timers."""
        # The monitor looks once a second; after a short step its last reading is the same again,
        # which must not count as another sample.
        fresh = reading.time_s != self._sample_s
        self._sample_s = reading.time_s
        # An old temperature says nothing of now: it counts as none.
        seen = reading.die_c is not None and now_s - reading.time_s <= LOST_S
        die_c = (reading.die_c or 0.0) if seen else 0.0
        if seen and fresh:
            self._filter.add(reading.time_s, die_c)
            self._valid_s = reading.time_s
        if self._valid_s is None:  # the first look has none: the wait for one begins now
            self._valid_s = now_s
        ahead_c = self._filter.ahead_c
        # A blind governor has no thermometer that could be lost.
        self._lost.update(not self.blind and now_s - self._valid_s >= LOST_S, now_s)
        # Without a temperature neither hot nor cool holds, so that no pause ends on a lost sensor.
        self._hot.update(seen and ahead_c >= PAUSE_C, now_s, fresh)
        self._cool.update(seen and ahead_c <= RESUME_C, now_s, fresh)
        # 105 °C is ordinary under load; in a pause it means that pausing does not help.
        self._boiling.update(self._waiting is not None and die_c >= STOP_C, now_s, fresh)
        self._battery_hot.update((reading.battery_c or 0.0) >= BATTERY_STOP_C, now_s, fresh)

    def _judge(
        self, reading: Reading, now_s: float, elapsed_s: float, step_s: float | None
    ) -> Decision:
        """Stop, else begin, keep or end a pause, else run."""
        stop = self._stop(reading, now_s)
        if stop:
            cause, reason = stop
            return Decision(
                "stop", duty=self._duty.value, cause=cause, reason=reason, checkpoint=True
            )
        # A pause lasts 10 s at least, and so does the run between two: no chatter.
        may_turn = now_s - self._turned_s >= APART_S
        if self._waiting is not None:
            if not may_turn or not self._may_resume(reading, self._waiting):
                return self._waiting
            self._waiting = None
            self._turned_s = now_s
        elif may_turn:
            pause = self._pause(reading)
            if pause is not None:
                self._waiting = pause
                self._waiting_since_s = now_s
                self._turned_s = now_s
                return pause
        return self._run(reading, elapsed_s, step_s)

    def _may_resume(self, reading: Reading, pause: Decision) -> bool:
        """Whether the pause's cause is gone, and power does not fail."""
        if pause.cause == "hot" and not self._cool.lasted(RESUME_HOLD_S, RESUME_SAMPLES):
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
        waits_to_cool = self._waiting is not None and self._waiting.cause == "hot"
        if waits_to_cool and waited_s > LONGEST_PAUSE_S:
            return "hot", f"not below {RESUME_C:.0f} °C after a pause of {waited_s:.0f} s"
        return None

    def _pause(self, reading: Reading) -> Decision | None:
        """The pause to begin now, if any.

        A pause for lack of power lasts until there is power: a checkpoint is on disk, nothing is
        lost.
        """
        power = self._power_trouble(reading, BATTERY_LOW_PERCENT)
        if power is not None:
            cause, reason = power
        elif self._hot.lasted(PAUSE_HOLD_S, samples=2):
            cause = "hot"
            reason = (
                f"die {reading.die_c:.1f} °C, pause at {PAUSE_C:.0f}, continue at {RESUME_C:.0f}"
            )
        else:
            return None
        return Decision(
            "pause",
            duty=self._duty.value,
            sleep_s=PAUSE_LOOK_S,
            cause=cause,
            reason=reason,
            checkpoint=power is not None,
        )

    def _power_trouble(self, reading: Reading, enough_percent: float) -> tuple[str, str] | None:
        """(cause, reason) to wait for power. Mode `cool` runs on battery until that is low."""
        if reading.plugged is False and self.mode != "cool":
            return "unplugged", f"on battery: plug in to continue, or stop and --resume with {LAP}"
        percent = reading.battery_percent
        if percent is not None and percent < enough_percent:
            reason = f"battery {percent:.0f} %, continue at {BATTERY_ENOUGH_PERCENT:.0f}: charge it"
            return "battery low", reason
        return None

    def _run(self, reading: Reading, elapsed_s: float, step_s: float | None) -> Decision:
        """Run on, with a nap that gives the step its duty."""
        duty, cause, reason = self._duty_now(reading, elapsed_s)
        if not cause and (reading.battery_c or 0.0) >= BATTERY_WARM_C:
            cause = "battery warm"
            reason = f"battery {reading.battery_c:.1f} °C, stop at {BATTERY_STOP_C:.0f}"
        # step / (step + nap) = duty. A longer nap would let the die swing.
        nap_s = (step_s or 0.0) * (1 - duty) / duty
        return Decision(
            "run", duty=duty, sleep_s=min(nap_s, LONGEST_NAP_S), cause=cause, reason=reason
        )

    def _duty_now(self, reading: Reading, elapsed_s: float) -> tuple[float, str, str]:
        """(duty, cause, reason); no cause where nothing slows the run down."""
        if self.blind:
            return 1.0, "blind", "no die thermometer: only the battery is governed"
        if self._lost.samples:
            # At most LOST_DUTY until the sensor is back; the duty rises slowly from there.
            self._duty.value = min(self._duty.value, LOST_DUTY)
            reason = f"no die temperature for {LOST_S:.0f} s: duty {LOST_DUTY} at most"
            return self._duty.value, "sensor lost", reason
        heavy = (reading.pressure_level or 0) >= HEAVY_PRESSURE
        set_c = SET_POINT_C[self.mode]
        ahead_c = self._filter.ahead_c
        ceiling = HEAVY_DUTY if heavy else 1.0
        duty = self._duty.update(set_c - ahead_c, elapsed_s, ceiling)
        if duty >= 1.0:
            return duty, "", ""
        cause = "pressure" if heavy else "warm"
        return duty, cause, f"duty {duty:.2f}: die {ahead_c:.1f} °C, set {set_c:.0f}"


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
            f"{why} this Mac: see `python -m mis_mlx.thermal doctor`, or choose mode observe and "
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
