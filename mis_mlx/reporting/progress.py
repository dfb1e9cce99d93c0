"""What moves while a command works: a bar on a terminal, elsewhere a line every 10 s; time left of
phase and run.

One display at a time, of a run and the phases and loops in it. Of the plan it knows only the
seconds.
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
    """A run, a phase or a loop. total: 0 where it is not counted. whole: a loop that is all of its
    phase.
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


def promise(seconds: float) -> str:
    """'about 14.9 min, done at 15:42'; with the weekday where that is not today."""
    now = time.time()
    today = time.localtime(now)
    then = time.localtime(now + seconds)
    at = time.strftime("%H:%M" if then[:3] == today[:3] else "%A %H:%M", then)
    return f"about {duration(seconds)}, done at {at}"


@dataclass
class Display:
    """All levels that there are, outermost first. planned: seconds of a run's phases, in their
    order.
    """

    planned: Mapping[str, float] = field(default_factory=dict)
    clock: Callable[[], float] = time.monotonic
    levels: list[Level] = field(default_factory=list)
    took: dict[str, float] = field(default_factory=dict)
    bar: Any = None
    # what the loop that is all of a phase said at its end; None outside of phases
    last: str | None = None

    @property
    def ratio(self) -> float:
        """What the phases that have ended took, of what was planned for them."""
        known = [name for name in self.took if self.planned.get(name)]
        return (
            sum(self.took[n] for n in known) / sum(self.planned[n] for n in known) if known else 1.0
        )

    def later_s(self, phase: str) -> float:
        """Of all phases after this one."""
        names = list(self.planned)
        return (
            self.ratio * sum(self.planned[n] for n in names[names.index(phase) + 1 :])
            if phase in names
            else 0.0
        )

    def left(self) -> tuple[float | None, float | None]:
        """Seconds of (phase or loop, run) that are left: by the rate; for many loops by the plan,
        if that says more.
        """
        now = self.clock()
        rest = None
        if loop := next((x for x in self.levels if x.total), None):
            rest = (loop.total - loop.done) / rate if (rate := loop.rate(now)) > 0 else None
        phase = next((x for x in self.levels if x.label in self.planned and not x.total), None)
        if phase is None:
            return rest, None
        if rest is None or loop is None or not loop.whole:
            rest = max(self.ratio * self.planned[phase.label] - (now - phase.began_s), rest or 0.0)
        later = self.later_s(phase.label)
        # what takes longer than planned: unknown
        return (rest, rest + later) if rest > 0 else (None, later or None)

    def line(self) -> str:
        """What is done, how far that is, how long yet; then what the loop says, or its rate and
        memory.
        """
        now = self.clock()
        shown = list[Level]()
        for level in list(self.levels)[1 if len(self.levels) > 1 and self.planned else 0 :]:
            if shown and shown[-1].text and now - shown[-1].moved_s < STILL_S:
                break
            if shown and shown[-1].label == level.label and not shown[-1].total:
                shown.pop()  # the phase, of which this is the loop
            shown.append(level)
        own = next((x for x in shown if x.total), shown[-1])
        head = ", ".join(f"{x.label} {x.done}/{x.total}" if x.total else x.label for x in shown)
        text = own.text
        if not text:
            rate = shown[-1].rate(now)
            turns = f"{rate:.{int(rate < 10)}f}/s" if rate else duration(now - shown[-1].began_s)
            text = f"{turns}  {gib(mx.get_active_memory())}"
        if own.total and own.done >= own.total:
            return f"{head}{' ' if own.text else '  '}{text}".rstrip()
        phase, run = self.left()
        left = "" if phase is None else f"  {duration(phase)} left"
        return f"{head}{left}{'' if run is None else f' (run: {duration(run)})'}  {text}"

    def draw(self) -> None:
        """One line, or the bar anew."""
        if self.bar is None:
            return cli.say(self.line())
        own = next((x for x in self.levels if x.total), Level("", 0, 0.0))
        self.bar.update(
            self.bar.task_ids[0], total=own.total or None, completed=own.done, text=self.line()
        )

    @contextmanager
    def level(self, label: str, total: int = 0, whole: bool = False) -> Iterator[Show]:
        """`update(done, text)` of one more level, shown until the block ends."""
        level = Level(label, total, self.clock(), whole)

        def update(done: int, text: str = "") -> None:
            level.first = max(0, done - 1) if level.first is None else level.first
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
        """Draw all that happens in the block: every second at least, with rich's bar, where stderr
        is a terminal and this process the one that speaks.
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

                columns = SpinnerColumn(), BarColumn(20), TextColumn("{task.fields[text]}")
                # What is printed meanwhile goes above the bar; but into a file that stdout is, and
                # not to the terminal.
                bar = Progress(
                    *columns, console=Console(stderr=True), redirect_stdout=sys.stdout.isatty()
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
    """What a command does from here on, and its phases; inside of what is shown already, if
    anything is. A Mac stays awake until it ends.
    """
    if cli.SHOWN:
        with cli.SHOWN[0].level(label):
            yield cli.SHOWN[0]
        return
    cli.SHOWN.append(display := Display(planned or {}))
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
            display.took[name] = took = display.clock() - began
            planned = (
                f" of {duration(display.planned[name])} planned" if name in display.planned else ""
            )
            later = display.later_s(name)
            run_ = f"; the run: {promise(later)}" if later else ""
            cli.say(f"{display.last or name}: {duration(took)}{planned}{run_}")
        finally:
            display.last = None
