"""A user's home and folder, as the page finds them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mis_mlx.compute import precision
from tests import tiny
from tests.conftest import ROOT, Once
from tests.studio_page.driving import QUICK


@pytest.fixture
def home(tmp_path: Path, own_home: dict[str, str]) -> dict[str, str]:
    """The environment of a user whose home is empty."""
    return {
        **own_home,
        precision.POLICY: os.environ.get(precision.POLICY, ""),
        "HOME": str(tmp_path / "home"),
    }


@pytest.fixture
def folder(tmp_path: Path, text_folder: Path) -> Path:
    """A user's folder: a model that talks, a text, a settings file."""
    place = tmp_path / "here"
    place.mkdir()
    (place / "text").symlink_to(text_folder)
    shutil.copytree(text_folder, place / "notes")
    tiny.talking(place / "more" / "tiny", ending=0.3)
    write_settings(place / "quick.yaml", QUICK)
    return place


def write_settings(file: Path, values: dict[str, object]) -> None:
    """A settings file."""
    lines = [f"{name}: {value}" for name, value in values.items()]
    file.write_text("\n".join(lines) + "\n")


@pytest.fixture
def kept(folder: Path, home: dict[str, str], once: Once) -> Path:
    """A user's folder with a finished run, which is made once a session."""

    def distil(place: Path) -> None:
        write_settings(folder / "brief.yaml", {**QUICK, "iters": 8})
        line = [sys.executable, "-m", "mis_mlx.distill", "--teacher", "more/tiny"]
        line += ["--data", "notes", "-c", "brief.yaml", "--out", str(place / "tiny-001")]
        env = {**home, "PYTHONPATH": str(ROOT)}
        subprocess.run(line, cwd=folder, env=env, check=True, capture_output=True)

    made = once(f"studio-runs-{home[precision.POLICY] or 'cpu'}", distil)
    shutil.copytree(made, folder / "runs")
    return folder
