"""How many steps fit into the minutes that were asked for, by the pace of the first steps.

The first steps warm the learning rate up, which does not depend on how many follow. So a run that
counted its steps has the same weights as one that was given that number with --iters.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from mis_mlx import cli
from mis_mlx.runs.run_loop import CheckpointedTraining
from mis_mlx.settings.recipe import FIRST_STEPS, DistillationConfig
from mis_mlx.storage.journal import Journal
from mis_mlx.types import MisError, Step

FILE = "pace.json"  # in a run's folder: the pace, counted once
StepsOf = Callable[[DistillationConfig], Callable[[int], Iterator[Step]]]


@dataclass(frozen=True)
class Pace:
    """minutes: that steps may take. seconds: of one step. iters: how many steps fit."""

    minutes: float
    seconds: float
    iters: int


def counted(minutes: float, seconds: Sequence[float], least: int) -> Pace:
    """The pace of the first steps, which took `seconds`, and how many steps fit: `least` or more.

    The very first step is left out of the pace: it also builds what all steps use.
    """
    usual = seconds[1:] or seconds
    pace = sum(usual) / len(usual)
    left = 60 * minutes - sum(seconds)
    further_steps = int(left / max(pace, 1e-9))
    fits = len(seconds) + max(0, further_steps)
    return Pace(
        minutes=minutes,
        seconds=round(pace, 3),
        iters=max(least, fits),
    )


def finish(
    training: CheckpointedTraining,
    recipe: DistillationConfig,
    steps_of: StepsOf,
    start: int,
    *,
    save_every: int,
) -> None:
    """Run a training to its end: `recipe.iters` steps, or as many as fit into `recipe.minutes`.

    steps_of: the steps of a recipe, from a number on.
    """
    if recipe.minutes is None:
        assert recipe.iters is not None
        training.finish(steps_of(recipe), start, recipe.iters, save_every)
        return
    pace = _stored(training)
    if pace is None:
        if start < FIRST_STEPS:
            first = _first_of(steps_of(recipe))
            training.finish(first, start, FIRST_STEPS, save_every)
            start = FIRST_STEPS
        pace = _decided(training, recipe)
        cli.say(
            f"{pace['iters']} steps fit into {recipe.minutes:g} minutes: {pace['seconds']:.1f} s "
            f"each"
        )
    iters = int(pace["iters"])
    if start < iters:
        steps = steps_of(replace(recipe, iters=iters))
        training.finish(steps, start, iters, save_every)


def _first_of(steps: Callable[[int], Iterator[Step]]) -> Callable[[int], Iterator[Step]]:
    """The same steps up to FIRST_STEPS."""
    return lambda start: islice(steps(start), FIRST_STEPS - start)


def _stored(training: CheckpointedTraining) -> dict[str, float] | None:
    """The pace that the run counted before it was stopped; None: not yet."""
    path = training.run.folder / FILE
    if not path.is_file():
        return None
    return dict(json.loads(path.read_text("utf-8")))


def _decided(training: CheckpointedTraining, recipe: DistillationConfig) -> dict[str, float]:
    """Count by the steps in the run's log, and keep the pace."""
    assert recipe.minutes is not None
    run = training.run
    log = run.folder / training.log
    by_number = Journal(log, ("number",)).read()  # a step done again counts with its last time
    first = [(number,) for number in range(1, FIRST_STEPS + 1)]
    seconds = [by_number[number]["seconds"] for number in first if number in by_number]
    if not seconds:
        raise MisError(f"{log} does not hold the first steps: start a new run")
    least = max(FIRST_STEPS, recipe.warmup)
    pace = vars(counted(recipe.minutes, seconds, least))
    run.files.replace_text(run.folder / FILE, json.dumps(pace))
    return dict(pace)
