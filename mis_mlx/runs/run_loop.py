"""One run from its flags to its end: its model, its folder, its steps and their checkpoints.

Steps are logged, rested after and stopped here. What is trained is not known here. The protocol on
disk is storage/checkpoint's.
"""

import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import mlx.core as mx

from mis_mlx import cli, flag_help
from mis_mlx.data import preparation, token_windows
from mis_mlx.hardware import blas_threads, memory
from mis_mlx.hardware.thermal.run_monitor import (
    Governed,
    PauseCounter,
    ThermalMonitor,
    battery,
)
from mis_mlx.maths.optimizer import Diverged, GuardedAdamW
from mis_mlx.models.architectures import scenarios
from mis_mlx.models.opening import load, resolve
from mis_mlx.models.opening.model_size import model_of
from mis_mlx.models.passing import distributed
from mis_mlx.planner import estimates
from mis_mlx.reporting import progress, text
from mis_mlx.storage import checkpoint as protocol
from mis_mlx.storage import run_folder
from mis_mlx.storage.files import DISK, as_mis_error, json_sha256, need_place
from mis_mlx.types import UNDECIDED, Budget, Checkpoint, MisError, Step, gib

BLAS_THREADS = "blas_threads"  # in origin.json
EVERY_S = 10.0  # between two times that the account is kept in the middle of a phase
S = TypeVar("S", bound=cli.Resumable)  # a command's Settings
# Settings that may differ when a run of any command goes on: none changes a result.
FREE_ANYWHERE = frozenset({"out", "resume", "dry_run", "config", "budget", "governor"})


def resumed(settings: S, free: frozenset[str], under: Path = Path("runs")) -> tuple[S, Path | None]:
    """The settings to run with, and with --resume the folder of the run that goes on.

    That is the run in `--out`, or the newest unfinished one right under `under`. A run of which
    nothing is decided yet has the settings that were said when it began. MisError where settings
    that are not `free` differ from the run's.
    """
    places = {}
    for name in ("teacher", "model", "student", "data"):
        said = getattr(settings, name, None)
        # from another folder it would be looked for on the hub, where anybody may have that name
        if isinstance(said, str) and Path(said).expanduser().exists():
            places[name] = str(Path(said).expanduser().absolute())
    settings = settings.with_values(**places)
    if not settings.resume:
        return settings, None
    folder = run_folder.find(settings.out, under)
    kind = type(settings)
    asked = _plain(kind, run_folder.asked_settings(folder))
    decided = run_folder.is_decided(folder)
    before = _plain(kind, run_folder.stored_settings(folder)) if decided else asked
    defaults = asdict(type(settings)())
    values = run_folder.merged(settings.given, defaults, before, free, asked=asked)
    if not decided:
        values = {name: values[name] for name in {**asked, **settings.given}}
    _restore_threads(folder)
    for name, value in values.items():
        if isinstance(value, list):  # JSON has no tuples
            values[name] = tuple(value)
    return type(settings)(**values), folder


def _restore_threads(folder: Path) -> None:
    """Have matrix products take as many threads as when the run began."""
    # A run that has not begun may have a search in it, which did.
    for file in (folder / run_folder.ORIGIN, *folder.glob(f"*/{run_folder.ORIGIN}")):
        if file.is_file():
            known = run_folder.stored_settings(file.parent, file.name)
            threads = str(known.get(BLAS_THREADS, ""))
            note = blas_threads.go_on_with(int(threads)) if threads.isdigit() else ""
            if note:
                cli.say(note)
            return


def _plain(kind: type, stored: dict[str, Any]) -> dict[str, Any]:
    """The same with the names that settings have today, and the scenario's plain one."""
    stored = flag_help.current_names(kind, stored)
    if isinstance(stored.get("scenario"), str):
        return {**stored, "scenario": scenarios.plain(stored["scenario"])}
    return stored


def open_model(
    s: Any, model: str | None, what: str = "model", place: str | Path = "runs", *, new: str = ""
) -> Checkpoint:
    """The model that a command begins with, opened once the flags are checked: `find_model`."""
    return opened(s, find_model(s, model, what, place, new=new))


def find_model(
    s: Any, model: str | None, what: str = "model", place: str | Path = "runs", *, new: str = ""
) -> Path:
    """The folder of the model that a command begins with, once the flags are checked.

    MisError before the model is looked for, where a flag is out of its range, where a run would
    wait for the plug after its first step, or where a path cannot be written: that of --out, by
    default under `place`, or of the flag `new`, which names something that is not there yet.
    """
    cli.check_ranges(s)
    plans_only = getattr(s, "dry_run", False)
    if isinstance(s, Governed) and not plans_only and s.governor == "steady":
        trouble = battery(s)
        if trouble:
            raise MisError(trouble)
    if new:
        need_place(new, place, "new")
    else:
        need_place("--out", s.out or place)
    source = resolve.resolve_model(model)
    cli.say(f"{what}: {source.source}")
    return source.path


