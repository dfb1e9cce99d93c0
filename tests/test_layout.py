"""The house rules that ruff has no word for: who may import whom, and what is cast.

ruff bans the rest (pyproject.toml): slow imports, the system outside hardware/, print, state.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from mis_mlx.__main__ import commands

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mis_mlx"
# From the ground up; a module imports its own folder and what stands before it.
ORDER = (
    "types",
    "flag_help",
    "cli",
    "maths",
    "storage",
    "data",
    "hardware",
    "compute",
    "models",
    "reporting",
    "settings",
    "planner",
    "runs",
    "gguf_export",
    "judge",
    "pruning",
    "quantization",
    "distillation",
    "size_search",
    "alignment",
    "checks",
    "studio_page",
)
SOURCES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path.read_text("utf-8")
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imports(name: str, source: str) -> Iterator[str]:
    """Dotted names below mis_mlx of everything imported, in functions and by name, too."""
    parents = ["mis_mlx", *name.split(".")]
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = parents[: -node.level] if node.level else []
            base = [*start, *filter(None, [node.module])]
            found += [".".join([*base, alias.name]) for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found.append(ast.unparse(node.args[0]).strip("f'\""))
    for dotted in found:
        package, _, rest = dotted.partition(".")
        if package == "mis_mlx" and rest:
            yield rest


def floor(name: str) -> int:
    """Where in ORDER; commands stand above all, and the package's own file opens them."""
    zone = name.partition(".")[0]
    if zone in ORDER:
        return ORDER.index(zone)
    return -1 if zone == "__version__" else len(ORDER) + (zone == "__init__")


def faults(name: str, source: str) -> Iterator[str]:
    """Imports that a module must not have."""
    zone = name.partition(".")[0]
    for other in imports(name, source):
        of_command = floor(other) == len(ORDER)
        if floor(other) > floor(name):
            yield f"{name} imports {other}, which stands above it"
        elif of_command and floor(name) == len(ORDER) and zone not in ("distill", other):
            yield f"{name} imports {other}: only distill knows other commands"
        elif floor(other) == floor(name) and not of_command and not other.startswith(zone):
            yield f"{name} imports {other}"
        elif (
            name.startswith("models.architectures.")
            and other.startswith("models.")
            and not other.startswith("models.architectures")
        ):
            yield f"{name} imports {other}: what a model is does not know how one is opened"


def test_imports_lead_downwards() -> None:
    """A module imports its own folder and lower ones."""
    assert not [fault for name, source in SOURCES.items() for fault in faults(name, source)]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("storage.x", "import mis_mlx.hardware.clock"),
        ("data.polish.x", "from ... import models"),
        ("distillation.x", "def f():\n    from mis_mlx import prune"),
        ("storage.x", "import importlib\nimportlib.import_module('mis_mlx.models.load')"),
        ("models.architectures.x", "def f():\n    import mis_mlx.models.passing.stream"),
        ("prune", "from .distill import run"),
    ],
)
def test_a_wrong_import_is_found(name: str, source: str) -> None:
    """In every spelling."""
    assert list(faults(name, source))


def test_there_is_no_import_circle() -> None:
    """Not even by an import inside a function, which hides one."""
    graph: dict[str, set[str]] = {}
    for name, source in SOURCES.items():
        if name == "__init__":
            continue
        graph[name] = set()
        for dotted in imports(name, source):
            # `from mis_mlx.types import GIB` is an import of types
            parts = dotted.split(".")
            paths = (".".join(parts[:stop]) for stop in range(len(parts), 0, -1))
            graph[name] |= {*[path for path in paths if path in SOURCES and path != name][:1]}
    TopologicalSorter(graph).prepare()


def test_what_was_read_from_disk_is_asked_before_it_is_cast() -> None:
    """It may be integers: packed weights, or the scales of mxfp4. A function that casts `raw` or
    `arrays` asks mx.issubdtype.
    """
    read = re.compile(r"(raw|arrays)(\[.*\]|\.get\(.*\))\.astype|mx\.load\(.*\)\[.*\]\.astype")
    for name, source in SOURCES.items():
        for node in ast.walk(ast.parse(source)) if "astype" in source else ():
            if isinstance(node, ast.FunctionDef):
                text = ast.unparse(node)
                assert not read.search(text) or "mx.issubdtype(" in text, f"{name}.{node.name}"


def test_every_command_is_listed() -> None:
    """`python -m mis_mlx` shows every command with a line of its own."""
    run = subprocess.run(
        [sys.executable, "-m", "mis_mlx"], cwd=ROOT, capture_output=True, text=True
    )
    halves = [line.split(None, 1) for line in run.stdout.splitlines()]
    lines = dict(words for words in halves if len(words) == 2)
    assert commands()
    assert all(lines[name] == about != "" for name, about in commands().items())


def test_help_imports_nothing_slow() -> None:
    """--help of every command answers without mlx_lm and transformers, which take seconds to
    import.
    """
    code = """
import contextlib, io, runpy, sys
for name in sys.argv[1:]:
    sys.argv = [name, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        runpy.run_module(f"mis_mlx.{name}", run_name="__main__", alter_sys=True)
    assert "usage" in out.getvalue().lower(), name
    assert not {"mlx_lm", "transformers"} & set(sys.modules), name
"""
    run = subprocess.run(
        [sys.executable, "-c", code, *commands()], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]


def test_importing_leaves_the_process_as_it_was() -> None:
    """Every module can be imported anywhere; limits, folder, signals, environment, warnings do not
    change.
    """
    code = """
import importlib, os, resource, signal, sys
import mis_mlx
def state():
    signals = [signal.getsignal(s) for s in sorted(signal.valid_signals())]
    files = resource.getrlimit(resource.RLIMIT_NOFILE)
    return files, os.getcwd(), signals, dict(os.environ), sys.warnoptions
before = state()
for name in sys.argv[1:]:
    importlib.import_module(name)
for one, other in zip(before, state()):
    assert one == other, (one, other)
assert "mlx_lm" not in sys.modules and "transformers" not in sys.modules
"""
    listed = [f"mis_mlx.{name}".removesuffix(".__init__") for name in SOURCES]
    run = subprocess.run(
        [sys.executable, "-c", code, *listed], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]


def test_the_walk_names_files_that_exist() -> None:
    """docs/architecture.md, every `file.py` of it; and all packages have their place there."""
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    named = re.findall(r"`([a-z_/]+\.py)`", text)
    assert len(named) > 30
    assert not [name for name in named if not (PACKAGE / name).is_file()]
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert packages == {name for name in packages if re.search(rf"^  {name}/ ", text, re.M)}
