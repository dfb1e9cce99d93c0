"""Metal's policy, imposed here: float16 computes, packed weights stay packed. Each of these failed
before it was tried.

The faults were seen on Linux by imposing the two policies; on a Mac nobody has run these yet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mis_mlx import quantize, sft
from mis_mlx.compute import precision
from mis_mlx.hardware import memory, rates
from mis_mlx.maths.losses import token_logps
from mis_mlx.models.opening import compute_type, load
from mis_mlx.models.opening.model_size import model_of
from mis_mlx.models.passing import pass_cost, stream
from mis_mlx.models.writing import lora, model_writer
from mis_mlx.planner import estimates
from mis_mlx.pruning import vocabulary
from mis_mlx.quantization import packed_format
from mis_mlx.runs import run_loop
from mis_mlx.types import UNDECIDED, Budget, Checkpoint, MisError, Precision
from tests import tiny
from tests.conftest import mostly_slow

TORCH = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
TOKENS = mx.random.randint(0, 512, (1, 12), key=mx.random.key(1))


def packed(tmp_path: Path, stored: str, mode: str = "affine", layers: int = 5) -> Checkpoint:
    """A 4-bit folder of a tiny model whose norms are of type `stored`; narrow, for its products are
    emulated here.
    """
    sizes: dict[str, Any] = {"num_hidden_layers": layers, "intermediate_size": 192}
    made = tiny.make(tmp_path / "dense", dtype=stored, torch_dtype=TORCH[stored], **sizes)
    dense = load.open_checkpoint(made)
    if mode == "affine":
        plan = packed_format.formats_of(dense.config, 64)
        packed_format.write_quantized(dense, tmp_path / "packed", plan)
    else:
        tiny.in_fp4(dense, tmp_path / "packed", mode)
    return load.open_checkpoint(tmp_path / "packed")


def final(source: stream.Stream) -> np.ndarray:
    """Final hidden states (1, 12, D) of one pass, in memory of their own."""
    return np.array(source.forward([TOKENS])[0].astype(mx.float32))


@pytest.mark.parametrize(
    ("stored", "mode"),
    mostly_slow(
        product(("BF16", "F16", "F32"), ("affine", "mxfp4", "nvfp4")),
        ("BF16", "affine"),
        ("F16", "mxfp4"),
        ("F32", "nvfp4"),
        of_several=True,
    ),
)
def test_packed_passes_are_equal(stored: str, mode: str, tmp_path: Path, metal: None) -> None:
    """First, second and third pass, streamed and with all blocks kept: the resident model's states,
    bit for bit.
    """
    checkpoint = packed(tmp_path, stored, mode)
    want = np.array(load.resident_model(checkpoint, mx.float16).model(TOKENS).astype(mx.float32))
    for room, keeps in ((0, 0), (None, 5)):
        source = stream.Stream(checkpoint, mx.float16, room)
        for _ in range(3):
            np.testing.assert_array_equal(final(source), want)
        assert source.resident_blocks == keeps


def adapter_gradients(checkpoint: Checkpoint, dtype: mx.Dtype) -> dict[str, np.ndarray]:
    """Of a pair's preference loss in every adapter of a 4-bit model, the adapters set alike in both
    types.
    """
    model = load.resident_model(checkpoint, dtype)
    lora.insert(model, lora.Lora(-1, 8, 20.0), 0)
    flat: dict[str, mx.array] = dict(tree_flatten(model.trainable_parameters()))
    drawn = {
        n: mx.random.normal(flat[n].shape, key=mx.random.key(i)) for i, n in enumerate(sorted(flat))
    }
    model.load_weights(
        [(n, (0.02 * a).astype(flat[n].dtype)) for n, a in drawn.items()], strict=False
    )
    pairs = mx.random.randint(0, 512, (4, 24), key=mx.random.key(1))

    def loss(model: nn.Module) -> mx.array:
        hidden = model.model(pairs)[:, :-1].reshape(-1, 64)
        head = load.head_weight(model)
        chances = (
            token_logps(hidden, head, pairs[:, 1:].reshape(-1), frozen_head=True)
            .reshape(4, -1)
            .sum(-1)
        )
        return -mx.log(mx.sigmoid(0.1 * (chances[:2] - chances[2:]))).mean()

    _, gradients = nn.value_and_grad(model, loss)(model)
    return {n: np.array(g.astype(mx.float32)) for n, g in tree_flatten(gradients)}


def test_gradients_of_adapters_do_not_underflow(tmp_path: Path, metal: None) -> None:
    """float16's are float32's to 3 % in every adapter of every block (1.1 % seen), and none of them
    is zero.
    """
    checkpoint = packed(tmp_path, "BF16", layers=3)
    want, found = (adapter_gradients(checkpoint, dtype) for dtype in (mx.float32, mx.float16))
    assert len(want) == 3 * 7 * 2
    for name, right in want.items():
        assert np.linalg.norm(found[name] - right) < 0.03 * np.linalg.norm(right), name
        assert (found[name] != 0).all(), name


@pytest.fixture(params=["activations", "weights"])
def overflowing(tmp_path: Path, request: pytest.FixtureRequest) -> Checkpoint:
    """A tiny model whose residual stream passes 65,504 in its second block, by large weights; or
    whose weights do.
    """
    made = load.open_checkpoint(tiny.make(tmp_path / "large"))
    large = (
        {"up_proj": 3e3, "down_proj": 3e3} if request.param == "activations" else {"down_proj": 1e6}
    )

    def take(name: str) -> mx.array:
        return load.dense(made, name) * (
            large.get(name.split(".")[-2], 1.0) if ".1.mlp." in name else 1.0
        )

    model_writer.write_model(
        made.config, take, source=made.path, out=tmp_path / "over", dtype="float32"
    )
    return load.open_checkpoint(tmp_path / "over")


@pytest.fixture(name="chip")
def _chip(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """`chip(True)`: this GPU has bfloat16 in hardware, as from M3 on."""

    def become(computes_bfloat16: bool) -> None:
        monkeypatch.setattr(rates, "computes_bfloat16", lambda: computes_bfloat16)

    return become


@pytest.mark.parametrize(
    ("newer", "want"), [(False, mx.float32), (True, mx.bfloat16)], ids=["M1", "M3"]
)
def test_overflow_is_found_and_avoided(
    newer: bool,
    want: mx.Dtype,
    chip: Callable[[bool], None],
    overflowing: Checkpoint,
    llama: Checkpoint,
    metal: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """That model computes in float32 on an M1, in bfloat16 on an M3, said in one line, once;
    another one in float16; a command's word goes first.
    """
    chip(newer)
    opened = compute_type.open_to_compute(llama.path)
    assert precision.dtype_of(opened) == mx.float16
    assert not capsys.readouterr().err
    opened = compute_type.open_to_compute(overflowing.path)
    assert [precision.dtype_of(opened) for _ in range(2)] == [want] * 2
    (line,) = capsys.readouterr().err.splitlines()
    name = str(want).removeprefix("mlx.core.")
    assert str(overflowing.path) in line
    assert "65,504" in line
    assert line.endswith(f"in {name}")
    for asked in ("float32", "float16"):
        opened = compute_type.open_to_compute(overflowing.path, Precision(asked=asked))
        assert precision.dtype_of(opened) == precision.DTYPES[asked]
        assert opened.precision.asked == asked
    assert not capsys.readouterr().err


def test_float32_where_the_budget_holds_it(
    chip: Callable[[bool], None], overflowing: Checkpoint, llama: Checkpoint, metal: None
) -> None:
    """On an M1 the budget decides before anything computes: float32 where one streamed pass fits,
    bfloat16 where not; a model that float16 holds stays in float16. In a run it is the command's
    --budget.
    """
    chip(False)
    whole = model_of(overflowing, dtype=mx.float32)
    need = pass_cost.streamed_pass(
        "", whole, tokens=512, micro_tokens=512, length=512, spool=False
    ).peak_bytes
    enough = Budget(memory.needed_bytes(need))
    for limit, want in ((enough, mx.float32), (Budget(need), mx.bfloat16), (enough, mx.float32)):
        settled = estimates.settle_precision(limit, overflowing, UNDECIDED)
        assert precision.dtype_of(settled) == want
        settled = estimates.settle_precision(limit, llama, UNDECIDED)
        assert precision.dtype_of(settled) == mx.float16
    for budget, want in (("1GiB", mx.float32), ("2MiB", mx.bfloat16)):
        settings = sft.Settings(model=str(overflowing.path), budget=budget, dry_run=True)
        opened = run_loop.open_model(settings, settings.model)
        assert precision.dtype_of(opened) == want


def test_what_is_made_of_a_model_computes_as_it_does(llama: Checkpoint, tmp_path: Path) -> None:
    """The same model with fewer rows, or in a file for each block: nothing is decided anew."""
    decided = replace(llama, precision=Precision(asked=None, dtype="bfloat16"))
    made = [
        vocabulary.first_rows(decided, 256),
        vocabulary.write(decided, range(512), tmp_path / "rows"),
        model_writer.by_block(decided, tmp_path / "parts"),
    ]
    for checkpoint in made:
        assert precision.dtype_of(checkpoint) == mx.bfloat16


@pytest.mark.parametrize(
    ("about", "newer"),
    [
        ({"architecture": "applegpu_g13g", "device_name": "Apple M1"}, False),
        ({"architecture": "applegpu_g14s", "device_name": "Apple M2 Max"}, False),
        ({"architecture": "applegpu_g15p", "device_name": "Apple M3"}, True),
        ({"architecture": "applegpu_g17s", "device_name": "Apple M5"}, True),
        ({"architecture": "sm_90", "device_name": "NVIDIA H100 80GB HBM3"}, True),
        ({"device_name": "Apple Paravirtual device"}, False),
        ({}, False),
    ],
)
def test_which_gpus_have_bfloat16(
    about: dict[str, str], newer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the names that MLX gives; what nothing is known of counts as an M1."""
    monkeypatch.setattr(mx, "device_info", lambda: about)
    assert rates.computes_bfloat16() == newer


