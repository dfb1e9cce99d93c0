"""What a matrix costs in every format, derived from what nearest values cost in a few of them.

A sensitivity pass measures the cost of MLX's nearest values in 3, 4, 5, 6 and 8 bits and in groups
of one size (quantization/bit_allocation). A cost is quadratic in the rounding error, so another
grid with the same bits costs its share of the squared error. The squared errors are taken on some
rows of each matrix. 2 bits are derived from 3, so that the
pass takes no longer for them.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx

from mis_mlx.compute import precision
from mis_mlx.maths import rounding
from mis_mlx.models.architectures import arch
from mis_mlx.models.architectures.families import family
from mis_mlx.models.opening import load
from mis_mlx.quantization.packed_format import WIDE_BITS, Format, formats_of, wide_projections
from mis_mlx.settings.recipe import QuantizationConfig
from mis_mlx.types import Checkpoint

FormatCosts = dict[Format, float]  # nats per token of a matrix
LEAST_BITS = 2
# Of what nearest values cost in a head, the share that GPTQ leaves there, over the share that it
# leaves in blocks, on text that calibration has not seen (benchmarks/README.md).
HEAD_SHARE = 0.45
# More bits have one group size: other ones would save next to nothing there.
MOST_BITS_OF_OTHER_GROUPS = 5


def for_model(config: Mapping[str, Any], how: QuantizationConfig) -> QuantizationConfig:
    """`how`, where `q_groups` "auto" is decided: "mixed" where 3 bits do not reach the target.

    At 4.26 bits a weight mixed groups and 2 bits lost more on Polish text than they won on English
    answers, so they are for what 3 bits cannot reach. Small matrices of fixed bits count, so a
    model may need more than 3 bits and their scales.
    """
    if how.q_groups != "auto" or how.target_bpw is None:
        return how
    one = replace(how, q_groups="one")
    least, _ = limits(config, one)
    return replace(how, q_groups="mixed") if how.target_bpw < least else one


def fewest_bits(how: QuantizationConfig) -> int:
    """The fewest bits that a matrix without a floor of its own may have."""
    return LEAST_BITS if how.q_groups == "mixed" else min(rounding.CANDIDATE_BITS)


def candidates(columns: int, how: QuantizationConfig, floor_bits: int = 0) -> list[Format]:
    """The formats that a matrix with rows of so many weights may have.

    floor_bits: the fewest of this matrix (`Architecture.bit_floors`).
    """
    formats = []
    fewest = max(floor_bits, fewest_bits(how))
    for bits in (LEAST_BITS, *rounding.CANDIDATE_BITS):
        if bits < fewest:
            continue
        for group in rounding.GROUPS:
            usual = group == how.q_group_size
            other = how.q_groups == "mixed" and bits <= MOST_BITS_OF_OTHER_GROUPS
            if usual or (other and columns % group == 0):
                formats.append(Format(bits, group))
    return formats


def limits(config: Mapping[str, Any], how: QuantizationConfig) -> tuple[float, float]:
    """The fewest bits per weight that a model's matrices can have together, and the most."""
    shapes = arch.tensors_of(config, stacked=True)
    fixed = wide_projections(config)
    floors = family(config).bit_floors()
    weights = 0
    least = 0.0
    for path in formats_of(config, how.q_group_size):
        shape = shapes[f"{path}.weight"]
        size = math.prod(shape)
        fewest = Format(WIDE_BITS, how.q_group_size).bits_per_weight
        if path not in fixed:
            formats = candidates(shape[-1], how, floors.get(path, 0))
            fewest = min(kind.bits_per_weight for kind in formats)
        weights += size
        least += size * fewest
    most = Format(max(rounding.CANDIDATE_BITS), how.q_group_size).bits_per_weight
    return least / weights, most


def of_formats(
    checkpoint: Checkpoint,
    nats: Mapping[str, Mapping[int, float]],
    how: QuantizationConfig,
    *,
    fitted: bool = False,
) -> dict[str, FormatCosts]:
    """{module path: {format: nats per token}} of every matrix, small ones of fixed bits included.

    nats: {module path: {bits: nats per token}} in groups of `how.q_group_size`, of nearest values
    or of fitted grids, as a search keeps them.
    """
    shapes = arch.tensors_of(checkpoint.config)
    floors = family(checkpoint.config).bit_floors()
    found: dict[str, FormatCosts] = {}
    for path, measured in nats.items():
        name = f"{path}.weight"
        # Of a large table only some first rows are read.
        rows = load.dense_sample(checkpoint, name)
        formats = candidates(shapes[name][1], how, floors.get(path, 0))
        found[path] = _derived(rows, measured, formats, how=how, fitted=fitted)
    # They have no choice, but their bits count towards the mean.
    for path in wide_projections(checkpoint.config):
        found[path] = {Format(WIDE_BITS, how.q_group_size): 0.0}
    head = load.head_prefix(checkpoint).rstrip(".")
    if how.compensates and head in found:
        # Beside blocks, all rounded by GPTQ, the head costs less.
        for kind, cost in found[head].items():
            if kind.bits < rounding.ENOUGH_BITS:
                found[head][kind] = HEAD_SHARE * cost
    return found


def _derived(
    rows: mx.array,
    measured: Mapping[int, float],
    formats: list[Format],
    *,
    how: QuantizationConfig,
    fitted: bool,
) -> dict[Format, float]:
    """{format: nats per token} of one matrix. rows: some of its rows (n, in)."""
    fit = how.compensates
    fused = precision.compiles()
    measured_errors: dict[int, float] = {}
    found = {}
    for kind in formats:
        source = max(kind.bits, min(measured))
        found[kind] = measured[source]
        if kind == Format(source, how.q_group_size) and fit == fitted:
            continue
        if source not in measured_errors:
            measured_errors[source] = rounding.squared_error(
                rows, how.q_group_size, source, fit=fitted, fused=fused
            )
        # A matrix without an error costs nothing in any format that is as exact.
        if measured_errors[source]:
            error = rounding.squared_error(rows, kind.group, kind.bits, fit=fit, fused=fused)
            found[kind] *= error / measured_errors[source]
    return found
