"""Miś-Minitron on MLX: make a language model smaller on the laptop it will run on.

`mis_mlx.distill(teacher=..., out=...)`, and so prune, quantize, evaluate, export;
`mis_mlx.open(folder)`. Nothing is imported before it is used (docs/python-api.md).
"""

from mis_mlx.hardware import import_path  # noqa: F401  before what could lie in the current folder

# isort: split
import inspect
import os
import sys
from contextlib import redirect_stdout
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from mis_mlx.hardware import macos
from mis_mlx.types import Checkpoint
from mis_mlx.types import MisError as MisError

# Before anything opens Metal's device: commands, scripts and Python programs all import this file.
macos.settle()

__version__ = "0.1.0"
FUNCTIONS = ("distill", "prune", "quantize", "evaluate", "export")
WRITTEN = ("student", "mlx_path", "out")  # what a command's JSON calls the folder that it wrote


class Result(dict[str, Any]):
    """A command's result: what --json prints. Sizes end in `_bytes`, times in `_s`."""

    @property
    def folder(self) -> Path | None:
        """The folder that was written, of the model if one was made.

        None: nothing was written, as with `dry_run=True`.
        """
        for key in WRITTEN:
            if self.get(key) and Path(self[key]).exists():
                return Path(self[key])
        return None


class Function(ModuleType):
    """A command's module, which may be called with its flags, dashes as underscores."""

    def __call__(self, **settings: Any) -> Result:
        """Do what the command does with these flags. Tables and progress go to stderr.

        MisError, one sentence, where the user can fix it; TypeError for an unknown keyword; after
        a KeyboardInterrupt the run can be resumed.
        """
        cli = import_module("mis_mlx.cli")
        named = import_module("mis_mlx.flag_help").current_names(self.Settings, settings)
        plain = {name: _plain(value) for name, value in named.items()}
        for field in fields(self.Settings):
            if field.name in plain:
                value = plain[field.name]
                plain[field.name] = cli.fitting(self.Settings, field.name, value, field.name)
        given = self.Settings(**plain)
        cli.check_ranges(given)
        cli.prepare()
        with redirect_stdout(sys.stderr):
            return Result(self.run(given))

    @property
    def __signature__(self) -> inspect.Signature:
        made = inspect.signature(self.Settings.__init__)
        _, *settings = made.parameters.values()
        own = getattr(self.Settings, "INTERNAL", ())
        return made.replace(parameters=[each for each in settings if each.name not in own])


def _plain(value: Any) -> Any:
    """A setting as flags give it: lists as tuples, paths as text, at any depth."""
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value


def open(folder: str | os.PathLike[str]) -> Checkpoint:
    """The model in a folder, or the last one of a run's folder, by its headers alone.

    It has `config`, `nbytes`, and `tensors`, {name: dtype, shape, place in its file}. No weight is
    read: `mlx_lm.load(folder)` does that. MisError if the folder has no model, or a damaged one.
    """
    load = import_module("mis_mlx.models.opening.load")
    run_folder = import_module("mis_mlx.storage.run_folder")
    path = Path(folder)
    if (path / run_folder.CONFIG).is_file():
        path = path / "model"
    return load.open_checkpoint(path)


def __getattr__(name: str) -> Any:
    if name not in FUNCTIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_module("mis_mlx.hardware.blas").load()
    module = import_module(f"mis_mlx.{name}")
    module.__class__ = Function
    return module
