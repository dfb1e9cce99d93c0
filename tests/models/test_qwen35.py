"""Qwen 3.5, dense text: the gated delta rule in chunks, its folders and state.

Parity with stock mlx_lm, gradients and bits are in test_families.py, configs in test_contract.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import pytest

from mis_mlx import generate
from mis_mlx.judge.speed import rounds
from mis_mlx.models.architectures import gated_delta
from mis_mlx.models.architectures.families import family
from mis_mlx.models.opening import load
from mis_mlx.models.opening.config import read_config
from mis_mlx.models.opening.model_size import model_of
from mis_mlx.models.passing import stream
from mis_mlx.models.writing import model_writer
from mis_mlx.quantization import bit_allocation
from mis_mlx.settings.recipe import QuantizationConfig
from mis_mlx.types import Checkpoint, MisError, Precision
from tests import peaks, tiny
from tests.family_checks import TOKENS, apart

KIND = "qwen3_5_text"
Arrays = list[mx.array]


@pytest.fixture(scope="module")
def qwen(models: Callable[[str], Checkpoint]) -> Checkpoint:
    return models(KIND)


def share(ours: mx.array, theirs: mx.array) -> float:
    """The largest difference as a share of the largest value."""
    return apart(ours, theirs) / float(mx.abs(theirs).max())


def inputs(length: int, alike: float = 0.0) -> Arrays:
    """q, k, v, log g, beta of 4 heads. alike: what all keys have in common."""
    keys = mx.random.split(mx.random.key(length), 5)
    shape = (2, length, 4)
    q = mx.random.normal((*shape, 32), key=keys[0])
    k = mx.random.normal((*shape, 32), key=keys[1]) + alike
    module = load.mlx_lm("models.gated_delta")
    q, k = module.normalize_qk(q, k, inv_scale=32**-0.5, eps=1e-6)
    v = mx.random.normal((*shape, 24), key=keys[2])
    log_g = -0.1 * mx.abs(mx.random.normal(shape, key=keys[3]))
    beta = mx.sigmoid(mx.random.normal(shape, key=keys[4]) + 1)
    return [q, k, v, log_g, beta]


def token_by_token(*arrays: mx.array) -> tuple[mx.array, mx.array]:
    """mlx-lm's recurrent form."""
    q, k, v, log_g, beta, *rest = arrays
    module = load.mlx_lm("models.gated_delta")
    state = rest[0] if rest else None
    found: tuple[mx.array, mx.array]
    found = module.gated_delta_ops(q, k, v, g=mx.exp(log_g), beta=beta, state=state)
    return found


@pytest.mark.usefixtures("cpu_policy")
@pytest.mark.parametrize("alike", [0.0, 3.0, 100.0])
@pytest.mark.parametrize("length", [1, 5, 8, 64, 65, 130])
def test_chunks_are_the_recurrent_form(length: int, alike: float) -> None:
    """Lengths that chunks of 64 divide and do not; keys that are almost the same, too, whose powers
    would not fit into a sum; from an empty state and from another.
    """
    arrays = inputs(length, alike)
    state = mx.random.normal((2, 4, 24, 32), key=mx.random.key(1))
    for more in ([], [state]):
        ours = gated_delta.delta_rule(*arrays, *more)
        theirs = token_by_token(*arrays, *more)
        assert all(share(a, b) <= 1e-5 for a, b in zip(ours, theirs, strict=True))


@pytest.mark.usefixtures("cpu_policy")
@pytest.mark.parametrize("alike", [0.0, 3.0])
def test_the_gradient_of_512_tokens(alike: float) -> None:
    """Against autodiff of the recurrent form, in all inputs and in the first state."""
    state = mx.random.normal((2, 4, 24, 32), key=mx.random.key(1))
    arrays = [*inputs(512, alike), state]
    above = [
        mx.random.normal((2, 512, 4, 24), key=mx.random.key(2)),
        mx.random.normal((2, 4, 24, 32), key=mx.random.key(3)),
    ]
    _, ours = mx.vjp(lambda *a: list(gated_delta.delta_rule(*a)), arrays, above)
    _, theirs = mx.vjp(lambda *a: list(token_by_token(*a)), arrays, above)
    for a, b in zip(ours, theirs, strict=True):
        assert mx.isfinite(a).all().item()
        assert share(a, b) <= 1e-4


