"""The command `sft`: parity with TRL, LoRA, exact resume, what it leaves."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mis_mlx import quantize, sft
from mis_mlx.alignment import alignment_run, packed_run, padded_rows
from mis_mlx.alignment.padded_rows import Rows
from mis_mlx.data.examples import Sequenced
from mis_mlx.gguf_export import model_card as model_card
from mis_mlx.hardware import memory
from mis_mlx.hardware.stage_cost import StageCost
from mis_mlx.judge.speed import rounds
from mis_mlx.models.opening import compute_type, load
from mis_mlx.models.writing import lora
from mis_mlx.settings.recipe import TrainingConfig
from mis_mlx.storage import run_folder
from mis_mlx.types import Checkpoint, MisError
from tests import tiny, trl_model
from tests.conftest import Done, last_line, settings_of

PLAIN: dict[str, Any] = {"target_bpw": None, "q_method": "round", "q_iters": 0}
SMALL = ("--iters", 6, "--save-every", 2, "--batch-size", 2, "--max-seq-length", 96)
SMALL += ("--eval-rows", 8, "--learning-rate", "3e-3", "--dtype", "float32")


@pytest.fixture(scope="module")
def small(llama: Checkpoint, answers: Path) -> tuple[object, ...]:
    """Flags of a run of seconds."""
    return ("--model", llama.path, "--data", answers, *SMALL)


def rows_of(found: dict[str, np.ndarray]) -> list[Sequenced]:
    """The rows that TRL was given, padding cut off."""
    rows = []
    for ids, labels in zip(found["sft/ids"], found["sft/labels"], strict=True):
        length = int(np.flatnonzero(labels != -100)[-1]) + 1
        rows.append((ids[:length].astype(np.int32), (labels[:length] != -100).astype(np.float32)))
    return rows


def step(lesson: Rows, model: nn.Module, batch_size: int, parts: int) -> tuple[float, float, Any]:
    """(sum, count, gradients of the sum) of the first step, micro-batches added as the loop adds
    them.
    """
    loss = partial(lesson.loss, False)
    total = 0.0
    count = 0.0
    gradients = None
    recipe = TrainingConfig(batch_size=batch_size, grad_accumulation_steps=parts)
    for arguments in lesson.micro_batches(recipe, 0):
        (part, n, _), made = nn.value_and_grad(model, loss)(model, *arguments)
        total = total + float(part)
        count = count + float(n)
        gradients = made if gradients is None else tree_map(mx.add, gradients, made)
    return total, count, gradients


@pytest.mark.parametrize("case", ["sft", "sft_parts"])
@pytest.mark.parametrize(("batch_size", "parts"), [(4, 1), (1, 4)])
def test_loss_and_gradients_are_trls(
    case: str, batch_size: int, parts: int, tmp_path: Path
) -> None:
    """TRL's SFTTrainer on completions, its token mean over a step; ours in one part or several."""
    found = trl_model.stored()
    model = trl_model.model(found, "policy", tmp_path)
    lesson = Rows(rows_of(found))
    total, count, gradients = step(lesson, model, batch_size, parts)
    assert total / count == pytest.approx(float(found[f"{case}/loss"]), rel=1e-5)
    assert trl_model.worst(gradients, found, case, count) < 5e-5
    assert lesson.measure(model, 3)["loss"] == pytest.approx(float(found[f"{case}/loss"]), rel=1e-5)


def test_end_to_end(undisturbed: tuple[Path, Done], llama: Checkpoint, answers: Path) -> None:
    """It learns; the result is an ordinary folder with the data's license in it, and the best
    checkpoint's weights.
    """
    out, done = undisturbed
    result = last_line(done)
    assert result["held_out_best"]["loss"] < result["held_out_start"]["loss"] - 0.5
    assert [r["number"] for r in run_folder.records(out / alignment_run.HELD_OUT)] == [0, 2, 4, 6]
    best = min(run_folder.records(out / alignment_run.HELD_OUT), key=lambda r: r["loss"])
    assert result["best_step"] == best["number"]
    model, tokenizer = rounds.open_model(compute_type.open_to_compute(out / "model"))
    assert len(list(rounds.greedy(model, tokenizer.encode("how many"), 4))) == 4
    card = json.loads((out / "model" / "data.json").read_text())
    assert card["licence"] == "CC0"
    assert card["source"] == answers.name
    assert card["train_rows"] == 24
    best = mx.load(str(out / "best" / f"step-{result['best_step']:08d}" / "model.safetensors"))
    stored = mx.load(str(out / "model" / "model.safetensors"))
    assert set(best) == set(stored)
    assert all(mx.array_equal(best[n], stored[n]) for n in best)
    assert result["tokens"] == sum(r["tokens"] for r in run_folder.metrics(out)) > 0


