"""Experts of mixtures rounded on the tokens that choose them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx import quantize
from mis_mlx.hardware import memory
from mis_mlx.maths import gptq
from mis_mlx.models.architectures.families import FAMILIES
from mis_mlx.models.architectures.mixture import Mixture
from mis_mlx.models.opening import load
from mis_mlx.models.opening.model_size import model_of
from mis_mlx.models.passing import stream
from mis_mlx.models.passing.sweep import BlockTurn
from mis_mlx.quantization import packed_format, stage
from mis_mlx.quantization.begun_rounding import BegunRounding
from mis_mlx.settings.recipe import QuantizationConfig
from mis_mlx.types import GIB, Budget, Checkpoint
from tests import peaks, tiny
from tests.conftest import mostly_thorough

MIXTURES = [name for name, kind in FAMILIES.items() if issubclass(kind, Mixture)]
FOUR = QuantizationConfig(q_group_size=32, target_bpw=None)


def made(place: Path, kind: str) -> Checkpoint:
    """A tiny mixture."""
    return load.open_checkpoint(tiny.make(place, **tiny.FAMILIES[kind]))


def windows(count: int) -> list[mx.array]:
    """Windows of 64 tokens."""
    return [mx.random.randint(0, 512, (1, 64), key=mx.random.key(k)) for k in range(count)]


@pytest.mark.parametrize("kind", mostly_thorough(MIXTURES, "qwen2_moe", "gpt_oss"))
def test_a_mixture_stays_nearer_to_itself(tmp_path: Path, kind: str) -> None:
    """Hidden states of text that calibration did not see: nearer than by plain rounding; every
    token is counted where it goes.
    """
    model = made(tmp_path / "m", kind)
    texts = windows(44)
    want = stream.Stream(model, mx.float32).forward(texts[40:])
    errors = {}
    for method in ("round", "gptq"):
        folder = tmp_path / method
        how = QuantizationConfig(q_group_size=32, target_bpw=None, q_method=method)
        stage.quantize(model, folder, how, batches=texts[:40])
        found = stream.Stream(load.open_checkpoint(folder), mx.float32).forward(texts[40:])
        apart = [mx.square(a - b).sum().item() for a, b in zip(found, want, strict=True)]
        errors[method] = sum(apart)

    assert errors["gptq"] < 0.8 * errors["round"]
    counts = json.loads((tmp_path / "gptq" / packed_format.EXPERT_TOKENS).read_text())
    each = model.config["num_experts_per_tok"]
    assert [sum(block) for block in counts] == [40 * 64 * each] * len(counts)


def test_a_killed_rounding_goes_on(tmp_path: Path) -> None:
    """After a block: the same bytes, and the same counts."""
    model = made(tmp_path / "m", "qwen2_moe")
    texts = windows(4)
    stage.quantize(model, tmp_path / "whole", FOUR, batches=texts)
    plan = packed_format.formats_of(model.config, 32)
    begun = BegunRounding(tmp_path / "begun")
    list(islice(stage.rounded_blocks(model, texts, plan, begun=begun), 2))
    again = BegunRounding(tmp_path / "begun")
    assert again.blocks == 2
    stage.quantize(model, tmp_path / "again", FOUR, batches=texts, begun=again)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_the_command_says_how_many_tokens_an_expert_saw(tmp_path: Path, text_folder: Path) -> None:
    """The fewest, the median, and how many saw fewer than their matrices have inputs."""
    model = made(tmp_path / "m", "qwen2_moe")
    windows = {"num_samples": 1, "max_seq_length": 64, "data": str(text_folder)}
    out = tmp_path / "out"
    asked = quantize.Settings(model=str(model.path), mlx_path=str(out), q_group_size=32, **windows)
    said = quantize.run(asked)["expert_tokens"]
    counts = np.array(json.loads((out / packed_format.EXPERT_TOKENS).read_text()))
    inputs = max(model.config["hidden_size"], model.config["moe_intermediate_size"])
    assert said == {
        "fewest": counts.min(),
        "median": np.median(counts),
        "below_inputs": (counts < inputs).sum(),
        "experts": counts.size,
    }
    assert said["below_inputs"] > 0


@pytest.mark.usefixtures("cpu_policy")
@pytest.mark.parametrize("chosen_by", [0, 5])
def test_a_rare_expert_is_rounded_by_the_tokens_of_others(tmp_path: Path, chosen_by: int) -> None:
    """What its own tokens lack comes from the whole block; nothing is left without inputs."""
    model = made(tmp_path / "m", "qwen3_moe")
    plan = packed_format.formats_of(model.config, 32)
    source = stream.Stream(model, mx.float32)
    count = 300
    size = model.config["hidden_size"]
    x = mx.random.normal((count, size), key=mx.random.key(1)) * mx.arange(1, size + 1)
    chosen = np.tile([0, 1], (count, 1))
    chosen[:chosen_by, 0] = 2
    hidden = source.embed(windows(1))
    for i, block in source.blocks([0]):
        turn = BlockTurn(source, i, block, hidden)
        rounded, counts = stage._rounded_experts(turn, plan, x, chosen)
        (expert,) = [expert for e, expert in block.mlp.experts.read([2]) if e == 2]
        weight = expert.gate_proj.weight

    def gram(rows: mx.array) -> np.ndarray:
        values = np.array(rows, np.float64)
        return values.T @ values

    assert counts[:3] == [count - chosen_by, count, chosen_by]
    wanted_gram = gram(x[:chosen_by]) + (size - chosen_by) / count * gram(x)
    (wanted,) = gptq.rounded([weight], gptq.factorize(wanted_gram), 32, 4)
    made_now: Sequence[mx.array] = rounded["model.layers.0.mlp.switch_mlp.gate_proj"]
    assert (made_now[0][2] == wanted[0]).mean() > 0.99
    assert all(mx.isfinite(part).all() for parts in rounded.values() for part in parts[1:])


def test_experts_stay_under_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What MLX and numpy hold together."""
    sizes = {"hidden_size": 256, "moe_intermediate_size": 512, "vocab_size": 512}
    config = {**tiny.FAMILIES["qwen3_moe"], **sizes}
    model = load.open_checkpoint(tiny.make(tmp_path / "m", dtype="BF16", **config))
    texts = windows(6)
    mx.eval(texts)
    planned = stage.quantizing_cost(model_of(model), FOUR, windows=6, length=64, limit=GIB)
    before = mx.get_active_memory()
    parts = (gptq, "factorize"), (gptq, "rounded")
    with (
        memory.limited(Budget(before + planned.peak_bytes)),
        peaks.counted(monkeypatch, *parts) as peak,
    ):
        mx.set_cache_limit(0)
        stage.quantize(model, tmp_path / "q4", FOUR, batches=texts, held=6)
    assert planned.peak_bytes / 4 < peak.nbytes < peaks.allocated(planned.peak_bytes)
