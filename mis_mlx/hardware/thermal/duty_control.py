"""The parts of the governor's controller: a filter, a PI loop on the duty, and a watch."""

import math
from collections import deque
from statistics import median


class DieFilter:
    """Median of three samples, then an exponential mean of 2 s, with a look ahead of 3 s at its slope."""

    SMOOTH_S = 2.0
    AHEAD_S = 3.0

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=3)
        self._time_s = 0.0
        self._value: float | None = None
        self.ahead_c = 0.0  # where the die will be in 3 s if it goes on rising; never below where it is

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
    """PI control of the share of time that work runs: falls at once, rises by 0.05 a second at most."""

    KP, KI = 0.02, 0.0015  # per K, per K·s
    LOW, RISE_PER_S = 0.2, 0.05
    LONGEST_S = 5.0  # a longer time between looks is integrated as this

    def __init__(self) -> None:
        self.value = 1.0
        self._integral = 1.0

    def update(self, room_k: float, elapsed_s: float, ceiling: float = 1.0) -> float:
        """The duty after a look: `room_k`: set-point minus temperature, `ceiling`: a limit from elsewhere."""
        elapsed_s = min(elapsed_s, self.LONGEST_S)
        wanted = self._integral + self.KP * room_k
        winds_up = (wanted >= 1.0 and room_k > 0) or (wanted <= self.LOW and room_k < 0)
        if not winds_up:
            self._integral = self._clip(self._integral + self.KI * room_k * elapsed_s)
        wanted = min(self._integral + self.KP * room_k, ceiling, self.value + self.RISE_PER_S * elapsed_s)
        self.value = self._clip(wanted)
        return self.value

    def hold(self, ceiling: float) -> float:
        """The duty when there is no temperature to go by: no higher than it was, nor than `ceiling`."""
        self.value = self._clip(min(self.value, ceiling))
        return self.value

    def _clip(self, duty: float) -> float:
        return min(1.0, max(self.LOW, duty))


class Held:
    """For how long, and over how many fresh samples, something has been true without a break."""

    def __init__(self) -> None:
        self._since_s: float | None = None
        self.samples = 0
        self.seconds = 0.0

    def update(self, true: bool, now_s: float, fresh: bool = True) -> None:
        """Feed one look; a look that brought no fresh sample counts as time, not as a sample."""
        if not true:
            self._since_s, self.samples, self.seconds = None, 0, 0.0
            return
        if self._since_s is None:
            self._since_s = now_s
        self.seconds = now_s - self._since_s
        self.samples += fresh

    def lasted(self, seconds: float, samples: int = 1) -> bool:
        """Whether it has been true that long and that often."""
        return self.samples >= samples and self.seconds >= seconds
