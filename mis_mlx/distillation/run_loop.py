"""One run from its flags to its end: model and folder, steps logged, rested after, stopped, and
their checkpoints.

Does not know what is trained. The protocol on disk is storage/checkpoint's.
"""

import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from mis_mlx import cli
from mis_mlx.data import preparation, token_windows
from mis_mlx.hardware import memory
from mis_mlx.hardware.thermal.run_monitor import (
    PauseCounter,
    ThermalFlags,
    ThermalMonitor,
    battery,
    check_power,
)
from mis_mlx.maths.optimizer import Diverged
from mis_mlx.models import distributed, load, policy, resolve
from mis_mlx.planner import estimates
from mis_mlx.reporting import progress, text
from mis_mlx.storage import checkpoint as protocol
from mis_mlx.storage import run_folder
from mis_mlx.storage.files import Files, need_place, reported
from mis_mlx.types import Budget, Checkpoint, MisError, Step

S = TypeVar("S", bound=Any)  # a command's Settings


def resumed(settings: S, free: frozenset[str], under: Path = Path("runs")) -> tuple[S, Path | None]:
    """The settings to run with; and where --resume is given, the folder of the run in `--out`, or
    of the newest unfinished one right under `under`. MisError where settings that are not `free`
    differ from its.
    """
    if not settings.resume:
        return settings, None

    def stored() -> tuple[dict[str, Any], str]:
        folder = run_folder.find(settings.out, under)
        defaults = asdict(type(settings)())
        return run_folder.merged(
            asdict(settings), defaults, run_folder.stored_settings(folder), free
        ), str(folder)

    values, folder = distributed.broadcast_json(stored)
    return type(settings)(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    ), Path(folder)


def opened(
    s: Any, model: str | None, what: str = "model", place: str | Path = "runs", new: str = ""
) -> Checkpoint:
    """The model that a command begins with. MisError, before it is looked for, where a flag is out
    of its range or what it names cannot be written: --out, by default under `place`, or something
    `new` that this flag names; and where a run would wait for the plug after its first step.
    """
    cli.check_ranges(s)
    if isinstance(s, cli.Resumable) and isinstance(s, ThermalFlags) and not s.dry_run:
        check_power(s)
    policy.use(s.compute_dtype)
    if new:
        need_place(new, place, "new")
    elif distributed.is_main():
        need_place("--out", s.out or place)
    source = resolve.resolve_model(model)
    cli.say(f"{what}: {source.source}")
    found = load.open_checkpoint(source.path)
    estimates.settle_precision(memory.budget(s.budget_bytes), found)
    return found


def prepared(
    s: Any, teacher: Checkpoint, source: preparation.Source | None = None
) -> tuple[preparation.Data, dict[str, str]]:
    """The text of --data, or of `source`, with what was done to it said aloud; and what a resumed
    run must have begun with.
    """
    data = preparation.prepare(source or s.data, load.tokenizer(teacher.path), s.max_seq_length)
    cli.say(*data.notes)
    return data, run_folder.origin(teacher, token_windows.fingerprint(data.train))


