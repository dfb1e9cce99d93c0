"""The command `dpo`: what it leaves, the stored reference, exact resume. Losses are in
test_preference.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mis_mlx import dpo
from mis_mlx.alignment import alignment_run, padded_rows
from mis_mlx.compute import precision
from mis_mlx.data import token_windows
from mis_mlx.models.opening import compute_type, load
from mis_mlx.models.writing import mlx_generate
from mis_mlx.storage import checkpoint as protocol
from mis_mlx.storage import run_folder
from mis_mlx.types import Checkpoint, MisError
from tests import tiny
from tests.conftest import Done, last_line, mostly_thorough, settings_of
from tests.test_sft import SMALL, answers  # noqa: F401  a fixture


@pytest.fixture(scope="module")
def small(llama: Checkpoint, answers: Path) -> tuple[object, ...]:  # noqa: F811
    """Flags of a run of seconds."""
    return ("--model", llama.path, "--data", answers, *SMALL, "--learning-rate", "1e-3")


def test_end_to_end(undisturbed: tuple[Path, Done]) -> None:
    """It begins at ln 2 with no margin, ends with one, the chosen answers no less likely, and
    speaks.
    """
    out, done = undisturbed
    result = last_line(done)
    start = result["held_out_start"]
    best = result["held_out_best"]
    assert start["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert start["margin"] == 0.0
    assert best["loss"] < start["loss"] - 0.01
    assert best["margin"] > 0.1
    assert best["chosen_gain"] > 0.0
    first = run_folder.metrics(out)[0]
    assert {"margin", "accuracy", "chosen", "rejected", "loss", "tokens"} <= set(first)
    assert first["tokens"] > 0
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-3)
    model, tokenizer = mlx_generate.open_model(compute_type.open_to_compute(out / "model"))
    assert len(list(mlx_generate.greedy(model, tokenizer.encode("how many"), 4))) == 4


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_figures_are_those_of_the_written_folder(
    kind: Any,
    answers: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Steps far below bfloat16's spacing: the folder keeps nine tenths of them, and is measured."""
    model = tiny.make(tmp_path / "bf16", dtype="BF16")
    flags = ("--model", model, "--data", answers, *SMALL[:-4])
    rate = {"full": 1e-5, "lora": 1e-4}[kind]
    settings = settings_of(dpo, flags, tmp_path / "run", learning_rate=rate, fine_tune_type=kind)
    result = dpo.run(settings)
    trained = run_folder.records(tmp_path / "run" / alignment_run.HELD_OUT)[-1]["margin"]
    checkpoint = compute_type.open_to_compute(tmp_path / "run/model")
    assert {t.dtype for t in checkpoint.tensors.values()} == {"BF16"}
    _, pairs, _ = alignment_run.data(settings, checkpoint, ("pair",), dpo.ANSWERS)
    before = load.resident_model(compute_type.open_to_compute(model), mx.float32)
    logps = dpo.reference(before, pairs, 2, trained=False)
    written = load.resident_model(checkpoint, mx.float32)
    found = dpo.measure(written, settings, pairs, logps, 2)["margin"]
    assert result["held_out_best"]["margin"] == pytest.approx(found, abs=1e-4)
    assert found == pytest.approx(trained, rel=0.1)


def test_the_reference_is_two_floats_a_pair(undisturbed: tuple[Path, Done]) -> None:
    """Pairs that the run trains on and held-out ones."""
    saved = protocol.newest(undisturbed[0] / dpo.REFERENCE)
    assert saved is not None
    values = protocol.load_arrays(saved, "logps")["chosen_rejected"]
    assert values.shape == (12 + 8, 2)
    assert values.dtype == mx.float32
    assert (values < 0).all()
    assert (
        json.loads((undisturbed[0] / "data.json").read_text())["fingerprint"]
        == saved.state["fingerprint"]
    )


