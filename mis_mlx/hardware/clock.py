"""Time to read and to wait for, and how long the machine slept meanwhile."""

import sys
import time


class Clock:
    """This machine's clock.

    Sleep (a closed lid) is read from the system's counters, not from a wall clock, which people and
    NTP set.
    """

    def monotonic(self) -> float:
        """Seconds that never run backwards; they stand still while the machine sleeps."""
        return time.monotonic()

    def wall(self) -> float:
        """Seconds since 1970; may jump."""
        return time.time()

    def sleep(self, seconds: float) -> None:
        """Wait; a negative time counts as 0."""
        time.sleep(max(seconds, 0.0))

    def uptime(self) -> float:
        """Seconds since boot, sleep included."""
        if sys.platform == "darwin":  # its raw clock counts sleep, and NTP does not slew it
            return time.clock_gettime(time.CLOCK_MONOTONIC_RAW)
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def asleep(self) -> float:
        """Seconds the machine has been asleep since boot, as `slept` takes them."""
        if sys.platform == "darwin":
            return self.uptime() - time.clock_gettime(time.CLOCK_UPTIME_RAW)
        return self.uptime() - time.clock_gettime(time.CLOCK_MONOTONIC)

    def slept(self, since: float) -> float:
        """Seconds asleep since `since = clock.asleep()`.

        0 below 1 s: the two counters are read one after the other.
        """
        gap = self.asleep() - since
        return gap if gap >= 1.0 else 0.0
