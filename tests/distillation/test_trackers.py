"""Steps told to others: mlx-lm's keys, and a sentence for what is not there."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mis_mlx.distillation import summary
from mis_mlx.types import MisError, Step
from tests.conftest import Done, sentence


def test_nobody_to_tell(tmp_path: Path) -> None:
    """No name, no reporter, and mlx-lm is not even imported."""
    summary.trackers(None)
    assert summary.reporter(None, tmp_path, {}) is None
    assert summary.reporter("", tmp_path, {}) is None


def test_unknown_and_missing_are_sentences(
    monkeypatch: pytest.MonkeyPatch, in_process: Callable[..., Done]
) -> None:
    """Before any work: a name that is not known, a package that is not installed."""
    refused = sentence(in_process("distill", "--report-to", "graph"))
    assert "--report-to graph is not known: give tensorboard, wandb, swanlab" in refused
    monkeypatch.setattr(summary, "find_spec", lambda name: None)
    with pytest.raises(
        MisError, match="--report-to tensorboard needs a package .* pip install tensorboardX"
    ):
        summary.trackers("tensorboard")


def test_tensorboard_gets_mlx_lms_keys(tmp_path: Path) -> None:
    """What is written is what the step was; read back with TensorBoard's own message format."""
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
    from tensorboardX.proto.event_pb2 import Event

    tell = summary.reporter("tensorboard", tmp_path, {"iters": 2})
    assert tell
    for number, loss in ((1, 2.5), (2, 2.25)):
        tell(
            Step(
                number=number,
                loss=loss,
                grad_norm=1.0,
                learning_rate=1e-3,
                tokens=500,
                seconds=2.0,
                peak_bytes=3 * 10**9,
            )
        )
    found: dict[tuple[int, str], float] = {}
    until = time.monotonic() + 30
    # a thread of its own writes
    while (2, "peak_memory") not in found and time.monotonic() < until:
        raw = next((tmp_path / "tensorboard").iterdir()).read_bytes()
        at = 0
        while at + 12 < len(raw):  # length (8), its check (4), the event, its check (4)
            size = int.from_bytes(raw[at : at + 8], "little")
            event = Event.FromString(raw[at + 12 : at + 12 + size])
            found |= {(event.step, v.tag): v.simple_value for v in event.summary.value}
            at += 16 + size
    assert found[1, "train_loss"] == 2.5
    assert found[2, "train_loss"] == 2.25
    assert found[2, "tokens_per_second"] == 250.0
    assert found[2, "trained_tokens"] == 1000.0
    assert found[1, "peak_memory"] == 3.0
    assert found[1, "iterations_per_second"] == 0.5
