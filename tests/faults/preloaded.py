"""What a process imports before it runs a job: a server that has imported this is forked in no
time.

Nothing is computed here: threads do not survive a fork, and MLX computes in threads.
"""

import importlib
from pathlib import Path

from mis_mlx import __main__, cli, prune
from mis_mlx.models.opening import load
from mis_mlx.reporting import html
from tests.faults import verdicts

__all__ = ["verdicts"]

load.mlx_lm("utils")
# What commands and libraries import once they have a model, which takes every fork a seventh of a
# second.
for name in (
    *(f"mis_mlx.{each}" for each in __main__.commands()),
    "mlx_lm.models.llama",
    "numpy.ma",
    "numpy.random",
    "transformers.models.llama.configuration_llama",
    "transformers.video_utils",
):
    importlib.import_module(name)
cli.parse(prune.Settings, [])  # tyro imports half of itself when it is first used
# compiled once, not by each that writes a page
for path in Path(html.__file__).with_name("templates").iterdir():
    html._templates().get_template(path.name)
