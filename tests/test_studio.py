"""The command `studio`: refusals before a page is there (tests/studio_page has the page)."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mis_mlx import studio
from mis_mlx.types import MisError
from tests.conftest import ROOT
from tests.studio_page.driving import needs_extra


def test_without_the_extra_one_sentence_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Before anything else: nothing is listened to, nothing is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(studio, "find_spec", lambda name: None)
    with pytest.raises(MisError) as error:
        studio.run(studio.Settings(models=("nowhere",)))
    assert re.search(r"needs NiceGUI, which is not installed: .*pip install 'nicegui", str(error))
    assert not list(tmp_path.iterdir())


def test_nothing_imports_the_extra() -> None:
    """Neither the list of commands, nor the help of this one, nor its modules, which do not bring
    MLX either.
    """
    files = (ROOT / "mis_mlx" / "studio_page").glob("*.py")
    names = sorted(path.stem for path in files)
    code = """
import contextlib, importlib, io, sys
import mis_mlx.__main__, mis_mlx.studio
from mis_mlx import cli
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    cli.parse(mis_mlx.studio.Settings, ["--help"])
light = {"mis_mlx.studio_page", "mlx", "nicegui", "fastapi", "uvicorn"} & set(sys.modules)
assert not light, light
for name in sys.argv[1:]:
    importlib.import_module(f"mis_mlx.studio_page.{name}")
assert not {"nicegui", "fastapi", "uvicorn", "mlx", "numpy", "mlx_lm"} & set(sys.modules)
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, *names], env=env, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


@needs_extra
def test_a_folder_that_is_none_and_a_port_that_is_taken(tmp_path: Path) -> None:
    """Two sentences."""
    with pytest.raises(MisError, match="nowhere is not a folder: give one that holds"):
        studio.run(studio.Settings(models=(str(tmp_path / "nowhere"),)))
    with contextlib.closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(MisError, match=f"--port {port} is taken"):
            studio.run(studio.Settings(port=port, no_browser=True))
