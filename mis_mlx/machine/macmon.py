"""Power of an Apple chip as the program macmon says it (github.com/vladkens/macmon, no root), for power.EnergyMeter.

Does not know what the energy was spent on. Used where zeus-apple-silicon is not installed and macmon is.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import time
from types import SimpleNamespace

WATTS = ("cpu_power", "gpu_power", "ane_power", "ram_power", "gpu_ram_power")
PERIOD_MS = 200


class Macmon:
    """Cores, GPU, neural engine and memory together. OSError where there is no macmon. To be closed."""

    source = "macmon, the chip's power sampled"

    def __init__(self, program: str = "macmon"):
        if (tool := shutil.which(program)) is None:
            raise OSError(f"no program {program}")
        self._samples: list[tuple[float, float]] = []  # (monotonic seconds, watts)
        self._began_s = time.monotonic()
        self._process = subprocess.Popen(
            [tool, "pipe", "-i", str(PERIOD_MS)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, name="macmon", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                said = json.loads(line)
                watts = sum(float(said[name]) for name in WATTS if name in said)
            except (ValueError, TypeError):
                continue
            self._samples.append((time.monotonic(), watts))

    def begin_window(self, _name: str) -> None:
        """Start a stretch."""
        self._began_s = time.monotonic()

    def end_window(self, _name: str) -> SimpleNamespace:
        """Millijoules since `begin_window`: mean power times seconds. Nothing where fewer than two samples came."""
        now_s = time.monotonic()
        # A sample is the mean of the period before it: half of that or more is of this stretch.
        watts = [w for at_s, w in self._samples if self._began_s + PERIOD_MS / 2000 <= at_s <= now_s]
        if len(watts) < 2:
            return SimpleNamespace()
        return SimpleNamespace(package_mj=1000 * sum(watts) / len(watts) * (now_s - self._began_s))

    def close(self) -> None:
        """End the program."""
        self._process.terminate()
        self._reader.join()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._process.wait()
