"""Tell TensorBoard (by tensorboardX), Weights & Biases or SwanLab of every step, under mlx-lm's keys."""

import atexit
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mis_mlx.models import load
from mis_mlx.storage import run_folder
from mis_mlx.types import MisError, Step

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "swanlab": "swanlab"}


def check(report_to: str | None) -> list[str]:
    """The names in `report_to`. MisError when one is unknown or its package is not installed."""
    names = [name.strip().lower() for name in (report_to or "").split(",") if name.strip()]
    for name in names:
        if name not in PACKAGES:
            raise MisError(f"--report-to {name} is not known: give {', '.join(PACKAGES)}, or several with commas")
        if find_spec(PACKAGES[name]) is None:
            raise MisError(f"--report-to {name} needs a package that is not installed: pip install {PACKAGES[name]}")
    return names


def reporter(report_to: str | None, folder: Path, config: Mapping[str, Any]) -> Callable[[Step], None] | None:
    """`tell(step)` for the services in `report_to`, of the run in `folder`; None when there are none."""
    if not (names := check(report_to)):
        return None
    others = ",".join(name for name in names if name != "tensorboard")
    callbacks = load.mlx_lm("tuner.callbacks").get_reporting_callbacks
    service = callbacks(others, project_name=folder.name, log_dir=str(folder), config=dict(config))
    writer = None
    if "tensorboard" in names:
        from tensorboardX import SummaryWriter

        writer = SummaryWriter(str(folder / "tensorboard"), flush_secs=2)
        atexit.register(writer.close)  # a thread of its own writes; what it has not yet written is not to be lost
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
        if service:
            service.on_train_loss_report(info)
        if writer:
            for name, value in info.items():
                writer.add_scalar(name, value, step.number)

    return tell
