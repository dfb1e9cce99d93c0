"""Adapters that stock mlx_lm opens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mis_mlx import sft
from mis_mlx.compute import precision
from mis_mlx.models.opening import load
from mis_mlx.models.writing import lora
from mis_mlx.types import Checkpoint
from tests import family_checks
from tests.conftest import mostly_thorough
from tests.family_checks import TOKENS, apart, streamed

Models = Callable[[str], Checkpoint]
MIXTURES = ("qwen3_moe", "qwen2_moe", "mixtral", "gpt_oss", "olmoe")


@pytest.mark.parametrize(
    ("kind", "policy"),
    mostly_thorough(
        [*((kind, "cpu") for kind in MIXTURES), ("qwen3_moe", "metal")],
        ("gpt_oss", "cpu"),
        ("qwen3_moe", "metal"),
        of_several=True,
    ),
)
def test_adapters_of_experts_are_mlx_lms(
    kind: str,
    policy: str,
    models: Callable[[str], Checkpoint],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Experts have one each here, and all of a block one there: mlx_lm computes the same, on packed
    weights too.
    """
    monkeypatch.setenv(precision.POLICY, policy)
    checkpoint = models(kind)
    if policy == "metal":
        checkpoint = family_checks.quantized(checkpoint.path, tmp_path / "packed", target_bpw=None)
    settings = lora.Lora(num_layers=3, rank=4, scale=2.0)
    model = load.resident_model(checkpoint, mx.float32)
    before = model(TOKENS)
    lora.insert(model, settings, seed=0)
    adapters = dict(tree_flatten(model.trainable_parameters()))
    for number, (name, array) in enumerate(adapters.items()):
        adapters[name] = 0.05 * mx.random.normal(array.shape, key=mx.random.key(number))
    model.update(tree_unflatten(list(adapters.items())))
    wanted = model(TOKENS)

    out = tmp_path / "adapters"
    lora.write(adapters, settings, out, config=checkpoint.config)

    assert any(".experts." in name for name in adapters)
    theirs, _ = load.mlx_lm("utils").load(str(checkpoint.path), adapter_path=str(out))
    theirs.set_dtype(mx.float32)
    assert apart(theirs(TOKENS), wanted) < 1e-3 * apart(before, wanted)


@pytest.mark.usefixtures("cpu_policy")
def test_adapters_of_a_run_open_in_stock(models: Models, tmp_path: Path) -> None:
    """What `sft` leaves is taken as --adapter-path, by the names of the published form."""
    model = models("lfm2")
    out = tmp_path / "run"
    row = json.dumps({"prompt": "The for statement", "completion": " is used to iterate"})
    (tmp_path / "data").mkdir()
    for split in ("train", "valid"):
        (tmp_path / "data" / f"{split}.jsonl").write_text(f"{row}\n" * 4)
    asked = sft.Settings(
        model=str(model.path),
        data=str(tmp_path / "data"),
        out=str(out),
        fine_tune_type="lora",
        num_layers=3,
        iters=2,
        batch_size=1,
        max_seq_length=32,
        learning_rate=1e-2,
    )
    sft.run(asked)
    stored: Any = mx.load(str(out / "adapters" / "adapters.safetensors"))
    names = list(dict(stored))
    assert any(".conv.in_proj." in name for name in names)
    where = str(out / "adapters")
    theirs = load.mlx_lm("utils").load(str(model.path), adapter_path=where)[0]
    theirs.set_dtype(mx.float32)
    wanted = theirs(TOKENS)
    fused = load.open_checkpoint(out / "model")
    # the folder has bfloat16 numbers
    assert apart(streamed(fused, TOKENS), wanted) < 0.1 * apart(wanted, streamed(model, TOKENS))
