"""Remove blocks, neurons, experts, heads, channels or tokens."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mis_mlx import cli
from mis_mlx.data import preparation
from mis_mlx.hardware import memory
from mis_mlx.hardware.stage_cost import WINDOWS
from mis_mlx.hardware.thermal.run_monitor import ThermalMonitor
from mis_mlx.models.architectures import arch
from mis_mlx.models.opening import load
from mis_mlx.models.opening.model_size import model_of
from mis_mlx.planner import estimates
from mis_mlx.pruning import select, vocabulary
from mis_mlx.reporting import html, progress
from mis_mlx.runs import run_loop
from mis_mlx.types import Count, Seed, Tokens


@dataclass(frozen=True)
class Settings(cli.Budgeted, select.PruningConfig):
    """Only prunes; `distill` runs the whole pipeline."""

    model: str | None = None
    """folder or hub id of the model to prune; default: SmolLM2-135M-Instruct"""
    mlx_path: str = "pruned"
    """folder to write"""
    data: str | None = None
    """calibration text: a folder with train.jsonl, or a hub data set; default: built-in text"""
    num_samples: Count = 32
    """calibration windows"""
    max_seq_length: Tokens = 256
    """tokens per window"""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """data type of the saved weights"""
    seed: Seed = 0
    """selects the calibration windows"""
    config: cli.ConfigFile = None
    """YAML file with any of these flags"""


def run(settings: Settings) -> dict[str, Any]:
    """The command: find the model, read the text, prune."""
    s = settings
    checkpoint = run_loop.open_model(s, s.model, place=s.mlx_path, new="--mlx-path")
    s = replace(s, **vocabulary.defaults(s.scenario, s.vocab, checkpoint.config, checkpoint.path))
    rows = vocabulary.rows_left(checkpoint, s)
    limit = memory.budget(s.budget_bytes)
    length = s.max_seq_length
    m = model_of(checkpoint)
    rotation = select.wanted_shape(checkpoint.config, s).hidden < m.shape.hidden
    planned = select.pruning_cost(
        m,
        m.nbytes,
        windows=s.num_samples,
        length=length,
        limit=limit.limit_bytes,
        rotation=rotation,
        shown=m if rows < m.shape.vocab else None,
    )
    estimates.require_fit(limit, planned)
    source = preparation.Source(s.data, tokens=s.num_samples * length)
    data = preparation.prepare(source, load.tokenizer(checkpoint.path), length)
    with (
        progress.run("prune"),
        memory.limited(limit),
        tempfile.TemporaryDirectory(prefix="mis_mlx-") as scratch,
        ThermalMonitor(s, None) as thermal_monitor,
    ):
        teacher, data = vocabulary.of_run(
            checkpoint,
            student=None,
            rows=rows,
            own=data,
            config=s,
            source=s.data,
            run=Path(scratch),
        )
        samples = preparation.calibration(data.train, s.num_samples, s.seed)
        run_loop.forget_text()
        report = select.prune(
            teacher,
            samples,
            Path(s.mlx_path),
            s,
            dtype=s.dtype,
            air=thermal_monitor.air,
            held=planned.stays.get(WINDOWS, 0),
        )
        report["params_before"] = arch.params(checkpoint.config)
        cli.say(html.document("pruned.md", report))
        return {
            "model": str(checkpoint.path),
            "mlx_path": s.mlx_path,
            **report,
            **thermal_monitor.account(),
        }


if __name__ == "__main__":
    cli.main(Settings, run)
