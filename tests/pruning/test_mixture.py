"""Mixtures of experts: which are kept, by pencil; little memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx import distill, prune
from mis_mlx.maths import importance
from mis_mlx.models.architectures import arch, experts
from mis_mlx.models.architectures.families import shape_of
from mis_mlx.models.opening import load
from mis_mlx.models.writing import model_writer
from mis_mlx.pruning import calibrate
from mis_mlx.types import MisError
from tests import peaks, tiny
from tests.conftest import near

FEW = 4  # blocks: what is tested here is in each of them


def few(kind: str) -> dict[str, Any]:
    """The tiny model of a kind, with fewer blocks."""
    sizes = {**tiny.MODELS[kind], "num_hidden_layers": FEW}
    return sizes | ({"layer_types": sizes["layer_types"][:FEW]} if "layer_types" in sizes else {})


MIXTURE = few("qwen3_moe")


def cut(model: Path, out: Path, text: Path, **how: Any) -> dict[str, Any]:
    """`prune` of a few short windows, and no axis but those asked for."""
    return prune.run(
        prune.Settings(
            model=str(model),
            mlx_path=str(out),
            data=str(text),
            scenario="none",
            num_samples=4,
            max_seq_length=24,
            dtype="float32",
            **how,
        )
    )


def test_scores_by_pencil() -> None:
    """Two tokens choose expert 0 by halves, outputs of norm 5 and 1; one chooses expert 2 wholly; 1
    is left alone.
    """
    sums = importance.ExpertSums(*np.zeros((3, 3)))
    sums.add(0, np.array([0.5, 0.5]), mx.array([[3.0, 4.0], [1.0, 0.0]]), 2.0)
    sums.add(2, np.array([1.0]), mx.array([[0.0, 2.0]]), 4.0)
    scores = sums.scores()
    assert importance.rms(scores).tolist() == [1.5, 0.0, 2.0]
    assert importance.aais(scores, 2.0).tolist() == [1.5, 0.0, 4.0]
    assert sums.routed.tolist() == [2, 0, 1]


def test_scores_are_those_of_plain_mlx(tmp_path: Path, batches: list[mx.array]) -> None:
    """Gate times norm by mlx_lm's own experts, and a neuron's activations under its gate."""
    checkpoint = load.open_checkpoint(tiny.make(tmp_path / "m", **MIXTURE))
    found, _ = calibrate.calibrate(checkpoint, batches)
    stock = load.mlx_lm("utils").load(str(checkpoint.path))[0]
    s = shape_of(checkpoint.config)
    k = MIXTURE["num_experts_per_tok"]
    gated = np.zeros(s.experts)
    routed = np.zeros(s.experts)
    neurons = np.zeros((s.experts, s.ffn))
    for tokens in batches:
        x = stock.model.embed_tokens(tokens)
        first = stock.model.layers[0]
        h = x + first.self_attn(first.input_layernorm(x), load.mask(stock.args, first, x))
        n = first.post_attention_layernorm(h).reshape(-1, s.hidden)
        odds = mx.softmax(first.mlp.gate(n), axis=-1)
        for token, row in zip(n, np.array(odds), strict=True):
            chosen = np.argsort(-row)[:k]
            for e in chosen:
                w = {
                    name: getattr(first.mlp.switch_mlp, f"{name}_proj").weight[int(e)]
                    for name in ("gate", "up", "down")
                }
                wide = mx.sigmoid(token @ w["gate"].T) * (token @ w["gate"].T) * (token @ w["up"].T)
                gate = row[e] / row[chosen].sum()
                gated[e] += gate * float(np.linalg.norm(np.array(wide @ w["down"].T)))
                routed[e] += 1
                neurons[e] += np.square(gate * np.array(wide)) / (tokens.shape[0] * tokens.shape[1])
    np.testing.assert_allclose(
        importance.rms(found.experts[0]), gated / np.maximum(routed, 1), rtol=near(1e-4, 5e-3)
    )
    np.testing.assert_allclose(
        found.ffn[0].square.reshape(s.experts, -1), neurons, rtol=near(1e-3, 0.05), atol=1e-9
    )


def test_what_stays_is_the_teachers(tmp_path: Path, text_folder: Path) -> None:
    """Experts with their rows of the router, in order; nothing else changes."""
    teacher = load.open_checkpoint(tiny.make(tmp_path / "m", **MIXTURE))
    report = cut(teacher.path, tmp_path / "cut", text_folder, experts="0.5x")
    student = load.open_checkpoint(tmp_path / "cut")
    keep = model_writer.read_keep(tmp_path / "cut")
    assert student.config["num_experts"] == 4
    assert report["params"] < report["params_before"]
    assert keep
    for name in arch.tensors_of(student.config):
        own = load.dense(student, name)
        i = arch.block_of(name)
        chosen = keep.kept[i, "experts"] if i is not None else ()
        if (e := experts.expert_of(name)) is not None:
            assert mx.array_equal(
                own, load.dense(teacher, name.replace(f"experts.{e}.", f"experts.{chosen[e]}."))
            )
        elif experts.is_router(name):
            assert mx.array_equal(own, load.dense(teacher, name)[mx.array(chosen)])
        else:
            assert mx.array_equal(own, load.dense(teacher, name))


@pytest.mark.thorough
def test_an_eighth_of_the_model(
    tmp_path: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calibration and cut of 75 MB of experts take less memory than an eighth of the model above
    what MLX held.
    """
    monkeypatch.setattr("mis_mlx.models.passing.stream.GROUP_BYTES", 2**20)
    big = {**MIXTURE, "num_experts": 16, "moe_intermediate_size": 1024, "num_hidden_layers": 6}
    model = tiny.make(tmp_path / "m", **big)
    nbytes = load.open_checkpoint(model).nbytes
    with peaks.of_mlx() as peak:
        cut(model, tmp_path / "cut", text_folder, experts="0.5x")
    assert nbytes > 70e6
    assert peak.nbytes < nbytes / 8


@pytest.mark.parametrize(
    ("kind", "asked"),
    [("qwen3_moe", "1"), ("qwen3_moe", "9"), ("qwen3_moe", "2.5x"), ("qwen3", "4")],
)
def test_numbers_that_do_not_fit(tmp_path: Path, text_folder: Path, kind: str, asked: str) -> None:
    """One sentence, before anything is read."""
    model = tiny.make(tmp_path / "m", **{**tiny.KINDS, **tiny.MODELS}[kind])
    with pytest.raises(MisError, match="experts") as caught:
        cut(model, tmp_path / "out", text_folder, experts=asked)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.thorough
def test_trained_in_shards(tmp_path: Path, text_folder: Path) -> None:
    """Whose files hold experts one by one whatever the family has. The student that was trained is
    not the pruned one, and it opens.
    """
    model = tiny.make(tmp_path / "m", **few("gpt_oss"))
    sizes: dict[str, Any] = {"num_samples": 2, "max_seq_length": 24, "reconstruct_samples": 4}
    sizes |= {"iters": 2, "eval_windows": 2, "q_group_size": 32, "experts": "0.5x"}
    paths = {"teacher": str(model), "data": str(text_folder), "out": str(tmp_path / "run")}
    result = distill.run(distill.Settings(**paths, **sizes, train="sharded"))
    students = [load.open_checkpoint(tmp_path / "run" / name) for name in ("pruned", "distilled")]
    name = next(n for n in students[0].tensors if experts.expert_of(n) is not None)
    assert result["mode"] == "sharded"
    assert not mx.array_equal(*(load.dense(student, name) for student in students))
