"""Where a distillation's time goes: seconds by phase, and in a phase by kind of work.

    scripts/mis benchmarks/phases.py [flags of distill]    # 10 minutes on 2 cores; nothing but the
    run beside

A thread looks at the main thread fifty times a second and notes the innermost function of this
package that it is in: MLX is lazy, so what waits for an evaluation has its time. A phase's kinds
are the functions with 2 % of it or more. The run goes to a temporary folder. It is a run like any
other: what looks at it costs less than a hundredth.

Writes benchmarks/results/<machine>/phases.json; with flags, nothing but what it prints.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import laboratory

from mis_mlx import cli, distill
from mis_mlx.reporting import progress

EVERY_S = 0.02
LEAST = 0.02  # of a phase
ROOT = str(Path(distill.__file__).parent)
GENERAL = ("lanes", "cli", "progress")  # what waits for others' work


class Watch:
    """Samples of the thread that made it: {phase: {function: how often}}."""

    def __init__(self) -> None:
        self.phase = "start"
        self.seen = dict[str, Counter[str]]()
        self.seconds = dict[str, float]()
        self.cpu_seconds = dict[str, float]()
        self._thread = threading.get_ident()
        self._over = threading.Event()
        self._began = time.perf_counter()
        self._used = time.process_time()
        self._looking = threading.Thread(target=self._look, daemon=True)
        self._looking.start()

    def _look(self) -> None:
        while not self._over.wait(EVERY_S):
            where = innermost(sys._current_frames()[self._thread])
            self.seen.setdefault(self.phase, Counter())[where] += 1

    def turn(self, phase: str) -> None:
        """From now on it is this phase."""
        now = time.perf_counter()
        used = time.process_time()
        self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + now - self._began
        self.cpu_seconds[self.phase] = self.cpu_seconds.get(self.phase, 0.0) + used - self._used
        self.phase = phase
        self._began = now
        self._used = used

    def close(self) -> dict[str, dict[str, Any]]:
        """{phase: its seconds, those of all cores together, and {function: seconds}, the longest
        first}.
        """
        self.turn("end")
        self._over.set()
        self._looking.join()
        found = {}
        for phase, seconds in self.seconds.items():
            counts = self.seen.get(phase, Counter())
            each = seconds / max(1, counts.total())
            kinds = {
                name: round(n * each, 1)
                for name, n in counts.most_common()
                if n >= LEAST * counts.total()
            }
            cpu = round(self.cpu_seconds[phase], 1)
            found[phase] = {"seconds": round(seconds, 1), "cpu_seconds": cpu, "work": kinds}
        return found


def innermost(frame: FrameType | None) -> str:
    """`module.function` of this package that the frame is in, or was called by."""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if str(path).startswith(ROOT) and path.stem not in GENERAL:
            return f"{path.stem}.{frame.f_code.co_qualname.removesuffix('.<locals>')}"
        frame = frame.f_back
    return "elsewhere"


def main(flags: list[str]) -> None:
    """One run under the watch."""
    watch = Watch()
    plain = progress.phase

    @contextmanager
    def phase(name: str) -> Iterator[Any]:
        watch.turn(name)
        with plain(name) as shown:
            yield shown
        watch.turn("between phases")

    progress.phase = phase  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as temp:
        distill.run(cli.parse(distill.Settings, flags).with_values(out=f"{temp}/run"))
    found = watch.close()
    for name, kinds in found.items():
        cli.say(f"{name}: {kinds['seconds']:.1f} s, {kinds['cpu_seconds']:.1f} of all cores")
        for where, seconds in kinds["work"].items():
            cli.say(f"    {seconds:6.1f} s  {where}")
    if not flags:
        laboratory.write("phases", "scripts/mis benchmarks/phases.py", {"phases": found})


if __name__ == "__main__":
    main(sys.argv[1:])
