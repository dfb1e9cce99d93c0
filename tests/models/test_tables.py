"""Tables with a row for each token are never in memory whole: real peaks against their plans, on a
small model with three parts of vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx import export
from mis_mlx.models.architectures.families import shape_of
from mis_mlx.models.opening import load
from mis_mlx.models.opening.model_size import model_of
from mis_mlx.models.passing.pass_cost import tensor_bytes
from mis_mlx.pruning import slicing
from mis_mlx.quantization import embedding_costs, packed_format, stage
from mis_mlx.settings.recipe import QuantizationConfig
from mis_mlx.storage import safetensors
from mis_mlx.types import Checkpoint, KeptUnits
from tests import tiny
from tests.conftest import mostly_thorough
from tests.peaks import allocated, counted

ROWS = 400_000
NUMBERS = ROWS * 64  # of the table: 25.6 million, three parts and a bit
ROUNDING = QuantizationConfig(q_method="round", target_bpw=None)


@pytest.fixture(name="wordy", scope="module")
def _wordy(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A llama of 400 thousand tokens, tied, in bfloat16."""
    folder = tmp_path_factory.mktemp("wordy") / "model"
    tiny.make(folder, dtype="BF16", vocab_size=ROWS, intermediate_size=128, num_hidden_layers=1)
    return load.open_checkpoint(folder)


@pytest.fixture(name="packed", scope="module")
def _packed(wordy: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The same in 4 bits."""
    folder = tmp_path_factory.mktemp("packed") / "model"
    return tiny.packed(wordy, folder)


@pytest.fixture(name="policy", params=mostly_thorough(["cpu", "metal"], "cpu"), autouse=True)
def _policy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MIS_MLX_POLICY", request.param)
    return str(request.param)


def whole(checkpoint: Checkpoint) -> np.ndarray:
    """The table, read at once."""
    return np.array(load.dense(checkpoint, "model.embed_tokens.weight").astype(mx.float32))


def peak_of(work: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes of arrays at the peak of the work, between any two parts of a file."""
    with counted(monkeypatch, (safetensors, "_bytes_of")) as peak:
        work()
    return peak.nbytes


@pytest.mark.thorough
def test_a_packed_table_is_cut_in_parts(
    packed: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A student of half of the channels: what is kept is the table's, and the peak is under its
    plan, which is a third of what the table would take.
    """
    kept = tuple(range(0, 64, 2))
    keep = KeptUnits((0,), {(-1, "hidden"): kept}, "by hand")
    shape = replace(shape_of(packed.config), hidden=32)
    out = tmp_path / "student"

    def write() -> None:
        slicing.write_student(packed, shape, keep, out, dtype="bfloat16")

    planned = slicing.copying_bytes(model_of(packed), rotation=False)
    assert peak_of(write, monkeypatch) < allocated(planned) < 12 * NUMBERS // 2
    want = mx.array(whole(packed)[:, ::2]).astype(mx.bfloat16).astype(mx.float32)
    assert np.array_equal(whole(load.open_checkpoint(out)), np.array(want))


def test_a_table_is_rounded_in_parts(
    wordy: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As mx.quantize rounds it at once, under its plan."""
    plan = packed_format.formats_of(wordy.config, 64)
    out = tmp_path / "packed"

    def write() -> None:
        packed_format.write_quantized(wordy, out, plan)

    m = model_of(wordy)
    planned = stage.quantizing_cost(m, ROUNDING, windows=1, length=16, limit=0).peak_bytes
    assert peak_of(write, monkeypatch) < allocated(planned) < 10 * NUMBERS
    rounded = load.open_checkpoint(out)
    settings = load.packing(rounded, "model.embed_tokens")
    table = mx.array(whole(wordy))
    words, *_ = mx.quantize(table, group_size=settings["group_size"], bits=settings["bits"])
    stored = tiny.stored_weights(out)["model.embed_tokens.weight"]
    assert mx.array_equal(stored, words)


@pytest.mark.thorough
def test_a_packed_table_is_exported_in_parts(
    packed: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`export --format hf` of a packed model, under its plan."""
    asked = export.Settings(
        model=str(packed.path), format="hf", out_type="bf16", out=str(tmp_path / "dense")
    )
    planned = tensor_bytes(model_of(packed))
    peak = peak_of(lambda: export._hf(asked, packed, "bf16"), monkeypatch)
    assert peak < allocated(planned) < 12 * NUMBERS // 2
    want = mx.array(whole(packed)).astype(mx.bfloat16).astype(mx.float32)
    assert np.array_equal(whole(load.open_checkpoint(tmp_path / "dense")), np.array(want))


def test_costs_of_a_table_are_taken_in_parts(
    packed: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number for each group stays, and the table never was there."""
    costs = list[embedding_costs.VocabularyCosts]()
    peak = peak_of(lambda: costs.append(embedding_costs.VocabularyCosts(packed, 64)), monkeypatch)
    found = costs[0].variances["model.embed_tokens"]
    assert found.shape == (ROWS, 1)
    assert peak < 12 * load.TABLE_PART + 3 * found.nbytes < 6 * NUMBERS
    table = whole(packed)
    want = (table.max(axis=1) - table.min(axis=1)) ** 2 / 12
    assert np.allclose(np.array(found)[:, 0], want, rtol=1e-5)
