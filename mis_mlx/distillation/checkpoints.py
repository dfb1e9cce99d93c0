"""The checkpoints of one training: the newest one put back on every machine, the next one saved by the first.

Does not know what is trained, nor when to save. The protocol on disk is storage/checkpoint's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mis_mlx import cli
from mis_mlx.distillation import train_loop
from mis_mlx.hardware.thermal.governor import PauseCounter
from mis_mlx.hardware.thermal.run_monitor import ThermalMonitor
from mis_mlx.models import distributed
from mis_mlx.storage import checkpoint as protocol
from mis_mlx.storage.files import Files

Arrays = dict[str, dict[str, mx.array]]


@dataclass(frozen=True)
class Checkpoints:
    """arrays(): weights and moments, by checkpoint file and name. memory(): what else the optimizer needs, as JSON.
    restore(arrays, memory): puts both back."""

    folder: Path
    arrays: Callable[[], Arrays]
    memory: Callable[[], dict[str, Any]]
    restore: Callable[[Arrays, dict[str, Any]], None]
    weather: ThermalMonitor
    files: Files

    def back(self) -> tuple[int, dict[str, Any]] | None:
        """Put the newest checkpoint back: (its number, its state, `more` among it); None when there is none."""
        saved = protocol.newest(self.folder, self.files)
        if saved:
            for note in [*saved.notes, f"continuing from step {saved.number}"]:
                cli.say(note)
            arrays = {key: protocol.load_arrays(saved, key) for key in saved.state["arrays"]}
            self.restore({"optimizer": {}, **arrays}, saved.state["optimizer"])
            self.weather.breaks = PauseCounter(**saved.state["tea"])
        found: Any = distributed.broadcast_json(lambda: [saved.number, saved.state] if saved else None)
        if found is None:
            return None
        self.share()
        return found[0], found[1]

    def share(self) -> None:
        """Every machine gets what the first one has."""
        train_loop.alike(self.arrays, self.memory, self.restore)

    def save(self, number: int, more: dict[str, Any]) -> None:
        """One checkpoint: all that a resumed run needs. more: JSON that `back` gives again."""
        arrays = {key: named for key, named in self.arrays().items() if named}
        state = {"arrays": list(arrays), "optimizer": self.memory(), "tea": self.weather.breaks.saved()}
        protocol.save_step(self.folder, number, arrays, {**state, **more}, self.files)
