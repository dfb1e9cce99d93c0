"""What moves while a command works: a bar on a terminal, elsewhere a line every 10 s.

It shows what is done and the time left of phase and run. There is one display at a time, of a run
and the phases and loops in it. Of the plan it knows only the seconds.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from mis_mlx import cli
from mis_mlx.hardware import macos
from mis_mlx.reporting.time_left import Pace, ShownEstimate
from mis_mlx.types import duration, gib

EVERY_S = 10.0  # between two lines where there is no terminal
Show = Callable[..., None]  # (done, text="")


@dataclass(eq=False)
class Level:
    """A run, a phase or a loop.

    total: 0 where it is not counted. whole: a loop that is all of its phase.
    """

    label: str
    total: int
    began_s: float
    whole: bool = False
    done: int = 0
    pace: Pace | None = None  # from the first turn on
    text: str = ""

    def advance(self, done: int, text: str, now_s: float) -> None:
        """So many turns are done now. A run that goes on begins with some of them."""
        if self.pace is None:
            self.pace = Pace(self.began_s, first=max(0, done - 1))
        self.pace.note(done, now_s)
        self.done = done
        self.text = text

    def left_s(self, now_s: float) -> float | None:
        """Seconds to its end by its pace; None: unknown."""
        return self.pace.left_s(self.total, now_s) if self.pace else None

    def speed(self, now_s: float) -> str:
        """'0.3/s'; before the first turn has ended, and where none is counted, the time so far."""
        turn_s = self.pace.turn_s(now_s) if self.pace else None
        if not turn_s:
            return f"{duration(now_s - self.began_s)} so far"
        if turn_s > 0.1:
            return f"{1 / turn_s:.1f}/s"
        return f"{1 / turn_s:.0f}/s"

    def count(self) -> str:
        """'block 3/30'; the label alone where it is not counted."""
        if not self.total:
            return self.label
        return f"{self.label} {self.done}/{self.total}"


def promise(seconds: float) -> str:
    """'about 14.9 min, done at 15:42'; with the weekday where that is not today."""
    now = time.time()
    today = time.localtime(now)
    then = time.localtime(now + seconds)
    form = "%A %H:%M"
    if then[:3] == today[:3]:
        form = "%H:%M"
    return f"about {duration(seconds)}, done at {time.strftime(form, then)}"


@dataclass
class Display:
    """All levels, outermost first. planned: seconds of a run's phases, in their order."""

    planned: Mapping[str, float] = field(default_factory=dict)
    clock: Callable[[], float] = time.monotonic
    levels: list[Level] = field(default_factory=list)
    took: dict[str, float] = field(default_factory=dict)
    # seconds left, as shown, by phase or loop; "": of the run
    shown: dict[str, ShownEstimate] = field(default_factory=dict)
    bar: Any = None
    # what the loop that is all of a phase said at its end; None outside of phases
    last: str | None = None

    def takes(self, outcome: str) -> bool:
        """Keep what a phase led to for the line of its end; False outside of phases."""
        if self.last is None:
            return False
        self.last = outcome
        return True

    @property
    def ratio(self) -> float:
        """Seconds of the whole run as a share of its plan, where phases to come take as planned.

        So a short phase that took four times as long says little of a long one.
        """
        seconds = 0.0
        for name, planned_s in self.planned.items():
            seconds += self.took.get(name, planned_s)
        return seconds / (sum(self.planned.values()) or 1.0)

    def later_s(self, phase: str) -> float:
        """Seconds of all phases after this one."""
        names = list(self.planned)
        if phase not in names:
            return 0.0
        later = names[names.index(phase) + 1 :]
        return self.ratio * sum(self.planned[name] for name in later)

    def left(self) -> tuple[float | None, float | None]:
        """Seconds that are left of (phase or loop, run); None: unknown.

        By the pace of the loop. A phase of several loops: by the plan, for each of them has a pace
        of its own.
        """
        now = self.clock()
        rest = None
        loop = self._outermost_loop()
        if loop:
            rest = loop.left_s(now)
        phase = self._phase()
        if phase is None:
            # Before the first phase, or between two.
            ahead = sum(seconds for name, seconds in self.planned.items() if name not in self.took)
            return (None, self.ratio * ahead or None) if self.planned else (rest, None)
        if rest is None or loop is None or loop.label != phase.label:
            rest = self.ratio * self.planned[phase.label] - (now - phase.began_s)
        later = self.later_s(phase.label)
        if rest > 0:
            return rest, rest + later
        return None, later or None  # it takes longer than planned

    def _phase(self) -> Level | None:
        """The planned phase that is under way, if there is one.

        The innermost: a run may have the name of one of its phases.
        """
        planned = (level for level in reversed(self.levels) if level.label in self.planned)
        return next((level for level in planned if not level.total), None)

    def _outermost_loop(self) -> Level | None:
        return next((level for level in self.levels if level.total), None)

    def _named(self) -> tuple[Level, str]:
        """(the level whose speed a line tells, the line's first words): of one level or two.

        A phase of several loops counts none of them; only where nothing is planned, so that no time
        is known, the outermost one is counted.
        """
        phase = self._phase()
        levels = list(self.levels)
        outer = phase or levels[0]
        loop = next((level for level in levels[1:] if level.total), None)
        if loop is None or (self.planned and phase is None):
            return outer, outer.label
        if loop.label == outer.label:  # all of the phase
            return loop, loop.count()
        if not self.planned:
            return loop, f"{outer.label}, {loop.count()}"
        if loop.whole:
            return outer, f"{outer.label}: {loop.label}"
        return outer, outer.label

    def _time_left(self, label: str) -> str:
        """'about 4.1 min left': of the run, or of a loop outside of runs; '': it is not known."""
        phase, run = self.left()
        late = phase is None and label in self.planned
        of_run = run is not None
        left = run if of_run else phase
        if left is None:
            return "longer than planned" if late else ""
        shown = self.shown.setdefault("" if of_run else label, ShownEstimate())
        words = f"about {duration(shown.update(left, self.clock()))}"
        return f"longer than planned, then {words}" if late else f"{words} left"

    def _percent(self) -> str:
        """' 62 %' of a phase that counts no turns; '' where its end is not known."""
        total, done = self._share_done()
        own, _ = self._named()
        if own.total or not total or own.label not in self.planned:
            return ""
        return f" {min(done / total, 0.99):.0%}".replace("%", " %")

    def line(self) -> str:
        """What is done and how long yet; then what the loop says, or its rate and memory."""
        own, head = self._named()
        head += self._percent()
        text = own.text
        if not text:
            text = f"{own.speed(self.clock())}  {gib(mx.get_active_memory())}"
        if own.total and own.done >= own.total:
            blank = " " if own.text else "  "
            return f"{head}{blank}{text}".rstrip()
        left = self._time_left(own.label)
        return "  ".join(part for part in (head, left, text) if part)

    def _share_done(self) -> tuple[float | None, float]:
        """(total, done) for the bar: turns of the loop that is named, else seconds of the phase."""
        own, _ = self._named()
        if own.total:
            return own.total, own.done
        left_s, _ = self.left()
        if left_s is None:
            return None, 0.0
        passed_s = self.clock() - own.began_s
        return passed_s + left_s, passed_s

    def draw(self) -> None:
        """One line, or the bar anew."""
        if self.bar is None:
            return cli.say(self.line())
        total, completed = self._share_done()
        self.bar.update(
            self.bar.task_ids[0],
            total=total,
            completed=completed,
            text=self.line(),
        )

    @contextmanager
    def level(self, label: str, total: int = 0, whole: bool = False) -> Iterator[Show]:
        """`update(done, text)` of one more level, shown until the block ends."""
        level = Level(label, total, self.clock(), whole)

        def update(done: int, text: str = "") -> None:
            level.advance(done, text, self.clock())
            if self.bar is not None:
                self.draw()

        self.levels.append(level)
        try:
            yield update
            own, _ = self._named()
            if own is level and whole and level.done >= total:
                if self.last is not None:
                    self.last = self.last or self.line()
                elif self.bar is None:
                    self.draw()
        finally:
            self.shown.pop(label, None)
            if level in self.levels:  # loops that run side by side end in any order
                del self.levels[self.levels.index(level) :]

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Draw all that happens in the block: every second at least on a terminal.

        rich's bar is on stderr, if this is the process that speaks; else a line every EVERY_S.
        """
        over = threading.Event()

        def beat() -> None:
            while not over.wait(EVERY_S if self.bar is None else 1.0):
                # a closed pipe is the main thread's to notice
                with suppress(OSError, ValueError, IndexError):
                    self.draw()

        with ExitStack() as stack:
            if not cli.rank() and sys.stderr.isatty():
                from rich.console import Console
                from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

                # What is printed meanwhile goes above the bar; but into a file that stdout is, and
                # not to the terminal.
                bar = Progress(
                    SpinnerColumn(),
                    BarColumn(20),
                    TextColumn("{task.fields[text]}"),
                    console=Console(stderr=True),
                    redirect_stdout=sys.stdout.isatty(),
                )
                self.bar = stack.enter_context(bar)
                self.bar.add_task("", total=None, text="")
            thread = threading.Thread(target=beat, daemon=True)
            thread.start()
            stack.callback(thread.join)
            stack.callback(over.set)  # the last one is called first
            yield


@contextmanager
def run(label: str, planned: Mapping[str, float] | None = None) -> Iterator[Display]:
    """What a command does from here on, and its phases. A Mac stays awake until it ends.

    Where something is shown already, it becomes a level of that.
    """
    if cli.SHOWN:
        with cli.SHOWN[0].level(label):
            yield cli.SHOWN[0]
        return
    display = Display(planned or {})
    cli.SHOWN.append(display)
    try:
        with macos.awake(), display.level(label), display.drawing():
            yield display
    finally:
        cli.SHOWN.pop()


@contextmanager
def bar(label: str, total: int) -> Iterator[Show]:
    """`update(done, text)` of a loop of `total` turns."""
    with run(label) as display, display.level(label, total, whole=True) as update:
        yield update


@contextmanager
def phase(name: str) -> Iterator[None]:
    """A phase of the run; at its end a line with what it led to and took."""
    with run(name) as display:
        began = display.clock()
        display.last = ""
        try:
            yield
            took = display.clock() - began
            display.took[name] = took
            cli.say(f"{display.last or name}: {duration(took)}")
            if name in display.planned:
                cli.detail(f"planned for {name}: {duration(display.planned[name])}")
        finally:
            display.last = None
