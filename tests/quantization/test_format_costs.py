"""Costs of formats that no pass has measured, and what a choice among all of them makes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx.gguf_export import tensors
from mis_mlx.maths import rounding
from mis_mlx.models.architectures import arch
from mis_mlx.models.opening import load
from mis_mlx.quantization import bit_allocation, format_costs, packed_format
from mis_mlx.quantization.packed_format import Format
from mis_mlx.settings.recipe import QuantizationConfig
from mis_mlx.types import Checkpoint, MisError
from tests.conftest import mostly_thorough

ONE_GROUP = QuantizationConfig(q_groups="one")
MIXED = QuantizationConfig(q_groups="mixed")
UP = "model.layers.0.mlp.up_proj"  # (768, 64)
DOWN = "model.layers.0.mlp.down_proj"  # (64, 768)


def error_of(weight: mx.array, packed: rounding.Packed, kind: Format) -> float:
    """The squared error of a packed matrix, de-quantized by MLX and summed by numpy."""
    words, scales, biases = packed
    values = mx.dequantize(
        words,
        scales.astype(mx.float32),
        biases.astype(mx.float32),
        group_size=kind.group,
        bits=kind.bits,
    )
    return float(np.square(np.array(values, np.float64) - np.array(weight, np.float64)).sum())


def test_candidates_are_what_rows_allow() -> None:
    """Groups of 128 only where they divide a row; 6 and 8 bits in one size; one size when asked."""
    found = format_costs.candidates(768, MIXED)
    assert len(found) == 4 * 3 + 2
    assert {kind.group for kind in found if kind.bits > 5} == {64}
    narrow = format_costs.candidates(64, MIXED)
    assert {kind.group for kind in narrow} == {32, 64}
    single = format_costs.candidates(768, ONE_GROUP)
    assert single == [Format(bits, 64) for bits in (3, 4, 5, 6, 8)]


def test_few_bits_need_other_groups(llama: Checkpoint) -> None:
    """By themselves 2 bits and other groups are there for targets that 3 bits do not reach."""

    def mixes(how: QuantizationConfig) -> bool:
        return format_costs.for_model(llama.config, how).q_groups == "mixed"

    for target, wanted in ((3.4, True), (3.5, False), (4.5, False), (None, False)):
        assert mixes(QuantizationConfig(target_bpw=target)) == wanted
    assert mixes(QuantizationConfig(target_bpw=3.9, q_group_size=32))
    assert not mixes(QuantizationConfig(target_bpw=3.0, q_groups="one"))


def test_no_two_formats_have_the_same_bits_per_weight() -> None:
    """`chosen_layout` tells a matrix's formats apart by them."""
    for group in rounding.GROUPS:
        found = format_costs.candidates(768, replace(MIXED, q_group_size=group))
        assert len({kind.bits_per_weight for kind in found}) == len(found)


