"""Quantize a model to 4 bits so that every linear is really quantized and stock mlx-lm opens the result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mis_mlx import cli
from mis_mlx.disk.files import Files
from mis_mlx.machine import memory
from mis_mlx.model import load, pack, teacher
from mis_mlx.training import phases, planning


@dataclass(frozen=True)
class Settings:
    """Quantize only; `distill` does this as its last stage."""

    model: str | None = None
    """folder or hub id of an unquantized model; default: SmolLM2-135M-Instruct"""
    mlx_path: str = "quantized"
    """folder to write"""
    q_group_size: Literal[32, 64] = 64
    """weights that share one scale"""
    budget: str | None = None
    """memory this may take, such as 600MiB; default: 5GiB or 75 % of what is there"""
    config: cli.ConfigFile = None
    """YAML file with any of these flags"""


def check(config: Mapping[str, Any], group_size: int) -> None:
    """Refuse, before hours of work, a shape that cannot be quantized whole."""
    pack.layout(config, group_size)


def quantize(folder: Path, out: Path, group_size: int, files: Files) -> Mapping[str, Any]:
    """Write the 4-bit model `out` from the dense model `folder`. Returns bits per weight and the groups used."""
    return pack.write_quantized(load.open_checkpoint(folder), out, group_size, files)


def run(settings: Settings) -> dict[str, Any]:
    """The command."""
    found = teacher.find(settings.model)
    limit = memory.budget(None if settings.budget is None else cli.parse_bytes(settings.budget))
    need = phases.tensor_bytes(planning.model_of(load.open_checkpoint(found.path)))
    limit.need(need, "the largest matrix, three times", f"give --budget {planning.flag(need)} or more")
    done = quantize(found.path, Path(settings.mlx_path), settings.q_group_size, Files())
    cli.say(f"{settings.mlx_path}: {done['bits_per_weight']:.2f} bits per weight")
    return {"model": str(found.path), "mlx_path": settings.mlx_path, **done}


if __name__ == "__main__":
    cli.main(Settings, run)
