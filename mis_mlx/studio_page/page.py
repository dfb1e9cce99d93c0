"""The page: NiceGUI's elements, four panels, and the server that shows them to one browser."""

import contextlib
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from mis_mlx.hardware import jobs, sockets
from mis_mlx.studio_page import choose, decide, entrance, judge, run_panel, runs
from mis_mlx.studio_page.guard import HOST, Door, Guard
from mis_mlx.studio_page.studio_state import Studio
from mis_mlx.studio_page.wishes import Wishes
from mis_mlx.types import MisError

TITLE = "mis_mlx studio"
PANELS = {
    "Choose": choose.build,
    "Decide": decide.build,
    "Run": run_panel.build,
    "Judge": judge.build,
}
# A machine that trains is slow: a page that did not answer for so long keeps what was chosen.
PATIENCE_S = 120.0
# A report is a page with scripts of its own and words of models: a browser shows it apart, in a
# frame of this page and in no other one.
REPORT_HEADERS = {
    "content-security-policy": "sandbox allow-scripts; default-src 'none'; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; frame-ancestors 'self'",
    "x-frame-options": "SAMEORIGIN",
}
PRIMARY = "#2b7bb9"  # white on it and it on black have a contrast of 4.4 and more
STYLE = """
.said { white-space: pre-wrap; overflow-wrap: anywhere; }
.q-tab-panel { padding: 16px 0; }
.listed .q-btn__content { flex-wrap: nowrap; text-align: left; overflow-wrap: anywhere; }
.room { padding: 6px 10px 0; } /* for half of a slider's thumb */
@media (max-width: 599px) { .q-tab { padding: 0 8px; } }
/* Seen on white, on black and on the header: a dark ring with a light one around it. */
:focus-visible { box-shadow: 0 0 0 2px #111, 0 0 0 5px #ffd34d !important; }
.q-tab:focus-visible { box-shadow: inset 0 0 0 3px #ffd34d, inset 0 0 0 5px #111 !important; }
.q-field :focus-visible { box-shadow: none !important; } /* its line becomes thick */
"""


def serve(
    more: Sequence[Path], port: int, browser: bool, say: Callable[[str], object]
) -> dict[str, Any]:
    """Show the page until Ctrl-C. say: is told its address, when it is there to be opened."""
    nicegui = importlib.import_module("nicegui")
    door = Door(sockets.port(port))
    studio = Studio(more=tuple(more), nicegui=nicegui)
    nicegui.app.add_middleware(Guard, door=door)
    nicegui.app.get("/report/{name}")(_report(nicegui))
    nicegui.ui.page("/", title=TITLE)(lambda: _page(studio))

    wanted = browser and jobs.has_browser()
    with (
        entrance.redirecting(door.address, wanted=wanted) as redirect,
        contextlib.suppress(KeyboardInterrupt),
    ):

        async def opened() -> None:
            await sockets.listening(HOST, door.port)
            say(door.address)
            if redirect:
                jobs.open_browser(redirect.as_uri())

        nicegui.app.on_startup(lambda: nicegui.background_tasks.create(opened()))
        nicegui.ui.run(
            host=HOST,
            port=door.port,
            title=TITLE,
            favicon="🐻",
            dark=None,
            reload=False,
            show=False,
            reconnect_timeout=PATIENCE_S,
            show_welcome_message=False,
            timeout_graceful_shutdown=1,
            access_log=False,
            server_header=False,
        )
    busy = runs.running()
    return {"address": f"http://{HOST}:{door.port}/", "running": busy.name if busy else None}


def _page(studio: Studio) -> None:
    """One browser tab's page."""
    ui = studio.ui
    wishes = Wishes()
    ui.add_css(STYLE)
    ui.colors(primary=PRIMARY)
    with ui.header().classes("items-center q-py-xs"):
        ui.label(TITLE).classes("text-h6").props("role=heading aria-level=1")
        with ui.tabs().props("inline-label outside-arrows mobile-arrows dense") as tabs:
            for name in PANELS:
                ui.tab(name)
    with (
        ui.column().classes("w-full items-center"),
        ui.tab_panels(tabs, value="Choose", animated=False)
        .props("keep-alive")
        .classes("w-full bg-transparent")
        .style("max-width: 60rem"),
    ):
        for name, build in PANELS.items():
            with ui.tab_panel(name):
                build(studio, wishes, tabs)


def _report(nicegui: ModuleType) -> Callable[[str], Any]:
    """The route of a run's report."""
    responses = importlib.import_module("fastapi.responses")

    def report(name: str) -> Any:
        try:
            path = runs.named(name).folder / "report.html"
            if path.is_symlink():
                raise MisError(f"{path} is a link: remove it, then make the report anew")
            text = path.read_text("utf-8")
        except (MisError, OSError) as error:
            return responses.PlainTextResponse(f"There is no report: {error}", status_code=404)
        return responses.HTMLResponse(text, headers=REPORT_HEADERS)

    return report
