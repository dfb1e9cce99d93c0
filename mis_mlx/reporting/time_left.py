"""How long a loop still takes, by its last turns; and an estimate of that which does not jump."""

import math
from collections import deque
from dataclasses import dataclass, field

RECENT_TURNS = 8  # a pace is that of at least so many turns
RECENT_S = 30.0  # and of at least so many seconds
MARK_S = 0.05  # turns that end closer together are noted as one
SETTLE_S = 4.0  # time constant with which a shown estimate follows the known one
MOST_CHANGE = 0.25  # of itself, by which a shown estimate is corrected in a second
LEAST_CHANGE_S = 1.0  # a small estimate is corrected by so much in a second


@dataclass(eq=False)
class Pace:
    """How fast a loop turns. began_s: when its first turn began; first: turns done before."""

    began_s: float
    first: int
    _marks: deque[tuple[float, int]] = field(default_factory=deque)  # (time, turns done)

    def __post_init__(self) -> None:
        self._marks.append((self.began_s, self.first))

    def note(self, done: int, now_s: float) -> None:
        """So many turns are done now."""
        last_s, last_done = self._marks[-1]
        if done <= last_done:
            return
        if len(self._marks) > 1 and now_s - last_s < MARK_S:
            self._marks.pop()
        self._marks.append((now_s, done))
        while len(self._marks) > 2 and self._enough(self._marks[1], now_s, done):
            self._marks.popleft()

    def _enough(self, mark: tuple[float, int], now_s: float, done: int) -> bool:
        """Whether the turns since this mark say how fast the loop is."""
        mark_s, mark_done = mark
        return now_s - mark_s >= RECENT_S and done - mark_done >= RECENT_TURNS

    def turn_s(self, now_s: float) -> float | None:
        """Seconds of a turn, of late; None before the first one has ended."""
        first_s, first_done = self._marks[0]
        last_s, last_done = self._marks[-1]
        turns = last_done - first_done
        if not turns:
            return None
        seconds = (last_s - first_s) / turns
        if now_s - last_s > seconds:  # this turn is slower than those before it
            return (now_s - first_s) / (turns + 1)
        return seconds

    def left_s(self, total: int, now_s: float) -> float | None:
        """Seconds until `total` turns are done; None before the first one has ended."""
        turn_s = self.turn_s(now_s)
        if turn_s is None:
            return None
        last_s, done = self._marks[-1]
        into_turn_s = min(now_s - last_s, turn_s)
        return max(0.0, (total - done) * turn_s - into_turn_s)


@dataclass(eq=False)
class ShownEstimate:
    """Seconds left as people see them: they count down, and follow what is known slowly.

    In a second the estimate is corrected by a quarter or a second at most.
    """

    shown_s: float | None = None
    known_s: float = 0.0
    _seen_s: float = 0.0

    def update(self, known_s: float, now_s: float) -> float:
        """The seconds to show, when `known_s` is the best estimate."""
        self.known_s = known_s
        if self.shown_s is None:
            self.shown_s = known_s
            self._seen_s = now_s
            return known_s
        passed_s = max(0.0, now_s - self._seen_s)
        self._seen_s = now_s
        counted_s = max(0.0, self.shown_s - passed_s)
        correction = (known_s - counted_s) * (1 - math.exp(-passed_s / SETTLE_S))
        most = passed_s * max(MOST_CHANGE * self.shown_s, LEAST_CHANGE_S)
        self.shown_s = counted_s + min(max(correction, -most), most)
        return self.shown_s
