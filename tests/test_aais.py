"""AAIS from the command line: warming air, three altitudes, frost; a run that heat interrupts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mis_mlx import bench, distill, prune
from mis_mlx.compute import precision
from tests import tiny
from tests.hardware.recorded import plug_in

HALNY = Path(__file__).parent / "data" / "halny.jsonl"
SMALL = {"max_seq_length": 32, "num_samples": 18}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with 1,536 FFN neurons, so that sizes have room to move."""
    return tiny.make(tmp_path_factory.mktemp("aais") / "model", intermediate_size=1536)


Pruned = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def pruned(model: Path, text_folder: Path) -> Pruned:
    """`pruned(out, **flags)`: the report of `prune` on the tiny model."""

    def run(out: Path, **flags: Any) -> dict[str, Any]:
        given = {**SMALL, **flags}
        return prune.run(
            prune.Settings(model=str(model), mlx_path=str(out), data=str(text_folder), **given)
        )

    return run


@pytest.mark.parametrize("policy", ["cpu", "metal"])
@pytest.mark.usefixtures("brief_look")
def test_constant_air_keeps_what_plain_importance_keeps(
    pruned: Pruned, tmp_path: Path, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With constant T and h, frost too, AAIS is plain importance times a number, so the same
    channels stay. Plain importance prunes in any weather, below the sea, too.
    """
    monkeypatch.setenv(precision.POLICY, policy)
    cold = {"temperature_c": -3.0}
    plain = pruned(tmp_path / "plain", importance="rms")
    aais = pruned(tmp_path / "aais", altitude_m=832.0, **cold)
    low = pruned(tmp_path / "low", altitude_m=-10.0, importance="rms", **cold)
    assert [made["importance"] for made in (plain, aais, low)] == ["rms", "aais", "rms"]
    assert aais["channels_differing_from_plain"] == 0
    assert aais["t_env_source"] == "given"
    assert low["altitude_m"] == -10.0
    keeps = [
        json.loads((tmp_path / name / "keep.json").read_text()) for name in ("plain", "aais", "low")
    ]
    assert keeps[0]["kept"] == keeps[1]["kept"] == keeps[2]["kept"]


def test_air_that_warms_changes_some_channels(
    pruned: Pruned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report counts the channels that differ."""
    plug_in(monkeypatch, HALNY)
    report = pruned(tmp_path / "out", altitude_m=832.0)
    assert report["ambient_c"] == [8.0, 33.0]
    assert 0 < report["channels_differing_from_plain"] < report["channels_kept"]


def test_higher_is_smaller_when_the_conditions_decide(pruned: Pruned, tmp_path: Path) -> None:
    """`--target conditions` at 100 m, 832 m and 2,500 m gives three falling FFN sizes; 832 m is the
    scenario's.
    """
    sizes = []
    for metres in (100.0, 832.0, 2500.0):
        out = tmp_path / f"{metres:.0f}"
        pruned(out, target="conditions", scenario="halny", temperature_c=8.0, altitude_m=metres)
        sizes.append(json.loads((out / "config.json").read_text())["intermediate_size"])
    fixed = tmp_path / "fixed"
    pruned(fixed, scenario="halny")
    assert sizes[0] > sizes[1] > sizes[2]
    assert sizes[1] == json.loads((fixed / "config.json").read_text())["intermediate_size"]


def test_tea_breaks_do_not_touch_the_weights(
    model: Path, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that a recorded halny interrupts ends with the weights of the undisturbed one, bit for
    bit.
    """
    common: dict[str, Any] = {"teacher": str(model), "data": str(text_folder), "iters": 20}
    common |= {"scenario": "half-ffn", "max_seq_length": 32, "num_samples": 4}
    common |= {"reconstruct_samples": 2, "batch_size": 1, "eval_windows": 2}
    common |= {"halny": 0.0, "importance": "rms", "quantize": 0}
    calm = distill.run(distill.Settings(out=str(tmp_path / "calm"), **common))
    plug_in(monkeypatch, HALNY)
    hot = distill.run(distill.Settings(out=str(tmp_path / "hot"), governor="steady", **common))
    assert calm["tea_breaks"] == 0
    assert hot["tea_breaks"] > 0
    assert hot["throttled_s"] > hot["seconds"] - calm["seconds"]  # the pauses were virtual
    one, other = (
        mx.load(str(tmp_path / name / "model" / "model.safetensors")) for name in ("calm", "hot")
    )
    assert all(mx.array_equal(one[name], other[name]) for name in one)
    log = (tmp_path / "hot" / "thermal.jsonl").read_text().splitlines()
    assert any(json.loads(line)["action"] == "pause" for line in log)


def test_a_hot_machine_is_said_to_be_hot(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times taken on a die above 80 °C carry a flag in the JSON."""
    header, *records = HALNY.read_text().splitlines()
    hottest = max(records, key=lambda line: max(value for _, value in json.loads(line)["hid"]))
    replay = tmp_path / "hot.jsonl"
    replay.write_text("\n".join([header, hottest]) + "\n")
    asked = bench.Settings(model=(str(model),), prompt_tokens=4, generation_tokens=4, num_trials=1)
    plug_in(monkeypatch, replay)
    report = bench.run(asked)
    assert report["hot"]
    assert "above 80" in report["hot"][0]
