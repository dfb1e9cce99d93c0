"""The doctor's checks and the engine on a GPU; the same functions on the CPU, so that these tests
are known to work. (Each check by itself on the CPU: tests/test_doctor.py.)
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx import doctor
from mis_mlx.checks import engine, groups, kernels
from mis_mlx.compute import precision
from mis_mlx.hardware import macos, memory
from mis_mlx.models.passing import stream
from mis_mlx.models.writing.draws import Draws, Sampling
from mis_mlx.types import Budget

DEVICES = [pytest.param("gpu", marks=pytest.mark.gpu), "cpu"]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Everything in the test computes there, by the device's own policy."""
    before = mx.default_device()
    mx.set_default_device(getattr(mx, request.param))
    yield request.param
    mx.set_default_device(before)


@pytest.mark.parametrize("count", [pytest.param(40_000, marks=pytest.mark.gpu), 400])
def test_draws_from_rows_in_half_precision(count: int) -> None:
    """Of 152 thousand tokens 8,192 are possible, in Zipf's shares: 22 % of the draws are behind the
    first thousand, and none is another token. A running sum in half precision stands still before,
    and on Metal it does not rise at every step.
    """
    vocab = 151_936
    possible = np.linspace(0, vocab - 1, 8_192).astype(int)
    row = np.full(vocab, -np.inf, np.float32)
    row[possible] = -np.log(np.arange(1, 8_193))
    log_probs = mx.array(row).astype(mx.float16)
    drawn = list[int]()
    for first in range(0, count, 40):
        draw = Draws(Sampling(1.0), range(first, first + 40))
        drawn += draw(mx.broadcast_to(log_probs, (40, vocab)), range(40)).tolist()
    assert np.isin(drawn, possible).all()
    assert (np.array(drawn) > possible[1024]).mean() > 0.15


def test_the_policy_is_the_device_s(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU float16 and packed weights, on a CPU float32."""
    monkeypatch.delenv(precision.POLICY, raising=False)
    assert (precision.policy() == "metal") == precision.keeps_packed() == (device == "gpu")
    assert precision.usual_dtype() == (mx.float16 if device == "gpu" else mx.float32)


def test_the_budget_holds(device: str, tmp_path: Path) -> None:
    """A streamed pass under a limit stays under it, by MLX's own count, and gives numbers."""
    limit = 64 * 2**20
    checkpoint = engine.make(tmp_path)["4-bit"]
    mx.clear_cache()
    mx.reset_peak_memory()
    with memory.limited(Budget(limit)):
        hidden = stream.Stream(checkpoint, precision.dtype_of(checkpoint)).forward([engine.TOKENS])
        assert np.isfinite(kernels.to_float64(hidden[0])).all()
    assert mx.get_peak_memory() < limit


@pytest.mark.parametrize("word", DEVICES)
def test_doctor(word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every group of the whole command computes where it is told to, in a process of its own; on a
    GPU all checks pass there.
    """
    monkeypatch.setenv(macos.DEVICE, word)
    if word == "cpu":  # where the checks have a test of their own
        monkeypatch.setattr(groups, "GROUPS", {"rates": groups.of_rates})
    before = mx.default_device()
    mx.set_default_device(getattr(mx, word))
    try:
        found = doctor.run(doctor.Settings(out=tmp_path / "report.md"))
    finally:
        mx.set_default_device(before)
    assert found["failed"] == []
    assert found["device"] == word.upper()
    assert found["devices"] == dict.fromkeys(groups.GROUPS, word.upper())
