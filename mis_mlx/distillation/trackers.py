"""Tell TensorBoard, Weights & Biases or SwanLab of every step, under mlx-lm's keys.

Does not know what is trained. mlx-lm has no TensorBoard; tensorboardX writes its files without TensorFlow.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mis_mlx.models import load
from mis_mlx.storage import run_folder
from mis_mlx.types import MisError, Step

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "swanlab": "swanlab"}
Report = Callable[[Step], None]


def check(report_to: str | None) -> None:
    """MisError when `report_to`, names with commas, holds one that is unknown or whose package is not installed."""
    for name in _names(report_to):
        if name not in PACKAGES:
            raise MisError(f"--report-to {name} is not known: give {', '.join(PACKAGES)}, or several with commas")
        if find_spec(PACKAGES[name]) is None:
            raise MisError(f"--report-to {name} needs a package that is not installed: pip install {PACKAGES[name]}")


def reporter(report_to: str | None, project: str, folder: Path, config: Mapping[str, Any]) -> Report | None:
    """`tell(step)` for the services in `report_to`; None when there are none."""
    if not (names := _names(report_to)):
        return None
    others = ",".join(name for name in names if name != "tensorboard")
    get = load.mlx_lm("tuner.callbacks").get_reporting_callbacks
    told = get(others, project_name=project, log_dir=str(folder), config=dict(config))
    writer = _tensorboard(folder) if "tensorboard" in names else None
    trained = sum(int(step["tokens"]) for step in run_folder.metrics(folder))  # before it was resumed

    def tell(step: Step) -> None:
        nonlocal trained
        trained += step.tokens
        info = {
            "iteration": step.number,
            "train_loss": step.loss,
            "learning_rate": step.learning_rate,
            "iterations_per_second": 1 / max(step.seconds, 1e-9),
            "tokens_per_second": step.tokens / max(step.seconds, 1e-9),
            "trained_tokens": trained,
            "peak_memory": step.peak_bytes / 1e9,  # GB, as mlx-lm has it
        }
        if told:
            told.on_train_loss_report(info)
        if writer:
            for name, value in info.items():
                writer.add_scalar(name, value, step.number)

    return tell


def _names(report_to: str | None) -> list[str]:
    return [name.strip().lower() for name in (report_to or "").split(",") if name.strip()]


def _tensorboard(folder: Path) -> Any:
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"), flush_secs=2)
    atexit.register(writer.close)  # a thread of its own writes; what it has not yet written is not to be lost
    return writer
