"""Watch over a training run: log every step, checkpoint, take tea breaks, stop when asked.

Does not know what is trained or what a checkpoint holds; `save(number)` does.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

from mis_mlx import cli
from mis_mlx.disk import runs
from mis_mlx.disk.files import Files
from mis_mlx.machine.memory import Peak
from mis_mlx.training.weather import Weather
from mis_mlx.types import MisError, Step


def supervise(
    steps: Iterator[Step],
    folder: Path,
    iters: int,
    save_every: int,
    save: Callable[[int], None],
    weather: Weather,
    peak: Peak,
    files: Files,
    log: str = runs.METRICS,
    label: str = "distil",
    budget_bytes: int | None = None,
    planned_tps: float | None = None,
    report: Callable[[Step], None] | None = None,
) -> None:
    """Run `steps` to their end. MisError after a checkpoint when Ctrl-C, SIGTERM or the governor stops it.

    budget_bytes, planned_tps: shown beside the memory and the speed there are. report: told of every step.
    """
    losses = deque[float](maxlen=cli.SPARK_STEPS)
    with cli.stop_asked() as asked, cli.progress(label, iters) as show:
        for step in steps:
            peak.note(step.peak_bytes)
            record = {**weather.now(), **{k: v for k, v in asdict(step).items() if k not in ("reading", "more")}}
            record |= step.more
            files.append(folder / log, json.dumps(record))
            losses.append(step.loss)
            seen = replace(step, reading=weather.last())
            show(step.number, cli.step_text(seen, losses, budget_bytes, planned_tps))
            if report:
                report(step)
            saved = False
            for decision in weather.after(step):
                if decision.action != "run":
                    show(step.number, f"tea break: {decision.reason}")
                if decision.action == "stop":
                    cli.say(f"the governor stops the run: {decision.reason}")
                    asked.append(0)
                if decision.checkpoint and not saved:
                    save(step.number)
                    saved = True
            if not saved and (step.number % save_every == 0 or step.number == iters or asked):
                save(step.number)
            if asked and step.number < iters:
                raise MisError(
                    f"stopped at step {step.number} of {iters}, all of it saved: go on with --out {folder} --resume"
                )
