"""Run: all runs; of one the phases, time left, loss, memory and temperature; stop and resume."""

from collections.abc import Mapping, Sequence
from typing import Any

from mis_mlx.reporting import html, run_reader
from mis_mlx.reporting.run_reader import Point, Record, RunRecord, points_of
from mis_mlx.storage import run_folder
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
STUDENTS = ("4-bit", "distilled")  # the first one that a result knows is the student
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
            self.result = ui.label().classes("said")
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
        phases = search_words(run) if run.state == RUNNING else ""
        facts = ""
        result = ""
        if story:
            phases = phase_words(story, running=run.state == RUNNING)
            facts = fact_words(story)
            lines = curves(story)
            result = result_words(story) if finished else ""
        self.result.set_text(result)
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


def search_words(run: Listed) -> str:
    """What a run does before its plan is decided: text is written, or a search measures sizes."""
    measured = 0
    for log in (run.folder / run_folder.SEARCH).glob("*.jsonl"):
        measured += len(run_folder.records(log))
    if measured:
        return f"searching for sizes: {measured} measurements so far"
    return "before its first phase: it reads text, or the teacher writes some"


def result_words(story: RunRecord) -> str:
    """Of a finished run: size, loss, loops, then a prompt with what both models said."""
    result = story.result
    last = next((name for name in STUDENTS if f"bytes_{name}" in result), "")
    if not last:
        return ""
    excess = result.get(f"answers_excess_{last}")
    values: dict[str, Any] = {
        "teacher": {"bytes": result["bytes_teacher"]},
        "student": {"bytes": result[f"bytes_{last}"]},
        "excess": excess,
        "lose": story.config.get("lose"),
        "loops": result.get(f"loops_{last}"),
        "teacher_loops": result.get("loops_teacher"),
        "texts": [],
        "speed": [],
        "first_token": [],
        "languages": result.get("languages") or {},
        "last": last,
    }
    lines = [html.document("won.md", values)]
    said = {row["model"]: row for row in story.answers if row["prompt"] == _first_prompt(story)}
    for name, row in said.items():
        if not lines[1:]:
            lines += ["", f"> {row['prompt']}"]
        who = name if name == "teacher" else "student"
        more = "" if row.get("ended", True) else " …"
        lines += ["", f"{who}: {row['text'].strip() or '(nothing)'}{more}"]
    return "\n".join(lines)


def _first_prompt(story: RunRecord) -> str:
    return str(story.answers[0]["prompt"]) if story.answers else ""


def phase_words(story: RunRecord, *, running: bool = False) -> str:
    """A table of phases: what each took, and what was planned; of a run at work, which is now."""
    took = story.took()
    planned = {}
    for phase in story.begun.get("planned", []):
        planned[phase["phase"]] = phase["seconds"]
    lines = [_row("phase", "took", "planned")]
    ahead = running
    for name in dict.fromkeys([*planned, *took]):
        spent = _time(took.get(name))
        if ahead and name not in took:
            spent = "now"
            ahead = False
        plan = _time(planned.get(name))
        lines.append(_row(name, spent, plan))
    return "\n".join(lines)


def _row(name: str, took: str, planned: str) -> str:
    return f"{name:<14} {took:>9} {planned:>9}"


def _time(seconds: float | None) -> str:
    return "–" if seconds is None else duration(seconds)


def fact_words(story: RunRecord) -> str:
    """Steps, loss, memory against the budget, temperature."""
    words = []
    losses = points_of(story.steps, "number", "loss")
    if losses:
        number, loss = losses[-1]
        steps = story.begun.get("iters", "?")
        words.append(f"step {number:.0f} of {steps}")
        words.append(f"loss {loss:.3f}")
    peaks = [record.get("peak_bytes", 0) for record in story.phases]
    for _, nbytes in points_of(story.steps, "wall_s", "peak_bytes"):
        peaks.append(nbytes)
    budget = story.begun.get("budget_bytes")
    if peaks and budget:
        most = max(peaks)
        words.append(f"memory {gib(most)} of {gib(budget)}")
    die = points_of(story.air, "wall_s", "die_c")
    words.append(f"{die[-1][1]:.0f} °C" if die else "no temperature measured")
    return ", ".join(words)


def curves(story: RunRecord) -> dict[str, dict[str, list[Point]]]:
    """{title: {name: (seconds since the run began, value)}}, for charts."""
    loss = _since(story, story.steps, "loss")
    memory = _since(story, story.steps, "peak_bytes", 1 / GIB)
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
    die = _since(story, story.air, "die_c")
    if die:
        lines[HEAT] = {"die": die}
    return lines


def _since(
    story: RunRecord, records: Sequence[Record], name: str, scale: float = 1.0
) -> list[Point]:
    began_s = story.begun.get("wall_s", 0.0)
    points = []
    for wall_s, value in points_of(records, "wall_s", name):
        points.append((wall_s - began_s, value * scale))
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
