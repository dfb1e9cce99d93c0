"""What all pages of one server share: folders of models, the library, answers that take seconds."""

from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from mis_mlx.hardware import child_process

EXPECTED = "mis_mlx.studio_page.expected"
PATIENCE_S = 120.0
MOST_BYTES = 4 * 2**30  # of address space, for a process that reads configs and a tokenizer


@dataclass
class Studio:
    """more: folders of --models. nicegui: the library, which only an extra brings."""

    more: tuple[Path, ...]
    nicegui: ModuleType
    curves: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)

    @property
    def ui(self) -> ModuleType:
        """NiceGUI's elements."""
        return self.nicegui.ui

    async def curve(self, model: str | None) -> list[dict[str, Any]]:
        """What students of a model should lose, asked once; [] where that is not known."""
        key = model or ""
        if key not in self.curves:
            self.curves[key] = await self._asked("curve", {"teacher": model}) or []
        return self.curves[key]

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
