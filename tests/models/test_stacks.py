"""Several windows in one pass, as on a GPU: how many passes there are, and that nothing else
changes.

Imposed on a CPU by Metal's policy, in float32; on a GPU nobody has counted them yet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx.compute import precision, quick_exp
from mis_mlx.data.token_windows import Windows
from mis_mlx.judge import comparison
from mis_mlx.models.opening import load
from mis_mlx.models.opening.model_size import model_of
from mis_mlx.models.passing import pass_cost, residency, stream
from mis_mlx.models.passing.sweep import BlockTurn
from mis_mlx.pruning import reconstruct
from mis_mlx.pruning.calibrate import calibrate
from mis_mlx.quantization import bit_allocation, stage
from mis_mlx.types import Air, Checkpoint, Precision
from tests import tiny
from tests.pruning.test_reconstruct import CUTS, student_of

WINDOWS = 8
LAYERS = 3


@pytest.fixture(name="batches")
def _batches() -> list[mx.array]:
    """Eight windows of 32 tokens."""
    return [mx.random.randint(0, 512, (1, 32), key=mx.random.key(k)) for k in range(WINDOWS)]


def in_float32(checkpoint: Checkpoint) -> Checkpoint:
    """The model, told to compute in float32 under either policy."""
    return replace(checkpoint, precision=Precision(asked="float32"))


@pytest.fixture(name="llama")
def _llama(llama: Checkpoint) -> Checkpoint:
    return in_float32(llama)


@pytest.fixture(name="under")
def _under(
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[str, Callable[[], Any]], tuple[Any, int]]:
    """`under(word, work)`: (what `work` gives under a policy; how often a block was called)."""
    calls = list[int]()
    kind = load.mlx_lm("models.llama").TransformerBlock
    call = kind.__call__

    def counting(self: Any, *arguments: Any, **named: Any) -> Any:
        calls.append(1)
        return call(self, *arguments, **named)

    monkeypatch.setattr(kind, "__call__", counting)

    def run(word: str, work: Callable[[], Any]) -> tuple[Any, int]:
        monkeypatch.setenv(precision.POLICY, word)
        calls.clear()
        return work(), len(calls)

    return run


def near(found: Any, want: Any, share: float = 1e-5) -> None:
    """To so much of the largest, in all that a mapping or a list holds."""
    if isinstance(want, Mapping):
        assert found.keys() == want.keys()
        found, want = list(found.values()), list(want.values())
    if isinstance(want, list):
        for a, b in zip(found, want, strict=True):
            near(a, b, share)
        return
    found, want = (np.array(x, np.float64) for x in (found, want))
    assert found.shape == want.shape
    assert np.abs(found - want).max() <= share * np.abs(want).max()


def test_how_many_go_together() -> None:
    """Eight at most, fewer where a pass holds more than 128 MiB, one of a mixture, whole batches of
    several windows.
    """
    s = tiny.CONFIG
    assert residency.batches_per_pass(s, 32, 32) == 8
    assert residency.batches_per_pass(s, 4 * 32, 32) == 2
    assert residency.batches_per_pass(s, 16 * 32, 32) == 1
    wide = {
        **s,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_attention_heads": 14,
        "head_dim": 64,
    }
    held = residency.pass_bytes(wide, 512, 512)
    assert residency.batches_per_pass(wide, 512, 512) == residency.STACK_BYTES // held == 2
    assert residency.batches_per_pass({**s, **tiny.FAMILIES["qwen3_moe"]}, 32, 32) == 1
    gemma = {**s, **tiny.FAMILIES["gemma4_text"], "model_type": "gemma4_text"}
    assert residency.batches_per_pass(gemma, 32, 32) == 1
    assert residency.batches_per_pass({**gemma, "num_kv_shared_layers": 0}, 32, 32) == 1


def test_a_pass(llama: Checkpoint, batches: list[mx.array], under: Any) -> None:
    """A block is called once for eight windows, one by one on a CPU; a window of another length
    goes by itself.
    """
    odd = [*batches[:3], mx.array([[5, 6, 7]]), *batches[3:]]
    want, many = under("cpu", lambda: stream.Stream(llama).forward(odd))
    found, few = under("metal", lambda: stream.Stream(llama).forward(odd))
    assert (many, few) == (9 * LAYERS, 3 * LAYERS)
    near(found, want)


class Given(NamedTuple):
    """What an engine is given."""

    teacher: Checkpoint
    other: Checkpoint  # of the same tokens
    batches: list[mx.array]
    folder: Path


def calibration(given: Given) -> Any:
    """Every sum and distance, and the air asked once a window."""
    asked = list[int]()

    def air() -> Air:
        asked.append(1)
        return Air()

    found, _ = calibrate(given.teacher, given.batches, air)
    assert len(asked) == WINDOWS
    sums = [*found.ffn.values(), *found.heads.values()]
    return [*([of.square, of.env_weighted] for of in sums), np.array([*found.block.values()])]


def gram_matrices(given: Given) -> Any:
    """GPTQ's sums of all windows in one block."""
    source = stream.Stream(given.teacher)
    hidden = source.embed(given.batches)
    _, block = next(source.blocks([0]))
    return stage._grams(BlockTurn(source, source.block_index, block, hidden), ["ffn", "norm1"])


