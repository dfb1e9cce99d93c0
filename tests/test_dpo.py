"""The command `dpo`: losses on pairs by hand and against TRL's stored numbers; what it leaves, and
the stored reference.
"""

from __future__ import annotations

import math
from functools import partial
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
from mis_mlx.judge.speed import rounds
from mis_mlx.maths.losses import token_logps
from mis_mlx.maths.rl_losses import dead_zone, pair_losses
from mis_mlx.models.opening import compute_type, load
from mis_mlx.storage import run_folder
from mis_mlx.types import Checkpoint
from tests import tiny, trl_model
from tests.conftest import Done, last_line, mostly_thorough, settings_of
from tests.test_sft import SMALL

# float32 on a CPU, two frameworks: measured 1e-6 and 5e-6
LOSS = 1e-5
GRADIENT = 5e-5
CASES = {
    "sigmoid": dpo.Settings(loss_type="sigmoid", beta=0.3, dpop_lambda=0.0),
    "dpop": dpo.Settings(loss_type="dpop", beta=0.3, dpop_lambda=50.0),
    "dpop_mild": dpo.Settings(loss_type="dpop", beta=0.1, dpop_lambda=5.0),
    "dpop_zero": dpo.Settings(loss_type="dpop", beta=0.3, dpop_lambda=0.0),
}


@pytest.fixture(scope="module")
def trl() -> dict[str, np.ndarray]:
    """TRL's numbers."""
    return trl_model.stored()


