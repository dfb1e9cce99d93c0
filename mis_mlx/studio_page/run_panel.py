"""Run: all runs; of one the phases, time left, loss, memory and temperature; stop and resume."""

from collections.abc import Mapping, Sequence
from typing import Any

from mis_mlx.reporting import run_reader
from mis_mlx.reporting.run_reader import Point, RunRecord, Series
from mis_mlx.studio_page import runs
from mis_mlx.studio_page.runs import FINISHED, RUNNING, STOPPED, Listed
from mis_mlx.studio_page.studio_state import Alert, Studio
from mis_mlx.studio_page.wishes import Wishes
from mis_mlx.types import GIB, MisError, duration, gib

EVERY_S = 2.0
FEW = 30  # points, which are drawn as such
LINES = 4  # of what the process says
LOSS = "loss, nats a token"
MEMORY = "memory, GiB"
HEAT = "°C"
GREY = {"color": "#888888"}  # reads on light and dark
AXIS = {
    "type": "value",
    "axisLabel": GREY,
    "axisLine": {"lineStyle": GREY},
    "splitLine": {"lineStyle": {"color": "#88888855"}},
}
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
            self.facts = ui.label()
            self.facts.classes("said")
            self.charts = {name: self._chart(name) for name in (LOSS, MEMORY, HEAT)}
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

    def _chart(self, name: str) -> Any:
        chart = self.studio.ui.echart({"series": []})
        chart.classes("w-full")
        chart.style("height: 11rem")
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
        self.card.set_visibility(bool(found))
        for run in found:
            if run.name == self.chosen.run:
                self._show(run, story)

    def _look(self) -> tuple[list[Listed], RunRecord | None]:
        found = runs.listed()
        names = [run.name for run in found]
        if names and self.chosen.run not in names:
            self.chosen.run = names[0]
        story = None
        for run in found:
            if run.name == self.chosen.run:
                story = story_of(run)
        return found, story

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
                    words += f", {megabytes:,.1f} MB"
                button = ui.button(words, icon=ICONS[run.state])
                button.on_click(lambda name=run.name: self._choose(name))
                button.props("flat no-caps align=left")
                button.classes("w-full listed")
                if run.name == self.chosen.run:
                    button.props("aria-current=true outline")

    async def _choose(self, name: str) -> None:
        self.chosen.run = name
        await self.refresh()

    def _show(self, run: Listed, story: RunRecord | None) -> None:
        self.title.set_text(f"{run.name}: {run.state}")
        said = runs.last_lines(run, LINES)
        self.said.set_text("\n".join(said))
        mine = run.state == RUNNING and run.job is not None
        stopped = run.state == STOPPED
        finished = run.state == FINISHED
        self.stop.set_visibility(mine)
        self.kill.set_visibility(mine)
        self.resume.set_visibility(stopped)
        self.judge.set_visibility(finished)
        lines: dict[str, dict[str, list[Point]]] = {}
        phases = ""
        facts = ""
        if story:
            phases = phase_words(story)
            facts = fact_words(story)
            lines = curves(story)
        self.phases.set_text(phases)
        self.facts.set_text(facts)
        for name, chart in self.charts.items():
            values = lines.get(name, {})
            chart.set_visibility(bool(values))
            if not values:
                continue
            options = picture(name, values)
            chart.options.clear()
            chart.options.update(options)
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
    """A table of phases: what each took, and what was planned."""
    took = story.took()
    planned = {}
    for phase in story.begun.get("planned", []):
        planned[phase["phase"]] = phase["seconds"]
    lines = [_row("phase", "took", "planned")]
    for name in dict.fromkeys([*planned, *took]):
        now = _time(took.get(name))
        plan = _time(planned.get(name))
        lines.append(_row(name, now, plan))
    return "\n".join(lines)


def _row(name: str, took: str, planned: str) -> str:
    return f"{name:<11} {took:>9} {planned:>9}"


def _time(seconds: float | None) -> str:
    return "–" if seconds is None else duration(seconds)


def fact_words(story: RunRecord) -> str:
    """Steps, loss, memory against the budget, temperature."""
    words = []
    series = story.steps.series
    number = _last(series["number"])
    loss = _last(series["loss"])
    if number is not None and loss is not None:
        steps = story.begun.get("iters", "?")
        words.append(f"step {number:.0f} of {steps}")
        words.append(f"loss {loss:.3f}")
    peaks = [record.get("peak_bytes", 0) for record in story.phases]
    for _, nbytes in series["peak_bytes"].points():
        peaks.append(nbytes)
    budget = story.begun.get("budget_bytes")
    if peaks and budget:
        most = max(peaks)
        words.append(f"memory {gib(most)} of {gib(budget)}")
    die_c = _last(story.air.series["die_c"])
    if die_c is None:
        words.append("no temperature measured")
    else:
        words.append(f"{die_c:.0f} °C")
    return ", ".join(words)


def _last(series: Series) -> float | None:
    """The last value; None where there is none."""
    points = series.points()
    if not points:
        return None
    _, value = points[-1]
    return value


def curves(story: RunRecord) -> dict[str, dict[str, list[Point]]]:
    """{title: {name: (seconds since the run began, value)}}, for charts."""
    loss = _since(story, story.steps.series["loss"])
    memory = _since(story, story.steps.series["peak_bytes"], 1 / GIB)
    lines: dict[str, dict[str, list[Point]]] = {}
    if loss:
        lines[LOSS] = {"loss": loss}
    if memory:
        lines[MEMORY] = {"memory": memory}
    budget = story.begun.get("budget_bytes")
    if memory and budget:
        height = budget / GIB
        first_s, _ = memory[0]
        last_s, _ = memory[-1]
        lines[MEMORY]["budget"] = [(first_s, height), (last_s, height)]
    die = _since(story, story.air.series["die_c"])
    if die:
        lines[HEAT] = {"die": die}
    return lines


def _since(story: RunRecord, series: Series, scale: float = 1.0) -> list[Point]:
    points = []
    for wall_s, value in series.points():
        points.append((wall_s - story.began_s, value * scale))
    return points


def picture(title: str, lines: Mapping[str, Sequence[Point]]) -> dict[str, Any]:
    """Values over minutes, as ECharts takes them."""
    series = []
    for name, points in lines.items():
        data = []
        for seconds, value in points:
            minutes = round(seconds / 60, 3)
            data.append([minutes, value])
        few = len(data) < FEW
        series.append({"type": "line", "name": name, "data": data, "showSymbol": few})
    several = len(lines) > 1
    return {
        "animation": False,
        "grid": {"left": 50, "right": 20, "top": 34, "bottom": 24},
        "title": {"text": title, "left": 0, "top": 0, "textStyle": {**GREY, "fontSize": 12}},
        "legend": {"show": several, "right": 0, "top": 0, "textStyle": GREY},
        "xAxis": {**AXIS, "axisLabel": {**GREY, "formatter": "{value} min"}},
        "yAxis": {**AXIS, "scale": True},
        "series": series,
    }