@dataclass
class OpenRun:
    """A run folder at work: locked, its memory limited, its air watched."""

    folder: Path
    weather: ThermalMonitor
    files: Files
    peak: memory.Peak
    began_s: float
    budget_bytes: int

    def done(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """The run's result, with memory, weather and time, as it now stands in the folder."""
        sizes = {"peak_bytes": self.peak.nbytes, "budget_bytes": self.budget_bytes}
        whole = {
            **result,
            **sizes,
            **self.weather.account(),
            "seconds": round(time.monotonic() - self.began_s, 1),
        }
        self.files.replace_text(self.folder / run_folder.RESULT, json.dumps(whole, indent=2))
        return whole


@contextmanager
def open_run(
    s: Any,
    folder: Path | None,
    name: str,
    origin: Mapping[str, str],
    way: Mapping[str, Any],
    limit: Budget,
    wired: int,
) -> Iterator[OpenRun]:
    """The run of the settings `s`: that in `folder`, which must have begun with `origin`, or a new
    one called `name`. Machines beside the first one work in a folder that goes with them. way: how
    it trains, decided once. wired: as of `memory.limited`, in bytes.
    """
    files = Files()
    distributed.check_same(origin)
    if folder is None and distributed.is_main():
        stored = {
            flag: value for flag, value in asdict(s).items() if flag not in run_folder.NOT_STORED
        }
        folder = run_folder.create(s.out, name, stored, origin, way, files)
    elif folder and distributed.is_main():
        cli.say(*run_folder.same_origin(folder, origin))
    cli.say(f"run folder: {folder}")
    try:
        with (
            distributed.workplace(folder) as place,
            protocol.lock(place),
            memory.limited(limit, wired),
            ThermalMonitor(s, place / "thermal.jsonl", files) as weather,
        ):
            protocol.sweep(place, files)
            if note := battery(s):
                cli.say(note)
            yield OpenRun(place, weather, files, memory.Peak(), time.monotonic(), limit.limit_bytes)
    except KeyboardInterrupt:
        # which the closing sentence of the first machine names
        raise KeyboardInterrupt(folder) from None


def _breaks(
    weather: ThermalMonitor, step: Step, show: Callable[[int, str], None], asked: list[int]
) -> Iterator[None]:
    """Take the tea breaks that come after a step; yields where the governor wants a checkpoint."""
    for decision in weather.after(step):
        if decision.action != "run":
            show(step.number, f"tea break: {decision.reason}")
        if decision.action == "stop":
            cli.say(f"the governor stops the run: {decision.reason}")
            asked.append(0)
        if decision.checkpoint:
            yield


@dataclass(frozen=True)
class CheckpointedTraining:
    """trained: a train_loop.Whole or sharded.Sharded. remember(number): what a checkpoint keeps
    beside it, asked for on every machine; recall(state) gets that again. planned_tps: shown beside
    the speed. report: told of every step.
    """

    run: OpenRun
    trained: Any
    remember: Callable[[int], dict[str, Any]]
    recall: Callable[[dict[str, Any]], None]
    steps: str = "steps"  # the folder of its checkpoints
    log: str = run_folder.METRICS
    label: str = "distil"
    planned_tps: float | None = None
    report: Callable[[Step], None] | None = None

    def start(self, begin: Callable[[], object]) -> int:
        """Steps done: of the newest checkpoint, put back; or 0, after `begin` on the first machine,
        and that saved.
        """
        if (number := self.back()) is not None:
            return number
        if distributed.is_main():
            begin()
            with reported(self.run.folder, "the folder of checkpoints"):
                self.run.files.make_folder(self.run.folder / self.steps)
        self._alike()
        self.save(0)
        return 0

    def _alike(self) -> None:
        """Every machine gets the weights, moments and memory of the first one."""
        if distributed.size() > 1:
            sent = distributed.broadcast_arrays(self.trained.arrays)
            remembered = distributed.broadcast_json(self.trained.memory)
            if not distributed.is_main():
                self.trained.restore({"optimizer": {}, **sent}, remembered)

    def back(self) -> int | None:
        """Put the newest checkpoint back on every machine: its number; None when there is none."""
        saved = protocol.newest(self.run.folder / self.steps, self.run.files)
        if saved:
            cli.say(*saved.notes, f"continuing from step {saved.number}")
            arrays = {key: protocol.load_arrays(saved, key) for key in saved.state["arrays"]}
            self.trained.restore({"optimizer": {}, **arrays}, saved.state["optimizer"])
            self.run.weather.breaks = PauseCounter(**saved.state["tea"])
        newest: Any = distributed.broadcast_json(
            lambda: [saved.number, saved.state] if saved else None
        )
        if newest is None:
            return None
        self._alike()
        self.recall(newest[1])
        return newest[0]

    def save(self, number: int) -> None:
        """One checkpoint: all that a resumed run needs."""
        more = self.remember(number)
        if distributed.is_main():
            arrays = {key: named for key, named in self.trained.arrays().items() if named}
            own = {"arrays": list(arrays), "optimizer": self.trained.memory()}
            state = {**own, "tea": asdict(self.run.weather.breaks), **more}
            protocol.save_step(self.run.folder / self.steps, number, arrays, state, self.run.files)

    def _run(self, steps: Iterator[Step], iters: int, save_every: int) -> None:
        """Run `steps` to their end. MisError after a checkpoint when Ctrl-C, SIGTERM or the
        governor stops it, here or on any machine beside this one, or when such a machine is gone.
        """
        run, weather = self.run, self.run.weather
        where = f"go on with --out {run.folder} --resume"
        unsaved = 0  # the number of a step that no checkpoint holds
        with cli.stop_asked() as asked, progress.bar(self.label, iters) as show:
            try:
                for step in steps:
                    memory.give_back(cache=False)
                    run.peak.note(step.peak_bytes)
                    facts = {k: v for k, v in asdict(step).items() if k not in ("reading", "more")}
                    run.files.append(
                        run.folder / self.log, json.dumps({**weather.now(), **facts, **step.more})
                    )
                    seen = replace(step, reading=weather.last())
                    show(step.number, text.step_text(seen, run.budget_bytes, self.planned_tps))
                    if self.report:
                        self.report(step)
                    unsaved = step.number
                    due = step.number % save_every == 0 or step.number == iters
                    for _ in _breaks(weather, step, show, asked):
                        due = True
                        # several save together, after the break
                        if unsaved and distributed.size() == 1:
                            self.save(step.number)
                            unsaved = 0
                    if unsaved and distributed.any_rank(due or asked):
                        self.save(step.number)
                        unsaved = 0
                    if distributed.any_rank(asked):
                        # which exit codes go by
                        by_hand = KeyboardInterrupt() if signal.SIGINT in asked else None
                        why = f"stopped at step {step.number} of {iters}, all of it saved: {where}"
                        raise MisError(why) from by_hand
            except distributed.Lost as lost:
                if not distributed.is_main():
                    raise
                if unsaved:  # the last step that all machines did
                    self.save(unsaved)
                raise MisError(f"{lost}; all steps that were done are saved, {where}") from None

    def finish(
        self, steps: Callable[[int], Iterator[Step]], start: int, iters: int, save_every: int
    ) -> None:
        """Run steps(start) to their end. Three bad batches in a row go back to the last checkpoint,
        once. On the second way these batches are left out and the learning rate is half of what it
        was; what is bad then raises `Diverged`. A run killed before the second way has a checkpoint
        takes both ways again, with the same bits.
        """
        try:
            self._run(steps(start), iters, save_every)
        except Diverged as error:
            number = None if self.trained.optimizers[0].calm < 1 else self.back()
            if number is None:
                raise
            for optimizer in self.trained.optimizers:
                optimizer.pass_over(error.batches)
            what = f"batches {', '.join(map(str, error.batches))} gave no numbers"
            cli.say(
                f"{what}: back to step {number}, and on without them, at half the learning rate"
            )
            self._run(steps(number), iters, save_every)
