"""Opening a folder: what mlx-lm would build, with the process left as it was."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest

from mis_mlx.models.opening import load, resolve
from mis_mlx.types import Checkpoint, MisError
from tests import tiny


@pytest.mark.parametrize("kind", ["llama", "untied"])
def test_the_embeddings_gradient_has_a_fixed_order(
    models: Callable[[str], Checkpoint], kind: str
) -> None:
    """`rows`'s: 2**24 + 1 + 1 + 1 for a token that occurs four times goes by pairs, to 2**24 + 2.
    The whole model's gradient is stock mlx_lm's (1e-5 of the largest), a tied head's share with it.
    """
    ours = load.resident_model(models(kind), mx.float32)
    stock, _ = load.mlx_lm("utils").load(str(models(kind).path))
    above = mx.array([2.0**24, 1.0, 1.0, 1.0])[:, None]
    slope = mx.grad(lambda t: (_with(ours.model.embed_tokens, t)(mx.array([7] * 4)) * above).sum())
    assert slope(ours.model.embed_tokens.weight)[7, 0].item() == 2.0**24 + 2
    tokens = mx.array([[7, 9, 7, 7, 300, 9], [7, 0, 0, 1, 2, 511]])
    for made in (ours, stock):
        made.freeze()
        made.model.embed_tokens.unfreeze()
    mine, theirs = (
        nn.value_and_grad(m, lambda m: mx.square(m(tokens)).sum())(m)[1] for m in (ours, stock)
    )
    mine, theirs = (g["model"]["embed_tokens"]["weight"] for g in (mine, theirs))
    assert mx.abs(mine - theirs).max().item() < 1e-5 * mx.abs(theirs).max().item()


def _with(embedding: nn.Module, table: mx.array) -> nn.Module:
    embedding.weight = table
    return embedding


@pytest.mark.thorough
def test_mlx_lm_leaves_the_process_as_it_was() -> None:
    """mlx_lm lowers the hard limit on open files when imported; not through this door."""
    code = """
import resource
import shutil
before = resource.getrlimit(resource.RLIMIT_NOFILE)
from mis_mlx.models.opening import load, resolve
import sys
assert "mlx_lm" not in sys.modules, "imported before it is needed"
load.mlx_lm("utils")
assert resource.getrlimit(resource.RLIMIT_NOFILE) == before
resource.setrlimit(resource.RLIMIT_NOFILE, before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert resource.setrlimit.__module__ == "resource"


def test_floats_come_in_the_type_asked_for(tmp_path: Path) -> None:
    """A bfloat16 folder opens in float32 with the same numbers, exactly."""
    checkpoint = load.open_checkpoint(tiny.make(tmp_path / "bf16", dtype="BF16"))
    name = "model.layers.1.mlp.up_proj.weight"
    stored = load.dense(checkpoint, name)
    assert stored.dtype == mx.bfloat16
    (wide,) = (a for n, a in load.weights(checkpoint, "", mx.float32) if n == name)
    assert wide.dtype == mx.float32
    assert mx.array_equal(wide.astype(mx.bfloat16), stored)


def test_foreign_quantization_is_refused(tmp_path: Path, llama: Checkpoint) -> None:
    """Packed weights without MLX's settings in config.json: a sentence, not garbage."""
    packed = tiny.packed(llama, tmp_path / "q4")
    foreign = Checkpoint(
        packed.path, {**packed.config, "quantization": {"quant_method": "gptq"}}, packed.tensors
    )
    with pytest.raises(MisError, match="format other than MLX's"):
        load.dense(foreign, "model.embed_tokens.weight")


def test_labels_are_the_shortest_ends_of_paths_that_differ() -> None:
    """`distilled/model` and `grpo/model`, not two long paths; a name that is taken gets its parent
    too.
    """
    assert resolve.labels(["runs/a/pruned", "runs/a/distilled/model", "runs/a/grpo/model"]) == [
        "pruned",
        "distilled/model",
        "grpo/model",
    ]
    assert resolve.labels(["x/teacher"], ("teacher",)) == ["x/teacher"]
    assert resolve.labels(["x/m", "x/m"]) == ["m", "m"]


def test_a_tokenizer_is_opened_once_until_its_files_change(tmp_path: Path) -> None:
    """The same object for the same files; another when one of them says something else."""
    folder = tiny.make(tmp_path / "model")
    first = load.tokenizer(folder)
    assert load.tokenizer(folder) is first
    assert load.tokenizer(shutil.copytree(folder, tmp_path / "copy")) is first
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "mistral"}))
    assert load.tokenizer(folder) is not first
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"model_max_length": 77}))
    assert load.tokenizer(folder) is not first
    assert load.tokenizer(folder).model_max_length == 77


@pytest.mark.parametrize("kind", ["phi3", "gpt_oss"])
def test_stacked_tensors_without_rows_are_refused(tmp_path: Path, kind: str) -> None:
    """A scalar in place of joined matrices, or of experts."""
    if kind == "phi3":
        folder = tiny.joined(tmp_path / kind)
    else:
        folder = tiny.make(tmp_path / kind, **tiny.FAMILIES[kind])
    stored = tiny.stored_weights(folder)
    name = next(name for name in stored if "qkv_proj" in name or "experts." in name)
    tiny.change(folder, {name: mx.array(1.0)})
    with pytest.raises(MisError, match="has 0 (rows|experts), but"):
        load.open_checkpoint(folder)
