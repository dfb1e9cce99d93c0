"""Miś-Minitron on MLX: make a language model smaller on the laptop it will run on.

`mis_mlx.distill(teacher=..., out=...)`, and so prune, quantize, evaluate, export; `mis_mlx.open(folder)`. Nothing is
imported before it is used (docs/python-api.md)."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
FUNCTIONS = ("distill", "prune", "quantize", "evaluate", "export")


def __getattr__(name: str) -> Any:
    if name in ("open", "Result", "MisError"):
        return getattr(import_module("mis_mlx.types" if name == "MisError" else "mis_mlx.functions"), name)
    if name not in FUNCTIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_module("mis_mlx.hardware.blas").load()
    module = import_module(f"mis_mlx.{name}")
    module.__class__ = import_module("mis_mlx.functions").Function
    return module
