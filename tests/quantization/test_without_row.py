"""Families that mlx-lm has and the table of families has not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mis_mlx import quantize
from mis_mlx.hardware import memory
from mis_mlx.maths import rounding
from mis_mlx.models.architectures.families import FAMILIES
from mis_mlx.models.opening import load
from mis_mlx.types import MisError
from tests import peaks, stock, tiny

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
}
# joined matrices and biases; blocks in parallel; windows; a rule of mlx-lm's own; experts; states
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "n_ctx": 512,
        "n_embd": 64,
        "n_head": 4,
        "n_layer": 3,
        "n_positions": 512,
        "layer_norm_epsilon": 1e-5,
        "vocab_size": 512,
    },
    "starcoder2": SIZES,
    "cohere": {**SIZES, "logit_scale": 1.0},
    "olmo3": {**SIZES, "rms_norm_eps": 1e-5, "sliding_window": 9},
    "granitemoe": {
        **SIZES,
        "rms_norm_eps": 1e-5,
        "logits_scaling": 1.0,
        "attention_multiplier": 0.25,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "attention_bias": False,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "mamba": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "state_size": 16,
        "num_hidden_layers": 4,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": 32,
    },
}


def made(folder: Path, kind: str, **more: Any) -> Path:
    """A model folder with mlx_lm's own Model of random weights, as it names them."""
    config = {"model_type": kind, "eos_token_id": 0, **KINDS[kind], **more}
    module = load.mlx_lm(f"models.{kind}")
    mx.random.seed(1)
    model = module.Model(module.ModelArgs.from_dict(config))
    folder.mkdir()
    named: Any = tree_flatten(model.parameters())
    # inputs that correlate, as those of a model that has learned
    mixed = [(n, w @ (mx.eye(w.shape[-1]) + 0.3) if w.ndim == 2 else w) for n, w in named]
    mx.save_safetensors(str(folder / "model.safetensors"), dict(mixed))
    (folder / "config.json").write_text(json.dumps(config))
    tiny.write_tokenizer(folder)
    return folder


def rounded(model: Path, out: Path, **more: Any) -> dict[str, Any]:
    """In groups of 32, on few windows."""
    settings = quantize.Settings(
        model=str(model),
        mlx_path=str(out),
        q_group_size=32,
        num_samples=8,
        max_seq_length=64,
        **more,
    )
    return quantize.run(settings)


def at_fitted_values(model: nn.Module, quantization: dict[str, Any]) -> nn.Module:
    """The model with the nearest values of fitted grids in place of weights."""
    for path, layer in model.named_modules():
        if not hasattr(layer, "to_quantized"):
            continue
        bits = quantization.get(path, quantization)["bits"]
        rows = layer.weight.reshape(-1, layer.weight.shape[-1])
        values = rounding.values(rounding.fitted(rows, 32, bits), 32, bits)
        layer.weight = values.reshape(layer.weight.shape)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_gptq_is_nearer_than_nearest_values(kind: str, tmp_path: Path, text_folder: Path) -> None:
    """At equal bytes, by mlx_lm's own forward of folders that stock mlx_lm opens; and nearer than
    the nearest values of the same kind of grids.
    """
    assert kind not in FAMILIES
    model = made(tmp_path / "model", kind)
    compensated = rounded(model, tmp_path / "gptq", data=str(text_folder))
    nearest = rounded(model, tmp_path / "round", q_method="round")
    assert compensated["nbytes"] == nearest["nbytes"]
    ids = load.tokenizer(model).encode((text_folder / "valid.jsonl").read_text())[:256]
    tokens = mx.array([ids])
    wanted = stock.opened(model)(tokens)

    def error(found: nn.Module) -> float:
        return float(mx.square(found(tokens) - wanted).mean())

    packed = stock.opened(tmp_path / "gptq")
    assert not any(type(layer) is nn.Linear for layer in packed.modules())
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())
    fitted = at_fitted_values(stock.opened(model), config["quantization"])
    assert error(packed) < error(fitted)
    assert error(packed) < error(stock.opened(tmp_path / "round"))


def test_rows_that_no_group_divides_stay(tmp_path: Path, capsys: Any) -> None:
    """And a sentence says which."""
    model = made(tmp_path / "model", "mamba", time_step_rank=20)
    rounded(model, tmp_path / "out", q_method="round")
    told = capsys.readouterr().err
    assert "4 matrices stay as they are, because 32 does not divide their rows" in told
    named = dict(stock.opened(tmp_path / "out").named_modules())
    assert type(named["backbone.layers.0.mixer.dt_proj"]) is nn.Linear


@pytest.mark.parametrize(
    ("changes", "asked", "why"),
    [
        ({"quantization": {"group_size": 64, "bits": 4}}, {}, "is quantized already"),
        ({"model_file": "model.py"}, {}, "model_file wants to run"),
        ({"hidden_size": 128}, {}, "mlx-lm does not load it as a starcoder2"),
        ({"model_type": "base"}, {}, "'base' is not supported"),
        ({}, {"budget": "64KiB"}, "rounding a starcoder2 needs .* but the budget is"),
    ],
)
def test_refusals(changes: dict[str, Any], asked: dict[str, str], why: str, tmp_path: Path) -> None:
    """One sentence, and nothing is written."""
    model = made(tmp_path / "model", "starcoder2")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(MisError, match=why):
        rounded(model, tmp_path / "out", q_method="round", **asked)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("q_method", ["gptq", "round"])
def test_the_plan_covers_what_is_held(q_method: Any, tmp_path: Path, text_folder: Path) -> None:
    """Of arrays; it writes nothing, and code of others is not run."""
    auto = {"AutoConfig": "configuration.Config"}
    model = made(tmp_path / "model", "gpt2", n_embd=256, vocab_size=8192, auto_map=auto)
    asked = {"q_method": q_method, "data": str(text_folder)}
    with peaks.of_mlx() as peak:
        plan = rounded(model, tmp_path / "out", dry_run=True, **asked)
        assert not (tmp_path / "out").exists()
        rounded(model, tmp_path / "out", **asked)
    limit = memory.budget(None).limit_bytes
    planned = plan["peak_bytes"] - limit + memory.headroom_bytes(limit, 0)
    assert planned / 4 < peak.nbytes < peaks.allocated(planned)  # without those of numpy
