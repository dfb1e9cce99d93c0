"""A page in the browser: choose, decide, run, judge."""

import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from mis_mlx import cli
from mis_mlx.types import MisError, Within


@dataclass(frozen=True)
class Settings:
    """Serves a page for this machine's browser alone, and opens it. Runs that it starts go on
    when it is closed.
    """

    models: tuple[str, ...] = ()
    """more folders in which models are found"""
    port: Annotated[int, Within(0, 65535)] = 0
    """port of 127.0.0.1; 0 takes any free one"""
    no_browser: bool = False
    """print the address and open nothing"""


def need() -> None:
    """MisError when NiceGUI is not there."""
    if find_spec("nicegui") is None:
        remedy = f"{sys.executable} -m pip install 'nicegui>=3.4,<4'"
        raise MisError(f"the page needs NiceGUI, which is not installed: {remedy}")


def run(settings: Settings) -> dict[str, Any]:
    """The command: print the address, serve until Ctrl-C."""
    need()
    cli.check_ranges(settings)
    folders = [Path(name).expanduser() for name in settings.models]
    for folder in folders:
        if not folder.is_dir():
            raise MisError(f"--models {folder} is not a folder: give one that holds model folders")
    from mis_mlx.studio_page import page

    return page.serve(folders, settings.port, browser=not settings.no_browser, say=_say)


def _say(address: str) -> None:
    print(address, flush=True)
    cli.say("open this address in a browser of this machine; it lets one browser in", "Ctrl-C ends")


if __name__ == "__main__":
    cli.main(Settings, run)
