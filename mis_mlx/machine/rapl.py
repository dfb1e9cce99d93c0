"""Energy counters of Intel and AMD processors under Linux (powercap's intel-rapl), for power.EnergyMeter.

Does not know what the energy was spent on. Most systems let root alone read them (CVE-2020-8694).
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

SYS = Path("/sys")


class Rapl:
    """All processor packages together: cores, caches, memory controller. OSError where none can be read."""

    source = "RAPL, processor packages"

    def __init__(self, root: Path = SYS):
        zones = sorted(root.glob("class/powercap/intel-rapl:*"))
        self._zones = [z for z in zones if (z / "name").read_text("ascii").startswith("package")]
        if not self._zones:
            raise OSError(f"no energy counter under {root / 'class/powercap'}")
        self._ranges = [_number(z / "max_energy_range_uj") for z in self._zones]
        self._began = self._now()

    def _now(self) -> list[int]:
        return [_number(z / "energy_uj") for z in self._zones]

    def begin_window(self, _name: str) -> None:
        """Start a stretch."""
        self._began = self._now()

    def end_window(self, _name: str) -> SimpleNamespace:
        """Millijoules since `begin_window`; a counter that began anew at its range is put right once."""
        spent = [
            after - before + (most if after < before else 0)
            for before, after, most in zip(self._began, self._now(), self._ranges, strict=True)
        ]
        return SimpleNamespace(package_mj=sum(spent) / 1000)


def _number(file: Path) -> int:
    return int(file.read_text("ascii"))
