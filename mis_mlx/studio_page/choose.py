"""Choose: which model, which text, which settings."""

from typing import Any

from mis_mlx.studio_page import places
from mis_mlx.studio_page.studio_state import Studio
from mis_mlx.studio_page.wishes import DEFAULT, HUB, NONE, Wishes


def build(studio: Studio, wishes: Wishes, tabs: Any) -> None:
    """The panel."""
    ui = studio.ui
    ui.label("Which model shall become smaller?").classes("text-h6")
    model = ui.select(_models(studio), value=wishes.model, label="Model")
    model.bind_value(wishes, "model")
    model.classes("w-full")
    hub_id = ui.input("Model on the Hugging Face hub, as owner/model").classes("w-full")
    hub_id.bind_value(wishes, "hub_id").props("maxlength=200")
    hub_id.bind_visibility_from(wishes, "model", value=HUB)
    text = ui.select(_texts(), value=wishes.text, label="Text to learn from")
    text.bind_value(wishes, "text")
    text.classes("w-full")
    ui.label(
        "Your text: put a folder with train.jsonl below the folder in which you started the page."
    ).classes("text-caption")
    files = {NONE: "none"}
    for place in places.settings_files():
        files[place.key] = place.label
    if len(files) > 1:
        settings = ui.select(files, value=wishes.settings, label="Settings file")
        settings.bind_value(wishes, "settings").classes("w-full")

    def look() -> None:
        model.set_options(_models(studio))
        text.set_options(_texts())

    with ui.row():
        decide = ui.button("Decide", icon="arrow_forward")
        decide.on_click(lambda: tabs.set_value("Decide"))
        again = ui.button("Look again", icon="refresh")
        again.on_click(look).props("flat")


def _models(studio: Studio) -> dict[str, str]:
    found = {DEFAULT: "the default: SmolLM2-135M-Instruct", HUB: "a model of the hub …"}
    for place in places.models(studio.more):
        megabytes = place.nbytes / 1e6
        found[place.key] = f"{place.label}, {megabytes:,.1f} MB"
    return found


def _texts() -> dict[str, str]:
    found = {NONE: "the built-in text"}
    for place in places.texts():
        found[place.key] = place.label
    return found
