"""The budget, and MLX told of it: limits come back."""

from __future__ import annotations

import sys
from functools import partial

import numpy as np
import psutil
import pytest

from mis_mlx.hardware import free_memory, macos, memory
from mis_mlx.hardware.rates import M1_AIR
from mis_mlx.hardware.thermal import apple_sensors
from mis_mlx.types import GIB, Budget, MisError
from tests.hardware.conftest import FakeApple

MIB = 2**20


class Device:
    """`mlx.core` of a machine of our making: remembers its limits."""

    gpu = "gpu"
    cpu = "cpu"

    def __init__(self, kind: str = "gpu"):
        self.kind = kind
        self.limits = {"memory": 1, "cache": 2}
        self.set_memory_limit = partial(self._set, "memory")
        self.set_cache_limit = partial(self._set, "cache")

    def default_device(self) -> str:
        return self.kind

    def _set(self, name: str, value: int) -> int:
        before, self.limits[name] = self.limits[name], value
        return before


@pytest.mark.parametrize("kind", ["gpu", "cpu"])
def test_limits_hold_and_come_back(kind: str) -> None:
    """Also after Ctrl-C."""
    device = Device(kind)
    arrays = 2 * GIB - 150 * MIB
    cache = 512 * MIB if kind == "gpu" else 0
    with pytest.raises(KeyboardInterrupt), memory.limited(Budget(2 * GIB), device):
        assert device.limits == {"memory": arrays, "cache": cache}
        raise KeyboardInterrupt
    assert device.limits == {"memory": 1, "cache": 2}


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("limit", [256 * MIB, 600 * MIB, 4 * GIB, 64 * GIB])
def test_the_process_and_its_arrays_are_the_budget(gpu: bool, limit: int) -> None:
    """What the planner leaves for arrays, MLX may take, and the process's own growth fits beside
    it: with MLX's cache on a CPU, which comes on top there; on Metal the cache lies within MLX's
    limit.
    """
    device = Device("gpu" if gpu else "cpu")
    with memory.limited(Budget(limit), device):
        arrays = limit - memory.PROCESS_BYTES
        cached = 0 if gpu else device.limits["cache"]
        assert arrays + cached == device.limits["memory"] < limit
        assert device.limits["cache"] < limit // 3


AIR = M1_AIR.room_bytes or 0


def test_what_is_asked_for() -> None:
    """It is the budget; more than the machine has is refused with both numbers."""
    assert memory.budget(600 * MIB, GIB) == Budget(600 * MIB)
    assert memory.budget(psutil.virtual_memory().total).limit_bytes > memory.free_for_us_bytes()
    with pytest.raises(MisError, match=r"8.00 GiB is more than the 4.00 GiB"):
        memory.budget(8 * GIB, 4 * GIB)
    assert 0 < memory.usable_memory_bytes() <= psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("recommended", "free", "default"),
    [
        (AIR, 5 * GIB, 4 * GIB),  # the Air's
        (AIR, None, 4 * GIB),  # one of which only this is known
        (AIR, 2300 * MIB + 5, 2300 * MIB),
        (16 * GIB, 15 * GIB, 12 * GIB),  # no more of a large Mac than of a small one is left out
        (None, 23 * GIB, 5 * GIB),
        (None, 4 * GIB, 3 * GIB),
    ],
)
def test_the_default(recommended: int | None, free: int | None, default: int) -> None:
    """Three quarters of what Metal recommends, or of what is free without Metal, 5 GiB at the most;
    never more than is free; in whole MiB, with the reason.
    """
    found = memory.default_budget(memory.Room(24 * GIB, recommended, free))
    assert found == Budget(default)
    assert found.why


def test_this_process_is_not_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """What others leave free is 2 GiB, and what this process holds is its own to use."""
    free = free_memory.FreeMemory(2 * GIB)
    monkeypatch.setattr(free_memory, "now", lambda: free)
    monkeypatch.setattr(memory, "_recommended", lambda device: AIR)
    found = memory.budget(None).limit_bytes
    own, _ = memory.held_bytes()
    assert found == pytest.approx(2 * GIB + own, abs=64 * MIB)  # it may grow between two looks


def test_the_peak_is_the_footprint_on_a_mac(
    fake_apple: FakeApple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """rusage_info_v4's physical footprint, now and at most: GPU, numpy and cache together."""
    fakes = apple_sensors.functions("memory", fake_apple.path)
    monkeypatch.setattr(apple_sensors, "functions", lambda group: fakes)
    fake_apple.footprint(300 * MIB, 400 * MIB)
    assert memory.held_bytes() == (300 * MIB, 400 * MIB)
    peak = memory.Peak()
    fake_apple.footprint(350 * MIB, 900 * GIB)
    assert peak.nbytes == 900 * GIB - 300 * MIB
    fake_apple.footprint(0, 0)  # it refuses: the resident set
    now, most = memory.held_bytes()
    assert MIB < now <= most + MIB


@pytest.mark.skipif(sys.platform != "linux", reason="macOS gives freed memory back by itself")
def test_freed_memory_goes_back() -> None:
    """200 MiB in pieces too small for pages of their own, below one that keeps the heap up."""
    before = memory.held_bytes()[0]
    pieces = [np.ones(12_800) for _ in range(2048)]  # 100 KiB
    top = np.ones(12_800)
    assert memory.held_bytes()[0] > before + 150 * MIB
    del pieces
    memory.give_back()
    assert memory.held_bytes()[0] < before + 50 * MIB
    assert top.sum() == 12_800


@pytest.mark.parametrize(
    ("model", "budget", "total", "past"),
    [
        # Qwen3 1.7B in bf16 beside 4 GiB on an Air: 1.2 GiB too much for its memory
        (3_441_185_608, 4 * GIB, 8 * GIB, True),
        (3_441_185_608, 4 * GIB, 16 * GIB, False),
        (270_000_000, 4 * GIB, 8 * GIB, False),  # the default teacher
        (5 * GIB, GIB, 24 * GIB, False),  # more than the budget, and the cache keeps all of it
    ],
)
def test_what_the_page_cache_cannot_keep_is_read_past_it(
    model: int, budget: int, total: int, past: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Model, budget and 2 GiB for the system, against all memory."""
    monkeypatch.setattr(macos, "total_bytes", lambda: total)
    assert memory.crowds_page_cache(model, Budget(budget)) == past
