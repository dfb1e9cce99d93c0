"""What a process imports before it runs a job: a server that has imported this is forked in no time.

Nothing is computed here: threads do not survive a fork, and MLX computes in threads.
"""

from mis_mlx import cli, prune
from mis_mlx.models import load
from tests.faults import verdicts

__all__ = ["verdicts"]

load.mlx_lm("utils")
cli.parse(prune.Settings, [])  # tyro imports half of itself when it is first used
