"""A prompt with several answers as one sequence: the numbers of each answer alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mis_mlx.models.architectures import stock
from mis_mlx.models.architectures.families import family
from mis_mlx.models.opening import load
from mis_mlx.models.passing import attention_masks
from mis_mlx.types import Checkpoint
from tests import tiny
from tests.conftest import mostly_slow

PROMPT = [5, 6, 7, 8, 9]
ANSWERS = [[11, 12, 13, 14], [21], [31, 32, 33]]

# every architecture but those that read a sequence as one text
KINDS = ["llama", "qwen2", "qwen3", *(kind for kind in tiny.FAMILIES if kind != "qwen3_5_text")]
QUICK = ("llama", "qwen2", "gemma4_text", "lfm2", "gpt_oss", "ministral3", "olmo2")


def alone(model: nn.Module, answer: list[int]) -> mx.array:
    """Hidden states (T, D) that predict one answer, after the prompt and nothing else."""
    hidden = model.model(mx.array([[*PROMPT, *answer]]))
    return hidden[0, len(PROMPT) - 1 : -1]


def check(model: nn.Module, tolerance: float = 1e-5) -> None:
    """Hidden states of every answer's predictions are those of prompt + answer on their own; so are
    gradients.
    """
    b = attention_masks.join(PROMPT, ANSWERS)
    hidden = attention_masks.forward(model, b.tokens, b.branch, b.positions)[0]
    assert len(hidden) == len(PROMPT) + 3 + 0 + 2
    for row, answer in enumerate(ANSWERS):
        found = hidden[b.logit_positions[row, : len(answer)]]
        wanted = alone(model, answer)
        assert mx.allclose(found, wanted, rtol=10 * tolerance, atol=tolerance)
        assert b.targets[row, : len(answer)].tolist() == answer
        assert b.mask[row].tolist() == [float(t < len(answer)) for t in range(4)]


@pytest.mark.parametrize("kind", mostly_slow(KINDS, *QUICK))
def test_every_answer_is_as_if_alone(kind: str, models: Callable[[str], Checkpoint]) -> None:
    """In every architecture; the blocks' own rotary modules are back in their place afterwards."""
    model = load.resident_model(models(kind), mx.float32)
    attending = [block for block in model.model.layers if "self_attn" in block]
    before = [block.self_attn.rope for block in attending]
    # their attention has no scale, so the tiny ones' roundings grow.
    check(model, 1e-4 if kind == "gemma4_text" else 1e-5)
    for block, rope in zip(attending, before, strict=True):
        assert block.self_attn.rope is rope


def test_a_sliding_window_counts_positions_not_columns(tmp_path: Path) -> None:
    """Blocks that see 3 tokens back see the prompt's end from an answer that stands far behind
    it.
    """
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    folder = tiny.make(tmp_path / "near", layer_types=layers, sliding_window=3)
    check(load.resident_model(load.open_checkpoint(folder), mx.float32))


def test_a_whole_models_blocks_have_the_windows_of_blocks_alone(
    models: Callable[[str], Checkpoint],
) -> None:
    """In every family, whoever asks: as a part of mlx-lm's model or on its own."""
    for kind in tiny.FAMILIES:
        values = models(kind).config
        architecture = family(values)
        args = architecture.model_args()
        whole = architecture.new_model().model.layers
        windows = [stock.window(args, block) for block in whole]
        for i, window in enumerate(windows):
            alone = architecture.new_block(args, i)
            assert stock.window(args, alone) == window, (kind, i)
        kinds = values.get("layer_types") or []
        slides = [kind == "sliding_attention" for kind in kinds]
        if any(slides):
            assert [window is not None for window in windows] == slides


@pytest.mark.parametrize(
    ("kind", "layer", "part", "names"),
    [
        ("llama", 0, "self_attn", ("q_proj", "k_proj", "v_proj", "o_proj")),
        ("lfm2", 0, "conv", ("in_proj", "conv", "out_proj")),
        ("lfm2", 2, "self_attn", ("q_proj", "k_proj", "v_proj", "o_proj")),
    ],
)
def test_the_gradient_is_that_of_answers_alone(
    models: Callable[[str], Checkpoint], kind: str, layer: int, part: str, names: tuple[str, ...]
) -> None:
    """Through the shared prompt too: sums of log-probabilities, differentiated both ways."""
    model = load.resident_model(models(kind), mx.float32)
    b = attention_masks.join(PROMPT, ANSWERS)

    def picked(hidden: mx.array, targets: mx.array) -> mx.array:
        logits = hidden @ load.head_weight(model).T
        of_targets = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        return (of_targets - mx.logsumexp(logits, axis=-1)).sum()

    def together(m: nn.Module) -> mx.array:
        hidden = attention_masks.forward(m, b.tokens, b.branch, b.positions)[0]
        learned = mx.array(np.flatnonzero(np.array(b.mask).reshape(-1)))
        positions = b.logit_positions.reshape(-1)[learned]
        targets = b.targets.reshape(-1)[learned]
        return picked(hidden[positions], targets)

    def one_by_one(m: nn.Module) -> mx.array:
        parts = [picked(alone(m, answer), mx.array(answer)) for answer in ANSWERS]
        return mx.stack(parts).sum()

    _, found = nn.value_and_grad(model, together)(model)
    _, expected = nn.value_and_grad(model, one_by_one)(model)

    ours = found["model"]["layers"][layer][part]
    theirs = expected["model"]["layers"][layer][part]
    for name in names:
        wanted = theirs[name]["weight"]
        apart = mx.abs(ours[name]["weight"] - wanted).max()
        assert apart < 5e-5 * mx.abs(wanted).max(), name
