"""What all pages of one server share: folders of models, the library, answers that take seconds."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from mis_mlx.hardware import child_process

EXPECTED = "mis_mlx.studio_page.expected"
PATIENCE_S = 120.0
UNKNOWN_S = 60.0  # for which a model's curve that is not known is not asked for again
MOST_BYTES = 4 * 2**30  # of address space, for a process that reads configs and a tokenizer


@dataclass
class Studio:
    """more: folders of --models. nicegui: the library, which only an extra brings. curves: of a
    model the seconds when it was asked for, and its points.
    """

    more: tuple[Path, ...]
    nicegui: ModuleType
    curves: dict[str, tuple[float, list[dict[str, Any]]]] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)

    @property
    def ui(self) -> ModuleType:
        """NiceGUI's elements."""
        return self.nicegui.ui

    async def curve(self, model: str | None) -> list[dict[str, Any]]:
        """What students of a model should lose; [] where that is not known.

        Asked once if it is known. If not, a search in a terminal may make it known, or a download.
        """
        key = model or ""
        asked_s, points = self.curves.get(key, (-UNKNOWN_S, []))
        if not points and time.monotonic() - asked_s >= UNKNOWN_S:
            points = await self._asked("curve", {"teacher": model}) or []
            self.curves[key] = time.monotonic(), points
        return points

    async def scenarios(self) -> list[str]:
        """Names that --scenario takes."""
        if not self.names:
            self.names = await self._asked("scenarios", {}) or []
        return self.names

    async def _asked(self, function: str, arguments: dict[str, Any]) -> Any:
        """The answer of a function of `expected`, in a process of its own; None: none came."""

        def ask() -> Any:
            try:
                return child_process.ask(
                    EXPECTED, function, arguments, seconds=PATIENCE_S, memory_bytes=MOST_BYTES
                )
            except child_process.NoAnswer:
                return None

        return await self.nicegui.run.io_bound(ask)


class Alert:
    """A line for a refusal, which screen readers read aloud."""

    def __init__(self, studio: Studio) -> None:
        self._label = studio.ui.label().props("role=alert").classes("text-negative said")
        self.clear()

    def say(self, error: Exception | str) -> None:
        """Show the sentence."""
        self._label.set_text(str(error))
        self._label.set_visibility(True)

    def clear(self) -> None:
        """Nothing is wrong."""
        self._label.set_text("")
        self._label.set_visibility(False)
