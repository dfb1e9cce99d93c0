"""Watch over a training run: its folder, then log every step, checkpoint, take tea breaks, stop when asked.

Does not know what is trained or what a checkpoint holds; `save(number)` does.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from mis_mlx import cli
from mis_mlx.hardware import memory
from mis_mlx.hardware.memory import Peak
from mis_mlx.hardware.thermal.run_monitor import ThermalFlags, ThermalMonitor, battery
from mis_mlx.maths.optimizer import Diverged, GuardedAdamW
from mis_mlx.models import distributed
from mis_mlx.reporting import progress, text
from mis_mlx.storage import checkpoint as protocol
from mis_mlx.storage import run_folder
from mis_mlx.storage.files import Files
from mis_mlx.types import Budget, MisError, Step

S = TypeVar("S", bound=Any)  # a command's Settings


def resumed(settings: S, free: frozenset[str], under: Path = Path("runs")) -> tuple[S, Path]:
    """The settings to go on with, and the folder of the run in `--out` or of the newest unfinished one right under
    `under`. MisError where settings that are not `free` differ from its."""

    def found() -> tuple[dict[str, Any], str]:
        folder, defaults = run_folder.find(settings.out, under), asdict(type(settings)())
        return run_folder.merged(asdict(settings), defaults, run_folder.stored_settings(folder), free), str(folder)

    values, folder = distributed.broadcast_json(found)
    return type(settings)(**values), Path(folder)


@contextmanager
def open_run(
    folder: Path | None,
    make: Callable[[], Path],
    origin: Mapping[str, str],
    limit: Budget,
    wired_bytes: int,
    flags: ThermalFlags,
    files: Files,
) -> Iterator[tuple[Path, ThermalMonitor]]:
    """(folder, weather) of a run: locked, swept, its memory limited, its air watched.

    folder: of a run to go on with, which must have begun with `origin`; None: that of `make()`. Machines beside the
    first one work in a folder that goes with them. wired_bytes: as of `memory.limited`.
    """
    distributed.check_same(origin)
    if folder is None and distributed.is_main():
        folder = make()
    elif folder and distributed.is_main():
        for note in run_folder.same_origin(folder, origin):
            cli.say(note)
    cli.say(f"run folder: {folder}")
    with (
        distributed.workplace(folder) as place,
        protocol.lock(place),
        memory.limited(limit, wired_bytes),
        ThermalMonitor(flags, place / "thermal.jsonl", files) as weather,
    ):
        protocol.sweep(place, files)
        if said := battery(flags):
            cli.say(said)
        yield place, weather


def retry_from_checkpoint(
    go: Callable[[Iterator[Step]], None],
    steps: Callable[[int], Iterator[Step]],
    start: int,
    back: Callable[[], int | None],
    optimizer: Callable[[], GuardedAdamW],
) -> None:
    """`go` through steps(start); three bad batches in a row go `back` to the last checkpoint, once.

    On the second way these batches are left out and the learning rate is half of what it was; what is bad then
    raises `Diverged`. A run killed before the second way has a checkpoint takes both ways again, with the same bits.
    """
    try:
        go(steps(start))
    except Diverged as error:
        number = None if optimizer().calm < 1 else back()
        if number is None:
            raise
        optimizer().pass_over(error.batches)
        cli.say(
            f"batches {', '.join(map(str, error.batches))} gave no numbers: back to step {number}, and on without "
            "them, at half the learning rate"
        )
        go(steps(number))


def run_training(
    steps: Iterator[Step],
    folder: Path,
    iters: int,
    save_every: int,
    save: Callable[[int], None],
    weather: ThermalMonitor,
    peak: Peak,
    files: Files,
    log: str = run_folder.METRICS,
    label: str = "distil",
    budget_bytes: int | None = None,
    planned_tps: float | None = None,
    report: Callable[[Step], None] | None = None,
) -> None:
    """Run `steps` to their end. MisError after a checkpoint when Ctrl-C, SIGTERM or the governor stops it, here or on
    any machine beside this one, or when such a machine is gone.

    budget_bytes, planned_tps: shown beside the memory and the speed there are. report: told of every step.
    """
    losses = deque[float](maxlen=text.SPARK_STEPS)
    unsaved = 0  # the number of a step that no checkpoint holds
    with cli.stop_asked() as asked, progress.bar(label, iters) as show:
        try:
            for step in steps:
                peak.note(step.peak_bytes)
                record = {**weather.now(), **{k: v for k, v in asdict(step).items() if k not in ("reading", "more")}}
                record |= step.more
                files.append(folder / log, json.dumps(record))
                losses.append(step.loss)
                seen = replace(step, reading=weather.last())
                show(step.number, text.step_text(seen, losses, budget_bytes, planned_tps))
                if report:
                    report(step)
                unsaved, due = step.number, step.number % save_every == 0 or step.number == iters
                for _ in _breaks(weather, step, show, asked):
                    due = True
                    if unsaved and distributed.size() == 1:  # several save together, after the break
                        save(step.number)
                        unsaved = 0
                if unsaved and distributed.any_rank(due or asked):
                    save(step.number)
                    unsaved = 0
                if distributed.any_rank(asked) and step.number < iters:
                    raise MisError(
                        f"stopped at step {step.number} of {iters}, all of it saved: go on with --out {folder} --resume"
                    )
        except distributed.Lost as lost:
            raise _left_alone(lost, partial(save, unsaved) if unsaved else None, folder) from None


def _breaks(weather: ThermalMonitor, step: Step, show: Callable[[int, str], None], asked: list[int]) -> Iterator[None]:
    """Take the tea breaks that come after a step; yields where the governor wants a checkpoint."""
    for decision in weather.after(step):
        if decision.action != "run":
            show(step.number, f"tea break: {decision.reason}")
        if decision.action == "stop":
            cli.say(f"the governor stops the run: {decision.reason}")
            asked.append(0)
        if decision.checkpoint:
            yield


def _left_alone(lost: distributed.Lost, save: Callable[[], None] | None, folder: Path) -> MisError:
    """What to say where a machine is gone, once the machine that writes has saved the last step that all did."""
    if not distributed.is_main():
        return lost
    if save:
        save()
    return MisError(f"{lost}; all steps that were done are saved, go on with --out {folder} --resume")
