"""What a user has chosen, as flags of `distill`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mis_mlx.models.architectures import scenarios
from mis_mlx.studio_page import places
from mis_mlx.types import MisError

DEFAULT = "default"  # the model that a command takes where none is named
HUB = "hub"
NONE = "none"
DECIDES = {
    "loss": "allowed loss",
    "bytes": "size",
    "scenario": "scenario",
    "settings": "as the settings file says",
}
MIB = 2**20


@dataclass
class Wishes:
    """The state of one page. Keys of places, numbers of sliders."""

    model: str = DEFAULT
    hub_id: str = ""
    text: str = NONE
    settings: str = NONE
    decides: str = "loss"
    loss: float = 0.1  # as in `distill`
    megabytes: float = 70.0
    scenario: str = "half-vocab"
    memory_mib: int = 0
    run: str = ""
    max_tokens: int = 96


def model_of(wishes: Wishes, more: Sequence[Path]) -> str | None:
    """A folder or a hub id; None for the default model. MisError for what was not found here."""
    if wishes.model == DEFAULT:
        return None
    if wishes.model == HUB:
        return places.hub_id(wishes.hub_id)
    return str(places.chosen(places.models(more), wishes.model, "model").path)


def number(value: object, least: float, most: float, what: str) -> float:
    """A slider's value. MisError for anything that a slider does not send."""
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if good and least <= float(str(value)) <= most:
        return float(str(value))
    raise MisError(f"{what} is {str(value)[:40]!r}: give a number from {least:g} to {most:g}")


def base_flags(wishes: Wishes, more: Sequence[Path]) -> list[str]:
    """Flags that say of what, on what and within what."""
    flags = []
    model = model_of(wishes, more)
    if model is not None:
        flags += ["--teacher", model]
    if wishes.text != NONE:
        flags += ["--data", str(places.chosen(places.texts(), wishes.text, "text").path)]
    if wishes.settings != NONE:
        file = places.chosen(places.settings_files(), wishes.settings, "settings file")
        flags += ["--config", str(file.path)]
    memory = number(wishes.memory_mib, 0, 2**30, "the memory in MiB")
    if memory:
        flags += ["--budget", f"{memory:.0f}MiB"]
    return flags


def size_flags(wishes: Wishes) -> list[str]:
    """Flags that say how large the result is."""
    if wishes.decides == "loss":
        return ["--lose", f"{number(wishes.loss, 0, 10, 'the allowed loss'):g}"]
    if wishes.decides == "bytes":
        size = number(wishes.megabytes, 0.001, 1e7, "the size in MB")
        return ["--bytes", f"{size:g}MB"]
    if wishes.decides == "scenario":
        if wishes.scenario not in scenarios.PLAIN_NAMES:
            raise MisError("this scenario is not known: choose one of the list")
        return ["--scenario", wishes.scenario]
    return []