def opened(s: Any, folder: Path) -> Checkpoint:
    """The model in a folder, within the budget, and what it computes in decided."""
    checkpoint = load.open_checkpoint(folder)
    limit = memory.budget(s.budget_bytes)
    cli.detail(f"memory budget: {gib(limit.limit_bytes)}, {limit.why}")
    if not getattr(s, "dry_run", False):  # whose plan says what would be too much
        estimates.require_tokenizer(limit, model_of(checkpoint))
    return estimates.settle_precision(limit, checkpoint, getattr(s, "precision", UNDECIDED))


def prepare_text(
    teacher: Checkpoint,
    source: preparation.Source | str | None,
    length: int,
    tell: Callable[..., None] = cli.say,
) -> tuple[preparation.Data, dict[str, str]]:
    """(the text of `source`; what a resumed run must have begun with). length: of its windows.

    tell: of the user's own text what was done with it; of the built-in text only -v tells.
    """
    data = preparation.prepare(source, load.tokenizer(teacher.path), length)
    own = source.data if isinstance(source, preparation.Source) else source
    if own is None:
        tell = cli.detail
    tell(*data.notes)
    judging = {name: token_windows.fingerprint(data.held_out[name]) for name in data.held_out}
    return data, {
        **run_folder.origin(teacher, token_windows.fingerprint(data.train)),
        "held_out": json_sha256([judging, data.talks]),
    }


def forget_text() -> None:
    """Let go of tokenizers and rows, once all windows are made.

    Else every phase would hold them too, 200 MiB with 152 thousand tokens.
    """
    load.opened_tokenizer.cache_clear()
    preparation.forget()
    memory.give_back(cache=False)


class Account:
    """The folder of a run on this machine, in which nobody else works meanwhile, and its account.

    That is seconds, memory and tea breaks of all processes that worked on it so far. It is kept in
    the folder as the work goes on, so that a kill costs a few seconds of it.

    peak: of this process. breaks: of the run.
    """

    def __init__(self, folder: Path, whole: "Account | None" = None) -> None:
        """whole: of the run that this one is a part of, which goes on meanwhile."""
        self.folder = folder
        self._whole = whole
        self.peak: memory.Peak = whole.peak if whole else memory.Peak()
        self._began_s = time.monotonic()
        self._kept_s = self._began_s
        stored = _stored(folder)
        self._earlier_s = float(stored.get("seconds", 0.0))
        self._earlier_bytes = int(stored.get("peak_bytes", 0))
        self.breaks = PauseCounter(**stored.get("tea", {}))

    def decide(self, settings: Mapping[str, Any], plan: Mapping[str, Any], limit: Budget) -> None:
        """Keep all settings of the run and how it trains, unless that is decided already.

        limit: named among them in any case: what other programs leave free on another day does not
        change a run that goes on.
        """
        if not run_folder.is_decided(self.folder):
            budget = settings.get("budget") or estimates.budget_flag(limit.limit_bytes)
            run_folder.decide(self.folder, {**settings, "budget": budget}, plan)

    @contextmanager
    def part(self, name: str) -> Iterator["Account"]:
        """A run that is a part of this one, in a folder of its own."""
        folder = self.folder / name
        with protocol.lock(folder):
            protocol.sweep(folder)
            yield Account(folder, whole=self)

    @property
    def seconds(self) -> float:
        """Of all processes, without the time between them."""
        return self._earlier_s + time.monotonic() - self._began_s

    @property
    def peak_bytes(self) -> int:
        """The most memory that one of them took."""
        return max(self._earlier_bytes, self.peak.nbytes)

    def keep(self) -> None:
        """Write it into the folder."""
        self._kept_s = time.monotonic()
        taken = {
            "seconds": round(self.seconds, 1),
            "peak_bytes": self.peak_bytes,
            "tea": asdict(self.breaks),
        }
        DISK.replace_text(self.folder / run_folder.TAKEN, json.dumps(taken, indent=2))
        if self._whole:
            self._whole.keep()

    def keep_sometimes(self) -> None:
        """The same, if that was not done a few seconds ago."""
        if time.monotonic() - self._kept_s >= EVERY_S:
            self.keep()


def _stored(folder: Path) -> dict[str, Any]:
    """What was kept; {} where there is nothing, or something that cannot be read."""
    with suppress(MisError):
        return run_folder.stored_settings(folder, run_folder.TAKEN)
    return {}


