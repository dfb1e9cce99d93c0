"""Batched sampling against one token at a time without a cache."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mis_mlx.evaluation import writing_cost
from mis_mlx.models import load, mlx_generate, opening
from mis_mlx.models.model_size import model_of
from mis_mlx.types import Checkpoint

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [40], [21, 22, 23]]


@pytest.fixture(name="model", params=["llama", "qwen3", "lfm2"])
def _model(request: pytest.FixtureRequest, models: Callable[[str], Checkpoint]) -> nn.Module:
    made = load.resident_model(models(request.param), mx.float32)
    mx.eval(made.parameters())
    return made


def plainly(
    model: nn.Module, prompt: Sequence[int], count: int, stop: Sequence[int] = ()
) -> list[int]:
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
    assert mlx_generate.groups(
        model, PROMPTS, count=2, max_tokens=9, stop=[], draw=draw, at_once=at_once
    ) == [[e, e] for e in expected]
    stop = expected[0][4]
    expected = [plainly(model, p, 9, [stop]) for p in PROMPTS]
    assert mlx_generate.groups(
        model, PROMPTS, count=1, max_tokens=9, stop=[stop], draw=draw, at_once=at_once
    ) == [[e] for e in expected]


def test_a_group_is_drawn_from_its_prompts_distribution(llama: Checkpoint) -> None:
    """1,000 first tokens: frequencies of the likeliest token agree with its probability at
    temperature 0.1.
    """
    model = load.resident_model(llama, mx.float32)
    (group,) = mlx_generate.groups(
        model,
        PROMPTS[:1],
        count=1000,
        max_tokens=1,
        stop=[],
        draw=mlx_generate.sampler(0.1, 3),
        at_once=1000,
    )
    p = mx.softmax(model(mx.array([PROMPTS[0]]))[0, -1] / 0.1)
    top = int(mx.argmax(p))
    share = np.mean([answer == [top] for answer in group])
    assert 0.02 < float(p[top]) < 0.98
    assert abs(share - float(p[top])) < 4 * np.sqrt(0.25 / 1000)


def test_the_seed_decides(model: nn.Module) -> None:
    """The same again from the same seed, others from another; MLX's global random state has no part
    in it.
    """
    made = []
    for seed in (1, 1, 2):
        mx.random.seed(seed + len(made))
        made.append(
            mlx_generate.groups(
                model,
                PROMPTS,
                count=4,
                max_tokens=6,
                stop=[],
                draw=mlx_generate.sampler(1.0, seed),
                at_once=8,
            )
        )
    assert made[0] == made[1] != made[2]
    assert [len(group) for group in made[0]] == [4, 4, 4]
    assert len({tuple(answer) for answer in made[0][0]}) == 4


def test_a_nucleus_by_hand() -> None:
    """Of 0.5, 0.3, 0.15, 0.05 in any order: the fewest tokens that have as much together; the
    likeliest one always.
    """
    p = mx.array([[0.05, 0.5, 0.15, 0.3], [0.3, 0.15, 0.05, 0.5]])

    def kept(top_p: float) -> list[list[bool]]:
        return (mlx_generate.nucleus(mx.log(p), top_p) > -mx.inf).tolist()

    assert kept(0.4) == [[False, True, False, False], [False, False, False, True]]
    assert kept(0.79) == [[False, True, False, True], [True, False, False, True]]
    assert kept(0.81) == [[False, True, True, True], [True, True, False, True]]
    assert kept(0.96) == [[True] * 4] * 2


@pytest.mark.parametrize("spread", [0.1, 1.0, 6.0])
def test_a_nucleus_is_mlx_lms(spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the likeliest tokens that are looked at first have less than it takes."""
    monkeypatch.setattr(mlx_generate, "LIKELIEST", 64)
    z = spread * mx.random.normal((5, 3000), key=mx.random.key(7))
    logps = z - mx.logsumexp(z, axis=-1, keepdims=True)
    expected = load.mlx_lm("sample_utils").apply_top_p(logps, 0.95)
    assert mx.array_equal(mlx_generate.nucleus(logps, 0.95), expected)


def test_without_a_nucleus_draws_are_what_they_were() -> None:
    """top_p 1 is off: the same tokens as by the plain formula; below 1, none from outside the
    nucleus.
    """
    logps = mx.log(mx.softmax(mx.random.normal((400, 50), key=mx.random.key(1)), axis=-1))
    key = mx.random.split(mx.random.key(3))[0]
    plain = mx.random.categorical(logps / 0.8, key=key)
    inside = mlx_generate.sampler(0.8, 3, top_p=0.5)(logps)
    assert mlx_generate.sampler(0.8, 3)(logps).tolist() == plain.tolist() != inside.tolist()
    chosen = mx.take_along_axis(
        mlx_generate.nucleus(logps, 0.5), inside[:, None].astype(mx.int32), axis=-1
    )
    assert (chosen > -mx.inf).all().item()


def test_a_sampler_of_its_own_does_not_see_the_others(model: nn.Module) -> None:
    """A prompt's text is the same alone, beside others and behind them, where each has its own
    random numbers.
    """

    def written(prompts: Sequence[Sequence[int]], at_once: int) -> dict[int, list[int]]:
        draw = [mlx_generate.sampler(1.0, len(prompt), top_p=0.9) for prompt in prompts]
        groups = mlx_generate.groups(
            model, prompts, count=1, max_tokens=8, stop=[], draw=draw, at_once=at_once
        )
        return {len(prompt): ids for prompt, (ids,) in zip(prompts, groups, strict=True)}

    assert written(PROMPTS, 3) == written(PROMPTS[::-1], 2) == written(PROMPTS, 1)


@pytest.mark.usefixtures("cpu_policy")
def test_writing_side_by_side_takes_what_the_plan_says(llama: Checkpoint) -> None:
    """32 texts of 100 tokens stay well below the plan, which has keys and values three times: the
    prompts' own caches go when the batch begins. Kept, they made it six tenths and more here, and
    more than all of it for a real model.
    """
    model, _ = mlx_generate.open_model(opening.open_to_compute(llama.path))
    prompts = [[5, 6, 7, 8] * 15] * 32
    planned = writing_cost.resident_bytes(model_of(llama), at_once=32, tokens=100)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()

    mlx_generate.groups(
        model,
        prompts,
        count=1,
        max_tokens=40,
        stop=(),
        draw=mlx_generate.sampler(0.0, 0),
        at_once=32,
    )

    assert 0.3 * planned < mx.get_peak_memory() - before < 0.55 * planned


@pytest.mark.parametrize(("said", "wires"), [("", False), ("1", True)])
def test_nothing_is_wired_for_a_batch(
    said: str, wires: bool, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mlx-lm's generator wires all that Metal recommends, and unwires it at its end. Unless
    MIS_MLX_WIRE=1, MLX is called not once: while it is made, writes, is closed, and is forgotten.
    """
    calls = list[int]()

    def recording(nbytes: int) -> int:
        calls.append(nbytes)
        return 7

    recommended = {"max_recommended_working_set_size": 5 * 2**30}
    monkeypatch.setattr(mx, "device_info", lambda *device: recommended)
    monkeypatch.setattr(mx, "set_wired_limit", recording)
    monkeypatch.setenv("MIS_MLX_WIRE", said)
    draw = mlx_generate.sampler(0.0, 0)
    mlx_generate.groups(model, PROMPTS, count=1, max_tokens=2, stop=[], draw=draw, at_once=3)
    assert mx.set_wired_limit is recording
    gc.collect()  # a generator closes itself once more when it goes
    assert calls == ([5 * 2**30, 7] if wires else [])
