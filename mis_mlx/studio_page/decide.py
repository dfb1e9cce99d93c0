"""Decide: how small, in how much memory; the plan follows."""

import asyncio
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from mis_mlx.hardware import jobs
from mis_mlx.models.architectures import scenarios
from mis_mlx.studio_page import places, runs, wishes
from mis_mlx.studio_page.studio_state import Alert, Studio
from mis_mlx.studio_page.wishes import Wishes
from mis_mlx.types import MisError, duration, gib

WAIT_S = 0.5  # after the last move of a slider
STEP_MIB = 256
MOST_MB = 8000  # of a model that is not here
MODES = {
    "sharded": "the student is trained in parts",
    "none": "nothing is trained: only bits and tokens go",
    "blocks": "the student is trained block by block",
}


def build(studio: Studio, chosen: Wishes, tabs: Any) -> None:
    """The panel."""
    _Decide(studio, chosen, tabs)


class _Decide:
    """Sliders, and the plan that belongs to them."""

    def __init__(self, studio: Studio, chosen: Wishes, tabs: Any) -> None:
        self.studio = studio
        self.chosen = chosen
        self.tabs = tabs
        self.task: asyncio.Task[None] | None = None
        ui = studio.ui
        ui.label("How small, how long, in how much memory?").classes("text-h6")
        self._sliders()
        self._plan()
        self.alert = Alert(studio)
        tabs.on_value_change(lambda event: self._shown(event.value))
        ui.context.client.on_delete(self._forget)

    def _sliders(self) -> None:
        ui = self.studio.ui
        chosen = self.chosen
        names = dict(wishes.DECIDES)
        decides = ui.toggle(names, value=chosen.decides).bind_value(chosen, "decides")
        decides.on_value_change(self.follow).props('aria-label="What decides the size"')
        loss = self._box("loss")
        with loss:
            label = "Loss: {} bits a byte above the model's own answers"
            self._slider("loss", label, 0.02, most=0.6, step=0.01)
        size = self._box("bytes")
        with size:
            label = "Size: {} MB of weights"
            self.size = self._slider("megabytes", label, 1, most=MOST_MB, step=1)
        scenario = ui.select(list(scenarios.PLAIN_NAMES), value=chosen.scenario, label="Scenario")
        scenario.bind_value(chosen, "scenario").on_value_change(self.follow)
        scenario.bind_visibility_from(chosen, "decides", value="scenario")
        scenario.classes("w-full")
        most = jobs.total_bytes() // wishes.MIB // STEP_MIB * STEP_MIB
        usual = "Memory: the default, 4 GiB on a Mac of 8 GB, less if less is free"
        label = "Memory: {} MiB"
        self._slider("memory_mib", label, 0, most=most, step=STEP_MIB, nothing=usual)

    def _box(self, decides: str) -> Any:
        """Shown while this decides the size."""
        box = self.studio.ui.column().classes("w-full gap-0")
        return box.bind_visibility_from(self.chosen, "decides", value=decides)

    def _slider(
        self,
        field: str,
        label: str,
        least: float,
        most: float,
        step: float,
        nothing: str = "",
    ) -> Any:
        """A slider with its value in words above it. nothing: the words for 0."""
        ui = self.studio.ui

        def words(value: float) -> str:
            return label.format(f"{value:g}") if value or not nothing else nothing

        value = getattr(self.chosen, field)
        with ui.column().classes("w-full gap-0"):
            shown = ui.label(words(value)).classes("q-mt-sm")
            with ui.element("div").classes("w-full room"):
                slider = ui.slider(min=least, max=most, step=step, value=value)
        slider.bind_value(self.chosen, field).on_value_change(self.follow)
        slider.props(f'aria-label="{label.partition(":")[0]}"')
        shown.bind_text_from(slider, "value", words)
        return slider

    def _plan(self) -> None:
        ui = self.studio.ui
        with ui.card().classes("w-full"):
            with ui.row().classes("items-center"):
                ui.label("Plan").classes("text-subtitle1")
                self.busy = ui.spinner(size="sm")
                self.busy.set_visibility(False)
            self.words = ui.label("Move a slider.").classes("said").props("role=status")
            with ui.expansion("Every phase").classes("w-full") as details:
                self.table = ui.label().classes("said").style("font-family: monospace")
            self.details = details
            self.start_button = ui.button("Start the run", icon="play_arrow", on_click=self.start)

    def _shown(self, tab: str) -> None:
        if tab == "Decide":
            self.follow()

    def _forget(self) -> None:
        if self.task:
            self.task.cancel()

    def follow(self, *_: object) -> None:
        """Plan anew for what the sliders say now; an older question is not waited for."""
        self._forget()
        if self.tabs.value == "Decide":
            self.task = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        await asyncio.sleep(WAIT_S)
        self.busy.set_visibility(True)
        self.alert.clear()
        try:
            self._limit_size()
            flags = wishes.base_flags(self.chosen, self.studio.more)
            flags += wishes.size_flags(self.chosen)
            answer = await jobs.ask("distill", [*flags, "--dry-run"])
            if answer.sentence:
                raise MisError(answer.sentence)
            self.words.set_text(plan_words(answer.result))
            self.table.set_text("\n".join(answer.lines))
        except MisError as error:
            self.words.set_text("There is no plan yet.")
            self.alert.say(error)
        finally:
            self.busy.set_visibility(False)

    def _limit_size(self) -> None:
        """The slider of bytes ends where the model does."""
        most = MOST_MB
        for place in places.models(self.studio.more):
            if place.key == self.chosen.model:
                most = max(1, round(place.nbytes / 1e6))
        self.size.props(f"max={most}")
        if self.size.value > most:
            self.size.set_value(most)

    async def start(self) -> None:
        """Start the run, and show it."""
        self.alert.clear()
        self.start_button.disable()
        try:
            more = self.studio.more
            model = wishes.model_of(self.chosen, more) or "SmolLM2-135M-Instruct"
            flags = wishes.base_flags(self.chosen, more)
            flags += wishes.size_flags(self.chosen)
            name = PurePath(model).name
            if name == "model":  # of a run
                name = PurePath(model).parent.name
            self.chosen.run = await self.studio.nicegui.run.io_bound(runs.start, name, flags)
            self.tabs.set_value("Run")
        except MisError as error:
            self.alert.say(error)
        finally:
            self.start_button.enable()


def plan_words(result: Mapping[str, Any]) -> str:
    """The plan in a few lines: parameters, time, peak, strategy."""
    lines = []
    before = result.get("params_teacher")
    after = result.get("params_student")
    if before and after:
        lines.append(f"{before / 1e6:.1f} → {after / 1e6:.1f} million parameters")
    seconds = result.get("seconds")
    peak = result.get("peak_bytes")
    budget = result.get("budget_bytes")
    if seconds is not None and peak and budget:
        lines.append(f"about {duration(seconds)}, {gib(peak)} of {gib(budget)} memory")
    mode = str(result.get("mode", ""))
    if mode:
        lines.append(MODES.get(mode, mode))
    if result.get("check_failed"):
        lines.append("This does not fit: give more memory, or choose a smaller model.")
    return "\n".join(lines)