def test_weights_outside_of_blocks_count(
    chip: Callable[[bool], None], llama: Checkpoint, tmp_path: Path, metal: None
) -> None:
    """A last norm that float16 cannot hold is found before the first pass, too."""
    chip(False)
    loud = compute_type.open_to_compute(tiny.loud(llama, tmp_path / "loud"))
    assert precision.dtype_of(loud) == mx.float32


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "nvfp4"])
def test_logits_of_a_packed_head_are_not_rounded(mode: str, tmp_path: Path, metal: None) -> None:
    """A packed head stays packed, and its logits of float16 states are those of float64, to
    float32's precision.
    """
    checkpoint = packed(tmp_path, "F16", mode, layers=1)
    head = load.head(checkpoint, mx.float16)
    hidden = (8 * mx.random.normal((5, 64), key=mx.random.key(0))).astype(mx.float16)
    found = load.wide_logits(head, hidden)
    assert found.dtype == mx.float32
    assert "scales" in head
    parts = [head.weight, head.scales, head.get("biases")]
    floats = [a.astype(mx.float32) if a is not None and a.dtype == mx.float16 else a for a in parts]
    how = {"group_size": head.group_size, "bits": head.bits, "mode": head.mode}
    dense = mx.dequantize(*floats, **how, dtype=mx.float32)
    want = np.array(hidden, np.float64) @ np.array(dense, np.float64).T
    np.testing.assert_allclose(np.array(found), want, atol=1e-4 * np.abs(want).max())


def test_nothing_is_chosen_by_numbers_that_are_none(
    overflowing: Checkpoint, text_folder: Path, tmp_path: Path, metal: None
) -> None:
    """Told to compute in float16 all the same, a pass and a rounding end in a sentence with the
    remedy.
    """
    few: dict[str, Any] = {"data": str(text_folder), "max_seq_length": 32, "num_samples": 4}
    asked = quantize.Settings(model=str(overflowing.path), mlx_path=str(tmp_path / "out"), **few)
    for work in (
        lambda: stream.Stream(overflowing, mx.float16).forward([TOKENS]),
        lambda: quantize.run(asked.with_values(compute_dtype="float16")),
    ):
        with pytest.raises(MisError, match=r"(block 1|layers\.1\.).*--compute-dtype float32"):
            work()
    assert not (tmp_path / "out").exists()
