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
from mis_mlx.types import duration, gib

EVERY_S = 10.0  # between two lines where there is no terminal
STILL_S = 2.0  # a loop is named once the one around it has not moved for so long
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
    first: int | None = None  # done before it began: the steps of a run that goes on
    moved_s: float = 0.0
    text: str = ""

    def rate(self, now_s: float) -> float:
        """Turns a second so far."""
        return (self.done - (self.first or 0)) / max(now_s - self.began_s, 1e-9)

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
    bar: Any = None
    # what the loop that is all of a phase said at its end; None outside of phases
    last: str | None = None

    @property
    def ratio(self) -> float:
        """Seconds that the ended phases took, as a share of what was planned for them."""
        known = [name for name in self.took if self.planned.get(name)]
        if not known:
            return 1.0
        return sum(self.took[name] for name in known) / sum(self.planned[name] for name in known)

    def later_s(self, phase: str) -> float:
        """Seconds of all phases after this one."""
        names = list(self.planned)
        if phase not in names:
            return 0.0
        later = names[names.index(phase) + 1 :]
        return self.ratio * sum(self.planned[name] for name in later)

    def left(self) -> tuple[float | None, float | None]:
        """Seconds that are left of (phase or loop, run); None: unknown.

        By the rate of the loop. A phase of several loops: by the plan, if that says more.
        """
        now = self.clock()
        rest = None
        loop = next((level for level in self.levels if level.total), None)
        if loop:
            rate = loop.rate(now)
            if rate > 0:
                rest = (loop.total - loop.done) / rate
        planned = (level for level in self.levels if level.label in self.planned)
        phase = next((level for level in planned if not level.total), None)
        if phase is None:
            return rest, None
        if rest is None or loop is None or not loop.whole:
            by_plan = self.ratio * self.planned[phase.label] - (now - phase.began_s)
            rest = max(by_plan, rest or 0.0)
        later = self.later_s(phase.label)
        if rest > 0:
            return rest, rest + later
        return None, later or None  # it takes longer than planned

    def _shown(self, now_s: float) -> list[Level]:
        """The levels that a line names: without a planned run, and without loops that move fast."""
        levels = list(self.levels)
        if len(levels) > 1 and self.planned:
            del levels[0]
        shown: list[Level] = []
        for level in levels:
            if shown and shown[-1].text and now_s - shown[-1].moved_s < STILL_S:
                break
            if shown and shown[-1].label == level.label and not shown[-1].total:
                shown.pop()  # the phase, of which this is the loop
            shown.append(level)
        return shown

    def line(self) -> str:
        """What is done and how long yet; then what the loop says, or its rate and memory."""
        now = self.clock()
        shown = self._shown(now)
        own = next((level for level in shown if level.total), shown[-1])
        head = ", ".join(level.count() for level in shown)
        text = own.text
        if not text:
            rate = shown[-1].rate(now)
            turns = duration(now - shown[-1].began_s)
            if rate:
                digits = int(rate < 10)
                turns = f"{rate:.{digits}f}/s"
            text = f"{turns}  {gib(mx.get_active_memory())}"
        if own.total and own.done >= own.total:
            blank = " " if own.text else "  "
            return f"{head}{blank}{text}".rstrip()
        phase, run = self.left()
        if phase is not None:
            head += f"  {duration(phase)} left"
        if run is not None:
            head += f" (run: {duration(run)})"
        return f"{head}  {text}"

    def draw(self) -> None:
        """One line, or the bar anew."""
        if self.bar is None:
            return cli.say(self.line())
        own = next((level for level in self.levels if level.total), Level("", 0, 0.0))
        task = self.bar.task_ids[0]
        self.bar.update(task, total=own.total or None, completed=own.done, text=self.line())

    @contextmanager
    def level(self, label: str, total: int = 0, whole: bool = False) -> Iterator[Show]:
        """`update(done, text)` of one more level, shown until the block ends."""
        level = Level(label, total, self.clock(), whole)

        def update(done: int, text: str = "") -> None:
            if level.first is None:
                level.first = max(0, done - 1)
            level.done = done
            level.text = text
            level.moved_s = self.clock()
            if self.bar is not None:
                self.draw()

        self.levels.append(level)
        try:
            yield update
            if whole and level.done >= total and self.last is not None:
                self.last = self.line()
            elif whole and level.done >= total and self.bar is None:
                self.draw()
        finally:
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
    """A phase of the run; at its end, what it took and when the run will be done."""
    with run(name) as display:
        began = display.clock()
        display.last = ""
        try:
            yield
            took = display.clock() - began
            display.took[name] = took
            line = f"{display.last or name}: {duration(took)}"
            if name in display.planned:
                line += f" of {duration(display.planned[name])} planned"
            later = display.later_s(name)
            if later:
                line += f"; the run: {promise(later)}"
            cli.say(line)
        finally:
            display.last = None
