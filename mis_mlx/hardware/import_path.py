"""Keep Python files in the current folder from being imported in place of libraries.

`python -m` puts the current folder first among the places of modules. Whoever stands in a model
folder would run a stranger's `json.py`. The package imports this before anything else, and the
import does it. Only `os` and `sys` are used here: Python has both in itself.
"""

import os
import sys

NAME = "mis_mlx"
SAFE = "PYTHONSAFEPATH"  # as `python -P`, for all that a process starts
PLACES = "PYTHONPATH"
PACKAGE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def python(*words: str) -> list[str]:
    """The command line of a child of this Python, which imports nothing from its folder."""
    return [sys.executable, "-P", *words]


def environment() -> dict[str, str]:
    """The environment in which a child finds this package, and nothing in the current folder."""
    places = [PACKAGE]
    for place in os.environ.get(PLACES, "").split(os.pathsep):
        if place and place != PACKAGE:  # an empty one means the current folder
            places.append(place)
    return {**os.environ, SAFE: "1", PLACES: os.pathsep.join(places)}


def _is_module() -> bool:
    """Whether this process is `python -m mis_mlx...`, which is about to begin.

    The first argument is "-m" until Python has found the module.
    """
    if sys.argv[:1] != ["-m"] or len(sys.orig_argv) < len(sys.argv):
        return False
    # The arguments stand last, the module's name before them: `-m NAME` or `-mNAME`.
    word = sys.orig_argv[-len(sys.argv)]
    top = word.partition(".")[0]
    if top.startswith("-"):
        return top.endswith("m" + NAME)
    return top == NAME


def _is_console_command() -> bool:
    """Whether this process is a console command: `mis_mlx`, `mis_mlx.distill`."""
    if not sys.argv:
        return False
    program = os.path.basename(sys.argv[0])
    return program.partition(".")[0] == NAME


def _leave_current_folder() -> None:
    """Drop the current folder where it stands first among the places of modules."""
    if sys.flags.safe_path or not sys.path:
        return
    try:
        here = os.getcwd()
    except OSError:  # it was deleted, so Python has not put it there
        return
    if os.path.abspath(sys.path[0]) != here:
        return
    del sys.path[0]
    if here == PACKAGE:  # a checkout: children find it in their environment
        os.environ.update(environment())


def _settle() -> None:
    """Of a command: leave the current folder out, here and in every process that it starts.

    A program that imports this package keeps its own places.
    """
    as_module = _is_module()
    if as_module:
        _leave_current_folder()
    if as_module or _is_console_command():
        os.environ[SAFE] = "1"


_settle()