@pytest.mark.usefixtures("cpu_policy")
def test_a_gradient_keeps_little() -> None:
    """Less than a third of what the recurrent form keeps at 256 tokens."""
    arrays = inputs(256)
    mx.eval(arrays)
    seen = []
    for form in (gated_delta.delta_rule, token_by_token):
        slopes = mx.grad(lambda *a, form=form: form(*a)[0].sum(), argnums=[0, 1, 2, 3, 4])
        with peaks.of_mlx() as peak:
            mx.eval(slopes(*arrays))
        seen.append(peak.nbytes)
    assert seen[0] < seen[1] / 3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_decay_keeps_its_digits(
    qwen: Checkpoint, dtype: Literal["bfloat16", "float16"], tmp_path: Path
) -> None:
    """As in mlx-lm, the logarithms of the decay stay float32, in memory and on disk, in every way
    that a model is opened or written.
    """
    name = "model.layers.0.linear_attn.A_log"
    stored = load.dense(qwen, name)
    assert not mx.array_equal(stored.astype(mx.bfloat16), stored)
    written = model_writer.by_block(qwen, tmp_path / "half", dtype)
    assert mx.array_equal(load.dense(written, name), stored)
    for checkpoint in (qwen, tiny.packed(qwen, tmp_path / "four", 32)):
        half = replace(checkpoint, precision=Precision(asked=dtype, dtype=dtype))
        assert mx.array_equal(load.dense(half, name), stored)
        whole = load.resident_model(half, getattr(mx, dtype))
        _, block = next(stream.Stream(half).blocks())
        stock_model, _ = rounds.open_model(half)
        for first in (whole.model.layers[0], block, stock_model.layers[0]):
            assert mx.array_equal(first.linear_attn.A_log, stored)
            assert first.linear_attn.dt_bias.dtype == getattr(mx, dtype)


def test_half_a_model_computes_where_it_was_read(qwen: Checkpoint, tmp_path: Path) -> None:
    """Tensors that stay float32 in a folder of bfloat16 do not make every block a copy."""
    folder = model_writer.by_block(qwen, tmp_path / "half", "bfloat16")
    assert model_of(folder, dtype=mx.bfloat16).as_stored
    assert not model_of(folder, dtype=mx.float16).as_stored
    assert model_of(folder, gpu=True, dtype=mx.bfloat16).as_stored
    whole = load.resident_model(folder, mx.bfloat16)
    expected = whole(TOKENS)
    source = stream.Stream(folder, mx.bfloat16)
    assert apart(load.logits(source.head(), source.forward([TOKENS])[0]), expected) <= 0.02


def test_too_few_bits_are_a_sentence() -> None:
    """The floors and 8 bits for the gates take more than the fewest bits of other matrices."""
    asked = QuantizationConfig(q_group_size=32, target_bpw=2.6)
    with pytest.raises(MisError, match="--target-bpw 2.6 is below 2.7"):
        bit_allocation.check({**tiny.CONFIG, **tiny.FAMILIES[KIND]}, asked)


def test_drafts_are_refused(qwen: Checkpoint) -> None:
    """With what to do, in flags that the command has."""
    with pytest.raises(MisError, match="leave out --draft-model"):
        generate.run(generate.Settings(model=str(qwen.path), draft_model=str(qwen.path)))


def test_transformers_form_is_refused(tmp_path: Path) -> None:
    """There norms multiply by 1 + weight, which the kernels' shape tells."""
    folder = tiny.make(tmp_path / "m", **tiny.FAMILIES[KIND])
    stored: Any = mx.load(str(folder / "model.safetensors"))
    weights: dict[str, mx.array] = {}
    for name, array in dict(stored).items():
        if "conv1d" in name:
            array = mx.contiguous(array.swapaxes(1, 2))
        weights[name.replace("language_model.model.", "model.language_model.")] = array
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    with pytest.raises(MisError, match="only MLX's form is read: run mlx_lm.convert"):
        load.open_checkpoint(folder)


def test_a_config_without_kinds(tmp_path: Path) -> None:
    """mlx-lm's defaults: attention in every fourth block, a quarter of each head rotates."""
    folder = tiny.make(tmp_path / "m", **tiny.FAMILIES[KIND])
    config = json.loads((folder / "config.json").read_text())
    for key in ("layer_types", "full_attention_interval"):
        del config["text_config"][key]
    del config["text_config"]["rope_parameters"]["partial_rotary_factor"]
    (folder / "config.json").write_text(json.dumps(config))
    read = read_config(folder)
    assert [i for i in range(7) if family(read).attends(i)] == [3]
    assert read["rope_parameters"]["partial_rotary_factor"] == 0.25