@pytest.mark.parametrize("method", ["round", "gptq"])
def test_a_cost_is_in_step_with_the_squared_error(llama: Checkpoint, method: str) -> None:
    """What nearest values were measured to cost, times the share of their error that a format
    leaves; 2 bits by the cost of 3.
    """
    how = QuantizationConfig(q_method=method)
    nats = {path: {3: 0.9, 4: 0.2, 5: 0.05, 6: 0.01, 8: 0.001} for path in (UP, DOWN)}
    make = rounding.fitted if method == "gptq" else rounding.nearest
    found = format_costs.of_formats(llama, nats, how)
    for path in (UP, DOWN):
        weight = load.dense(llama, f"{path}.weight")
        step = max(1, weight.size // rounding.SAMPLED)
        rows = weight.astype(mx.float32)[::step]
        for kind, cost in found[path].items():
            measured = max(3, kind.bits)
            nearest = rounding.nearest(rows, 64, measured)
            before = error_of(rows, nearest, Format(measured, 64))
            after = error_of(rows, make(rows, kind.group, kind.bits), kind)
            assert cost == pytest.approx(nats[path][measured] * after / before, rel=2e-3), kind
    if method == "round":
        assert found[UP][Format(4, 64)] == 0.2


@pytest.mark.thorough
def test_costs_of_the_usual_formats_are_those_of_fitted_grids(
    llama: Checkpoint, batches: list[mx.array]
) -> None:
    """`costs(fit=True)`, which searches use, says the same of 3 to 8 bits in groups of 64."""
    plain = bit_allocation.costs(llama, batches, 64, rounding.CANDIDATE_BITS)
    fitted = bit_allocation.costs(llama, batches, 64, rounding.CANDIDATE_BITS, fit=True)
    derived = format_costs.of_formats(llama, plain, MIXED)
    assert derived.keys() == fitted.keys()
    from_fitted = format_costs.of_formats(llama, fitted, MIXED, fitted=True)
    assert from_fitted[UP][Format(2, 32)] == pytest.approx(derived[UP][Format(2, 32)], rel=1e-5)
    for path, costs in fitted.items():
        for bits, cost in costs.items():
            share = 1.0
            if path == "model.embed_tokens" and bits < 8:
                share = format_costs.HEAD_SHARE
            assert derived[path][Format(bits, 64)] == pytest.approx(share * cost, rel=1e-5)


@pytest.mark.parametrize("method", ["round", "gptq"])
def test_a_head_that_gptq_rounds_costs_less_beside_blocks(llama: Checkpoint, method: str) -> None:
    """A share of what was measured, below 8 bits, which get nearest values."""
    how = QuantizationConfig(q_method=method)
    nats = {"model.embed_tokens": {3: 0.9, 4: 0.2, 5: 0.05, 6: 0.01, 8: 0.001}, UP: {8: 0.001}}
    found = format_costs.of_formats(llama, nats, how, fitted=method == "gptq")
    share = format_costs.HEAD_SHARE if method == "gptq" else 1.0
    assert found["model.embed_tokens"][Format(4, 64)] == pytest.approx(share * 0.2)
    assert found["model.embed_tokens"][Format(8, 64)] == 0.001
    assert found[UP][Format(8, 64)] == 0.001


def test_formats_of_two_matrices_by_pencil(llama: Checkpoint) -> None:
    """At 3.375 bits of two matrices as large: one in 3 bits and groups of 128 (3.25), the other in
    3 bits and groups of 64 (3.5), because the cheaper pair, 2.5 and 4.25, costs more.
    """
    costs = {
        UP: {Format(2, 64): 1.0, Format(3, 64): 0.3},
        DOWN: {Format(2, 64): 5.0, Format(3, 128): 0.5, Format(4, 128): 0.2},
    }
    chosen, report = bit_allocation.chosen_layout(llama.config, costs, 3.375)
    assert chosen == {UP: Format(3, 64), DOWN: Format(3, 128)}
    assert report["predicted_nats"] == pytest.approx(0.8)
    assert report["groups"] == {UP: 64, DOWN: 128}
    assert report["bits"] == {UP: 3, DOWN: 3}
    assert report["nats"][DOWN] == {"2/64": 5.0, "3/128": 0.5, "4/128": 0.2}


@pytest.mark.parametrize("target", mostly_thorough([2.6, 3.0, 4.5], 2.6))
def test_mixed_groups_open_in_mlx_lm(
    target: float, llama: Checkpoint, batches: list[mx.array], tmp_path: Path
) -> None:
    """2 bits and groups of 32, 64 and 128 side by side: the stored bytes keep to the target, and
    stock mlx_lm computes what we read back.
    """
    plan, report = bit_allocation.mixed(llama, batches, QuantizationConfig(target_bpw=target))
    if target < 4:
        assert 2 in report["bits"].values()
        assert 128 in report["groups"].values()
    done = packed_format.write_quantized(llama, tmp_path / "q", plan, fit=True)
    assert done["bits_per_block_weight"] == packed_format.block_bits(llama.config, plan)
    made = load.open_checkpoint(tmp_path / "q")
    assert packed_format.formats(made) == dict(plan)
    nbytes = 0
    weights = 0
    shapes = arch.tensors_of(llama.config)
    for path in plan:
        nbytes += sum(made.tensors[f"{path}.{part}"].nbytes for part in packed_format.PARTS)
        weights += math.prod(shapes[f"{path}.weight"])
    assert target - 0.3 < 8 * nbytes / weights <= target
    model, _ = load.mlx_lm("utils").load(str(tmp_path / "q"))
    ours = load.resident_model(made, mx.float32)
    # it computes in float16
    assert mx.allclose(model(batches[0]).astype(mx.float32), ours(batches[0]), atol=5e-3)


def test_a_gguf_keeps_every_format_up_to_5_bits(
    llama: Checkpoint, batches: list[mx.array], tmp_path: Path
) -> None:
    """Blocks of 32 repeat a group's scale and bias, whatever the group's size: no matrix of 5 bits
    or fewer is rounded again.
    """
    plan, _ = bit_allocation.mixed(llama, batches, QuantizationConfig(target_bpw=2.8))
    packed_format.write_quantized(llama, tmp_path / "q", plan, fit=True)
    made = load.open_checkpoint(tmp_path / "q")
    for part in tensors.parts(made, tensors.out_type(made)):
        kind = plan.get(part.source.removesuffix(".weight"))
        if kind is not None:
            assert part.exact == (kind.bits <= 5), part


def test_limits_are_those_of_the_model(llama: Checkpoint) -> None:
    """2 bits in groups of 128 where rows allow it, in groups of 64 elsewhere, weighted by size."""
    bits = []
    sizes = []
    for shape in arch.tensors_of(llama.config).values():
        if len(shape) == 2:
            sizes.append(math.prod(shape))
            bits.append(2.25 if shape[1] % 128 == 0 else 2.5)
    least = np.average(bits, weights=sizes)
    assert format_costs.limits(llama.config, MIXED) == pytest.approx((least, 8.5))
    assert format_costs.limits(llama.config, ONE_GROUP) == (3.5, 8.5)
    shown = math.ceil(least * 1000) / 1000
    bit_allocation.check(llama.config, QuantizationConfig(target_bpw=shown))
    bit_allocation.check(llama.config, QuantizationConfig(target_bpw=None))
    for target, end in ((2.3, shown), (8.501, 8.5)):
        with pytest.raises(MisError, match=f"--target-bpw {target:g} .* {end:g}"):
            bit_allocation.check(llama.config, QuantizationConfig(target_bpw=target))


def test_the_least_target_can_be_made(llama: Checkpoint, batches: list[mx.array]) -> None:
    """What the message says is the least is reached: every matrix in its fewest bits."""
    least, _ = format_costs.limits(llama.config, MIXED)
    shown = math.ceil(least * 1000) / 1000
    plan, _ = bit_allocation.mixed(llama, batches[:1], QuantizationConfig(target_bpw=shown))
    assert {kind.bits for kind in plan.values()} == {2}
