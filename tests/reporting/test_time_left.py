"""Time left as people see it: right in the end, and without jumps, on paces of real runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import pytest

from mis_mlx.reporting.progress import Display
from mis_mlx.reporting.time_left import Pace, ShownEstimate

# Seconds of the training steps of two runs on Linux: something else used the processor during five
# of the first one's steps.
DISTURBED = (
    *(8.1, 6.3, 4.2, 4.2, 4.2, 4.2, 4.2, 4.2, 4.1, 4.2, 4.2, 4.2, 4.2, 4.2, 4.5),
    *(4.3, 4.2, 4.4, 4.3, 4.2, 8.7, 8.5, 7.9, 8.6, 5.9, 4.2, 4.2, 4.2, 4.3, 4.4),
)
EVEN = (
    *(9.1, 8.3, 8.3, 8.2, 8.2, 8.3, 8.2, 8.1, 8.1, 8.1, 8.1, 8.1, 8.1, 8.1, 8.4),
    *(8.2, 8.1, 8.0, 8.2, 8.3, 8.2, 8.2, 8.2, 8.3, 8.3, 9.1, 8.5, 8.3, 8.1, 8.3),
)
HALVES = (*EVEN[:15], *(2 * seconds for seconds in EVEN[15:]))
STOPS = (*EVEN[:15], 300.0, *EVEN[15:])
FRAMES = 10  # pictures a second


def shown(steps: Sequence[float]) -> Iterator[tuple[float, float, float]]:
    """(time, seconds left as shown, seconds left in truth), ten times a second."""
    pace = Pace(began_s=0.0, first=0)
    estimate = ShownEstimate()
    ends = [math.fsum(steps[: number + 1]) for number in range(len(steps))]
    done = 0
    for frame in range(int(ends[-1] * FRAMES)):
        now_s = frame / FRAMES
        while done < len(steps) and ends[done] <= now_s:
            done += 1
            pace.note(done, ends[done - 1])
        known_s = pace.left_s(len(steps), now_s)
        if known_s is not None:
            yield now_s, estimate.update(known_s, now_s), ends[-1] - now_s


@pytest.mark.parametrize("steps", [DISTURBED, EVEN, HALVES, STOPS, EVEN[::-1], HALVES[::-1]])
def test_no_jump(steps: Sequence[float]) -> None:
    """Of any two estimates within a second, the later one is the earlier one less the time between
    them, up to a third, or a second and a half.
    """
    points = list(shown(steps))
    for start, (then_s, before, _) in enumerate(points):
        for now_s, after, _ in points[start + 1 : start + FRAMES + 1]:
            expected = max(0.0, before - (now_s - then_s))
            assert abs(after - expected) <= max(before / 3, 1.5)


def test_an_even_pace_is_told_well() -> None:
    """Of a run whose steps take alike, from the third one on: within a tenth of what is left."""
    for now_s, told_s, true_s in shown(EVEN):
        if now_s > 30 and true_s > 30:
            assert abs(told_s - true_s) < 0.1 * true_s


def test_a_pace_that_halves_is_noticed() -> None:
    """Ten steps after it halves, the estimate is within a sixth of the truth; the mean of all steps
    would be a third too low there.
    """
    ten_later_s = math.fsum(HALVES[:25])
    mean_s = ten_later_s / 25
    after = [point for point in shown(HALVES) if point[0] >= ten_later_s]
    _, told_s, true_s = after[0]
    assert 5 * mean_s < 0.8 * true_s
    assert abs(told_s - true_s) < true_s / 6


def test_a_stop_raises_the_estimate() -> None:
    """While nothing ends for five minutes, the estimate rises."""
    points = list(shown(STOPS))
    stop_s = math.fsum(STOPS[:15])
    during = [point for point in points if stop_s + 30 < point[0] < stop_s + 300]
    told = [told_s for _, told_s, _ in during]
    assert max(told) > told[0]
    assert all(after >= before - 1 / FRAMES - 1e-6 for before, after in pairwise(told))


def test_the_pace_by_pencil() -> None:
    """Two turns of 2 and 4 s: 3 s each. A third one that takes 9 s already counts as a turn."""
    pace = Pace(began_s=100.0, first=10)
    assert pace.left_s(20, 101.0) is None
    pace.note(11, 102.0)
    pace.note(12, 106.0)
    assert pace.turn_s(106.0) == 3.0
    assert pace.left_s(20, 106.0) == 24.0
    assert pace.left_s(20, 108.0) == 22.0
    assert pace.turn_s(115.0) == 5.0
    assert pace.left_s(20, 115.0) == 35.0


def test_turns_of_microseconds_take_bounded_room() -> None:
    """A million turns in a hundred seconds: as many marks as thirty seconds hold."""
    pace = Pace(began_s=0.0, first=0)
    for turn in range(1, 10**6 + 1):
        pace.note(turn, turn * 1e-4)
    assert len(pace._marks) < 700
    assert pace.left_s(2 * 10**6, 100.0) == pytest.approx(100.0, rel=1e-3)


def test_phases_hand_the_run_over_without_a_jump() -> None:
    """A first phase that takes four times as long as planned makes the rest longer by half: the
    run's time left moves there in steps of less than a third.
    """
    now_s = 0.0
    display = Display({"prune": 20.0, "distil": 100.0}, lambda: now_s)
    told = []
    with display.level("distill"):
        with display.level("prune"):
            while now_s < 80:
                display.line()
                told.append(display.shown[""].shown_s)
                now_s += 0.5
        display.took["prune"] = 80.0
        with display.level("distil"):
            while now_s < 200:
                display.line()
                told.append(display.shown[""].shown_s)
                now_s += 0.5
    for before, after in pairwise(told):
        assert before is not None and after is not None
        assert abs(after - (before - 0.5)) <= max(before / 3, 1.0)
    assert told[-1] == pytest.approx(150 - 120 + 0.5, rel=0.02)
