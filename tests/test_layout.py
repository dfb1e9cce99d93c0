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


def test_modules_can_be_imported_anywhere() -> None:
    """Limits, folder, signals, environment, warnings do not change, and neither importing a module
    nor a command's --help imports mlx_lm or transformers, which take seconds.
    """
    code = """
import contextlib, importlib, io, os, resource, runpy, signal, sys
import mis_mlx
def state():
    signals = [signal.getsignal(s) for s in sorted(signal.valid_signals())]
    files = resource.getrlimit(resource.RLIMIT_NOFILE)
    return files, os.getcwd(), signals, dict(os.environ), sys.warnoptions
before = state()
names, commands = sys.argv[1].split(), sys.argv[2].split()
for name in names:
    importlib.import_module(name)
for one, other in zip(before, state()):
    assert one == other, (one, other)
for name in commands:
    sys.argv = [name, "--help"]
    del sys.modules[f"mis_mlx.{name}"]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        runpy.run_module(f"mis_mlx.{name}", run_name="__main__", alter_sys=True)
    assert "usage" in out.getvalue().lower(), name
    assert not {"mlx_lm", "transformers"} & set(sys.modules), name
"""
    listed = [f"mis_mlx.{name}".removesuffix(".__init__") for name in SOURCES]
    line = [sys.executable, "-c", code, " ".join(listed), " ".join(commands())]
    run = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


def test_the_walk_names_files_that_exist() -> None:
    """docs/architecture.md, every `file.py` of it; and all packages have their place there."""
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    named = re.findall(r"`([a-z_/]+\.py)`", text)
    assert len(named) > 30
    assert not [name for name in named if not (PACKAGE / name).is_file()]
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert packages == {name for name in packages if re.search(rf"^  {name}/ ", text, re.M)}
