"""The house rules: who may import whom, who speaks, what may not be changed by a function, and what
Metal would refuse, which no test here can see. Read with `ast`.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from graphlib import CycleError, TopologicalSorter
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
COMMAND_FLOOR = len(ORDER)
METHODS = {  # that change what they belong to
    *("add", "append", "appendleft", "clear", "discard", "extend", "insert", "move_to_end", "pop"),
    *("popitem", "popleft", "remove", "reverse", "setdefault", "sort", "update"),
}
# (module, what a function of it changes), of which a process has one
STATE = {
    ("reporting.progress", "cli.SHOWN"),  # what is on the terminal
}


@dataclass(frozen=True)
class Module:
    """One file: `name` is dotted without the package, such as "storage.files" or "prune"."""

    name: str
    source: str

    @cached_property
    def tree(self) -> ast.Module:
        """The file's syntax tree."""
        return ast.parse(self.source)

    @cached_property
    def nodes(self) -> list[ast.AST]:
        """All of the tree, which most rules look at."""
        return list(ast.walk(self.tree))

    @property
    def zone(self) -> str:
        """The folder, or the module itself when it lies on top."""
        return self.name.partition(".")[0]

    @property
    def is_command(self) -> bool:
        """Whether a person runs it."""
        return floor(self.zone) == COMMAND_FLOOR


@cache
def modules() -> list[Module]:
    """Every file of the package."""
    paths = sorted(PACKAGE.rglob("*.py"))
    return [
        Module(".".join(p.relative_to(PACKAGE).with_suffix("").parts), p.read_text("utf-8"))
        for p in paths
    ]


def floor(zone: str) -> int:
    """Where in ORDER; commands are above all. The package itself (`mis_mlx`, `mis_mlx.__version__`)
    is 0.
    """
    if zone in ORDER:
        return ORDER.index(zone)
    return 0 if zone in ("", "__init__", "__version__") else COMMAND_FLOOR


def imports(module: Module, nodes: Iterable[ast.AST] | None = None) -> Iterator[str]:
    """Dotted names of everything imported: `import a.b`, `from a import b` and `from .c import d`
    alike.
    """
    parents = ["mis_mlx", *module.name.split(".")]
    for node in module.nodes if nodes is None else nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = parents[: -node.level] if node.level else []
            yield from (
                ".".join([*start, *filter(None, [node.module]), a.name]) for a in node.names
            )
        elif isinstance(node, ast.Call) and _called(node).endswith(("import_module", "__import__")):
            yield ast.unparse(node.args[0]).removeprefix("f").strip("'\"")


def _called(call: ast.Call) -> str:
    """The last word of what is called: `import_module` of `importlib.import_module(...)`."""
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def ours(module: Module) -> Iterator[str]:
    """The zones of this package that the module imports."""
    names = [name.split(".") for name in imports(module)]
    return (parts[1] for parts in names if parts[0] == "mis_mlx" and len(parts) > 1)


def floors(module: Module) -> list[str]:
    """A module imports its own folder and lower ones."""
    # The package's own file opens the commands, each when it is asked for, so it stands above them.
    mine = COMMAND_FLOOR + 1 if module.name == "__init__" else floor(module.zone)
    return [
        f"imports {zone}"
        for zone in ours(module)
        if zone != module.zone
        and floor(zone) >= mine
        and not (module.is_command and floor(zone) == mine)
    ]


def rooms(module: Module) -> list[str]:
    """What a model is (models/architectures) does not know how one is opened, passed or written."""
    if not module.name.startswith("models.architectures."):
        return []
    return [
        f"imports {name}"
        for name in imports(module)
        if name.startswith("mis_mlx.models.")
        and not name.startswith("mis_mlx.models.architectures")
    ]


def conductor(module: Module) -> list[str]:
    """Commands do not import each other; only distill does."""
    if not module.is_command or module.name == "distill":
        return []
    return [f"imports {z}" for z in ours(module) if floor(z) == COMMAND_FLOOR and z != module.zone]


def outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    """What runs when the module is imported."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from outside_functions(child)


def slow_imports(module: Module) -> list[str]:
    """mlx_lm and transformers: under models/, inside functions."""
    nodes = outside_functions(module.tree) if module.zone == "models" else None
    return [
        name for name in imports(module, nodes) if name.split(".")[0] in ("mlx_lm", "transformers")
    ]


def machine_door(module: Module) -> list[str]:
    """ctypes, subprocess and platform: only hardware/."""
    if module.zone == "hardware":
        return []
    return [
        name
        for name in imports(module)
        if name.split(".")[0] in ("ctypes", "subprocess", "platform")
    ]


def calls(module: Module) -> list[str]:
    """Everything called, as written: 'print', 'mx.eval'."""
    return [ast.unparse(n.func) for n in module.nodes if isinstance(n, ast.Call)]


def speaking(module: Module) -> list[str]:
    """print, sys.exit and flags: only cli.py and commands."""
    if module.is_command or module.name == "cli":
        return []
    said = [
        call
        for call in calls(module)
        if call in ("print", "sys.exit", "exit", "quit", "SystemExit")
    ]
    return said + [
        n
        for n in imports(module)
        if n.split(".")[0] in ("argparse", "tyro", "click") or n == "sys.exit"
    ]


def _functions(module: Module) -> list[ast.AST]:
    """Every function, and all that stands outside of them as one more."""
    inside = [n for n in module.nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    outside = ast.Module([n for n in module.tree.body if n not in inside], [])
    return [*inside, outside]


def doubles(module: Module) -> list[str]:
    """Metal has no float64: who makes one for MLX puts what is done with it on the CPU's stream, in
    that function.
    """
    written = [ast.unparse(f) for f in _functions(module) if "float64" in module.source]
    named = [name for name in imports(module) if name == "mlx.core.float64"]
    return named + [
        t.splitlines()[0] for t in written if "mx.float64" in t and "stream=mx.cpu" not in t
    ]


def decompositions(module: Module) -> list[str]:
    """mx.linalg's decompositions have no Metal version: numpy, or the CPU's stream."""
    found = [
        n for n in module.nodes if isinstance(n, ast.Call) and "mx.linalg." in ast.unparse(n.func)
    ]
    named = [name for name in imports(module) if name.startswith("mlx.core.linalg")]
    return named + [c for c in map(ast.unparse, found) if "stream=mx.cpu" not in c]


def casts(module: Module) -> list[str]:
    """What was read from disk (`raw`, `arrays`, mx.load, safetensors.lazy) may be integers: packed
    weights, or the scales of mxfp4. It is cast only in a function that asks mx.issubdtype.
    """
    read = r"(raw|arrays)(\[|\.(items|values|get)\()|(mx\.load|safetensors\.lazy)\("
    bad = []
    for function in _functions(module) if "astype" in module.source else []:
        drawn = {"a name that no variable has"}  # in a loop over what was read
        for node in ast.walk(function):
            if isinstance(node, ast.For | ast.comprehension) and re.match(
                read, ast.unparse(node.iter)
            ):
                drawn |= {n.id for n in ast.walk(node.target) if isinstance(n, ast.Name)}
        for node in ast.walk(function):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "astype"
            ):
                of = ast.unparse(node.func.value)
                if (re.match(read, of) or of in drawn) and "mx.issubdtype(" not in ast.unparse(
                    function
                ):
                    bad.append(ast.unparse(node))
    return bad


def _defined(module: Module) -> set[str]:
    """Names that a module gives a value or a class."""
    defined = set[str]()
    for node in module.tree.body:
        if isinstance(node, ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            defined |= {target.id for target in targets if isinstance(target, ast.Name)}
    return defined


def _cached(module: Module) -> set[str]:
    """Functions of a module that remember what they gave."""
    cached = set[str]()
    for node in module.tree.body:
        if isinstance(node, ast.FunctionDef):
            decorators = map(ast.unparse, node.decorator_list)
            if any(re.search(r"\bcache\b|lru_cache", decorator) for decorator in decorators):
                cached.add(node.name)
    return cached


def _locals(function: ast.AST) -> set[str]:
    """Parameters of a function and what it gives a value, without what it says is global."""
    names = set[str]()
    for node in ast.walk(function):
        if isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


@dataclass(frozen=True)
class Change:
    """What a function changes: `x` of `x[i] = …`, `x.a = …`, `del x[i]`, `x.append(…)`."""

    node: ast.expr
    called: bool  # by a method: `files.append(…)` may be a function of a module `files`

    @property
    def owner(self) -> ast.expr:
        """What it belongs to: `x` of `x.a[i].append(…)`."""
        owner = self.node
        while isinstance(owner, ast.Subscript | ast.Attribute):
            owner = owner.value
        return owner


def _changes(function: ast.AST) -> Iterator[Change]:
    for node in ast.walk(function):
        if isinstance(node, ast.Subscript | ast.Attribute):
            if not isinstance(node.ctx, ast.Load):
                yield Change(node.value, called=False)
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
                yield Change(node.func.value, called=True)
            elif _called(node) in ("setattr", "delattr"):
                yield Change(node.args[0], called=False)


def _is_state(module: Module, change: Change, shadowed: set[str]) -> bool:
    """Whether what is changed outlives the function. shadowed: names of the function itself."""
    owner = change.owner
    if isinstance(owner, ast.Call):
        return isinstance(owner.func, ast.Name) and owner.func.id in _cached(module)
    if not isinstance(owner, ast.Name) or owner.id in shadowed:
        return False
    if owner.id in _defined(module):
        return True
    ours = {name.rpartition(".")[2] for name in imports(module) if name.startswith("mis_mlx.")}
    return owner.id in ours and not (change.called and change.node is owner)


def state(module: Module) -> list[str]:
    """No function changes what is defined in a module, of its own or of another one, or what a
    cached function gave: it is passed. STATE lists the exceptions.
    """
    bad = [f"line {n.lineno}: {ast.unparse(n)}" for n in module.nodes if isinstance(n, ast.Global)]
    for node in module.tree.body:
        value = getattr(node, "value", None)
        if isinstance(value, ast.Call) and _called(value) in ("ContextVar", "local"):
            bad.append(f"line {node.lineno}: {ast.unparse(node)}")
    functions = [n for n in module.nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    for function in functions:
        shadowed = _locals(function)
        for change in _changes(function):
            text = ast.unparse(change.node)
            if _is_state(module, change, shadowed) and (module.name, text) not in STATE:
                bad.append(f"line {change.node.lineno}: changes {text}")
    return bad


RULES: list[Callable[[Module], list[str]]] = [
    floors,
    rooms,
    conductor,
    slow_imports,
    machine_door,
    speaking,
    doubles,
    decompositions,
    casts,
    state,
]

# Rule, a module's name, a source that breaks the rule there.
BROKEN = [
    (floors, "storage.x", "import mis_mlx.hardware.clock"),
    (floors, "storage.x", "from mis_mlx import data"),
    (floors, "maths.x", "from mis_mlx.storage import files"),
    (floors, "data.x", "from ..hardware import clock"),
    (floors, "data.polish.x", "from ... import models"),
    (floors, "models.x", "from mis_mlx.distillation.train_loop import train"),
    (floors, "distillation.x", "def f():\n    from mis_mlx import prune"),
    (floors, "cli", "import mis_mlx.storage"),
    (floors, "types", "from mis_mlx.cli import main"),
    (floors, "storage.x", "import importlib\nimportlib.import_module('mis_mlx.models.load')"),
    (rooms, "models.architectures.x", "from mis_mlx.models.opening import load"),
    (rooms, "models.architectures.x", "def f():\n    import mis_mlx.models.passing.stream"),
    (conductor, "prune", "from mis_mlx import quantize"),
    (conductor, "prune", "from .distill import run"),
    (slow_imports, "storage.x", "def f():\n    import transformers"),
    (slow_imports, "prune", "from mlx_lm import load"),
    (slow_imports, "models.x", "import mlx_lm.utils"),
    (
        slow_imports,
        "models.x",
        "class C:\n    import mlx_lm\n    def f(self):\n        import mlx_lm",
    ),
    (
        slow_imports,
        "distillation.x",
        "def f(n):\n    return importlib.import_module(f'mlx_lm.{n}')",
    ),
    (machine_door, "storage.x", "import subprocess"),
    (machine_door, "prune", "def f():\n    from ctypes import CDLL"),
    (speaking, "storage.x", "def f():\n    print(1)"),
    (speaking, "models.x", "import sys\ndef f():\n    sys.exit(1)"),
    (speaking, "distillation.x", "from argparse import ArgumentParser"),
    (speaking, "maths.x", "import tyro"),
    (doubles, "maths.x", "def f(x):\n    return mx.array(x, mx.float64).sum()"),
    (
        doubles,
        "maths.x",
        "def f(x):\n    return x.astype(mx.float64)\ndef g(x):\n    return "
        "mx.sum(x, stream=mx.cpu)",
    ),
    (doubles, "maths.x", "from mlx.core import float64"),
    (doubles, "maths.x", "KIND = mx.float64"),
    (decompositions, "maths.x", "def f(x):\n    return mx.linalg.eigh(x)"),
    (decompositions, "maths.x", "from mlx.core.linalg import svd"),
    (casts, "models.load", "def f(raw, n, dtype):\n    return raw[n].astype(dtype)"),
    (
        casts,
        "models.x",
        "def f(raw, dtype):\n    return {n: a.astype(dtype) for n, a in raw.items()}",
    ),
    (
        casts,
        "models.x",
        "def f(arrays):\n    for a in arrays.values():\n        yield a.astype(mx.float32)",
    ),
    (casts, "models.x", "def f(p, n, dtype):\n    return mx.load(p)[n].astype(dtype)"),
    (state, "models.x", "SEEN = []\ndef f(x):\n    SEEN.append(x)"),
    (state, "models.x", "SEEN = {}\ndef f(x):\n    SEEN[x] = 1"),
    (state, "models.x", "SEEN: dict = {}\ndef f(x):\n    SEEN[x]['a'] += 1"),
    (state, "models.x", "SEEN = {}\ndef f(x):\n    del SEEN[x]"),
    (state, "models.x", "COUNT = 0\ndef f():\n    global COUNT\n    COUNT += 1"),
    (state, "models.x", "class A:\n    seen = 0\ndef f():\n    A.seen = 1"),
    (state, "models.x", "class A:\n    seen = []\n    def f(self):\n        A.seen.append(1)"),
    (state, "models.x", "class A:\n    pass\ndef f():\n    setattr(A, 'seen', 1)"),
    (state, "models.x", "from mis_mlx import cli\ndef f():\n    cli.SHOWN.clear()"),
    (state, "models.x", "from mis_mlx.models import load\ndef f():\n    load.LIMIT = 3"),
    (state, "models.x", "from mis_mlx.models.load import A\ndef f():\n    A[3] = 1"),
    (state, "models.x", "from contextvars import ContextVar\nNOW = ContextVar('now')"),
    (state, "models.x", "import threading\nNOW = threading.local()"),
    (state, "models.x", "@cache\ndef _all():\n    return {}\ndef f(x):\n    _all()[x] = 1"),
    (state, "models.x", "@functools.cache\ndef _a():\n    return A()\ndef f():\n    _a().b = 1"),
]

GOOD = '''"""Nothing to complain about."""
from __future__ import annotations
import mlx.core as mx
from mis_mlx import __version__
from mis_mlx.types import MisError
NAMES = ["a"]
if TYPE_CHECKING:
    from mis_mlx.types import Step
def f(raw, name, dtype):
    """Cast floats, add up doubles, decompose on the CPU."""
    NAMES = [raw]
    NAMES.append(name)
    doubles = mx.array([1.0], mx.float64)
    mx.linalg.eigh(doubles, stream=mx.cpu)
    return raw[name].astype(dtype) if mx.issubdtype(raw[name].dtype, mx.floating) else raw[name]
'''


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(rule: Callable[[Module], list[str]]) -> None:
    """No module breaks it."""
    found = {module.name: rule(module) for module in modules()}
    broken = {name: faults for name, faults in found.items() if faults}
    assert not broken, f"{rule.__doc__} Broken by: {broken}"


@pytest.mark.parametrize(("rule", "name", "source"), BROKEN)
def test_the_rule_can_fail(rule: Callable[[Module], list[str]], name: str, source: str) -> None:
    """Each rule catches a module that breaks it, in every spelling."""
    assert rule(Module(name, source))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_rule_can_pass(rule: Callable[[Module], list[str]]) -> None:
    """A clean module is let through on every floor; distill may conduct and models/ may open
    mlx_lm.
    """
    for name in ("storage.x", "maths.x", "models.x", "distillation.x", "prune"):
        assert rule(Module(name, GOOD)) == []
    assert rule(Module("distill", GOOD + "from mis_mlx import prune\n")) == []
    assert rule(Module("models.y", GOOD + "def g():\n    '''G.'''\n    import mlx_lm\n")) == []


def imported(module: Module, names: Container[str]) -> Iterator[str]:
    """The modules among `names` that a module imports, in its functions too. Packages are empty."""
    for name in imports(module):
        parts = name.split(".")
        if parts[0] != "mis_mlx":
            continue
        # `from mis_mlx.types import GIB` is an import of types
        paths = (".".join(parts[1:stop]) for stop in range(len(parts), 1, -1))
        target = next((path for path in paths if path in names), module.name)
        if target != module.name:
            yield target


def circle(among: Iterable[Module]) -> list[str]:
    """Modules that import each other in a circle, if any do.

    The package's own file opens any module when it is asked to, and is left out.
    """
    graph = {}
    names = {module.name for module in among} - {"__init__"}
    for module in among:
        if module.name in names:
            graph[module.name] = set(imported(module, names))
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_there_is_no_import_circle() -> None:
    """Not even by an import inside a function, which hides one."""
    assert not circle(modules())


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("from mis_mlx.models import b", "import mis_mlx.models.a"),
        ("from mis_mlx.models.b import f", "def f():\n    from mis_mlx.models import a"),
        ("from .b import f", "def f():\n    importlib.import_module('mis_mlx.models.a')"),
    ],
)
def test_an_import_circle_is_found(first: str, second: str) -> None:
    """Through a third module, too."""
    a = Module("models.a", first)
    b = Module("models.b", second)
    third = Module("models.c", "def f():\n    from mis_mlx.models.a import g")
    assert set(circle([a, b])) == {"models.a", "models.b"}
    through = Module("models.b", "from mis_mlx.models import c")
    assert set(circle([a, through, third])) == {"models.a", "models.b", "models.c"}
    assert not circle([a, third])


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
    listed = [f"mis_mlx.{module.name}".removesuffix(".__init__") for module in modules()]
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
