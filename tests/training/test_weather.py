"""The weather of a run: what is logged, where T_env came from, tea breaks in virtual time, a closed lid."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mis_mlx.machine.clock import VirtualClock
from mis_mlx.maths.losses import HALNY_CLIP
from mis_mlx.maths.optimizer import GoralW
from mis_mlx.training.loop import Schedule, train
from mis_mlx.training.weather import Weather, WeatherFlags
from mis_mlx.types import Step

HALNY = Path(__file__).parent.parent / "data" / "halny.jsonl"


def step(number: int) -> Step:
    """A step of one second."""
    return Step(number, 1.0, 1.0, 1e-3, 10, 1.0, 0)


def test_a_given_temperature_is_labelled_given_and_moves_no_wind() -> None:
    """Values typed by hand are never called measured, and eps_halny stays 0 with them."""
    with Weather(WeatherFlags(temperature_c=8.0, altitude_m=832.0)) as weather:
        reading = weather.reading()
        assert (reading.ambient_c, reading.altitude_m) == (8.0, 832.0)
        account = weather.account()
        assert (account["t_env_source"], account["altitude_source"]) == ("given", "given")
        assert weather.sigma() == 0.0


def test_halny_sigma_comes_from_the_last_hour_of_the_recording() -> None:
    """Air that warms from 8 to 33 °C gives 0.15 * std / 15 °C; before any reading the wind is still."""
    with Weather(WeatherFlags(thermal_replay=str(HALNY))) as weather:
        assert weather.sigma() == 0.0
        air = [weather.reading().ambient_c for _ in range(16)]
        mean = sum(air) / 16
        std = (sum((t - mean) ** 2 for t in air) / 16) ** 0.5
        assert (air[0], air[-1]) == (8.0, 33.0)
        assert weather.sigma() == pytest.approx(HALNY_CLIP * std / 15.0)
        assert weather.account()["t_env_source"] == "replay SMC TVA0"


def test_tea_breaks_are_counted_logged_and_end_with_the_recording(tmp_path: Path) -> None:
    """Hot spells pause the run in virtual time; both logs share a clock; after its end the replay is quiet."""
    log = tmp_path / "thermal.jsonl"
    with Weather(WeatherFlags(thermal_replay=str(HALNY)), log) as weather:
        actions = [[d.action for d in weather.after(step(n))] for n in range(1, 200)]
        assert weather.breaks.count == 6
        assert weather.breaks.seconds > 60
        assert weather.account()["tea_reasons"] == {"hot": 6}
        now = weather.now()
    assert actions[0] == ["run"]
    assert actions[-1] == []
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {line["action"] for line in lines} == {"run", "pause"}
    assert all(line["reason"] for line in lines if line["action"] == "pause")
    assert lines[-1]["time_s"] <= now["time_s"]


class Lid(VirtualClock):
    """A virtual clock on which someone closes the lid once, in the middle of a step."""

    def __init__(self) -> None:
        super().__init__()
        self.closings = 1

    def close(self) -> None:
        """Half an hour of sleep, once."""
        if self.closings:
            self.closings -= 1
            self.suspend(1800.0)


def trained(clock: VirtualClock, close: bool) -> tuple[dict[str, mx.array], list[Step]]:
    """Three steps of a linear layer, with or without a closed lid in the second."""
    model = nn.Linear(4, 3)
    model.weight = mx.arange(12, dtype=mx.float32).reshape(3, 4) / 10
    model.bias = mx.zeros(3)

    def micro_batches(number: int) -> list[tuple[mx.array]]:
        if close and number == 1 and isinstance(clock, Lid):
            clock.close()
        return [(mx.ones((2, 4)) * (number + 1),)]

    def loss(layer: nn.Module, x: mx.array) -> tuple[mx.array, mx.array]:
        return mx.square(layer(x)).sum(), mx.array(2.0)

    steps = list(train(model, micro_batches, loss, GoralW(), Schedule(3, 1e-2, 1), clock=clock))
    return dict(tree_flatten(model.parameters())), steps


def test_a_step_during_which_the_machine_slept_is_done_again() -> None:
    """The lid costs one step's work and a note; the weights are those of the undisturbed run, bit for bit."""
    calm, _ = trained(VirtualClock(), close=False)
    woken, steps = trained(Lid(), close=True)
    assert [s.note for s in steps] == ["", "the machine slept 30 min; step done again.", ""]
    for name, value in calm.items():
        assert mx.array_equal(value, woken[name])
