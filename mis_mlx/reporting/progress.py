"""What moves while a command works: a bar on a terminal, elsewhere a line every 10 s.

It shows what is done and the time left. There is one display at a time, of a run and the phases and
loops in it; rich counts and draws. Of the plan it knows only the seconds.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import mlx.core as mx
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, Task, TextColumn

from mis_mlx import cli
from mis_mlx.hardware import macos
from mis_mlx.types import duration, gib

EVERY_S = 10.0  # between two lines where there is no terminal
PACE_S = 300.0  # a loop's pace is that of so many seconds
Show = Callable[..., None]  # (done, text="")


@dataclass(eq=False)
class Level:
    """A run, a phase or a loop. whole: a loop that is all of its phase; task: rich's count."""

    label: str
    task: Task
    whole: bool = False
    text: str = ""

    def words(self) -> str:
        """What the loop says of its last turn; else its rate, or the time so far, and memory."""
        if self.text:
            return self.text
        pace = f"{duration(self.task.elapsed or 0.0)} so far"
        if self.task.speed:
            pace = (
                f"{self.task.speed:.1f}/s" if self.task.speed < 10 else f"{self.task.speed:.0f}/s"
            )
        return f"{pace}  {gib(mx.get_active_memory())}"


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
    most: dict[str, float] = field(default_factory=dict)  # share done, as shown, by phase
    # what the loop that is all of a phase said at its end; None outside of phases
    last: str | None = None

    def __post_init__(self) -> None:
        # What is printed meanwhile goes above the bar; but into a file that stdout is, and not to
        # the terminal.
        self.counts = Progress(get_time=self.clock, speed_estimate_period=PACE_S, disable=True)
        self.bar = Progress(
            SpinnerColumn(),
            BarColumn(20),
            TextColumn("{task.description}", markup=False),
            console=Console(stderr=True),
            redirect_stdout=sys.stdout.isatty(),
            auto_refresh=False,
            disable=bool(cli.rank()) or not sys.stderr.isatty(),
        )

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
        seconds = sum(self.took.get(name, planned_s) for name, planned_s in self.planned.items())
        return seconds / (sum(self.planned.values()) or 1.0)

    def _phase(self) -> Level | None:
        """The planned phase that is under way: the innermost, for a run may have its name."""
        planned = [level for level in self.levels if level.label in self.planned]
        return next((level for level in reversed(planned) if level.task.total is None), None)

    def _counted(self) -> Level | None:
        """The loop whose turns are counted: all of its phase, or the outermost where nothing is
        planned. A phase of several loops counts none: each has a pace of its own.
        """
        phase = self._phase()
        loop = next((level for level in self.levels if level.task.total is not None), None)
        if loop is None or (self.planned and (phase is None or phase.label != loop.label)):
            return None
        return loop

    def left_s(self) -> float | None:
        """Seconds to the run's end, or to a loop's where nothing is planned; None: unknown."""
        loop = self._counted()
        rest = loop.task.time_remaining if loop else None
        if not self.planned:
            return rest
        phase = self._phase()
        if phase is None:  # before the first phase, or between two
            ahead = sum(seconds for name, seconds in self.planned.items() if name not in self.took)
            return self.ratio * ahead or None
        names = list(self.planned)
        later = sum(self.planned[name] for name in names[names.index(phase.label) + 1 :])
        if rest is None:
            rest = self.ratio * self.planned[phase.label] - (phase.task.elapsed or 0.0)
        return self.ratio * later + rest if rest > 0 else None

    def _head(self) -> str:
        """The phase, how much of it is done, and the loop in it that has a name of its own."""
        phase, loop = self._phase(), self._counted()
        outer = phase or self.levels[0]
        if loop:
            count = f"{loop.label} {loop.task.completed:.0f}/{loop.task.total:.0f}"
            return count if outer.label == loop.label else f"{outer.label}, {count}"
        head = outer.label
        inner = next((level for level in self.levels if level.whole), None)
        if inner and phase:
            head += f": {inner.label}"
        return head if phase is None else f"{head} {100 * self._share():.0f} %"

    def _share(self) -> float:
        """Share of the phase that is done; never less than was shown before."""
        phase, loop = self._phase(), self._counted()
        share = 0.0
        if loop:
            share = loop.task.percentage / 100
        elif phase:
            share = (phase.task.elapsed or 0.0) / (self.ratio * self.planned[phase.label] or 1.0)
            self.most[phase.label] = max(min(share, 0.99), self.most.get(phase.label, 0.0))
            share = self.most[phase.label]
        return share

    def line(self) -> str:
        """What is done and how long yet; then what the loop says, or its rate and memory."""
        level = self._counted() or self._phase() or self.levels[0]
        left_s = self.left_s()
        left = f"about {duration(left_s)} left" if left_s is not None else ""
        if left_s is None and self._phase():
            left = "longer than planned"
        if level.task.total and level.task.completed >= level.task.total:
            left = ""
        return "  ".join(part for part in (self._head(), left, level.words()) if part)

    def draw(self) -> None:
        """One line, or the bar anew."""
        if self.bar.disable:
            return cli.say(self.line())
        total = None if self._counted() is None and self._phase() is None else 1.0
        row = self.bar.task_ids[0]
        self.bar.update(row, total=total, completed=self._share(), description=self.line())
        self.bar.refresh()

    @contextmanager
    def level(self, label: str, total: int | None = None, whole: bool = False) -> Iterator[Show]:
        """`update(done, text)` of one more level, shown until the block ends."""
        number = self.counts.add_task(label, total=total)
        level = Level(label, self.counts.tasks[-1], whole)

        def update(done: int, text: str = "") -> None:
            if not level.task.completed and done > 1:  # it goes on with some turns done before
                level.task.completed = done - 1
            self.counts.update(number, completed=done)
            level.text = text
            if not self.bar.disable:
                self.draw()

        self.levels.append(level)
        try:
            yield update
            if whole and self._counted() is level and level.task.finished:
                if self.last is not None:
                    self.last = self.last or self.line()
                elif self.bar.disable:
                    self.draw()
        finally:
            self.counts.remove_task(number)
            if level in self.levels:  # loops that run side by side end in any order
                del self.levels[self.levels.index(level) :]

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Draw all that happens in the block: every second on a terminal, else every EVERY_S."""
        over = threading.Event()

        def beat() -> None:
            while not over.wait(EVERY_S if self.bar.disable else 1.0):
                # a closed pipe is the main thread's to notice
                with suppress(OSError, ValueError, IndexError):
                    self.draw()

        thread = threading.Thread(target=beat, daemon=True)
        with self.bar:
            self.bar.add_task("", total=None)
            thread.start()
            try:
                yield
            finally:
                over.set()
                thread.join()


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