@contextmanager
def entered(
    folder: Path | None,
    name: str,
    *,
    out: str | None,
    asked: Mapping[str, Any],
) -> Iterator[Account]:
    """The place of the run in `folder`, or of a new one: `out`, or a new folder called `name`.

    It is made and locked before anything works in it, and can be resumed from then on. A new run
    that is refused before any work leaves nothing. asked: as in `run_folder.begin`.
    """
    new = folder is None
    if folder is None:
        folder = run_folder.make(out, name)
    cli.say(f"run folder: {folder}")
    try:
        with protocol.lock(folder):
            if new:
                run_folder.begin(folder, asked)
            protocol.sweep(folder)
            # They are the process's own, and 226 MiB with torch: before memory is counted.
            load.mlx_lm("utils")
            place = Account(folder)
            try:
                yield place
            except BaseException as stop:
                with suppress(MisError, OSError):
                    place.keep()
                if new and isinstance(stop, MisError):
                    run_folder.forget_bare(folder)
                raise
    except KeyboardInterrupt:
        # The closing sentence names the folder.
        raise KeyboardInterrupt(folder) from None


@dataclass
class OpenRun:
    """A run folder at work: its memory limited, its temperatures watched."""

    folder: Path
    thermal_monitor: ThermalMonitor
    account: Account
    budget_bytes: int

    def finish(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Write the run's result into its folder, with memory, weather and time; return it.

        They are those of all processes that worked on the run.
        """
        complete = {
            **result,
            "peak_bytes": self.account.peak_bytes,
            "budget_bytes": self.budget_bytes,
            **self.thermal_monitor.account(),
            "seconds": round(self.account.seconds, 1),
        }
        DISK.replace_text(self.folder / run_folder.RESULT, json.dumps(complete, indent=2))
        return complete


@contextmanager
def open_run(
    place: Account,
    origin: Mapping[str, str],
    *,
    same: tuple[str, ...] = run_folder.SAME,
    thermal: Governed,
    limit: Budget,
) -> Iterator[OpenRun]:
    """The run in a place, at work.

    One that goes on must have begun with what is `same` in `origin`.
    """
    distributed.check_same({name: value.encode() for name, value in origin.items()})
    # What computes matrix products: on the CPU their last bits depend on it.
    products = {"blas": blas_threads.name(), BLAS_THREADS: str(blas_threads.at_start())}
    cli.say(*run_folder.same_origin(place.folder, {**origin, **products}, same))
    with (
        memory.limited(limit),
        ThermalMonitor(thermal, place.folder / "thermal.jsonl") as thermal_monitor,
    ):
        thermal_monitor.breaks = place.breaks
        note = battery(thermal)
        if note:
            cli.say(note)
        yield OpenRun(
            folder=place.folder,
            thermal_monitor=thermal_monitor,
            account=place,
            budget_bytes=limit.limit_bytes,
        )


def _cooldowns(
    thermal_monitor: ThermalMonitor, step: Step, show: Callable[[int, str], None], asked: list[int]
) -> Iterator[None]:
    """Take the tea breaks that come after a step; yields where the governor wants a checkpoint.

    A governor that stops the run puts a 0 into `asked`, where signals stand otherwise.
    """
    for decision in thermal_monitor.after(step):
        if decision.action != "run":
            show(step.number, f"tea break: {decision.reason}")
        if decision.action == "stop":
            cli.say(f"the governor stops the run: {decision.reason}")
            asked.append(0)
        if decision.checkpoint:
            yield


class Trained(Protocol):
    """What a training changes, as far as checkpoints go.

    All students save by names in the whole model: weights, and moments as the name of their weight
    and .m, .v.
    """

    @property
    def longest_unsaved(self) -> int:
        """At most so many steps are made between two checkpoints."""

    @property
    def optimizers(self) -> Sequence[GuardedAdamW]:
        """Whose guards decide about steps: one, or one for each block that learns."""

    def arrays(self) -> Mapping[str, Mapping[str, mx.array] | protocol.Written]:
        """The arrays that a resumed run needs, by checkpoint file: as they are, or written."""

    def memory(self) -> dict[str, Any]:
        """The part of a checkpoint that is not an array, for its state.json."""

    def restore(self, arrays: dict[str, dict[str, mx.array]], memory: dict[str, Any]) -> None:
        """Put back what `arrays` and `memory` gave, evaluated: a file may go once this returns."""


@dataclass(frozen=True)
class CheckpointedTraining:
    """A training that can be stopped and resumed at any time.

    remember(number): further state for a checkpoint; recall(state) gets it again. steps, log: the
    folder of its checkpoints and the file of its steps, in the run's folder.
    """

    run: OpenRun
    trained: Trained
    remember: Callable[[int], dict[str, Any]]
    recall: Callable[[dict[str, Any]], None]
    steps: str = "steps"
    log: str = run_folder.METRICS
    label: str = "distil"

    def start(self, begin: Callable[[], object]) -> int:
        """The number of steps done: of the newest checkpoint, which is put back; else 0.

        A new run calls `begin`, and saves what that made as checkpoint 0. MisError where several
        machines do not stand at the same step of the same run.
        """
        number = self.restore_newest()
        if number is None:
            begin()
            with as_mis_error(self.run.folder, "the folder of checkpoints"):
                DISK.make_folder(self.run.folder / self.steps)
            self.save(0)
            number = 0
        if distributed.machines()[1] > 1:
            saved = self.run.folder / self.steps / f"step-{number:08d}" / protocol.MANIFEST
            hashes = json.loads(saved.read_bytes())["files"]
            del hashes[protocol.STATE]  # how long each machine took so far
            settings = run_folder.stored_settings(self.run.folder)
            del settings["budget"]
            plan = run_folder.stored_settings(self.run.folder, run_folder.PLAN)
            for what, value in {"checkpoint": hashes, "setting": settings, "plan": plan}.items():
                distributed.check_same({what: json.dumps([number, value]).encode()})
        return number

    def restore_newest(self) -> int | None:
        """Put the newest checkpoint back: its number; None when there is none."""
        saved = protocol.newest(self.run.folder / self.steps)
        if saved is None:
            return None
        cli.say(*saved.notes, f"continuing from step {saved.number}")
        arrays = {key: protocol.load_arrays(saved, key) for key in saved.state["arrays"]}
        self.trained.restore({"optimizer": {}, **arrays}, saved.state["optimizer"])
        self.recall(dict(saved.state))
        return saved.number

    def save(self, number: int) -> None:
        """Save a checkpoint: all that a resumed run needs."""
        remembered = self.remember(number)
        arrays = {key: named for key, named in self.trained.arrays().items() if named}
        state = {
            "arrays": list(arrays),
            "optimizer": self.trained.memory(),
            **remembered,
        }
        folder = self.run.folder / self.steps
        protocol.save_step(folder, number, arrays, state)
        self.run.account.keep()

    def _log(self, step: Step, show: Callable[[int, str], None]) -> None:
        """Write a step into the run's log, show it, and report it."""
        run = self.run
        facts = asdict(step)
        del facts["reading"], facts["further"]
        record = {**run.thermal_monitor.now(), **facts, **step.further}
        DISK.append(run.folder / self.log, json.dumps(record))
        run.account.keep_sometimes()
        seen = replace(step, reading=run.thermal_monitor.last())
        show(step.number, text.step_text(seen, run.budget_bytes))

    def _run(self, steps: Iterator[Step], iters: int, save_every: int) -> None:
        """Run `steps` to their end.

        MisError after a checkpoint when Ctrl-C, SIGTERM or the governor stops it, here or on
        another machine.
        """
        run = self.run
        where = cli.continuing(run.folder)
        with cli.stop_asked() as asked, progress.bar(self.label, iters) as show:
            for step in steps:
                memory.give_back(cache=False)
                run.account.peak.note(step.peak_bytes)
                self._log(step, show)
                unsaved = True
                due = step.number % save_every == 0 or step.number == iters
                for _ in _cooldowns(run.thermal_monitor, step, show, asked):
                    due = True
                    # One machine saves before it rests; several save together, afterwards.
                    if unsaved and distributed.machines()[1] == 1:
                        self.save(step.number)
                        unsaved = False
                saves, stops = distributed.sums(due, bool(asked))
                if unsaved and (saves or stops):
                    self.save(step.number)
                if stops:
                    # The exit code depends on the cause: a Ctrl-C is one of its own.
                    by_hand = KeyboardInterrupt() if signal.SIGINT in asked else None
                    why = f"stopped at step {step.number} of {iters}; everything is saved: {where}"
                    raise MisError(why) from by_hand

    def finish(
        self, steps: Callable[[int], Iterator[Step]], start: int, iters: int, save_every: int
    ) -> None:
        """Run steps(start) to their end.

        After three bad batches in a row it goes back to the last checkpoint, once. From there these
        batches are left out, and the learning rate is half of what it was; further bad batches then
        raise `Diverged`. A run that is killed before the second attempt has a checkpoint makes both
        attempts again, with the same bits.
        """
        save_every = min(save_every, self.trained.longest_unsaved)
        try:
            self._run(steps(start), iters, save_every)
        except Diverged as error:
            second_attempt = self.trained.optimizers[0].lr_scale < 1
            number = None if second_attempt else self.restore_newest()
            if number is None:
                raise
            for optimizer in self.trained.optimizers:
                optimizer.skip_batches(error.batches)
            what = f"batches {', '.join(map(str, error.batches))} gave NaN or infinity"
            cli.say(
                f"{what}: going back to step {number}, and on without them, at half the "
                f"learning rate"
            )
            self._run(steps(number), iters, save_every)
