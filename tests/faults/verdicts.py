"""One fault under one job: was anything lost, and does the job end with the undisturbed bytes?"""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import mlx.core as mx

from mis_mlx.maths import stats
from mis_mlx.planner import estimates
from mis_mlx.storage import run_folder
from mis_mlx.storage.files import LEFTOVER, Files
from mis_mlx.types import MisError
from tests.faults.broken import ASKED, KILLED, Killed, breaking, changed, half
from tests.faults.jobs import (
    LOSSES,
    Job,
    Outcome,
    Said,
    acknowledged,
    clean,
    contents,
    jobs,
    lost,
    sha256,
)
from tests.faults.power import cuts, recorded

FATES: dict[str, int | str] = {
    "disk full": errno.ENOSPC,
    "I/O error": errno.EIO,
    "end of the process": KILLED,
    "SIGTERM": ASKED,
}


# how quick the machine is: how long a run may take, and nothing else
rates = cache(estimates.machine_rates)


# what a job that nothing happens to ends with, its file operations, its seconds
Whole = tuple[Outcome, int, float]


class Bench:
    """A job, its undisturbed outcome, and what became of the faults so far. room: an empty folder
    of its own.

    ends: how the job took its faults, and how often. bad: sentences about what was lost or came out
    wrong. A disk on which every byte is as on one from which the job ended well is not gone on from
    again. known: filled and used.
    """

    def __init__(self, job: Job, room: Path, known: dict[str, Whole] | None = None):
        self.job, self.room, self.place = job, room, room / "place"
        self.ends = Counter[str]()
        self.bad = list[str]()
        self._ended = set[str]()
        self._said = list[Said]()
        found = (known or {}).get(job.name) or self._undisturbed()
        if known is not None:
            known[job.name] = found
        self.whole, self.operations, self.seconds = found

    def _undisturbed(self) -> Whole:
        place = clean(self.room / "whole")
        self.job.run(place)
        whole = self.job.outcome(place)
        began = time.monotonic()
        with breaking(0, KILLED) as done:
            self.job.run(clean(place))
        seconds = time.monotonic() - began
        assert self.job.outcome(place) == whole, "undisturbed it does not give the same bytes twice"
        return whole, len(done), seconds

    @property
    def resumed(self) -> int:
        """From how many different states of the disk the job was gone on with, and ended well."""
        return len(self._ended)

    def operation(self, at: int, fate: int | str) -> None:
        """Operation `at` fails."""
        place = clean(self.place)
        said = list[Said]()
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        with acknowledged(said.append), breaking(at, fate):
            try:
                self.job.run(place)
                ended = "went on"
            except (Killed, KeyboardInterrupt):
                ended = "killed"
            except MisError:
                ended = "said so"
            except Exception as error:
                ended = "a traceback"
                self.bad.append(f"operation {at}, {fate}: {type(error).__name__}: {error}")
            finally:
                signal.signal(signal.SIGTERM, before)
        self._judge(f"operation {at}, {fate}", ended, said, place)

    def ends_at_each(self, resumed: int) -> None:
        """The process ends at operation 1, 2, 3 ...: what lies there when half of each is done, all
        of one run. resumed: from so many of these disks, spread over all, the job is gone on with.

        Nothing of ours is done after a kill, so that a copy of the disk at that moment is what it
        leaves.
        """
        place = clean(self.place)
        said = list[Said]()
        kept = dict[str, tuple[str, Path]]()
        inside = [False]

        def wrap(name: str, do: Callable[..., Any]) -> Callable[..., Any]:
            def operation(files: Files, *arguments: Any) -> Any:
                if inside[0]:  # looking at a copy sweeps it
                    return do(files, *arguments)
                inside[0] = True
                number = self.ends["killed"] = self.ends["killed"] + 1
                here = self.room / f"left-{number}"
                shutil.copytree(place, here, symlinks=True)
                if name not in ("scratch", "put"):  # of a file without a name nothing is left
                    half(name, do, files, (here / arguments[0].relative_to(place), *arguments[1:]))
                state = self._state(here, ())
                what = f"the end at operation {number}"
                if self._losses(what, said, here) or state in kept:
                    shutil.rmtree(here)
                else:
                    kept[state] = what, here
                inside[0] = False
                return do(files, *arguments)

            return operation

        with changed(wrap), acknowledged(said.append):
            self.job.run(place)
        left = list(kept.values())
        for number in stats.spread(len(left), resumed):
            self._go_on(*left[number])

    def power(self, count: int, forgets: str = "", resumed: int = 10**9) -> None:
        """`count` cuts of one run. forgets: see `recorded`. resumed: the most to go on from."""
        place = clean(self.place)
        said = list[Said]()
        with recorded(forgets) as trace, acknowledged(said.append, lambda: len(trace)):
            self.job.run(place)
        rng = random.Random(count)
        for number, (moment, drive) in enumerate(
            cuts(trace, count, rng, [each.at for each in said])
        ):
            out = clean(self.room / "cut")
            drive.after_cut(rng, place, out)
            safe = [each for each in said if each.at <= moment]
            resume = self.resumed < resumed
            what = f"cut {number}, after operation {moment}"
            self._judge(what, "power cut", safe, out, but=(LOSSES,), resume=resume)

    def kill(self, wait: float) -> bool:
        """SIGKILL a process with the job after `wait` seconds; whether that came before its end.

        Call it until it says no: the next process goes on with what lies there, and at the end the
        bytes are judged.
        """
        self.place.mkdir(parents=True, exist_ok=True)
        before = self._differs(self.place)
        # A fork server has imported everything and computed nothing; Metal does not survive a fork
        # even so.
        context = multiprocessing.get_context("spawn" if sys.platform == "darwin" else "forkserver")
        context.set_forkserver_preload(["tests.faults.preloaded"])
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(
            target=_serve,
            args=(
                self.job.name,
                *self.job.made,
                self.place,
                estimates.machine_rates(),
                theirs,
            ),
        )
        process.start()
        theirs.close()
        assert ours.poll(60.0)
        assert ours.recv() == "ready"
        self._said += list(_told(ours, time.monotonic() + wait))
        process.kill()
        self._said += list(_told(ours, float("inf")))
        process.join()
        killed = process.exitcode == -signal.SIGKILL
        assert killed or process.exitcode == 0, f"{self.job.name} ended with {process.exitcode}"
        self.ends["killed" if killed else "ended first"] += 1
        self._losses("SIGKILL", self._said, self.place)
        if not killed:
            self._compare("SIGKILL", self.place, swept=bool(before))
            clean(self.place)
            self._said.clear()
        return killed

    def kills(self, count: int, rng: random.Random) -> None:
        """`count` kills that came in time, and the last of these jobs brought to its end."""
        clean(self.place)
        self.kill(0.0)  # starts the server
        began = time.monotonic()
        assert not self.kill(120.0), f"{self.job.name} does not end in a fork"
        longest = time.monotonic() - began
        while self.ends["killed"] < count:
            self.kill(rng.random() * longest * rng.choice([0.3, 1.0, 1.3]))
        assert not self.kill(120.0), f"{self.job.name} does not end after {count} kills"

    def _judge(
        self,
        what: str,
        ended: str,
        said: Sequence[Said],
        here: Path,
        but: Sequence[str] = (),
        resume: bool = True,
    ) -> None:
        self.ends[ended] += 1
        state = self._state(here, but)
        if self._losses(what, said, here) or state in self._ended or not resume:
            return
        if self._go_on(what, here, but):
            self._ended.add(state)

    def _go_on(self, what: str, here: Path, but: Sequence[str] = ()) -> bool:
        """Whether the job, gone on with, ends with the undisturbed bytes."""
        before = self._differs(here, but)
        try:
            self.job.run(here)
        except MisError as error:
            self.bad.append(f"{what}: cannot be gone on with: {error}")
            return False
        return self._compare(what, here, but, swept=bool(before))

    def _losses(self, what: str, said: Sequence[Said], here: Path) -> list[str]:
        found = lost(said, self.place, here)
        self.bad += [f"{what}: acknowledged but lost: {each}" for each in found]
        return found

    def _differs(self, here: Path, but: Sequence[str] = ()) -> list[str]:
        """Names of what is there and should not be, or the other way round, or has other bytes."""
        different = self.job.outcome(here).items() ^ self.whole.items()
        return sorted({name for name, _ in different} - set(but))

    def _compare(self, what: str, here: Path, but: Sequence[str] = (), swept: bool = True) -> bool:
        """swept: there was something left to do, and whoever does it sweeps up first."""
        wrong = self._differs(here, but)
        left = [p.name for p in here.rglob("*") if swept and p.name.startswith(LEFTOVER)]
        self.bad += [f"{what}: other bytes at the end: {wrong}"] if wrong else []
        self.bad += [f"{what}: left behind: {sorted(left)}"] if left else []
        return not (wrong or left)

    def _state(self, here: Path, but: Sequence[str]) -> str:
        """What a resumed job finds: every byte but for times, process numbers and, after a power
        cut, losses.
        """
        files = {
            name: value
            for name, value in contents(here).items()
            if not (
                name.endswith((".jsonl", ".lock"))
                or "/.tmp-" in f"/{name}"
                or "/.trash-" in f"/{name}"
            )
        }
        losses = [] if but else [(r["number"], r["loss"]) for r in run_folder.metrics(here / "run")]
        return sha256(repr((sorted(files.items()), losses, bool(but))).encode())


def _serve(name: str, model: Path, text: Path, place: Path, rates: Any, out: Connection) -> None:
    """The other process's side of `kill`: runs the job and tells what is safe as it is."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1), os.dup2(quiet, 2)
    mx.set_default_device(mx.cpu)
    estimates.machine_rates = lambda *_: rates
    job = jobs(model, text)[name]
    out.send("ready")
    with acknowledged(out.send):
        job.run(place)


def _told(ours: Connection, until: float) -> Iterator[Said]:
    """What the other process says, until it ends or the time has come."""
    with contextlib.suppress(EOFError, ConnectionResetError):
        while ours.poll(None if until == float("inf") else max(0.0, until - time.monotonic())):
            yield ours.recv()
