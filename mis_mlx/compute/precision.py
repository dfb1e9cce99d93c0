"""Metal or a CPU: which of the two holds, by device or by MIS_MLX_POLICY."""

import os
from typing import Literal

from mis_mlx.hardware import rates
from mis_mlx.types import MisError

POLICY = "MIS_MLX_POLICY"  # in the environment, so child processes inherit it


def policy() -> Literal["metal", "cpu"]:
    """The policy that holds: the device's own, or what MIS_MLX_POLICY says, on any device."""
    forced = os.environ.get(POLICY)
    if forced not in (None, "", "metal", "cpu"):
        raise MisError(f"{POLICY} is {forced!r}: set it to metal or cpu, or unset it")
    if forced:
        return "metal" if forced == "metal" else "cpu"
    return "metal" if rates.on_gpu() else "cpu"
