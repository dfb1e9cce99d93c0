"""Quantize a model to 4 bits so that every linear is really quantized and stock mlx-lm opens the result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from mis_mlx import cli
from mis_mlx.disk.files import Files
from mis_mlx.disk.spool import Spool
from mis_mlx.machine import memory
from mis_mlx.maths.rounding import Packed
from mis_mlx.model import gptq, load, pack, teacher, windows
from mis_mlx.training import phases, planning
from mis_mlx.types import MisError


@dataclass(frozen=True)
class Settings:
    """Quantize only; `distill` does this as its last stage."""

    model: str | None = None
    """folder or hub id of an unquantized model; default: SmolLM2-135M-Instruct"""
    mlx_path: str = "quantized"
    """folder to write"""
    q_group_size: Literal[32, 64] = 64
    """weights that share one scale"""
    method: Literal["round", "gptq"] = "round"
    """every weight to its nearest value (round), or so that each matrix's output on text changes least (gptq)"""
    data: str | None = None
    """text for gptq: a folder with train.jsonl, or a hub data set; default: built in"""
    num_samples: int = 32
    """windows of text for gptq"""
    max_seq_length: int = 256
    """tokens in a window"""
    budget: str | None = None
    """memory this may take, such as 600MiB; default: 5GiB or 75 % of what is there"""
    seed: int = 0
    """which windows"""
    config: cli.ConfigFile = None
    """YAML file with any of these flags"""


def check(config: Mapping[str, Any], group_size: int) -> None:
    """Refuse, before hours of work, a shape that cannot be quantized whole."""
    pack.layout(config, group_size)


def quantize(
    folder: Path, out: Path, group_size: int, files: Files, batches: Sequence[mx.array] = (), held: int = 0
) -> Mapping[str, Any]:
    """Write the 4-bit model `out` from the dense model `folder`. Returns bits per weight and the groups used.

    batches: token ids [(B, T)] for GPTQ, the hidden states of the first `held` in memory, others in a file beside
    `out`; none: plain rounding.
    """
    checkpoint = load.open_checkpoint(folder)
    spool = Spool(out.absolute().parent, held, files) if held < len(batches) else None

    def blocks(plan: pack.Layout) -> Iterator[Mapping[str, Packed]]:
        with cli.progress("quantize: block", checkpoint.config["num_hidden_layers"]) as update:
            for i, block in enumerate(gptq.rounded_blocks(checkpoint, batches, plan, spool)):
                update(i + 1, "")
                yield block

    return pack.write_quantized(checkpoint, out, group_size, files, blocks if batches else None)


def run(settings: Settings) -> dict[str, Any]:
    """The command."""
    s, found = settings, teacher.find(settings.model)
    if s.method == "gptq" and s.num_samples < 1:
        raise MisError(f"--method gptq looks at text, --num-samples is {s.num_samples}: give 1 or more")
    count = s.num_samples if s.method == "gptq" else 0
    limit = memory.budget(None if s.budget is None else cli.parse_bytes(s.budget))
    checkpoint = load.open_checkpoint(found.path)
    planned = phases.quantize(planning.model_of(checkpoint), count, s.max_seq_length, limit.limit_bytes)
    remedy = f"give --budget {planning.flag(planned.peak_bytes)} or more" + (", or --method round" if count else "")
    planning.fit(limit, planned, remedy=remedy)
    batches: list[mx.array] = []
    if count:
        tokens = windows.prepare(s.data, found.path, s.max_seq_length).train.tokens
        chosen = np.random.default_rng(s.seed).permutation(len(tokens))[:count]
        batches = [mx.array(tokens[i][None]) for i in chosen]
    with memory.limited(limit, planned.peak_bytes):
        held = planned.held_tokens // s.max_seq_length
        done = quantize(found.path, Path(s.mlx_path), s.q_group_size, Files(), batches, held)
    cli.say(f"{s.mlx_path}: {done['bits_per_weight']:.2f} bits per weight")
    return {"model": str(found.path), "mlx_path": s.mlx_path, "method": s.method, **done}


if __name__ == "__main__":
    cli.main(Settings, run)
