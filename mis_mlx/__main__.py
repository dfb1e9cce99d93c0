"""`python -m mis_mlx`: the list of commands, one line each.

Imports none of them: their docstrings are read as text, so the list is there at once.
"""

from __future__ import annotations

import ast
from pathlib import Path

NOT_COMMANDS = ("__init__", "__main__", "types", "cli")


def commands() -> dict[str, str]:
    """{command: first line of its module's docstring}, in alphabetical order."""
    modules = sorted(path for path in Path(__file__).parent.glob("*.py") if path.stem not in NOT_COMMANDS)
    return {path.stem: summary(path.read_text(encoding="utf-8")) for path in modules}


def summary(source: str) -> str:
    """The first line of a module's docstring; empty when there is none."""
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def main() -> None:
    """Print the commands."""
    listed = commands()
    width = max([10, *(len(name) for name in listed)])
    print("Makes a language model smaller on the laptop it will run on. Usage: scripts/mis COMMAND [flags]\n")
    for name, line in listed.items():
        print(f"  {name:<{width}} {line}")


if __name__ == "__main__":
    main()
