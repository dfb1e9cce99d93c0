"""What a block holds is measured on this device, and the plan's formulas are corrected by it."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mis_mlx.compute import streams
from mis_mlx.models.architectures import stock
from mis_mlx.models.architectures.families import family
from mis_mlx.models.opening.model_size import BY_FORMULA, model_of
from mis_mlx.models.passing import residency
from mis_mlx.planner import measured_block
from mis_mlx.types import GIB
from tests import peaks, tiny

MIB = 2**20
WIDE = {
    **tiny.CONFIG,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
}
BATCH = 2
LENGTH = 256


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of measurements, empty."""
    path = tmp_path / "cache" / "blocks.json"
    monkeypatch.setattr(measured_block, "kept_file", lambda: path)
    return path


def trained_peak() -> int:
    """MLX's peak while stock mlx-lm's block trains on windows of noise, without weights and their
    gradients.
    """
    architecture = family(WIDE)
    args = architecture.model_args()
    block = architecture.new_block(args, 0)
    hidden = mx.random.normal((BATCH, LENGTH, 256))
    mx.eval(hidden, block.parameters())
    weights = dict[str, mx.array](tree_flatten(block.parameters()))
    gradients = sum(weight.nbytes for weight in weights.values())

    def loss(block: nn.Module) -> mx.array:
        return block(hidden, stock.mask(args, block, hidden), None).sum()

    with peaks.of_mlx() as peak:
        _, grads = nn.value_and_grad(block, loss)(block)
        mx.eval(grads)
    return peak.nbytes - gradients


def test_a_corrected_plan_holds_what_training_holds(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One window after the other: the formula is 22 % above the peak, the corrected one near it."""
    monkeypatch.setattr(streams, "count", lambda: 1)
    m = model_of(WIDE)
    corrected = measured_block.with_factors(m, BATCH, LENGTH, GIB)
    assert corrected.block_factors != BY_FORMULA
    peak = max(trained_peak() for _ in range(3))
    assert peak <= residency.backward_bytes(corrected, BATCH, LENGTH) <= 1.2 * peak
    assert kept.exists()


def test_a_measurement_is_made_once_and_kept(kept: Path) -> None:
    """What the file says counts, until it is damaged: then it is measured again."""
    m = model_of(WIDE)
    first = measured_block.with_factors(m, BATCH, LENGTH, GIB)
    assert measured_block.with_factors(m, BATCH, LENGTH, GIB) == first
    stored = json.loads(kept.read_text())
    (key,) = stored
    stored[key]["kept"] = 1.5
    kept.write_text(json.dumps(stored))
    changed = measured_block.with_factors(m, BATCH, LENGTH, GIB)
    assert changed.block_factors.kept == 1.5
    plain = residency.activation_bytes(m, BATCH, LENGTH)
    assert residency.activation_bytes(changed, BATCH, LENGTH) == int(1.5 * plain)
    kept.write_text('{"cut off')
    again = measured_block.with_factors(m, BATCH, LENGTH, GIB)
    assert again.block_factors.kept == pytest.approx(first.block_factors.kept, rel=0.05)


def test_a_cache_that_cannot_be_written_is_no_reason_to_stop(kept: Path) -> None:
    """A file stands where the folder would be: the block is measured each time."""
    kept.parent.write_text("")
    m = measured_block.with_factors(model_of(WIDE), BATCH, LENGTH, GIB)
    assert m.block_factors != BY_FORMULA


def test_another_shape_and_another_step_are_measured_anew(kept: Path) -> None:
    """Windows, widths: each is a measurement of its own."""
    m = model_of(WIDE)
    measured_block.with_factors(m, BATCH, LENGTH, GIB)
    measured_block.with_factors(m, 1, LENGTH, GIB)
    measured_block.with_factors(model_of({**WIDE, "intermediate_size": 512}), 1, LENGTH, GIB)
    assert len(json.loads(kept.read_text())) == 3


def test_a_large_block_is_measured_in_small(kept: Path) -> None:
    """Of an 8 B model under 400 MiB: half of the budget holds the sample, whose kept activations
    are those of the formula within a tenth.
    """
    large = {
        **tiny.CONFIG,
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "vocab_size": 128_256,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    }
    with peaks.of_mlx() as peak:
        m = measured_block.with_factors(model_of(large), BATCH, LENGTH, 400 * MIB)
    assert peak.nbytes < 200 * MIB
    assert m.block_factors.kept == pytest.approx(1, abs=0.1)
    assert "4096" not in kept.read_text()


def test_formulas_stay_where_nothing_can_be_measured(kept: Path) -> None:
    """A mixture's blocks; a block whose heads cannot be divided, and a budget too small for it."""
    mixture = model_of({**tiny.CONFIG, **tiny.FAMILIES["qwen3_moe"], "model_type": "qwen3_moe"})
    assert measured_block.with_factors(mixture, BATCH, LENGTH, GIB) == mixture
    odd = model_of({**WIDE, "num_attention_heads": 5, "num_key_value_heads": 5})
    assert measured_block.with_factors(odd, BATCH, LENGTH, 4 * MIB) == odd
    assert not kept.exists()
