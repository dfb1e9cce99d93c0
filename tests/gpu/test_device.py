"""The doctor's checks and the engine on a GPU; the same functions on the CPU, so that these tests
are known to work.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx import doctor
from mis_mlx.checks import engine, full_size, groups, hybrid_kernels, kernels
from mis_mlx.compute import precision
from mis_mlx.hardware import macos, memory
from mis_mlx.models.passing import stream
from mis_mlx.types import Budget

DEVICES = [pytest.param("gpu", marks=pytest.mark.gpu), "cpu"]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Everything in the test computes there, by the device's own policy."""
    before = mx.default_device()
    mx.set_default_device(getattr(mx, request.param))
    yield request.param
    mx.set_default_device(before)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> engine.Models:
    """The doctor's tiny model in four formats."""
    return engine.make(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("name", [*kernels.CHECKS, *hybrid_kernels.CHECKS])
def test_kernels(name: str, device: str) -> None:
    """Each kernel is as near to its witness as its bound says."""
    found, bound = (kernels.CHECKS | hybrid_kernels.CHECKS)[name]()
    assert found <= bound


@pytest.mark.gpu
def test_draws_in_half_precision() -> None:
    """Of 40,000 from rows of 152 thousand in float16 none has no probability."""
    found, bound = full_size.draws_in_half(40_000)
    assert found <= bound


@pytest.mark.parametrize("name", engine.CHECKS)
def test_engine(name: str, device: str, made: engine.Models) -> None:
    """So is the engine: streamed, kept and resident passes, decoding as mlx_lm does, equal steps,
    the planned peak.
    """
    found, bound = engine.CHECKS[name](made)
    assert found <= bound


def test_the_policy_is_the_device_s(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU float16 and packed weights, on a CPU float32."""
    monkeypatch.delenv(precision.POLICY, raising=False)
    assert (precision.policy() == "metal") == precision.keeps_packed() == (device == "gpu")
    assert precision.usual_dtype() == (mx.float16 if device == "gpu" else mx.float32)


def test_the_budget_holds(device: str, made: engine.Models) -> None:
    """A streamed pass under a limit stays under it, by MLX's own count, and gives numbers."""
    limit = 64 * 2**20
    mx.clear_cache()
    mx.reset_peak_memory()
    with memory.limited(Budget(limit)):
        checkpoint = made["4-bit"]
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