@pytest.fixture(scope="module")
def policy(trl: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """TRL's policy in MLX."""
    return trl_model.model(trl, "policy", tmp_path_factory.mktemp("trl"))


@pytest.fixture(scope="module")
def pairs(trl: dict[str, np.ndarray]) -> list[dpo.Pair]:
    """The rows that TRL was given, padding cut off: (ids, marks) of the chosen and of the rejected
    answer.
    """
    rows = []
    for ids, mask in zip(trl["dpo/ids"], trl["dpo/mask"], strict=True):
        length = int(np.flatnonzero(mask)[-1]) + 1
        rows.append((ids[:length].astype(np.int32), mask[:length].astype(np.float32)))
    half = len(rows) // 2
    return list(zip(rows[:half], rows[half:], strict=True))


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_trls(
    case: str, trl: dict[str, np.ndarray], policy: nn.Module, pairs: list[dpo.Pair]
) -> None:
    """DPO as TRL's DPOTrainer computes it; DPO-P as its formula does in torch. Its
    penalty, here of 50, multiplies the 2e-5 nats that count as rounding, which TRL counts as
    rewards.
    """
    theirs = float(trl[f"{case}/loss"])
    tolerance = 2 * LOSS if case == "dpop" else LOSS
    work = nn.value_and_grad(policy, CASES[case].loss)
    arguments = (*dpo.padded_pairs(pairs), mx.array(trl["dpo/reference"]))

    (total, count, _), made = work(policy, *arguments)

    assert float(total) / float(count) == pytest.approx(theirs, rel=tolerance)
    assert trl_model.worst(made, trl, case, float(count)) < GRADIENT


def test_the_reference_is_torchs(
    trl: dict[str, np.ndarray], pairs: list[dpo.Pair], tmp_path: Path
) -> None:
    """Pair by pair and three at a time, as in training and as held out, which must not matter."""
    model = trl_model.model(trl, "reference", tmp_path / "reference")
    half = len(pairs)
    for batch_size in (1, 3):
        values = dpo.reference(model, pairs, batch_size, trained=batch_size == 3)
        np.testing.assert_allclose(values[:, 0], trl["dpo/reference"][:half], rtol=1e-5)
        np.testing.assert_allclose(values[:, 1], trl["dpo/reference"][half:], rtol=1e-5)


def test_by_hand() -> None:
    """r_w = 1, r_l = -2, beta 0.5: margin 3; and with r_w = -1 the penalty of dpop stands inside
    beta and sigma.
    """
    one = mx.array([1.0])
    two = mx.array([-2.0])
    loss = partial(pair_losses, beta=0.5)

    # at the reference nothing is preferred yet, and the gradient of dpop's penalty is 0
    zero = mx.zeros((3,))
    for kind in ("sigmoid", "dpop"):
        np.testing.assert_allclose(loss(zero, zero, kind=kind), math.log(2), atol=1e-7)
        chosen = mx.grad(lambda r, kind=kind: loss(r, zero, kind=kind).sum())(zero)
        np.testing.assert_allclose(chosen, -0.5 / 2)
    plain = loss(one, two, kind="sigmoid").item()
    assert plain == loss(one, two, kind="dpop", dpop_lambda=50.0).item()
    assert plain == pytest.approx(math.log1p(math.exp(-1.5)))
    with_penalty = loss(-one, two, kind="dpop", dpop_lambda=3.0).item()
    assert with_penalty == pytest.approx(math.log1p(math.exp(-0.5 * (1 - 3))))


def test_rounding_is_no_reward() -> None:
    """Within the zone exactly 0, beyond it less by its width, as steep as without it."""
    apart = mx.array([-0.5, -0.1, 0.0, 0.05, 0.3])
    np.testing.assert_allclose(np.array(dead_zone(apart, 0.1)), [-0.4, 0, 0, 0, 0.2], atol=1e-7)
    assert dead_zone(apart, 0.1)[1:4].tolist() == [0.0] * 3

    slopes = mx.grad(lambda x: (2 * dead_zone(x, mx.array([0.1] * 5))).sum())(apart)
    assert slopes.tolist() == [2.0] * 5


@pytest.mark.parametrize(("rows", "temperature", "softcap"), [(None, 1.0, 0.0), (5, 0.7, 3.0)])
def test_log_probabilities_in_chunks_are_those_of_the_whole(
    rows: int | None, temperature: float, softcap: float
) -> None:
    """Values and gradients of hidden states and head, each position with its own cotangent, against
    log_softmax.
    """
    hidden = mx.random.normal((23, 16), key=mx.random.key(4))
    head = mx.random.normal((50, 16), key=mx.random.key(5))
    targets = mx.arange(23) * 2
    weights = mx.random.normal((23,), key=mx.random.key(6))

    def plain(h: mx.array, w: mx.array) -> mx.array:
        z = h @ w.T
        z = softcap * mx.tanh(z / softcap) if softcap else z
        log_p = nn.log_softmax(z / temperature, axis=-1)
        return (mx.take_along_axis(log_p, targets[:, None], -1)[:, 0] * weights).sum()

    def chunked(h: mx.array, w: mx.array, frozen_head: bool = False) -> mx.array:
        how = {"temperature": temperature, "rows": rows, "softcap": softcap}
        log_p = token_logps(h, w, targets=targets, frozen_head=frozen_head, **how)
        return (log_p * weights).sum()

    wanted, wanted_gradients = mx.value_and_grad(plain, argnums=(0, 1))(hidden, head)
    found, found_gradients = mx.value_and_grad(chunked, argnums=(0, 1))(hidden, head)
    frozen = mx.grad(lambda h: chunked(h, head, frozen_head=True))(hidden)

    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    for one, other in zip(wanted_gradients, found_gradients, strict=True):
        assert mx.allclose(one, other, rtol=1e-4, atol=1e-5)
    assert mx.allclose(frozen, wanted_gradients[0], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def small(llama: Checkpoint, answers: Path) -> tuple[object, ...]:
    """Flags of a run of seconds."""
    return ("--model", llama.path, "--data", answers, *SMALL, "--learning-rate", "1e-3")


def test_end_to_end(undisturbed: tuple[Path, Done]) -> None:
    """It begins at ln 2 with no margin, ends with one, the chosen answers no less likely, and
    speaks. The kept checkpoint has the lowest loss of means, which follows margin and gain.
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
    records = run_folder.records(out / alignment_run.HELD_OUT)
    means = [r[dpo.OF_MEANS] for r in records]
    assert result["best_step"] == records[int(np.argmin(means))]["number"] > 0
    for r, mean in zip(records, means, strict=True):
        x = 0.1 * (r["margin"] - 5.0 * max(0.0, -r["chosen_gain"]))
        assert mean == pytest.approx(math.log1p(math.exp(-x)), abs=1e-5)
    first = run_folder.metrics(out)[0]
    assert {"margin", "accuracy", "chosen", "rejected", "loss", "tokens"} <= set(first)
    assert first["tokens"] > 0
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-3)
    model, tokenizer = rounds.open_model(compute_type.open_to_compute(out / "model"))
    assert len(list(rounds.greedy(model, tokenizer.encode("how many"), 4))) == 4


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_figures_are_those_of_the_written_folder(
    kind: Any,
    answers: Path,
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
    dtype = alignment_run.dtype_of(settings, checkpoint)
    before = load.resident_model(compute_type.open_to_compute(model), dtype)
    logps = dpo.reference(before, pairs, 2, trained=False)
    written = load.resident_model(checkpoint, dtype)
    found = dpo.measure(written, settings, pairs, logps, 2)["margin"]
    assert result["held_out_best"]["margin"] == pytest.approx(found, abs=1e-4)
    assert found == pytest.approx(trained, rel=0.1)


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
