"""Minutes in place of steps: how many fit by the pace of the first ones, and that they are the
steps of --iters.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mis_mlx import distill
from mis_mlx.distillation import train_loop
from mis_mlx.hardware import clock
from mis_mlx.runs import pace
from mis_mlx.settings.recipe import FIRST_STEPS
from mis_mlx.storage import run_folder
from mis_mlx.types import MisError
from tests.conftest import Done, weights
from tests.test_distill import losses, settings_of


def test_the_count_by_pencil() -> None:
    """The first step is left out of the pace: 2 s a step, 20 s of 60 gone, so 20 more fit. Never
    fewer than `least`.
    """
    found = pace.counted(1.0, [14.0, 2.0, 2.0, 2.0], least=5)
    assert (found.seconds, found.iters) == (2.0, 24)
    assert pace.counted(0.1, [14.0, 2.0, 2.0, 2.0], least=5).iters == 5
    assert pace.counted(1.0, [30.0], least=1).iters == 2


class SlowClock(clock.Clock):
    """A clock on which every step takes as long as it is told to, from the steps that the log
    has.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.now = 0.0

    def monotonic(self) -> float:
        """Half of a step's seconds go by between two looks: `train` looks twice a step."""
        self.now += self.seconds
        return self.now


@pytest.mark.parametrize("seconds", [4.0, 11.0])
def test_minutes_end_when_they_are_over(
    flags: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """On two machines, one nearly three times as slow: five minutes of steps take 5 minutes, give
    or take one.
    """
    monkeypatch.setattr(train_loop, "CLOCK", SlowClock(seconds))
    asked = [*flags[: flags.index("--iters")], "--minutes", 5, "--quantize", 0]

    result = distill.run(settings_of(distill, tuple(asked), tmp_path / "run"))

    steps = run_folder.metrics(tmp_path / "run")
    total = sum(step["seconds"] for step in steps)
    assert 4 * 60 <= total <= 6 * 60
    assert (
        len(steps)
        == result["iters"]
        == json.loads((tmp_path / "run" / pace.FILE).read_text())["iters"]
    )
    assert steps[-1]["learning_rate"] < 0.2 * max(step["learning_rate"] for step in steps)


@pytest.mark.thorough
def test_the_same_number_of_steps_gives_the_same_student(
    flags: tuple[object, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: Callable[..., Done],
) -> None:
    """A run that counted its steps, stopped on the way and resumed, against one with that
    --iters.
    """
    monkeypatch.setattr(train_loop, "CLOCK", SlowClock(5.0))
    short = (
        *flags[: flags.index("--iters")],
        "--save-every",
        3,
        "--q-iters",
        1,
    )
    counted = settings_of(distill, (*short, "--minutes", 0.75), tmp_path / "counted")
    steps_of = pace._first_of
    monkeypatch.setattr(pace, "_decided", lambda *_: pytest.fail("stopped here"))
    with pytest.raises(pytest.fail.Exception, match="stopped here"):
        distill.run(counted)
    assert len(run_folder.metrics(tmp_path / "counted")) == FIRST_STEPS
    monkeypatch.undo()
    monkeypatch.setattr(train_loop, "CLOCK", SlowClock(5.0))
    assert pace._first_of is steps_of

    distill.run(distill.Settings(out=str(tmp_path / "counted"), resume=True))

    iters = json.loads((tmp_path / "counted" / pace.FILE).read_text())["iters"]
    assert iters == 9
    distill.run(settings_of(distill, (*short, "--iters", iters), tmp_path / "told"))
    assert losses(tmp_path / "told") == losses(tmp_path / "counted")
    assert weights(tmp_path / "told") == weights(tmp_path / "counted")


CACHED = Path(__file__).parent.parent / "fixtures" / "cached.yaml"


@pytest.mark.parametrize("more", [("--config", str(CACHED)), ("--train", "sharded")])
def test_where_the_number_must_be_known_it_is_asked_for(
    flags: tuple[object, ...], tmp_path: Path, more: tuple[Any, ...]
) -> None:
    """Targets on disk and a student in parts: one sentence with the number that the plan expects to
    fit.
    """
    asked = (*flags[: flags.index("--iters")], "--minutes", 1, *more)
    with pytest.raises(MisError, match=r"must know the number first: give --iters \d+"):
        distill.run(settings_of(distill, asked, tmp_path / "run"))
    with pytest.raises(
        MisError, match="--minutes 1 and --iters 18 both set the number of steps: give one"
    ):
        distill.run(settings_of(distill, (*flags, "--minutes", 1), tmp_path / "run"))