def test_a_damaged_reference_is_made_again(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bit of the stored log-probabilities flipped: noticed by its hash, the run's end is the
    same. A whole one is not asked for again.
    """
    folder = tmp_path / "run"
    result = dpo.run(settings_of(dpo, small, folder, iters=2))
    weights = (folder / "model/model.safetensors").read_bytes()
    path = next((folder / dpo.REFERENCE).iterdir()) / "logps.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    for name in ("model", "steps", "best"):
        (folder / name).rename(tmp_path / name)
    again = dpo.run(settings_of(dpo, small, folder, iters=2, resume=True))
    assert (folder / "model/model.safetensors").read_bytes() == weights
    assert again["held_out_best"] == result["held_out_best"]
    (folder / "model").rename(tmp_path / "again")
    monkeypatch.setattr(dpo, "reference", lambda *_, **__: pytest.fail("it is asked again"))
    dpo.run(settings_of(dpo, small, folder, iters=2, resume=True))


@pytest.mark.parametrize(("count", "batch"), [(7, 2), (7, 3), (5, 8), (1, 1)])
def test_the_rows_that_steps_see(count: int, batch: int) -> None:
    """As drawn step by step; a number of steps without end is not drawn to its end."""
    for iters in (1, 2, 3):
        s = dpo.Settings(iters=iters, batch_size=batch)
        drawn = [
            token_windows.order(count, s.batch_size * s.grad_accumulation_steps, step, s.seed)
            for step in range(iters)
        ]
        wanted = np.unique(np.concatenate(drawn))
        assert padded_rows.visited_rows(count, s).tolist() == wanted.tolist()
    endless = dpo.Settings(iters=10**12, batch_size=batch)
    assert padded_rows.visited_rows(count, endless).tolist() == list(range(count))


def test_dpop_is_judged_by_the_mean_pair(undisturbed: tuple[Path, Done]) -> None:
    """The kept checkpoint has the lowest loss of means, which at the reference is ln 2 and follows
    margin and gain.
    """
    records = run_folder.records(undisturbed[0] / alignment_run.HELD_OUT)
    best = min(records, key=lambda r: r[dpo.OF_MEANS])
    assert last_line(undisturbed[1])["best_step"] == best["number"] > 0
    assert records[0][dpo.OF_MEANS] == pytest.approx(math.log(2), abs=1e-4)
    for r in records:
        x = 0.1 * (r["margin"] - 5.0 * max(0.0, -r["chosen_gain"]))
        assert r[dpo.OF_MEANS] == pytest.approx(math.log1p(math.exp(-x)), abs=1e-5)


def test_plain_dpo_learns(small: Any, tmp_path: Path) -> None:
    """The margin on held-out pairs grows, with LoRA too."""
    result = dpo.run(
        settings_of(
            dpo,
            small,
            tmp_path / "run",
            loss_type="sigmoid",
            fine_tune_type="lora",
            learning_rate=3e-3,
        )
    )
    assert result["held_out_best"]["margin"] > 0.1 > result["held_out_start"]["margin"]
    assert result["held_out_best"]["loss"] < result["held_out_start"]["loss"]


@pytest.fixture(name="fused")
def _fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention outside of a gradient has other last bits, as on Metal, where a kernel of its own
    computes it.
    """
    traced = list[bool]()
    attention = mx.fast.scaled_dot_product_attention
    value_and_grad = nn.value_and_grad

    def tracing(model: nn.Module, work: Any) -> Any:
        def marked(*arguments: Any, **named: Any) -> Any:
            traced.append(True)
            try:
                return work(*arguments, **named)
            finally:
                traced.pop()

        return value_and_grad(model, marked)

    def attend(*arguments: Any, **named: Any) -> mx.array:
        right = attention(*arguments, **named)
        if traced:
            return right
        return right + float(mx.finfo(right.dtype).eps) * mx.abs(right).max()

    monkeypatch.setattr(nn, "value_and_grad", tracing)
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", attend)


@pytest.mark.parametrize("word", mostly_thorough(["cpu", "metal"], "cpu"))
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_training_begins_at_exactly_zero(
    kind: Any,
    word: str,
    small: Any,
    tmp_path: Path,
    fused: None,
    monkeypatch: pytest.MonkeyPatch,
    brief_look: None,
) -> None:
    """No pair of step 1, and none held out, has a reward: the loss is ln 2, the penalty of dpop is
    off. Attention is computed in two ways, and rectangles of step and reference are of different
    lengths.
    """
    monkeypatch.setenv(precision.POLICY, word)
    settings = settings_of(dpo, small, tmp_path / "run", iters=1, fine_tune_type=kind)
    result = dpo.run(settings)
    (first,) = run_folder.metrics(tmp_path / "run")
    assert first["margin"] == first["accuracy"] == first["chosen_gain"] == 0.0
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    start = result["held_out_start"]
    assert start["margin"] == start["chosen_gain"] == 0.0
    assert start["loss"] == start[dpo.OF_MEANS] == pytest.approx(math.log(2), abs=1e-7)
    assert first["grad_norm"] > 0


def test_refusals_are_sentences(small: Any, tmp_path: Path) -> None:
    """Rows without a rejected answer, by line; nothing is begun."""
    row = json.dumps({"prompt": "a", "chosen": "b"})
    (tmp_path / "train.jsonl").write_text(f"{row}\n")
    with pytest.raises(
        MisError, match="train.jsonl line 1: has no 'prompt' and 'chosen' and 'rejected'"
    ):
        dpo.run(settings_of(dpo, small, tmp_path / "run", data=str(tmp_path)))
    assert not (tmp_path / "run").exists()
