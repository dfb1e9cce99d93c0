"""Run: all runs; of one what its process says, and its report; stop and resume."""

import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from mis_mlx.hardware import jobs
from mis_mlx.studio_page import runs
from mis_mlx.studio_page.runs import FINISHED, RUNNING, STOPPED, Listed
from mis_mlx.studio_page.studio_state import Alert, Studio
from mis_mlx.studio_page.wishes import Wishes
from mis_mlx.types import MisError

EVERY_S = 2.0
LINES = 4  # of what the process says
ICONS = {RUNNING: "play_circle", FINISHED: "check_circle", STOPPED: "pause_circle"}


def build(studio: Studio, chosen: Wishes, tabs: Any) -> None:
    """The panel."""
    _Run(studio, chosen, tabs)


class _Run:
    """The list of runs, and the one that was chosen."""

    def __init__(self, studio: Studio, chosen: Wishes, tabs: Any) -> None:
        self.studio = studio
        self.chosen = chosen
        self.tabs = tabs
        self.seen: list[tuple[str, str]] = []
        self.framed = ""  # the run whose report is shown
        ui = studio.ui
        ui.label("Runs").classes("text-h6")
        self.names = ui.column().classes("w-full gap-1")
        self.alert = Alert(studio)
        with ui.card().classes("w-full") as self.card:
            self.title = ui.label().classes("text-subtitle1")
            self.said = ui.label().classes("said").props("role=status")
            with ui.row():
                self._buttons()
            frame = ui.element("iframe").classes("w-full")
            frame.style("height: 70vh; border: 0; background: white")
            self.frame = frame.props('title="Report"')
            self.frame.set_visibility(False)
        self.card.set_visibility(False)
        ui.timer(EVERY_S, self.refresh, immediate=True)

    def _buttons(self) -> None:
        ui = self.studio.ui
        self.stop = ui.button("Stop", icon="pause")
        self.stop.on_click(lambda: self._end(at_once=False))
        self.kill = ui.button("Stop at once")
        self.kill.on_click(lambda: self._end(at_once=True))
        self.kill.props("flat")
        self.resume = ui.button("Resume", icon="play_arrow")
        self.resume.on_click(self._resume)
        self.judge = ui.button("Judge")
        self.judge.on_click(lambda: self.tabs.set_value("Judge"))
        self.report = ui.button("Make the report", icon="summarize", on_click=self._report)
        self.report.props("flat")

    async def _report(self) -> None:
        """Make the report anew, also of a run at work, and show it."""
        self.alert.clear()
        self.report.disable()
        try:
            run = runs.named(self.chosen.run)
            answer = await jobs.ask("report", [str(run.folder)])
            if answer.sentence:
                raise MisError(answer.sentence)
            self.framed = ""
        except MisError as error:
            self.alert.say(error)
        finally:
            self.report.enable()
        await self.refresh()

    async def refresh(self) -> None:
        """Show what the folders say now."""
        if self.tabs.value != "Run":
            return
        found = await self.studio.nicegui.run.io_bound(self._look)
        if self.studio.ui.context.client.is_deleted:
            return
        self._list(found)
        self.card.set_visibility(bool(found))
        for run in found:
            if run.name == self.chosen.run:
                self._show(run)

    def _look(self) -> list[Listed]:
        found = runs.listed()
        names = [run.name for run in found]
        if names and self.chosen.run not in names:
            self.chosen.run = names[0]
        return found

    def _list(self, found: Sequence[Listed]) -> None:
        """Buttons, made anew only where something is different: they may have the focus."""
        now = [("chosen", self.chosen.run)]
        for run in found:
            now.append((run.name, run.state))
        if now == self.seen:
            return
        self.seen = now
        ui = self.studio.ui
        self.names.clear()
        with self.names:
            if not found:
                ui.label("No run yet: choose a model, decide, start.")
            for run in found:
                words = f"{run.name}: {run.state}"
                megabytes = run.model_bytes / 1e6
                if megabytes:
                    words += f", {megabytes:,.0f} MB"
                button = ui.button(words, icon=ICONS[run.state])
                button.on_click(lambda name=run.name: self._choose(name))
                button.props("flat no-caps align=left")
                button.classes("w-full listed")
                if run.name == self.chosen.run:
                    button.props("aria-current=true outline")

    async def _choose(self, name: str) -> None:
        self.chosen.run = name
        await self.refresh()

    def _show(self, run: Listed) -> None:
        self.title.set_text(f"{run.name}: {run.state}")
        self.said.set_text("\n".join(runs.last_lines(run, LINES)))
        working = run.state == RUNNING
        self.stop.set_visibility(working)
        self.kill.set_visibility(working)
        self.resume.set_visibility(run.state == STOPPED)
        self.judge.set_visibility(run.state == FINISHED)
        there = (run.folder / "report.html").is_file()
        self.frame.set_visibility(there)
        if there and self.framed != run.name:
            # Another address, or the browser would show the one that it has.
            self.frame.props(f'src="/report/{quote(run.name)}?{time.time()}"')
            self.framed = run.name

    async def _end(self, at_once: bool) -> None:
        await self._do(runs.stop, self.chosen.run, at_once)

    async def _resume(self) -> None:
        await self._do(runs.resume, self.chosen.run)

    async def _do(self, action: Any, *values: Any) -> None:
        self.alert.clear()
        try:
            await self.studio.nicegui.run.io_bound(action, *values)
        except MisError as error:
            self.alert.say(error)
        await self.refresh()
