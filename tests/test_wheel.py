"""The wheel: built, and installed into an empty environment outside the checkout.

The environment sees the libraries of this one, but not the checkout: that proves the wheel's own
files and commands. That the list of dependencies is whole is proved by `.ci/run`, which lets pip
install the wheel with all of them, and does the main job from there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from mis_mlx import __version__
from mis_mlx.__main__ import commands

ROOT = Path(__file__).parent.parent
Done = subprocess.CompletedProcess[str]


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
    line = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        out,
        source,
    ]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(out.glob("mis_mlx-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Done]:
    """`installed("mis_mlx.distill", ...)` runs that console command in a folder of its own."""
    env = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", env], check=True)
    python = env / "bin" / "python"
    line = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        wheel,
    ]
    subprocess.run(line, check=True)
    packages = next((env / "lib").glob("python*/site-packages"))
    # A path in such a file is searched, but the .pth files there, the checkout's among them, are
    # not obeyed.
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(name: str, *argv: object, **more: str) -> Done:
        line = [str(env / "bin" / name), *map(str, argv)]
        return subprocess.run(line, cwd=env, env={**own, **more}, capture_output=True, text=True)

    found = run("python", "-c", "import mis_mlx; print(mis_mlx.__file__)")
    where = found.stdout
    assert where.startswith(str(packages)), found.stderr
    return run


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


@pytest.mark.thorough
def test_console_commands_say_what_they_are(installed: Callable[..., Done]) -> None:
    """`mis_mlx` lists them and tells the version; the help of one is that command's."""
    listed = installed("mis_mlx").stdout
    assert all(f"  {name} " in listed for name in commands())
    assert installed("mis_mlx", "--version").stdout == f"mis_mlx {__version__}\n"
    assert "--target-bpw" in installed("mis_mlx.distill", "--help").stdout
