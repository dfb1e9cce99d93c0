"""The quantize stage: a dense model folder in, a packed one out, each matrix in the bits that cost least on text."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mis_mlx import cli
from mis_mlx.models import load
from mis_mlx.models.stream import Batches
from mis_mlx.planner.recipe import QuantizationConfig
from mis_mlx.quantization import bit_allocation, gptq, packed_format
from mis_mlx.storage.files import Files
from mis_mlx.storage.hidden_spool import Spool


def check(config: Mapping[str, Any], how: QuantizationConfig) -> None:
    """Refuse, before hours of work, a shape that cannot be quantized whole and a target out of reach."""
    packed_format.layout(config, how.q_group_size, mode=how.q_mode)
    bit_allocation.check(how.affine.target_bpw, how.q_group_size)


def quantize(
    folder: Path, out: Path, how: QuantizationConfig, files: Files, batches: Batches = (), held: int = 0, seed: int = 0
) -> dict[str, Any]:
    """Write the quantized model `out` from the dense model `folder`. Returns bits per weight and the groups used.
    batches: token ids [(B, T)] to look at, hidden states of the first `held` in memory, others in a file beside it."""
    checkpoint, how = load.open_checkpoint(folder), how.affine
    packed_format.check_dense(checkpoint)
    files.make_folder(out.absolute().parent)
    layers = checkpoint.config["num_hidden_layers"]

    def hidden(passes: int) -> Spool | None:
        count = held * passes
        return Spool(out.absolute().parent, count, files) if held < len(batches) else None

    wide = packed_format.blocks_after_removed(checkpoint) if how.q_mode == "affine" else ()
    plan: packed_format.Layout = packed_format.layout(checkpoint.config, how.q_group_size, wide, how.q_mode)
    extra = {}
    if how.target_bpw is not None:
        cli.say("sensitivity: what every matrix costs in fewer bits")
        plan, found = bit_allocation.mixed(checkpoint, batches, how, seed, hidden(layers))
        extra[packed_format.SENSITIVITY] = json.dumps(found).encode()

    rounded = partial(gptq.rounded_blocks, checkpoint, batches, hidden=hidden(1)) if how.q_method == "gptq" else None
    return packed_format.write_quantized(checkpoint, out, plan, files, rounded, extra)
