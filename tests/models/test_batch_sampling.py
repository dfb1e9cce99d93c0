"""Batched sampling against one token at a time without a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mis_mlx.models import load, mlx_generate
from mis_mlx.types import Checkpoint

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [40], [21, 22, 23]]


@pytest.fixture(name="model", params=["llama", "qwen3"])
def _model(request: pytest.FixtureRequest, models: Callable[[str], Checkpoint]) -> nn.Module:
    made = load.resident(models(request.param), mx.float32)
    mx.eval(made.parameters())
    return made


def plainly(model: nn.Module, prompt: Sequence[int], count: int, stop: Sequence[int] = ()) -> list[int]:
    """The greedy continuation, the whole text read anew for every token."""
    ids = list(prompt)
    while len(ids) < len(prompt) + count and (len(ids) == len(prompt) or ids[-1] not in stop):
        ids.append(int(mx.argmax(model(mx.array([ids]))[0, -1])))
    return ids[len(prompt) :]


@pytest.mark.parametrize("at_once", [1, 2, 16])
def test_greedy_is_the_models_own_text(model: nn.Module, at_once: int) -> None:
    """Prompts of 7, 1 and 3 tokens together; a stop token ends one early and is its last."""
    expected = [plainly(model, p, 9) for p in PROMPTS]
    draw = mlx_generate.sampler(0.0, 0)
    assert mlx_generate.groups(model, PROMPTS, 2, 9, [], draw, at_once) == [[e, e] for e in expected]
    stop = expected[0][4]
    expected = [plainly(model, p, 9, [stop]) for p in PROMPTS]
    assert mlx_generate.groups(model, PROMPTS, 1, 9, [stop], draw, at_once) == [[e] for e in expected]


def test_a_group_is_drawn_from_its_prompts_distribution(llama: Checkpoint) -> None:
    """1,000 first tokens: frequencies of the likeliest token agree with its probability at temperature 0.1."""
    model = load.resident(llama, mx.float32)
    (group,) = mlx_generate.groups(model, PROMPTS[:1], 1000, 1, [], mlx_generate.sampler(0.1, 3), 1000)
    p = mx.softmax(model(mx.array([PROMPTS[0]]))[0, -1] / 0.1)
    top = int(mx.argmax(p))
    share = np.mean([answer == [top] for answer in group])
    assert 0.02 < float(p[top]) < 0.98 and abs(share - float(p[top])) < 4 * np.sqrt(0.25 / 1000)


def test_the_seed_decides(model: nn.Module) -> None:
    """The same again from the same seed, others from another; MLX's global random state has no part in it."""
    made = []
    for seed in (1, 1, 2):
        mx.random.seed(seed + len(made))
        made.append(mlx_generate.groups(model, PROMPTS, 4, 6, [], mlx_generate.sampler(1.0, seed), 8))
    assert made[0] == made[1] != made[2]
    assert [len(group) for group in made[0]] == [4, 4, 4]
    assert len({tuple(answer) for answer in made[0][0]}) == 4
