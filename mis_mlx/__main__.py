"""`python -m mis_mlx`: the list of commands, one line each; with a command and flags, that command.

Imports none of them: their docstrings are read as text, so the list is there at once. The console
commands `mis_mlx` and `mis_mlx.distill` begin here too, so that Ctrl-C while a command is imported
is one sentence.
"""

import ast
import difflib
import json
import runpy
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from mis_mlx import __version__

USAGE = (
    "Makes a language model smaller on the laptop that will run it. Usage: mis_mlx COMMAND [flags]"
)
NOT_COMMANDS = ("__init__", "__main__", "types", "cli", "flag_help")


def commands() -> dict[str, str]:
    """{command: first line of its module's docstring}, in alphabetical order."""
    first_lines = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem not in NOT_COMMANDS:
            docstring = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
            first_lines[path.stem] = docstring.partition("\n")[0]
    return first_lines


def main() -> None:
    """Run the command that we are called by (`mis_mlx.distill`) or with (`mis_mlx distill`).

    Without one, list all commands.
    """
    try:
        known = commands()
        name = Path(sys.argv[0]).name.removeprefix("mis_mlx.")
        if name not in known:
            name = sys.argv.pop(1) if set(sys.argv[1:2]) & set(known) else ""
        with _reader():
            if "--version" in sys.argv:
                print(f"mis_mlx {__version__}")
            elif name:
                runpy.run_module(f"mis_mlx.{name}", run_name="__main__", alter_sys=True)
            elif set(sys.argv[1:]) - {"-h", "--help"}:
                print(f"mis_mlx: {_unknown(sys.argv[1], known)}", file=sys.stderr)
                sys.exit(2)
            else:
                print(USAGE)
                groups = json.loads((Path(__file__).parent / "help.json").read_text("utf-8"))
                for title, names in groups["commands"].items():
                    print(f"\n{title}")
                    for command in names.split():
                        print(f"  {command:<10} {known[command]}")
    except KeyboardInterrupt:
        print("mis_mlx: stopped by hand before it began: start it again", file=sys.stderr)
        sys.exit(130)


def _reader() -> AbstractContextManager[None]:
    """cli.end_quietly_on_closed_pipe; nothing before the packages are installed, when scripts/mis
    lists commands.
    """
    try:
        from mis_mlx import cli
    except ModuleNotFoundError:
        return nullcontext()
    return cli.end_quietly_on_closed_pipe()


def _unknown(name: str, known: dict[str, str]) -> str:
    """The sentence about a word that is not a command, with the nearest command."""
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"there is no command {name}: {hint}`mis_mlx` lists all commands"


if __name__ == "__main__":
    main()
