"""What a run has taken so far: seconds, memory and tea breaks of all processes that worked on it.

It is kept in the run's folder as the work goes on, so that a kill costs a few seconds of it.
"""

import json
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mis_mlx.hardware import memory
from mis_mlx.hardware.thermal.run_monitor import PauseCounter
from mis_mlx.storage import run_folder
from mis_mlx.storage.files import DISK
from mis_mlx.types import MisError

EVERY_S = 10.0  # between two times that it is kept in the middle of a phase


class Account:
    """The account of the run in a folder.

    peak: of this process. breaks: of the run.
    """

    def __init__(self, folder: Path, whole: "Account | None" = None) -> None:
        """whole: of the run that this one is a part of, which goes on meanwhile."""
        self._folder = folder

        self._whole = whole
        self.peak: memory.Peak = whole.peak if whole else memory.Peak()
        self._began_s = time.monotonic()
        self._kept_s = self._began_s
        stored = _stored(folder)
        self._earlier_s = float(stored.get("seconds", 0.0))
        self._earlier_bytes = int(stored.get("peak_bytes", 0))
        self.breaks = PauseCounter(**stored.get("tea", {}))

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
        DISK.replace_text(self._folder / run_folder.TAKEN, json.dumps(taken, indent=2))
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
