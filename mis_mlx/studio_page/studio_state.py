"""What all pages of one server share: folders of models, and the library."""

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType


@dataclass
class Studio:
    """more: folders of --models. nicegui: the library, which only an extra brings."""

    more: tuple[Path, ...]
    nicegui: ModuleType

    @property
    def ui(self) -> ModuleType:
        """NiceGUI's elements."""
        return self.nicegui.ui


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
