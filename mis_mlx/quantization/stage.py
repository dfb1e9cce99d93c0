"""The quantize stage: a dense model folder in, a packed one out, each matrix in the bits that cost
least on text.

Blocks are rounded one by one, each on what the rounded blocks before it deliver. Streamed. GPTQ
(arXiv 2210.17323): every matrix is rounded so that its output changes least on the inputs that
calibration sees (maths/rounding); those are gathered once a block, with its own weights as they
were.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mis_mlx import cli
from mis_mlx.hardware import lanes
from mis_mlx.maths import reconstruction, rounding
from mis_mlx.models import arch, load, stream
from mis_mlx.models.stream import Batches, Hidden
from mis_mlx.planner.recipe import QuantizationConfig
from mis_mlx.quantization import bit_allocation, packed_format
from mis_mlx.storage.files import Files
from mis_mlx.storage.hidden_spool import Spool
from mis_mlx.types import Checkpoint, MisError

ENOUGH_BITS = 8  # rounding costs nothing there: such matrices get their nearest values


def check(config: Mapping[str, Any], how: QuantizationConfig) -> None:
    """Refuse, before hours of work, a shape that cannot be quantized whole and a target out of
    reach.
    """
    packed_format.layout(config, how.q_group_size, mode=how.q_mode)
    bit_allocation.check(how.affine.target_bpw, how.q_group_size)


def quantize(
    folder: Path,
    out: Path,
    how: QuantizationConfig,
    files: Files,
    batches: Batches = (),
    held: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """Write the quantized model `out` from the dense model `folder`. Returns bits per weight and
    the groups used. batches: token ids [(B, T)] to look at, hidden states of the first `held` in
    memory, others in a file beside it.
    """
    checkpoint = load.open_checkpoint(folder)
    how = how.affine
    files.make_folder(out.absolute().parent)
    layers = checkpoint.config["num_hidden_layers"]

    def hidden(passes: int) -> Spool | None:
        return Spool(out.absolute().parent, held * passes, files) if held < len(batches) else None

    wide = packed_format.blocks_after_removed(checkpoint) if how.q_mode == "affine" else ()
    plan: packed_format.Layout = packed_format.layout(
        checkpoint.config, how.q_group_size, wide, how.q_mode
    )
    extra = {}
    if how.target_bpw is not None:
        cli.say("sensitivity: what every matrix costs in fewer bits")
        plan, found = bit_allocation.mixed(checkpoint, batches, how, seed, hidden(layers))
        extra[packed_format.SENSITIVITY] = json.dumps(found).encode()

    rounded = (
        rounded_blocks(checkpoint, batches, plan, hidden(1)) if how.q_method == "gptq" else None
    )
    return packed_format.write_quantized(checkpoint, out, plan, files, rounded, extra)


def rounded_blocks(
    checkpoint: Checkpoint,
    batches: Batches,
    plan: packed_format.Layout,
    hidden: Hidden | None = None,
) -> Iterator[dict[str, rounding.Packed]]:
    """Per block, in order, {module path: packed matrix}, calibrated on token ids [(B, T)].

    plan: affine formats only. hidden: a place for the hidden states other than memory."""
    source = stream.Stream(checkpoint, direct=hidden is not None)
    hidden = source.embed(batches, hidden)
    for i, block in source.blocks():
        prefix = f"model.layers.{i}."
        readers = arch.readers(block)
        paths = {
            axis: [f"{prefix}{part}.{name}" for name in names]
            for axis, (part, names) in readers.items()
        }
        tapped = [
            axis for axis in readers if any(plan[path].bits < ENOUGH_BITS for path in paths[axis])
        ]
        grams = _grams(source, block, hidden, tapped, f"{checkpoint.path}: {prefix}")
        done: dict[str, rounding.Packed] = {}
        for axis, (part, names) in readers.items():
            linears = {
                path: block[part][name] for path, name in zip(paths[axis], names, strict=True)
            }
            gram = grams.pop(axis, None)
            for kind in {plan[path]: None for path in linears}:  # all of one format in one go
                same = [path for path in linears if plan[path] == kind]
                whole = [load.dense_weight(linears[path]) for path in same]
                if gram is None or kind.bits >= ENOUGH_BITS:
                    rounded = [rounding.nearest(w, kind.group, kind.bits) for w in whole]
                else:
                    # Rows do not know of each other.
                    every = [np.array(w) for w in whole]
                    parts = rounding.compensated(np.concatenate(every), gram, kind.group, kind.bits)
                    ends = np.cumsum([len(w) for w in every])[:-1].tolist()
                    rounded = list(zip(*(mx.split(part, ends) for part in parts), strict=True))
                for path, packed in zip(same, rounded, strict=True):
                    linear = linears[path]
                    linear.weight = rounding.values(packed, kind.group, kind.bits).astype(
                        linear.weight.dtype
                    )
                    stream.evaluate_now(packed, linear.weight)
                    done[path] = packed
        for path in sorted(packed_format.gates(checkpoint.config)):
            if arch.block_of(path) == i:
                kind = plan[path]
                done[path] = rounding.nearest(
                    load.dense_weight(block[path.split(".")[-1]]), kind.group, kind.bits
                )
        yield done
        if i + 1 < source.layers:
            source.through(block, hidden)


def _grams(
    source: stream.Stream, block: nn.Module, hidden: Hidden, axes: Sequence[str], where: str = ""
) -> dict[str, np.ndarray]:
    """{axis: sum of a a^T (in, in) over all tokens} of what goes into the matrices that read it, in
    the block that the source gave out last.

    Products of one batch are float32, sums over batches in `reconstruction.precision`. MisError,
    with `where`, when a product overflows.
    """
    taps = {}
    places = {axis: (part, names[0]) for axis, (part, names) in arch.readers(block).items()}
    for axis in axes:
        part, name = places[axis]
        block[part][name] = taps[axis] = stream.InputRecorder(block[part][name])
    sizes = {axis: tap.inner.weight.shape[1] for axis, tap in taps.items()}
    sums = {axis: np.zeros((n, n), reconstruction.precision(n)) for axis, n in sizes.items()}

    def work(stack: tuple[int, list[mx.array]]) -> dict[str, mx.array]:
        first, some = stack
        source.run(source.at, block, first, stream.joined(some))
        seen = {axis: tap.take().astype(mx.float32) for axis, tap in taps.items()}
        return {axis: (flat := a.reshape(-1, a.shape[-1])).T @ flat for axis, a in seen.items()}

    # Sums do not ask which window a token is of: a stack's are one product.
    for products in lanes.each(work, source.stacks(hidden)):
        for axis, product in products.items():
            if not mx.isfinite(product).all().item():
                raise MisError(
                    f"{where}{'.'.join(places[axis])} meets values that are not finite: use plain "
                    f"rounding"
                )
            sums[axis] += np.asarray(product)
    for axis, tap in taps.items():
        part, name = places[axis]
        block[part][name] = tap.inner
    return sums
