"""How much one line of the code asks of its reader: `scripts/mis scripts/density.py [--files N]`.

Counted on the syntax tree, so layout cannot win. `--write` lowers what
tests/density_ratchet.json allows to what the code has today.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import math
import tokenize
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RATCHET = ROOT / "tests" / "density_ratchet.json"
TREES = ("mis_mlx", "tests", "benchmarks")
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
NODES_A_STATEMENT = 40
NODES_A_LINE = 10.0  # of a file of the package
DENSITY = "nodes a line"  # what the ratchet calls it
POSITIONAL = 5
COLUMNS = 100
SHORT_FILE = 20  # lines of code; a density of fewer says nothing
NOT_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def code_lines(source: str) -> int:
    """Lines that hold code: no blank ones, no comments, no docstrings."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NOT_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines.difference_update(range(node.lineno, (node.end_lineno or 0) + 1))
    return len(lines)


def nodes(source: str) -> int:
    """Syntax nodes of a file."""
    return sum(1 for _ in ast.walk(ast.parse(source)))


def tuple_assignments(tree: ast.Module) -> list[int]:
    """`a, b = x, y` of values that do not need each other. A swap and unpacking stay."""
    lines = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
            continue
        target = node.targets[0]
        if isinstance(target, ast.Tuple) and not _names(target) & _names(node.value):
            lines.append(node.lineno)
    return lines


def _names(node: ast.AST) -> set[str]:
    variables = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    attributes = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
    return variables | attributes


def walruses(tree: ast.Module) -> list[int]:
    """Two walruses in a statement, or one in a comprehension."""
    lines = []
    for statement in _statements(tree):
        inside = list(_of_statement(statement))
        count = sum(isinstance(node, ast.NamedExpr) for node in inside)
        comprehensions = [node for node in inside if isinstance(node, COMPREHENSIONS)]
        if count > 1 or any(_holds(node, ast.NamedExpr) for node in comprehensions):
            lines.append(statement.lineno)
    return lines


def nested_comprehensions(tree: ast.Module) -> list[int]:
    """A comprehension inside a comprehension, or one with two `for`."""
    lines = []
    for node in ast.walk(tree):
        if not isinstance(node, COMPREHENSIONS):
            continue
        if len(node.generators) > 1 or _holds(node, COMPREHENSIONS):
            lines.append(node.lineno)
    return lines


def conditional_expressions(tree: ast.Module) -> list[int]:
    """A conditional expression that holds another one; one, or an `or`, that is called."""
    lines = []
    for node in ast.walk(tree):
        chosen = isinstance(node, ast.Call) and isinstance(node.func, ast.IfExp | ast.BoolOp)
        if chosen or (isinstance(node, ast.IfExp) and _holds(node, ast.IfExp)):
            lines.append(node.lineno)
    return lines


def positional_calls(tree: ast.Module) -> list[int]:
    """Calls with five positional arguments and more."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [call.lineno for call in calls if len(call.args) >= POSITIONAL]


def big_statements(tree: ast.Module) -> list[int]:
    """Statements of more than 40 nodes. Tables of literals and what only declares do not count."""
    return [s.lineno for s in _statements(tree) if _weight(s) > NODES_A_STATEMENT]


def _weight(statement: ast.stmt) -> int:
    declares = (*FUNCTIONS, ast.ClassDef, ast.Import, ast.ImportFrom)
    tables = (ast.Dict, ast.List, ast.Tuple, ast.Set)
    assigned = getattr(statement, "value", None)
    if isinstance(statement, declares) or isinstance(assigned, tables):
        return 0
    return sum(1 for _ in _of_statement(statement))


def _statements(tree: ast.Module) -> list[ast.stmt]:
    """Every statement, inner ones too."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]


def _of_statement(statement: ast.stmt) -> Iterator[ast.AST]:
    """The nodes of one statement, without the statements inside it."""
    waiting: list[ast.AST] = [statement]
    while waiting:
        node = waiting.pop()
        yield node
        waiting.extend(c for c in ast.iter_child_nodes(node) if not isinstance(c, ast.stmt))


def _holds(node: ast.AST, kinds: type | tuple[type, ...]) -> bool:
    """Whether a node of these kinds stands inside of this one."""
    return any(isinstance(inner, kinds) for inner in ast.walk(node) if inner is not node)


Rule = Callable[[ast.Module], list[int]]
RULES: dict[str, Rule] = {
    "tuple assignments": tuple_assignments,
    "walruses": walruses,
    "nested comprehensions": nested_comprehensions,
    "conditional expressions": conditional_expressions,
    "positional calls": positional_calls,
    "big statements": big_statements,
}


@cache
def sources(tree: str) -> dict[str, str]:
    """The text of every Python file below a folder of the checkout, by its path."""
    paths = sorted((ROOT / tree).rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in paths}


def breaches(tree: str) -> dict[str, dict[str, int]]:
    """Rule -> file -> how often it breaks it; files that keep it are left out."""
    counted: dict[str, dict[str, int]] = {word: {} for word in RULES}
    for name, text in sources(tree).items():
        parsed = ast.parse(text)
        for word, rule in RULES.items():
            count = len(rule(parsed))
            if count:
                counted[word][name] = count
    return counted


def densities(tree: str) -> dict[str, float]:
    """Syntax nodes a line of code, of every file that is long enough to say something."""
    measured = {}
    for name, text in sources(tree).items():
        lines = code_lines(text)
        if lines > SHORT_FILE:
            measured[name] = nodes(text) / lines
    return measured


def together(tree: str) -> tuple[int, int]:
    """(syntax nodes, lines of code) of all files."""
    texts = sources(tree).values()
    return sum(map(nodes, texts)), sum(map(code_lines, texts))


@cache
def ratchet() -> dict[str, dict[str, float]]:
    """What the code has today: rule -> file -> how often. Files of the package that have more than
    NODES_A_LINE stand under that name, with what they have.
    """
    found: dict[str, dict[str, float]] = {DENSITY: {}}
    for name, nodes_a_line in densities("mis_mlx").items():
        if nodes_a_line > NODES_A_LINE:
            found[DENSITY][name] = math.ceil(10 * nodes_a_line) / 10
    for word in RULES:
        found[word] = {}
    for tree in TREES:
        for word, files in breaches(tree).items():
            found[word].update(files)
    return found


def main() -> None:
    """Prints the counts; with --write stores the ratchet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=10, help="so many of the densest files")
    parser.add_argument("--write", action="store_true", help="store the ratchet")
    arguments = parser.parse_args()
    found = ratchet()
    for tree in TREES:
        count, lines = together(tree)
        print(f"{tree}: {count:,} nodes, {lines:,} lines of code, {count / lines:.1f} a line")
        for word, files in found.items():
            here = [n for name, n in files.items() if name.startswith(f"{tree}/")]
            total = "" if word == DENSITY else f"{sum(here):.0f} in "
            print(f"  {word}: {total}{len(here)} files")
        ranked = sorted(densities(tree).items(), key=lambda item: -item[1])
        for name, density in ranked[: arguments.files]:
            print(f"  {density:5.1f}  {name}")
    if arguments.write:
        RATCHET.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", "utf-8")


if __name__ == "__main__":
    main()
