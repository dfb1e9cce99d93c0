"""Run: all runs; of one the phases, time left, loss, memory and temperature; stop and resume."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mis_mlx.reporting import run_reader
from mis_mlx.reporting.run_reader import Point, RunRecord
from mis_mlx.studio_page import runs
from mis_mlx.studio_page.runs import FINISHED, RUNNING, Listed
from mis_mlx.studio_page.studio_state import Alert, Studio
from mis_mlx.studio_page.wishes import Wishes
from mis_mlx.types import GIB, MisError, duration, gib

EVERY_S = 2.0
LINES = 4  # of what the process says
GREY = {"color": "#888888"}  # reads on light and dark
ICONS = {RUNNING: "play_circle", FINISHED: "check_circle", "stopped": "pause_circle"}


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
        ui = studio.ui
        ui.label("Runs").classes("text-h6")
        self.names = ui.column().classes("w-full gap-1")
        self.alert = Alert(studio)
        with ui.card().classes("w-full") as self.card:
            self.title = ui.label().classes("text-subtitle1")
            self.said = ui.label().classes("said").props("role=status")
            with ui.row():
                self._buttons()
            self.phases = ui.label().classes("said").style("font-family: monospace")
            self.facts = ui.label().classes("said")
            self.charts = {
                name: self._chart(name) for name in ("loss, nats a token", "memory, GiB", "°C")
            }
        self.card.set_visibility(False)
        ui.timer(EVERY_S, self.refresh, immediate=True)

    def _buttons(self) -> None:
        ui = self.studio.ui
        self.stop = ui.button("Stop", icon="pause", on_click=lambda: self._end(at_once=False))
        self.kill = ui.button("Stop at once", on_click=lambda: self._end(at_once=True))
        self.kill.props("flat")
        self.resume = ui.button("Resume", icon="play_arrow", on_click=self._resume)
        self.judge = ui.button("Judge", on_click=lambda: self.tabs.set_value("Judge"))

    def _chart(self, name: str) -> Any:
        chart = self.studio.ui.echart({"series": []}).classes("w-full").style("height: 11rem")
        chart.props(f'role=img aria-label="{name} over time"')
        chart.set_visibility(False)
        return chart

    async def refresh(self) -> None:
        """Show what the folders say now."""
        if self.tabs.value != "Run":
            return
        found, story = await self.studio.nicegui.run.io_bound(self._look)
        if self.studio.ui.context.client.is_deleted:
            return
        self._list(found)
        run = next((each for each in found if each.name == self.chosen.run), None)
        self.card.set_visibility(run is not None)
        if run:
            self._show(run, story)

    def _look(self) -> tuple[list[Listed], RunRecord | None]:
        found = runs.listed()
        if found and self.chosen.run not in {run.name for run in found}:
            self.chosen.run = found[0].name
        story = None
        for run in found:
            if run.name == self.chosen.run:
                story = story_of(run)
        return found, story

    def _list(self, found: Sequence[Listed]) -> None:
        """Buttons, made anew only where something is different: they may have the focus."""
        now = [(run.name, run.state) for run in found]
        now.append((self.chosen.run, "chosen"))
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
                if run.model_bytes:
                    words += f", {run.model_bytes / 1e6:,.1f} MB"
                button = ui.button(words, icon=ICONS[run.state])
                button.on_click(lambda name=run.name: self._choose(name))
                button.props("flat no-caps align=left").classes("w-full")
                if run.name == self.chosen.run:
                    button.props("aria-current=true outline")

    async def _choose(self, name: str) -> None:
        self.chosen.run = name
        await self.refresh()

    def _show(self, run: Listed, story: RunRecord | None) -> None:
        self.title.set_text(f"{run.name}: {run.state}")
        self.said.set_text("\n".join(runs.last_lines(run, LINES)))
        mine = run.state == RUNNING and run.job is not None
        self.stop.set_visibility(mine)
        self.kill.set_visibility(mine)
        self.resume.set_visibility(run.state == "stopped")
        self.judge.set_visibility(run.state == FINISHED)
        self.phases.set_text(phase_words(story) if story else "")
        self.facts.set_text(fact_words(story) if story else "")
        lines = curves(story) if story else {}
        for name, chart in self.charts.items():
            values = lines.get(name, {})
            chart.set_visibility(bool(values))
            if values:
                chart.options.clear()
                chart.options.update(picture(name, values))
                chart.update()

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


def story_of(run: Listed) -> RunRecord | None:
    """What its folder tells; None where there is nothing yet."""
    try:
        return run_reader.read(run.folder)
    except (MisError, OSError):
        return None


def phase_words(story: RunRecord) -> str:
    """A line a phase: what it took, of what was planned."""
    took = story.took()
    planned = {each["phase"]: each["seconds"] for each in story.begun.get("planned", [])}
    lines = []
    for name in dict.fromkeys([*planned, *took]):
        now = duration(took[name]) if name in took else "–"
        plan = duration(planned[name]) if name in planned else "–"
        lines.append(f"{name:<12} {now:>10} of {plan} planned")
    return "\n".join(lines)


def fact_words(story: RunRecord) -> str:
    """Steps, loss, memory against the budget, temperature."""
    words = []
    steps = story.steps.series["number"].points()
    loss = story.steps.series["loss"].points()
    if steps and loss:
        words.append(f"step {steps[-1][1]:.0f} of {story.begun.get('iters', '?')}")
        words.append(f"loss {loss[-1][1]:.3f}")
    peaks = [record["peak_bytes"] for record in story.phases if "peak_bytes" in record]
    peaks += [value for _, value in story.steps.series["peak_bytes"].points()]
    budget = story.begun.get("budget_bytes")
    if peaks and budget:
        words.append(f"memory {gib(max(peaks))} of {gib(budget)}")
    die = story.air.series["die_c"].points()
    words.append(f"{die[-1][1]:.0f} °C" if die else "no temperature measured")
    return ", ".join(words)


def curves(story: RunRecord) -> dict[str, dict[str, list[Point]]]:
    """{title: {name: (seconds since the run began, value)}}, for charts."""
    loss = _since(story, "loss")
    memory = _since(story, "peak_bytes", 1 / GIB)
    lines = {"loss, nats a token": {"loss": loss}, "memory, GiB": {"memory": memory}}
    budget = story.begun.get("budget_bytes")
    if memory and budget:
        ends = [memory[0][0], memory[-1][0]]
        lines["memory, GiB"]["budget"] = [(x, budget / GIB) for x in ends]
    die = [(x - story.began_s, y) for x, y in story.air.series["die_c"].points()]
    lines["°C"] = {"die": die}
    return {title: found for title, found in lines.items() if any(found.values())}


def _since(story: RunRecord, name: str, scale: float = 1.0) -> list[Point]:
    points = story.steps.series[name].points()
    return [(wall_s - story.began_s, value * scale) for wall_s, value in points]


def picture(title: str, lines: Mapping[str, Sequence[Point]]) -> dict[str, Any]:
    """Values over minutes, as ECharts takes them."""
    series = []
    for name, points in lines.items():
        data = [[round(x / 60, 3), y] for x, y in points if math.isfinite(y)]
        series.append({"type": "line", "name": name, "data": data, "showSymbol": len(data) < 30})
    return {
        "animation": False,
        "grid": {"left": 50, "right": 20, "top": 34, "bottom": 24},
        "title": {"text": title, "textStyle": {**GREY, "fontSize": 12}},
        "legend": {"show": len(lines) > 1, "right": 0, "top": 0, "textStyle": GREY},
        "xAxis": {"type": "value", "axisLabel": {"formatter": "{value} min"}},
        "yAxis": {"type": "value", "scale": True},
        "series": series,
    }
