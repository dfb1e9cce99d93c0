"""The command `bench`: what is counted, not how fast this machine is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mis_mlx import bench
from mis_mlx.model import speak
from mis_mlx.types import Checkpoint, MisError
from tests import tiny


def test_rates_by_pencil(llama: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stamps 0, 0.5, 0.6, 0.7 s: first token after 500 ms, then 2 tokens in 0.2 s; the median of three trials."""
    stamps = iter([[0.0, 9.0, 9.9], [0, 0.5, 0.6, 0.7], [1, 1.1, 1.5, 1.9], [2, 4.0, 4.05, 4.1]])
    monkeypatch.setattr(speak, "token_times", lambda *_: next(stamps))
    first, rate = bench.measure([llama.path], ["m"], 4, 3, 3)
    assert (first.metric, first.value, first.n) == ("ttft_ms", pytest.approx(500.0), 3)
    assert (rate.metric, rate.value) == ("decode_tps", pytest.approx(10.0))  # of 10, 2.5 and 20


def test_a_table_of_two_models(llama: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Real trials: positive times, the bytes of the weights, one column a model."""
    small = tiny.make(tmp_path / "small", num_hidden_layers=1)
    result = bench.run(bench.Settings(model=(str(llama.path), str(small)), p=4, g=4, n=1))
    assert result["bytes_llama"] == pytest.approx(llama.nbytes / 1e6)
    assert 0 < result["bytes_small"] < result["bytes_llama"]
    assert all(result[f"{metric}_{name}"] > 0 for metric in ("ttft_ms", "decode_tps") for name in ("llama", "small"))
    assert "| | llama | small |" in capsys.readouterr().out


def test_one_token_has_no_rate(llama: Checkpoint) -> None:
    """There is no second one to time the first against: two are taken."""
    assert all(row.value > 0 for row in bench.measure([llama.path], ["m"], 4, 1, 1))


@pytest.mark.parametrize("flags", [{"p": 0}, {"g": 0}, {"n": 0}, {"delay": -1.0}])
def test_nothing_to_time_is_a_sentence(llama: Checkpoint, flags: dict[str, Any]) -> None:
    """All four numbers are said."""
    with pytest.raises(MisError, match="cannot be timed"):
        bench.run(bench.Settings(model=(str(llama.path),), **flags))


def test_two_models_of_one_name(tmp_path: Path) -> None:
    """a/model and b/model get a column each."""
    folders = []
    for name, layers in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        folders.append(str(tiny.make(tmp_path / name / "model", num_hidden_layers=layers)))
    result = bench.run(bench.Settings(model=tuple(folders), p=2, g=2, n=1))
    assert result[f"bytes_{folders[0]}"] < result[f"bytes_{folders[1]}"]