def test_the_best_checkpoint_is_kept_when_training_goes_wrong(small: Any, tmp_path: Path) -> None:
    """A rate that ruins the model: the result is the best there was, not the last."""
    result = sft.run(settings_of(sft, small, tmp_path / "run", learning_rate=0.5))
    records = run_folder.records(tmp_path / "run" / alignment_run.HELD_OUT)
    held = {r["number"]: r["loss"] for r in records}
    assert held[6] > held[result["best_step"]] == min(held.values())
    assert result["held_out_best"]["loss"] == min(held.values())


def test_lora_trains_little_and_fuses_to_what_mlx_lm_makes(
    small: Any, tmp_path: Path, llama: Checkpoint
) -> None:
    """Frozen weights stay; the folder equals mlx-lm's own fuse of the adapters, which mlx-lm loads
    by their folder.
    """
    flags = {"fine_tune_type": "lora", "rank": 4, "num_layers": 2, "learning_rate": 1e-2}
    result = sft.run(settings_of(sft, small, tmp_path / "run", **flags))
    wanted = lora.Lora(2, 4, 20.0)
    assert result["params_trained"] == wanted.params(llama.config) < 512_448 / 10
    assert result["held_out_best"]["loss"] < result["held_out_start"]["loss"] - 0.3
    model, _ = load.mlx_lm("utils").load(
        str(llama.path), adapter_path=str(tmp_path / "run/adapters")
    )
    fused = load.mlx_lm("tuner.utils").tree_unflatten(
        [(n, m.fuse()) for n, m in model.named_modules() if hasattr(m, "fuse")]
    )
    model.update_modules(fused)
    theirs = dict(tree_flatten(model.parameters()))
    ours = mx.load(str(tmp_path / "run/model/model.safetensors"))
    before = mx.load(str(llama.path / "model.safetensors"))
    assert set(theirs) == set(ours)
    assert all(mx.allclose(theirs[n], ours[n], atol=1e-6) for n in ours)
    changed = {name for name in ours if not mx.array_equal(ours[name], before[name])}
    assert changed
    assert all(name.startswith(("model.layers.1.", "model.layers.2.")) for name in changed)


def test_lora_on_a_packed_model_fuses_into_a_dense_one(
    small: Any, tmp_path: Path, llama: Checkpoint
) -> None:
    """A 4-bit model can be trained with adapters, and with nothing else; --no-fuse leaves these
    beside it.
    """
    quantize.run(quantize.Settings(model=str(llama.path), mlx_path=str(tmp_path / "q4"), **PLAIN))
    flags = {"model": str(tmp_path / "q4"), "iters": 2}
    with pytest.raises(MisError, match="--fine-tune-type lora"):
        sft.run(settings_of(sft, small, tmp_path / "no", **flags))
    left = sft.run(
        settings_of(sft, small, tmp_path / "left", fine_tune_type="lora", fuse=False, **flags)
    )  # beside the model
    assert left["student"] == str(tmp_path / "left/adapters")
    assert not (tmp_path / "left/model").exists()
    names = {p.name for p in (tmp_path / "left/adapters").iterdir()}
    assert names == {"adapters.safetensors", "adapter_config.json"}
    result = sft.run(settings_of(sft, small, tmp_path / "run", fine_tune_type="lora", **flags))
    made = load.open_checkpoint(tmp_path / "run/model")
    assert "quantization" not in made.config
    assert made.nbytes == llama.nbytes
    assert result["held_out_best"]["loss"] < result["held_out_start"]["loss"]


def test_steps_are_cut_where_memory_is_short_and_stay_so(small: Any, tmp_path: Path) -> None:
    """A budget for one row at a time: the same step to rounding, in four parts; resumed under a big
    one, still so.
    """
    wide = settings_of(sft, small, tmp_path / "wide", iters=2, batch_size=4)
    *_, checkpoint = alignment_run.open_run_model(wide)

    def phase(s: sft.Settings) -> StageCost:
        return alignment_run.training_cost(s, checkpoint, s.batch_size, 32, name="sft")

    # rows at once, times: with the gradients of those before beside them
    ways = ((1, 4), (2, 2), (4, 1))
    peaks = [
        phase(replace(wide, batch_size=n, grad_accumulation_steps=k)).peak_bytes for n, k in ways
    ]
    limit = memory.needed_bytes(peaks[0])
    assert min(peaks[1:]) > peaks[0]
    tight = wide.with_values(out=str(tmp_path / "tight"), budget=f"{limit}")
    cut = alignment_run.fit_micro_batches(tight, None, phase)
    assert (cut.batch_size, cut.grad_accumulation_steps) == (1, 4)
    assert alignment_run.fit_micro_batches(wide, None, phase) == wide
    sft.run(wide)
    sft.run(tight)
    one, other = (run_folder.metrics(tmp_path / name) for name in ("wide", "tight"))
    assert [r["loss"] for r in one] == pytest.approx([r["loss"] for r in other], rel=1e-5)
    assert run_folder.stored_settings(tmp_path / "tight", run_folder.PLAN)["micro"] == 1
    again = tight.with_values(budget=None, resume=True)
    assert alignment_run.fit_micro_batches(again, tmp_path / "tight", phase).batch_size == 1


