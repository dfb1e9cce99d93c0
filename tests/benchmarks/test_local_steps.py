"""Local distillation: each step is the one by hand, every cut recovers, and a killed run ends with
the same bits.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from benchmarks.ablations import local_steps
from mis_mlx.data.token_windows import order
from mis_mlx.models import load, model_writer, stream
from mis_mlx.pruning import reconstruct
from mis_mlx.settings.recipe import TrainingConfig
from mis_mlx.storage.files import DISK, Files
from mis_mlx.types import Checkpoint, KeptUnits, MisError, Step
from tests import tiny
from tests.conftest import mostly_slow
from tests.pruning.test_reconstruct import CUTS, stream_error, student_of
from tests.pruning.test_slice_weights import raw

# Slow: what is tried here lost, and nobody is promised it. Steps and sizes by hand are those of
# float32.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cpu_policy")]

SEEN = (0, 1, 2, 4)  # of five batches the fourth judges
RECIPE = TrainingConfig(iters=3, grad_accumulation_steps=2, learning_rate=1e-3, warmup=1)
HEADS = {(i, "heads"): (1, 2) for i in range(3)}
ALL_CUTS = CUTS | {"heads": (KeptUnits((0, 1, 2), HEADS, ""), {"heads": 2})}


def student(teacher: Checkpoint, cut: str, root: Path) -> tuple[Checkpoint, KeptUnits]:
    """The pruned model of a cut, and what was kept."""
    keep, sizes = ALL_CUTS[cut]
    return student_of(teacher, keep, root / "pruned", **sizes), keep


@pytest.fixture(scope="module")
def windows() -> list[mx.array]:
    """Five batches of two windows of 16 tokens."""
    return [mx.random.randint(0, 512, (2, 16), key=mx.random.key(k)) for k in range(5)]


def begin(
    teacher: Checkpoint,
    pruned: Checkpoint,
    keep: KeptUnits,
    windows: list[mx.array],
    root: Path,
    recipe: TrainingConfig = RECIPE,
    files: Files = DISK,
    held: int = 99,
    **more: Any,
) -> Iterator[Step]:
    """What a command does, at the start and after a kill."""
    made = model_writer.by_block(pruned, root / "s", DISK)
    return local_steps.train(
        teacher,
        pruned,
        student=made,
        keep=keep,
        batches=windows,
        recipe=recipe,
        folder=root,
        held=held,
        files=files,
        **more,
    )


def weights(root: Path) -> dict[str, bytes]:
    return raw(load.open_checkpoint(root / "s"))


def by_hand(
    teacher: Checkpoint,
    pruned: Checkpoint,
    keep: KeptUnits,
    windows: list[mx.array],
    pick: Callable[[int, int], bool],
) -> dict[str, bytes]:
    """The same training with both models whole in memory and mlx's AdamW. pick(step, k): from the
    own stream?
    """
    big = load.resident_model(teacher, mx.float32).model
    small = load.resident_model(pruned, mx.float32).model

    def run(layers: list[nn.Module], hidden: list[mx.array]) -> list[mx.array]:
        for layer in layers:
            hidden = [layer(h, "causal") for h in hidden]
        return hidden

    def narrow(hidden: list[mx.array]) -> list[mx.array]:
        kept = mx.array(list(keep.kept.get((-1, "hidden"), range(64))))
        return [mx.take(h, kept, axis=-1) for h in hidden]

    given = [big.embed_tokens(w) for w in windows]
    own = [small.embed_tokens(w) for w in windows]
    first = 0
    for j, block in enumerate(small.layers):
        end = keep.layers[j + 1] if j + 1 < len(keep.layers) else len(big.layers)
        target = run(big.layers[first:end], given)
        adam = optim.AdamW(
            0.0, betas=[0.9, 0.95], weight_decay=RECIPE.weight_decay, bias_correction=True
        )

        def loss(block: nn.Module, x: mx.array, y: mx.array) -> mx.array:
            return (mx.square(block(x, "causal") - y).sum(-1) / mx.square(y).sum(-1)).sum()

        judge = own[3], narrow(target)[3]
        begun = loss(block, *judge).item()
        before = block.parameters()
        for step in range(RECIPE.iters):
            number = j * RECIPE.iters + step
            total: Any = None
            for k, at in enumerate(order(len(SEEN), 2, number, RECIPE.seed).tolist()):
                b = SEEN[at]
                into = own[b] if pick(number, k) else narrow(given)[b]
                _, grads = nn.value_and_grad(block, loss)(block, into, narrow(target)[b])
                total = grads if total is None else tree_map(mx.add, total, grads)
            adam.learning_rate = RECIPE.rate(step)
            # 2 batches of 2 windows of 16 tokens
            adam.update(block, tree_map(lambda g: (1 / 64) * g, total))
            mx.eval(block.parameters(), adam.state)
        if loss(block, *judge).item() > begun:
            block.update(before)
        own = run([block], own)
        given = target
        first = end
    trained = {f"model.{n}": w for n, w in tree_flatten(small.parameters())}
    return {n: bytes(memoryview(trained[n])) for n in pruned.tensors}


@pytest.mark.parametrize("cut", ["ffn", "layers", "hidden", "heads", "first layer"])
@pytest.mark.parametrize("own_share", mostly_slow([0.0, 0.5, 1.0], 0.5))
def test_every_step_is_the_one_by_hand(
    tmp_path: Path, llama: Checkpoint, windows: list[mx.array], cut: str, own_share: float
) -> None:
    """Bit for bit, with the teacher's stream, the student's own, or a seeded half of either going
    in.
    """
    pruned, keep = student(llama, cut, tmp_path)
    steps = list(
        begin(
            llama,
            pruned,
            keep=keep,
            windows=windows,
            root=tmp_path,
            own_share=own_share,
            repair=False,
        )
    )

    def pick(step: int, k: int) -> bool:
        return bool(np.random.default_rng([RECIPE.seed, step, 2]).random(2)[k] < own_share)

    assert weights(tmp_path) == by_hand(llama, pruned, keep=keep, windows=windows, pick=pick)
    assert [s.number for s in steps] == list(range(1, 3 * len(keep.layers) + 1))
    assert {s.tokens for s in steps} == {64}
    assert steps[3].note == f"block 2 of {len(keep.layers)}"


def test_the_loss_is_the_error_per_token(
    tmp_path: Path, llama: Checkpoint, windows: list[mx.array]
) -> None:
    """The first step of block 0, by numpy in float64: a long token counts as much as a short
    one.
    """
    pruned, keep = student(llama, "ffn", tmp_path)
    step = next(begin(llama, pruned, keep=keep, windows=windows, root=tmp_path, repair=False))
    both = []
    for checkpoint in (llama, pruned):
        source = stream.Stream(checkpoint, mx.float32)
        blocks = source.blocks()
        hidden = source.embed(windows)
        both.append([np.array(h, np.float64) for h in source.run_block(next(blocks)[1], hidden)])
    shares = [np.square(s - t).sum(-1) / np.square(t).sum(-1) for t, s in zip(*both, strict=True)]
    expected = np.mean([shares[SEEN[at]] for at in order(4, 2, 0, RECIPE.seed)])
    assert step.loss == pytest.approx(expected, rel=1e-5)  # float32


@pytest.mark.parametrize("cut", ALL_CUTS)
def test_the_error_falls_in_every_block(
    tmp_path: Path, llama: Checkpoint, windows: list[mx.array], cut: str
) -> None:
    """By steps alone, measured by marching both models apart: each block ends nearer to the
    teacher.
    """
    pruned, keep = student(llama, cut, tmp_path)
    recipe = replace(RECIPE, iters=48)
    windows = windows + [
        mx.random.randint(0, 512, (2, 16), key=mx.random.key(50 + k)) for k in range(27)
    ]
    steps = list(
        begin(
            llama,
            pruned,
            keep=keep,
            windows=windows,
            root=tmp_path,
            recipe=recipe,
            own_share=1.0,
            repair=False,
        )
    )
    basis = np.eye(64)[:, list(keep.kept.get((-1, "hidden"), range(64)))]
    before = stream_error(llama, pruned, basis=basis, windows=windows, layers=keep.layers)
    after = stream_error(
        llama,
        load.open_checkpoint(tmp_path / "s"),
        basis=basis,
        windows=windows,
        layers=keep.layers,
    )
    assert all(a < b for a, b in zip(after, before, strict=True))
    assert all(steps[j + 47].loss < steps[j].loss for j in range(0, len(steps), 48))


def test_steps_that_spoil_a_block_are_undone(
    tmp_path: Path, llama: Checkpoint, windows: list[mx.array], capsys: pytest.CaptureFixture[str]
) -> None:
    """At a rate at which nothing is learned but noise: said, and the student ends as the closed
    form left it.
    """
    pruned, keep = student(llama, "ffn", tmp_path)
    list(
        begin(
            llama,
            pruned,
            keep=keep,
            windows=windows,
            root=tmp_path,
            recipe=replace(RECIPE, learning_rate=0.5),
        )
    )
    assert capsys.readouterr().err.count("its steps are undone") == 3
    repaired, _ = reconstruct.reconstruct(llama, pruned, keep, windows)
    made = load.open_checkpoint(tmp_path / "s")
    for name in pruned.tensors:
        want = repaired[name] if name in repaired else load.dense(pruned, name)
        assert mx.allclose(load.dense(made, name), want, rtol=1e-3, atol=1e-5), name


def test_no_steps_is_the_closed_form(
    tmp_path: Path, llama: Checkpoint, windows: list[mx.array]
) -> None:
    """With 0 steps a block what is left is reconstruct's, block by block and spooled: there a
    block's output is that of before and what the change adds, here it is computed anew.
    """
    pruned, keep = student(llama, "ffn", tmp_path)
    repaired, _ = reconstruct.reconstruct(llama, pruned, keep, windows)
    assert (
        list(
            begin(
                llama,
                pruned,
                keep=keep,
                windows=windows,
                root=tmp_path,
                recipe=replace(RECIPE, iters=0),
                held=1,
            )
        )
        == []
    )
    made = load.open_checkpoint(tmp_path / "s")
    for name in pruned.tensors:
        want = repaired[name] if name in repaired else load.dense(pruned, name)
        assert mx.allclose(load.dense(made, name), want, rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("held", [0, 2])
def test_from_disk_or_from_memory_is_the_same(
    tmp_path: Path, llama: Checkpoint, windows: list[mx.array], held: int
) -> None:
    """Whatever share of the hidden states is spooled, the bits are those of everything in
    memory.
    """
    pruned, keep = student(llama, "hidden", tmp_path)
    (tmp_path / "b").mkdir()
    a = [s.loss for s in begin(llama, pruned, keep=keep, windows=windows, root=tmp_path)]
    b = [
        s.loss
        for s in begin(llama, pruned, keep=keep, windows=windows, root=tmp_path / "b", held=held)
    ]
    assert a == b
    assert weights(tmp_path) == weights(tmp_path / "b")
    assert sorted(os.listdir(tmp_path / "b")) == ["s"]


def test_a_finished_student_is_left_alone(
    tmp_path: Path, llama: Checkpoint, windows: list[mx.array]
) -> None:
    """No step, no reading of a teacher that is not even there any more."""
    pruned, keep = student(llama, "ffn", tmp_path)
    list(begin(llama, pruned, keep=keep, windows=windows, root=tmp_path))
    before = weights(tmp_path)
    gone = Checkpoint(tmp_path / "gone", llama.config, {})
    assert local_steps.finished(load.open_checkpoint(tmp_path / "s")) == 3
    assert list(begin(gone, pruned, keep=keep, windows=windows, root=tmp_path)) == []
    assert weights(tmp_path) == before


def test_a_student_half_done_goes_on_with_its_next_block(
    tmp_path: Path, llama: Checkpoint, windows: list[mx.array]
) -> None:
    """Stopped in its second block: that one is trained again from the pruned one, the first is not.
    Every operation of the disk is tests/faults' business.
    """
    pruned, keep = student(llama, "ffn", tmp_path)
    whole = [
        (s.number, s.loss) for s in begin(llama, pruned, keep=keep, windows=windows, root=tmp_path)
    ]
    (tmp_path / "b").mkdir()
    steps = begin(llama, pruned, keep=keep, windows=windows, root=tmp_path / "b")
    first = [(s.number, s.loss) for s in itertools.islice(steps, 5)]
    steps.close()  # type: ignore[attr-defined]
    rest = [
        (s.number, s.loss)
        for s in begin(llama, pruned, keep=keep, windows=windows, root=tmp_path / "b")
    ]
    assert first == whole[:5]
    assert rest == whole[3:]
    assert weights(tmp_path / "b") == weights(tmp_path)


def test_a_disk_that_is_too_small_is_seen_before_anything_is_read(
    tmp_path: Path, llama: Checkpoint, windows: list[mx.array]
) -> None:
    """5 batches, 2 held: 96 tokens of 3 streams of 64 floats, and a fifth to spare."""
    pruned, keep = student(llama, "ffn", tmp_path)

    class Short(Files):
        def free_bytes(self, path: Path) -> int:
            return 80_000

    gone = Checkpoint(tmp_path / "gone", llama.config, {})
    assert local_steps.scratch_bytes(llama.config, pruned.config, 96) == 96 * 64 * 3 * 4
    with pytest.raises(MisError, match="the spool of hidden states needs 86 KiB, 78 KiB are free"):
        next(begin(gone, pruned, keep=keep, windows=windows, root=tmp_path, files=Short(), held=2))


def test_memory_holds_one_block_of_each(tmp_path: Path, windows: list[mx.array]) -> None:
    """Teacher and student of 24 blocks of 245 KiB: of the one two buffers; of the other weight,
    gradient, two moments, and what an update and a backward pass take beside them. Neither model
    fits the limit twice over.
    """
    limit = 3 * 2**20
    teacher = load.open_checkpoint(
        tiny.make(tmp_path / "t", num_hidden_layers=24, intermediate_size=256)
    )
    assert teacher.nbytes > 1.9 * limit
    keep = KeptUnits(tuple(range(24)), {}, "")
    made = model_writer.by_block(teacher, tmp_path / "s", DISK)
    mx.eval(windows)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    recipe = replace(RECIPE, iters=1)
    steps = local_steps.train(
        teacher,
        teacher,
        student=made,
        keep=keep,
        batches=windows,
        recipe=recipe,
        folder=tmp_path,
        held=0,
        files=DISK,
    )
    assert max(s.peak_bytes for s in steps) - before < limit
