"""What a run has taken so far: seconds, memory and tea breaks of all processes that worked on it.

It is kept in the run's folder as the work goes on, so that a kill costs a few seconds of it.
"""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mis_mlx.hardware import memory
from mis_mlx.hardware.thermal.run_monitor import PauseCounter
from mis_mlx.planner import estimates
from mis_mlx.storage import checkpoint as protocol
from mis_mlx.storage import run_folder
from mis_mlx.storage.files import DISK
from mis_mlx.types import Budget, MisError

EVERY_S = 10.0  # between two times that it is kept in the middle of a phase


class Account:
    """The folder of a run on this machine, in which nobody else works meanwhile, and its account.

    peak: of this process. breaks: of the run.
    """

    def __init__(self, folder: Path, whole: "Account | None" = None) -> None:
        """whole: of the run that this one is a part of, which goes on meanwhile."""
        self.folder = folder
        self._whole = whole
        self.peak: memory.Peak = whole.peak if whole else memory.Peak()
        self._began_s = time.monotonic()
        self._kept_s = self._began_s
        stored = _stored(folder)
        self._earlier_s = float(stored.get("seconds", 0.0))
        self._earlier_bytes = int(stored.get("peak_bytes", 0))
        self.breaks = PauseCounter(**stored.get("tea", {}))

    def decide(self, settings: Mapping[str, Any], plan: Mapping[str, Any], limit: Budget) -> None:
        """Keep all settings of the run and how it trains, unless that is decided already.

        limit: named among them in any case: what other programs leave free on another day does not
        change a run that goes on.
        """
        if not run_folder.is_decided(self.folder):
            budget = settings.get("budget") or estimates.budget_flag(limit.limit_bytes)
            run_folder.decide(self.folder, {**settings, "budget": budget}, plan)

    @contextmanager
    def part(self, name: str) -> Iterator["Account"]:
        """A run that is a part of this one, in a folder of its own."""
        folder = self.folder / name
        with protocol.lock(folder):
            protocol.sweep(folder)
            yield Account(folder, whole=self)

    @property
    def seconds(self) -> float:
        """Of all processes, without the time between them."""
        return self._earlier_s + time.monotonic() - self._began_s

    @property
    def peak_bytes(self) -> int:
        """The most memory that one of them took."""
        return max(self._earlier_bytes, self.peak.nbytes)

    def keep(self) -> None:
        """Write it into the folder."""
        self._kept_s = time.monotonic()
        taken = {
            "seconds": round(self.seconds, 1),
            "peak_bytes": self.peak_bytes,
            "tea": asdict(self.breaks),
        }
        DISK.replace_text(self.folder / run_folder.TAKEN, json.dumps(taken, indent=2))
        if self._whole:
            self._whole.keep()

    def keep_sometimes(self) -> None:
        """The same, if that was not done a few seconds ago."""
        if time.monotonic() - self._kept_s >= EVERY_S:
            self.keep()


def _stored(folder: Path) -> dict[str, Any]:
    """What was kept; {} where there is nothing, or something that cannot be read."""
    with suppress(MisError):
        return run_folder.stored_settings(folder, run_folder.TAKEN)
    return {}
