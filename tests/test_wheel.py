"""The wheel. `.ci/run` installs it with all its dependencies into an empty environment, and does
the main job from there.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from mis_mlx.__main__ import commands

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made from a copy of what belongs to it, so that nothing older in the checkout gets in."""
    source = tmp_path_factory.mktemp("source")
    out = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(
        ROOT / "mis_mlx", source / "mis_mlx", ignore=shutil.ignore_patterns("__pycache__")
    )
    line = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    line += ["-w", str(out), str(source)]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(out.glob("mis_mlx-*.whl"))


def test_the_wheel_holds_every_file(wheel: Path) -> None:
    """Every module of every folder, and nothing but the package and its papers."""
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "mis_mlx").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_every_command_is_a_console_command() -> None:
    """In mlx-lm's manner, and `mis_mlx` itself: no command is forgotten."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]
    assert set(scripts) == {"mis_mlx", *(f"mis_mlx.{name}" for name in commands())}
    assert set(scripts.values()) == {"mis_mlx.__main__:main"}
