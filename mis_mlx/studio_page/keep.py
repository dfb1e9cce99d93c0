"""Keep: export, upload, delete."""

import re
import shlex
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from mis_mlx.hardware import jobs
from mis_mlx.studio_page import places, runs
from mis_mlx.studio_page.studio_state import Alert, Studio
from mis_mlx.studio_page.wishes import Wishes
from mis_mlx.types import MisError

EXPORTED = Path("exported")
# key: label, flags of `export`
FORMS = {
    "gguf": ("GGUF, as the model is packed", ["--format", "gguf"]),
    "q8_0": ("GGUF, 8 bits", ["--format", "gguf", "--out-type", "q8_0"]),
    "hf": ("Hugging Face folder, bfloat16", ["--format", "hf"]),
}
LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]{0,39}")


def build(studio: Studio, chosen: Wishes, tabs: Any) -> None:
    """The panel."""
    _Keep(studio, chosen, tabs)


class _Keep:
    """What can be done with one run's model."""

    def __init__(self, studio: Studio, chosen: Wishes, tabs: Any) -> None:
        self.studio = studio
        self.chosen = chosen
        self.buttons: list[Any] = []
        ui = studio.ui
        ui.label("Keep it, or not").classes("text-h6")
        self.run = ui.select([], label="Run").classes("w-full")
        self._exports()
        self._upload()
        ui.separator()
        delete = ui.button("Delete the run", icon="delete", color="negative")
        delete.on_click(self._delete)
        self.busy = ui.spinner(size="sm")
        self.busy.set_visibility(False)
        self.done = ui.label().classes("said").props("role=status")
        self.alert = Alert(studio)
        tabs.on_value_change(lambda event: self._shown(event.value))

    def _exports(self) -> None:
        ui = self.studio.ui
        labels = {}
        for key, (label, _) in FORMS.items():
            labels[key] = label
        with ui.row().classes("items-center w-full"):
            self.form = ui.select(labels, value="gguf", label="Form").classes("col-grow")
            self._button("Export", self._export)

    def _upload(self) -> None:
        ui = self.studio.ui
        with ui.expansion("Upload to the Hugging Face hub").classes("w-full"):
            self.repository = ui.input("Repository, as name/model").classes("w-full")
            self.license = ui.input("License, in the hub's words, such as apache-2.0")
            self.license.classes("w-full")
            self._button("Upload", self._send)

    def _button(self, label: str, action: Callable[[], Awaitable[str]]) -> None:
        """A button; what its action returns is shown, its refusal too."""

        async def act() -> None:
            self.alert.clear()
            self.done.set_text("")
            self.busy.set_visibility(True)
            for button in self.buttons:
                button.disable()
            try:
                self.done.set_text(await action())
            except MisError as error:
                self.alert.say(error)
            finally:
                self.busy.set_visibility(False)
                for button in self.buttons:
                    button.enable()

        self.buttons.append(self.studio.ui.button(label, on_click=act).props("outline"))

    def _shown(self, tab: str) -> None:
        if tab != "Keep":
            return
        names = [run.name for run in runs.listed()]
        value = self.chosen.run if self.chosen.run in names else None
        if value is None and names:
            value = names[0]
        self.run.set_options(names, value=value)

    def _model(self) -> tuple[runs.Listed, Path]:
        if not self.run.value:
            raise MisError("There is no run: make one first")
        run = runs.named(self.run.value)
        if not run.model_bytes:
            raise MisError(f"{run.name} has no model yet: let it finish")
        return run, run.folder / "model"

    async def _export(self) -> str:
        run, model = self._model()
        if self.form.value not in FORMS:
            raise MisError("this form is not known: choose one of the list")
        _, flags = FORMS[self.form.value]
        out = await export(model, f"{run.name}-{self.form.value}", flags)
        return "\n".join([f"Written: {out}", *commands(out, run.name)])

    async def _send(self) -> str:
        run, model = self._model()
        repository = places.repository(self.repository.value)
        license = str(self.license.value or "").strip()
        if not LICENSE.fullmatch(license):
            raise MisError("Say the license of the weights in the hub's words, such as apache-2.0")
        question = f"Upload {run.name} to {repository} as {license}? Others may see it then."
        if not await self._sure(question, "Upload"):
            return ""
        flags = ["--format", "hf", "--upload-repo", repository, "--license", license]
        await export(model, f"{run.name}-hf", flags)
        return f"Uploaded to {repository}"

    async def _sure(self, question: str, yes: str) -> bool:
        ui = self.studio.ui
        with ui.dialog() as dialog, ui.card():
            ui.label(question).classes("said")
            with ui.row():
                cancel = ui.button("Cancel")
                cancel.on_click(lambda: dialog.submit(False)).props("autofocus")
                confirm = ui.button(yes)
                confirm.on_click(lambda: dialog.submit(True)).props("flat")
        answer = await dialog
        dialog.delete()
        return bool(answer)

    async def _sure_by_name(self, name: str) -> bool:
        """The second question: the run's name has to be written."""
        ui = self.studio.ui
        with ui.dialog() as dialog, ui.card():
            ui.label(f"This cannot be undone. Write {name} to delete it.").classes("said")
            written = ui.input("Name of the run").classes("w-full").props("autofocus")
            with ui.row():
                cancel = ui.button("Cancel")
                cancel.on_click(lambda: dialog.submit(""))
                last = ui.button("Delete for good", color="negative")
                last.on_click(lambda: dialog.submit(written.value))
        answer = await dialog
        dialog.delete()
        return answer == name

    async def _delete(self) -> None:
        self.alert.clear()
        self.done.set_text("")
        try:
            if not self.run.value:
                raise MisError("There is no run to delete")
            run = runs.named(self.run.value)
            if not await self._sure(f"Delete {run.name}, with its models?", "Delete"):
                return
            if not await self._sure_by_name(run.name):
                self.done.set_text("Nothing was deleted.")
                return
            nbytes = await self.studio.nicegui.run.io_bound(runs.delete, run.name)
            self.done.set_text(f"{run.name} is deleted, {nbytes / 1e6:,.1f} MB.")
        except MisError as error:
            self.alert.say(error)
        self._shown("Keep")


async def export(model: Path, name: str, flags: list[str]) -> Path:
    """Export a model into the next free folder under exported/. MisError with its refusal."""
    out = free_folder(EXPORTED, name)
    answer = await jobs.ask("export", ["--model", str(model), "--out", str(out), *flags])
    if answer.sentence:
        raise MisError(answer.sentence)
    return out


def commands(out: Path, name: str) -> list[str]:
    """Lines for a terminal with which other programs take an exported GGUF; none for other forms.

    name: of the run.
    """
    lines = []
    for file in sorted(out.glob("*.gguf")):
        gguf = shlex.quote(str(file))
        listed = re.sub(r"[^a-z0-9._-]", "-", name.lower())  # the letters that Ollama takes
        lines.append(f"llama.cpp: llama-cli -m {gguf}")
        lines.append(f"LM Studio (not tried): lms import --copy {gguf}")
        create = f"ollama create {listed} -f Modelfile"
        lines.append(f"Ollama (not tried): cd {shlex.quote(str(out))} && {create}")
    return lines


def free_folder(parent: Path, name: str) -> Path:
    """`parent/name`, or with a number behind it where that is there."""
    folder = parent / name
    number = 2
    while folder.exists() or folder.is_symlink():
        folder = parent / f"{name}-{number}"
        number += 1
    return folder