def test_the_plan_holds(undisturbed: tuple[Path, Done], small: Any) -> None:
    """MLX never held more than was planned, over all steps."""
    s = settings_of(sft, small, Path("unused"))
    checkpoint = load.open_checkpoint(str(s.model))
    planned = alignment_run.training_cost(s, checkpoint, s.batch_size, 96).peak_bytes
    held = max(r["peak_bytes"] for r in run_folder.metrics(undisturbed[0]))
    assert held <= planned < 4 * held  # of which a third is in flight on a GPU alone


@pytest.fixture(scope="module")
def taught(
    small: Any, llama: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Checkpoint, Path, dict[str, Any]]:
    """(a packed model, the run in which its scales learned, the run's result)."""
    place = tmp_path_factory.mktemp("scales")
    base = tiny.packed(llama, place / "q4")
    flags: dict[str, Any] = {"model": str(base.path), "fine_tune_type": "scales"}
    flags |= {"learning_rate": 5e-2, "iters": 12, "save_every": 4, "grad_accumulation_steps": 2}
    result = sft.run(settings_of(sft, small, place / "run", **flags))
    return base, place / "run", dict(result)


def test_scales_learn_and_the_rest_stays(taught: tuple[Checkpoint, Path, dict[str, Any]]) -> None:
    """As many bytes as before; no integer changes, nor a table, and all else does."""
    base, out, result = taught
    assert result["held_out_best"]["loss"] < result["held_out_start"]["loss"] - 1.0
    made = load.open_checkpoint(out / "model")
    assert made.nbytes == base.nbytes
    assert made.config["quantization"] == base.config["quantization"]
    before = tiny.stored_weights(base.path)
    after = tiny.stored_weights(made.path)
    assert set(after) == set(before)
    same = {name for name in after if mx.array_equal(after[name], before[name])}
    tables = {name for name in after if name.startswith("model.embed_tokens")}
    assert same == {name for name in after if after[name].dtype == mx.uint32} | tables
    changed = sum(after[name].size for name in set(after) - same)
    assert result["params_trained"] == changed
    assert json.loads((out / "model" / "data.json").read_text())["licence"] == "CC0"


def test_mlx_lm_opens_what_learned_and_finds_the_same_loss(
    taught: tuple[Checkpoint, Path, dict[str, Any]], small: Any
) -> None:
    """Of the base, of the result, each under mlx-lm's own forward pass: the run's figures, and
    which rows it would answer right.
    """
    base, out, result = taught
    s = settings_of(sft, small, Path("unused"))
    _, valid, _ = alignment_run.data(s, base, ("completion",))
    tokens, counts = padded_rows.padded([row[0] for row in valid])
    for folder, found in ((base.path, "held_out_start"), (out / "model", "held_out_best")):
        model, _ = load.mlx_lm("utils").load(str(folder))
        model.set_dtype(mx.float32)
        logits = model(tokens)[:, :-1]
        losses = nn.losses.cross_entropy(logits, tokens[:, 1:])
        loss = float((losses * counts[:, :-1]).sum() / counts.sum())
        assert loss == pytest.approx(result[found]["loss"], rel=2e-4)
        wrong = (logits.argmax(axis=-1) != tokens[:, 1:]) * counts[:, :-1]
        assert result[found]["right"] == float((wrong.sum(axis=1) == 0).mean())


def test_the_plan_of_scales_holds(taught: tuple[Checkpoint, Path, dict[str, Any]]) -> None:
    """MLX never held more than was planned, though all that is welcome stays in memory."""
    base, out, _ = taught
    s = sft.Settings(**run_folder.stored_settings(out))
    planned = packed_run.training_cost(s, base, 96, 8).peak_bytes
    assert max(r["peak_bytes"] for r in run_folder.metrics(out)) <= planned


@pytest.mark.parametrize("kind", ["dense", "mxfp4"])
def test_what_has_no_scales_that_learn_is_refused(
    kind: str, small: Any, llama: Checkpoint, tmp_path: Path
) -> None:
    """Before any work, with a remedy."""
    flags: dict[str, Any] = {"fine_tune_type": "scales"}
    why = "is not quantized, so it has no scales: `quantize` it"
    if kind == "mxfp4":
        tiny.in_fp4(llama, tmp_path / "fp4", kind)
        flags["model"] = str(tmp_path / "fp4")
        why = "in affine, mxfp4, whose scales do not learn here: use --fine-tune-type lora"
    with pytest.raises(MisError, match=why):
        sft.run(settings_of(sft, small, tmp_path / "run", **flags))
    assert not (tmp_path / "run").exists()
