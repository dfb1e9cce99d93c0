"""Windows through blocks, and who looks on."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx.models.passing.stream import Stream
from mis_mlx.models.passing.sweep import Stack
from mis_mlx.storage.hidden_spool import Spool
from mis_mlx.types import Checkpoint

DOWN = {"down": ("mlp", "down_proj")}


@pytest.fixture
def windows() -> list[mx.array]:
    """Seven of one length, and two longer ones."""
    rng = np.random.default_rng(0)
    return [mx.array(rng.integers(0, 512, (1, t)).astype(np.int32)) for t in [12] * 7 + [20] * 2]


def plain(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32))


def test_who_looks_sees_each_window_once_and_moves_none(
    llama: Checkpoint, windows: list[mx.array], policy: str
) -> None:
    """Looking leaves windows before the block, going through puts them behind it: what they looked
    like there. What a module takes in is told apart by window, and the module is there again.
    """
    source = Stream(llama, mx.float32)
    hidden = source.embed(windows)
    seen: list[range] = []

    def look(stack: Stack) -> list[tuple[mx.array, mx.array]]:
        seen.append(stack.numbers)
        return [(window.out, window.taken["down"]) for window in stack.apart()]

    for turn in source.sweep(hidden):
        seen.clear()
        before = [plain(states) for states in hidden]
        down = turn.block.mlp.down_proj
        looked = [window for found in turn.look(look, DOWN) for window in found]
        assert all((plain(h) == b).all() for h, b in zip(hidden, before, strict=True))
        assert [number for numbers in seen for number in numbers] == list(range(9))
        assert (len(seen) == 9) == (policy == "cpu")
        passed = []
        for numbers, found in turn.through(look, DOWN):
            assert len(numbers) == len(found)
            passed += found
        assert turn.block.mlp.down_proj is down
        for h, first, second in zip(hidden, looked, passed, strict=True):
            assert (plain(h) == plain(first[0])).all()
            assert (plain(h) == plain(second[0])).all()
            assert first[1].shape == (*h.shape[:2], 768)
    assert turn.number == source.layers - 1
    final = source.norm(hidden)
    again = Stream(llama, mx.float32).forward(windows)
    assert all((plain(a) == plain(b)).all() for a, b in zip(final, again, strict=True))


def test_a_module_is_put_back_where_a_look_fails(
    llama: Checkpoint, windows: list[mx.array]
) -> None:
    """Else the next one to look would see this one's inputs."""

    def fail(stack: Stack) -> None:
        raise RuntimeError("no")

    source = Stream(llama, mx.float32)
    for turn in source.sweep(source.embed(windows)):
        down = turn.block.mlp.down_proj
        with pytest.raises(RuntimeError, match="no"):
            list(turn.look(fail, DOWN))
        assert turn.block.mlp.down_proj is down
        break


@pytest.mark.parametrize("held", [0, 4, 100])
def test_states_before_every_block_are_kept(
    tmp_path: Path, llama: Checkpoint, windows: list[mx.array], held: int
) -> None:
    """In memory or in a file. Nobody wants what the last block gives, so it is not computed."""
    windows = windows[:7]
    plainly = Stream(llama, mx.float32)
    wanted = []
    for turn in plainly.sweep(states := plainly.embed(windows)):
        wanted += [plain(h) for h in states]
        turn.go()
    source = Stream(llama, mx.float32)
    kept = source.embed(windows, Spool(tmp_path, held))
    for _ in source.sweep(kept, keep=True, last=False):
        pass  # everybody goes on by himself
    assert len(kept) == source.layers * 7
    assert all((plain(kept[k]) == want).all() for k, want in enumerate(wanted))
