"""The budget, and MLX told of it: every limit comes back, Metal is never wired beyond what it recommends."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import psutil
import pytest

from mis_mlx.machine import memory
from mis_mlx.types import GIB, Budget, MisError

MIB = 2**20


class Device:
    """Stands for `mlx.core` on a machine of our making: remembers its limits, fails as Metal does."""

    gpu, cpu = "gpu", "cpu"

    def __init__(self, kind: str = "gpu", recommended: int | None = 5_300_000_000):
        self.kind, self.recommended = kind, recommended
        self.limits = {"memory": 1, "cache": 2, "wired": 3}

    def default_device(self) -> str:
        return self.kind

    def device_info(self) -> dict[str, Any]:
        return {} if self.recommended is None else {"max_recommended_working_set_size": self.recommended}

    def _set(self, name: str, value: int) -> int:
        before, self.limits[name] = self.limits[name], value
        return before

    def set_memory_limit(self, value: int) -> int:
        return self._set("memory", value)

    def set_cache_limit(self, value: int) -> int:
        return self._set("cache", value)


class Metal(Device):
    """The same with a call that wires memory."""

    def set_wired_limit(self, value: int) -> int:
        assert self.recommended is not None and value <= self.recommended, "Metal ends the process here"
        return self._set("wired", value)


@pytest.mark.parametrize(
    ("need", "wired"), [(None, 2 * GIB + 256 * MIB), (GIB, GIB + 256 * MIB), (6 * GIB, 5_300_000_000)]
)
def test_metal_wires_what_is_needed(need: int | None, wired: int) -> None:
    """The need and 256 MiB, the budget when none is given, never more than recommended; all limits come back."""
    device = Metal()
    with pytest.raises(KeyboardInterrupt), memory.limited(Budget(2 * GIB), need, device):
        assert device.limits == {"memory": 2 * GIB, "cache": 128 * MIB, "wired": wired}
        raise KeyboardInterrupt
    assert device.limits == {"memory": 1, "cache": 2, "wired": 3}


@pytest.mark.parametrize("device", [Metal("cpu"), Metal(recommended=None), Device()])
def test_nothing_is_wired_elsewhere(device: Device) -> None:
    """Not on a CPU, not where Metal recommends nothing, not by an MLX that cannot: the other limits are set."""
    with memory.limited(Budget(GIB), None, device):
        assert device.limits == {"memory": GIB, "cache": 64 * MIB, "wired": 3}
    assert device.limits["memory"] == 1


def test_the_real_one_here() -> None:
    """MLX's own limits are those of before afterwards."""
    before = mx.set_memory_limit(GIB)
    try:
        with memory.limited(Budget(2 * GIB)):
            assert mx.set_memory_limit(2 * GIB) == 2 * GIB
        assert mx.set_memory_limit(GIB) == GIB
    finally:
        mx.set_memory_limit(before)


def test_budgets() -> None:
    """What is asked for, or the default, or 75 % of a small room; more than there is is refused with both numbers."""
    assert memory.budget(600 * MIB, GIB) == Budget(600 * MIB)
    assert memory.budget(None, 100 * GIB) == Budget(5 * GIB)
    assert memory.budget(None, 100 * GIB, 2 * GIB) == Budget(2 * GIB)
    assert memory.budget(None, 4 * GIB) == Budget(3 * GIB)
    with pytest.raises(MisError, match=r"8.00 GiB is more than the 4.00 GiB there are"):
        memory.budget(8 * GIB, 4 * GIB)
    assert 0 < memory.room_bytes() <= psutil.virtual_memory().total