def repair(given: Given) -> Any:
    """The matrices of a pruned student, of which every fourth window judges, and the error that is
    left.
    """
    keep, sizes = CUTS["ffn"]
    student = in_float32(student_of(given.teacher, keep, given.folder, **sizes))
    matrices, left = reconstruct.reconstruct(given.teacher, student, keep, given.batches)
    assert len(matrices) == LAYERS
    return [matrices, np.array(left)]


def sensitivity(given: Given) -> Any:
    """What every matrix costs in fewer bits."""
    costs = bit_allocation.costs(given.teacher, given.batches, 64, (3, 4, 8))
    return {path: np.array([*of.values()]) for path, of in costs.items()}


def measuring(given: Given) -> Any:
    """Loss, KL and agreement of every window, of which all but the first three predictions
    count.
    """
    tokens = np.concatenate([np.array(batch) for batch in given.batches]).astype(np.int32)
    loss_mask = np.ones(tokens.shape, np.float32)
    loss_mask[:, :3] = 0
    models = {"teacher": given.teacher, "student": given.other}
    found = comparison.compare(models, Windows(tokens, loss_mask))
    assert len(found) == 1 + len(comparison.METRICS)
    return found


# engine -> (calls of a block with a window in each, and with eight; the share that may differ)
ENGINES: dict[Callable[[Given], Any], tuple[int, int, float]] = {
    calibration: (WINDOWS * LAYERS, LAYERS, 1e-5),
    gram_matrices: (WINDOWS, 1, 1e-5),
    repair: (3 * WINDOWS * LAYERS, 3 * LAYERS, 1e-4),
    # forwards in one pass for eight windows, back in two
    sensitivity: (2 * WINDOWS * LAYERS, 3 * LAYERS, 1e-5),
    measuring: (2 * WINDOWS * LAYERS, 2 * LAYERS, 1e-5),
}


@pytest.mark.parametrize("engine", ENGINES)
def test_eight_windows_are_in_one_pass(
    engine: Callable[[Given], Any],
    llama: Checkpoint,
    models: Callable[[str], Checkpoint],
    batches: list[mx.array],
    tmp_path: Path,
    under: Any,
) -> None:
    """Which changes nothing."""
    other = in_float32(models("untied"))
    given = (Given(llama, other, batches, tmp_path / word) for word in ("cpu", "metal"))
    (want, many), (found, few) = (under(g.folder.name, partial(engine, g)) for g in given)
    *calls, share = ENGINES[engine]
    assert [many, few] == calls
    near(found, want, share)


def test_what_takes_more_than_hidden_states(
    models: Callable[[str], Checkpoint],
    batches: list[mx.array],
    under: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A model whose blocks get channels of each token and another block's keys, goes window
    by window: a pass, calibration, and GPTQ's sums in a block that uses others' keys are a CPU's to
    the bit. So are costs but for the softmax that they begin with.
    """
    monkeypatch.setattr(quick_exp, "is_quicker", lambda _: False)  # of a CPU alone: other bits
    gemma = in_float32(models("gemma4_text"))

    def sums() -> dict[str, np.ndarray]:
        source = stream.Stream(gemma)
        hidden = source.embed(batches[:3])
        for i, block in source.blocks():
            if i == source.layers - 1:
                return stage._grams(
                    BlockTurn(source, source.block_index, block, hidden), ["ffn", "norm1"]
                )
            source.run_block(block, hidden)
        raise AssertionError

    def forth() -> list[np.ndarray]:
        statistics, states = calibrate(gemma, batches[:3])
        found = [np.array(h) for h in (*states, *stream.Stream(gemma).forward(batches[:3]))]
        found += [
            np.array([*statistics.block.values()]),
            *(of.env_weighted for of in statistics.ffn.values()),
        ]
        return [*found, *sums().values()]

    want, _ = under("cpu", forth)
    found, _ = under("metal", forth)
    assert len(want) == len(found)
    assert all(np.array_equal(a, b) for a, b in zip(found, want, strict=True))

    def back() -> dict[str, dict[int, float]]:
        return bit_allocation.costs(gemma, batches[:3], 32, (3, 8))

    costs, _ = under("cpu", back)
    on_a_gpu, _ = under("metal", back)
    for path, of in costs.items():
        assert [*on_a_gpu[path].values()] == pytest.approx([*of.values()], rel=1e-4)


def test_the_plan_has_room_for_them() -> None:
    """A pass over eight windows is planned with all that the engine takes at once, over one with
    one.
    """
    m = model_of(tiny.CONFIG, gpu=True)
    one = pass_cost.workspace_bytes(m, 32, 32)
    assert pass_cost.pass_workspace(m, 32, 32, 32) == one
    assert pass_cost.pass_workspace(m, 3 * 32, 32, 32) == 3 * one
    assert pass_cost.pass_workspace(m, 20 * 32, 32, 32) == 8 * one
    assert pass_cost.pass_workspace(model_of(tiny.CONFIG, gpu=False), 20 * 32, 32, 32) <= 2 * one
