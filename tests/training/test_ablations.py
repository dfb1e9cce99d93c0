"""What distillation may do beside plain KL: cross-entropy, states inside, a corrected teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mis_mlx.disk.text import Windows
from mis_mlx.machine.rates import M1_AIR
from mis_mlx.maths.optimizer import GoralW
from mis_mlx.model import arch, load
from mis_mlx.training import distillation, loop, phases, planning
from mis_mlx.training.distillation import Middle, Teacher, Text
from mis_mlx.training.job import job_of
from mis_mlx.training.planning import forward_flops, model_of
from mis_mlx.training.recipe import Distillation
from mis_mlx.types import GIB, Checkpoint, Keep, MisError, Step
from tests import tiny
from tests.training.test_phases import BIG, JOB, SMALL

RECIPE = Distillation(iters=4, batch_size=2, grad_accumulation_steps=2, max_seq_length=16, learning_rate=1e-2, warmup=1)
NARROW = Keep((0, 2), {(-1, "hidden"): tuple(range(1, 65, 2))}, "")  # every other channel of 64
DEEP = Keep((2,), {}, "")
OPTIONS: dict[str, dict[str, Any]] = {
    "cross-entropy": {"cross_entropy": 0.3},
    "reverse": {"divergence": "reverse"},
    "middle": {"middle": Middle.of(NARROW, 3, 1.0)},
    "all": {"cross_entropy": 0.3, "divergence": "reverse", "middle": Middle.of(NARROW, 3, 0.5)},
}


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """Random students of the tiny llama's tokens: two narrow blocks, and one as wide as the teacher's."""
    root = tmp_path_factory.mktemp("students")
    sizes: dict[str, dict[str, Any]] = {
        "narrow": {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1},
        "deep": {"num_hidden_layers": 1},
    }
    made = {n: tiny.make(root / n, seed=5, intermediate_size=256, **s) for n, s in sizes.items()}
    return {name: load.open_checkpoint(folder) for name, folder in made.items()}


@pytest.fixture(scope="module")
def data() -> Windows:
    """Twelve windows of 16 tokens, some counted in part; the last column never is."""
    rng = np.random.default_rng(2)
    learn = (rng.random((12, 16)) < 0.7).astype(np.float32)
    learn[:, -1] = 0
    return Windows(rng.integers(0, 512, (12, 16)).astype(np.int32), learn)


def distil(source: distillation.Source, student: Checkpoint, data: Windows) -> list[Any]:
    """Losses, norms, and all weights after RECIPE."""
    model = load.resident(student, mx.float32)
    steps = list(distillation.steps(model, source, data, RECIPE, GoralW()))
    return facts(steps) + [p.tolist() for _, p in tree_flatten(model.parameters())]


def facts(steps: list[Step]) -> list[Any]:
    return [(s.loss, s.grad_norm, s.tokens) for s in steps]


def test_minitrons_pair() -> None:
    """Blocks 0-11 and 28-31 of 32: student block 13 is compared behind teacher block 29, as in table 17 (29:13).

    Where layers were dropped between, it is the entrance of the next one kept; behind the last, the end.
    """
    pair = Middle.of(Keep((*range(12), *range(28, 32)), {}, ""), 32, 1.0)
    assert (pair.block, pair.depth) == (13, 30)
    kept = [(0, 4, 5, 8), (0, 6, 7), (1, 5), (3,)]
    assert [Middle.of(Keep(layers, {}, ""), 9, 1.0).depth for layers in kept] == [5, 6, 5, 9]


@pytest.mark.parametrize(("keep", "depth"), [(NARROW, 2), (DEEP, 3)])
@pytest.mark.parametrize("room", [None, 0])
def test_the_states_inside_are_the_teachers(
    llama: Checkpoint, data: Windows, keep: Keep, depth: int, room: int | None
) -> None:
    """Those of mlx-lm's own blocks, in the student's channels, bit for bit; the final ones stay what they were."""
    model, tokens = load.resident(llama, mx.float32), mx.array(data.tokens[:2])
    h = model.model.embed_tokens(tokens)
    for block in model.model.layers[:depth]:
        h = block(h, "causal")
    channels = list(keep.kept.get((-1, "hidden"), range(64)))
    batch = distillation.Batch(tokens, mx.array(data.learn[:2]))
    ((_, _, final, inside),) = Teacher(llama, room, middle=Middle.of(keep, 3, 1.0)).micro_batches([batch])
    ((_, _, plain),) = Teacher(llama, room).micro_batches([batch])
    assert mx.array_equal(final, plain)
    assert mx.array_equal(inside, h.reshape(32, 64)[:, mx.array(channels)])


@pytest.mark.parametrize(("name", "keep"), [("narrow", NARROW), ("deep", DEEP)])
@pytest.mark.parametrize(("c", "share", "reverse"), [(0.0, 1.0, False), (0.3, 0.5, False), (1.0, 2.0, True)])
def test_the_gradient_is_that_of_the_formula(
    llama: Checkpoint, students: dict[str, Checkpoint], data: Windows, name: str, keep: Keep, c: float, share: float,
    reverse: bool,
) -> None:  # fmt: skip
    """L + share * alpha * sum(1 - cos), L = (1 - c) KL + c CE, alpha = L / sum(1 - cos) a constant: written out on
    whole logits and differentiated by MLX. The value reported is L."""
    middle = Middle.of(keep, 3, share)
    source = Teacher(llama, None, 1.0, 1.0, c, "reverse" if reverse else "forward", middle)
    cut = distillation.cut(source, data, replace(RECIPE, grad_accumulation_steps=1))(0)
    student, teacher = (load.resident(m, mx.float32) for m in (students[name], llama))
    tokens, learn, *_ = cut[0]
    channels = mx.array(list(keep.kept.get((-1, "hidden"), range(64))))
    logs = teacher(tokens).reshape(32, -1)
    logs = logs - mx.logsumexp(logs, axis=-1, keepdims=True)
    states = teacher.model.embed_tokens(tokens)
    for block in teacher.model.layers[: middle.depth]:
        states = block(states, "causal")
    want = states.reshape(32, 64)[:, channels]

    def parts() -> tuple[mx.array, mx.array]:
        h = student.model.embed_tokens(tokens)
        for i, block in enumerate(student.model.layers):
            h = block(h, "causal")
            inside = h if i == middle.block else inside  # noqa: F821
        z = student.model.norm(h) @ student.model.embed_tokens.weight.T
        own = (z - mx.logsumexp(z, axis=-1, keepdims=True)).reshape(32, -1)
        p, q = (own, logs) if reverse else (logs, own)
        each = (1 - c) * (mx.exp(p) * (p - q)).sum(axis=-1)
        each = each - c * mx.take_along_axis(own, mx.roll(tokens, -1, 1).reshape(-1, 1), axis=-1)[:, 0]
        a = inside.reshape(32, -1)
        cosine = (a * want).sum(axis=-1) / mx.linalg.norm(a, axis=-1) / mx.linalg.norm(want, axis=-1)
        return (each * learn).sum(), ((1 - cosine) * learn).sum()

    alpha = (lambda loss, apart: loss.item() / apart.item())(*parts())

    def naive() -> mx.array:
        loss, apart = parts()
        return loss + share * alpha * apart

    _, wanted = nn.value_and_grad(student, naive)()
    (value, _), got = nn.value_and_grad(student, lambda *b: distillation.loss_of(source)(student, *b))(*cut[0])
    assert value.item() == pytest.approx(parts()[0].item(), rel=1e-5)
    largest = max(mx.abs(g).max().item() for _, g in tree_flatten(wanted))
    for (n, a), (_, b) in zip(tree_flatten(got), tree_flatten(wanted), strict=True):
        assert mx.abs(a - b).max().item() < 1e-5 * largest, n


def test_off_is_off(llama: Checkpoint, students: dict[str, Checkpoint], data: Windows) -> None:
    """Nothing asked for: a micro-batch is what it was, and a weight of 0 on the states inside, tap and all,
    gives the run without, bit for bit. Each option by itself gives another run."""
    assert len(Teacher(llama).micro_batches([distillation.Batch(mx.array(data.tokens), mx.array(data.learn))])[0]) == 3
    plain = distil(Teacher(llama, None), students["narrow"], data)
    assert distil(Teacher(llama, None, middle=Middle.of(NARROW, 3, 0.0)), students["narrow"], data) == plain
    assert distil(Teacher(llama, 0), students["narrow"], data) == plain
    runs = [distil(Teacher(llama, None, **o), students["narrow"], data) for o in OPTIONS.values()]
    runs.append(plain)
    assert all(a[-1] != b[-1] for i, a in enumerate(runs) for b in runs[:i])


@pytest.mark.parametrize("option", OPTIONS)
def test_stopping_and_going_on_is_bit_equal(
    llama: Checkpoint, students: dict[str, Checkpoint], data: Windows, option: str
) -> None:
    """Two steps, everything through a checkpoint's arrays, two steps: the run that never stopped."""
    whole = distil(Teacher(llama, None, **OPTIONS[option]), students["narrow"], data)
    first, before = load.resident(students["narrow"], mx.float32), GoralW()
    source, steps = Teacher(llama, 0, **OPTIONS[option]), list[Step]()
    for step in distillation.steps(first, source, data, RECIPE, before):
        steps.append(step)
        if step.number == 2:
            break
    second, after = load.resident(students["narrow"], mx.float32), GoralW()
    loop.restore(second, after, loop.arrays_of(first, before), before.memory())
    steps += distillation.steps(second, source, data, RECIPE, after, 2)
    assert facts(steps) + [p.tolist() for _, p in tree_flatten(second.parameters())] == whole


def test_the_states_inside_come_nearer(llama: Checkpoint, students: dict[str, Checkpoint], data: Windows) -> None:
    """Twenty steps: the cosine behind the block ends higher than with logits alone, by a tenth or more."""
    few, ends = Windows(data.tokens[:4], data.learn[:4]), []
    middle = Middle.of(NARROW, 3, 1.0)
    ((tokens, learn, _, want),) = Teacher(llama, None, middle=middle).micro_batches(
        [distillation.Batch(mx.array(few.tokens), mx.array(few.learn))]
    )
    for source in (Teacher(llama, None), Teacher(llama, None, middle=middle)):
        student = load.resident(students["narrow"], mx.float32)
        list(distillation.steps(student, source, few, replace(RECIPE, iters=20), GoralW()))
        _, inside = middle.forward(student, tokens)
        apart = distillation.losses.cosine_sum(inside.reshape(64, 32), want, learn) / learn.sum()
        ends.append(1.0 - apart.item())
    assert ends[1] > ends[0] + 0.1


def test_the_text_as_source_is_cross_entropy(llama: Checkpoint, data: Windows) -> None:
    """Plain training of any resident model: the first loss is mlx's own cross-entropy, and it falls."""
    few = Windows(data.tokens[:4], data.learn[:4])
    model = load.resident(llama, mx.float32)
    z, tokens, learn = model(mx.array(few.tokens)), mx.array(few.tokens), mx.array(few.learn)
    wanted = (nn.losses.cross_entropy(z[:, :-1], tokens[:, 1:]) * learn[:, :-1]).sum() / learn.sum()
    steps = list(distillation.steps(model, Text(), few, replace(RECIPE, iters=12), GoralW()))
    assert steps[0].loss == pytest.approx(wanted.item(), rel=1e-5)
    assert steps[-1].loss < 0.8 * steps[0].loss


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"cross_entropy": 1.5}, "--cross-entropy is 1.5: give a number from 0 to 1"),
        ({"cross_entropy": float("nan")}, "--cross-entropy is nan"),
        ({"intermediate": -1.0}, "--intermediate is -1: give a number from 0 to inf"),
        ({"teacher_correction": -2}, "--teacher-correction is -2"),
        ({"targets": "cached", "cross_entropy": 0.1}, "--cross-entropy needs the teacher itself, --targets cached"),
        ({"targets": "cached", "divergence": "reverse"}, "--divergence needs the teacher itself, --targets cached"),
        ({"targets": "cached", "intermediate": 1.0}, "--intermediate needs the teacher itself, --targets cached"),
        ({"train": "sharded", "intermediate": 1.0}, "--intermediate needs the whole student, --train sharded"),
    ],
)
def test_what_does_not_go_together_is_a_sentence(asked: dict[str, Any], said: str) -> None:
    """The flag, what it clashes with, and what to do; the defaults and each flag by itself pass."""
    Distillation().check()
    Distillation(cross_entropy=1.0, intermediate=2.0, teacher_correction=5, divergence="reverse").check()
    Distillation(targets="cached", teacher_correction=5).check()
    with pytest.raises(MisError) as caught:
        Distillation(**asked).check()
    assert str(caught.value).startswith(said)


def test_the_job_that_is_asked_for() -> None:
    """States inside need a resident student, so no other way is tried; a packed teacher cannot be corrected."""
    asked = Settings(intermediate=1.0, teacher_correction=7)
    job = job_of(BIG, SMALL, asked)
    assert (job.modes, job.intermediate, job.correction) == (("resident",), True, 7)
    assert job_of(BIG, SMALL, Settings()).modes == ("resident", "sharded")
    with pytest.raises(MisError, match="--teacher-correction trains the teacher, and this one is quantized"):
        job_of(replace(BIG, packed=True), SMALL, asked)


class Settings(Distillation):
    """`distill`'s, as far as a job needs them."""

    num_samples = eval_windows = 4


def test_the_plan_counts_them() -> None:
    """Correction by pencil: 7 steps of 384 tokens three times through the teacher, 16 bytes a parameter and its
    activations; three checkpoints and its folder. States inside: 384 tokens of 64 floats more."""
    job, params = replace(JOB, correction=7), arch.params(BIG.config)
    plan = phases.make(job, GIB, M1_AIR)
    assert [p.name for p in plan.phases] == ["prune", "teacher correction", "distil", "quantize", "measure"]
    p = phases.correct(job, 4)
    assert p.flops == 7 * 3 * forward_flops(BIG, 384, 32) and p.written_bytes == 3 * 12 * params + BIG.nbytes
    assert p.peak_bytes == planning.training_bytes(BIG.config, 4, 32) > 16 * params
    assert plan.phases[0] == phases.make(JOB, GIB, M1_AIR).phases[0]
    more = phases.resident(replace(JOB, intermediate=True), 4, 0).peak_bytes - phases.resident(JOB, 4, 0).peak_bytes
    assert more == 384 * 64 * 4


def test_no_room_for_a_teacher_in_training_is_a_sentence() -> None:
    """Both numbers, the budget that would do, and that leaving the correction out would do too."""
    least = phases.least_bytes(replace(JOB, modes=("resident",)), M1_AIR)
    wide = model_of({**tiny.CONFIG, "num_hidden_layers": 60, "torch_dtype": "float32"}, gpu=False)
    job = replace(JOB, teacher=wide, correction=7, modes=("resident",))
    budget = least + 30 * 2**20
    assert phases.make(replace(job, correction=0), budget, M1_AIR).fits
    said = phases.remedy(phases.make(job, budget, M1_AIR))
    assert said.startswith("teacher correction needs ") and f"the budget is {budget / 2**20:.0f} MiB" in said
    assert said.endswith("or --teacher-correction 0")


def test_training_with_everything_stays_under_the_plan(tmp_path: Path, models: Callable[[str], Checkpoint]) -> None:
    """A large vocabulary, cross-entropy and states inside: MLX's own peak is under the plan's, no more than 4 times."""
    vocab, length = 8192, 64
    teacher = load.open_checkpoint(tiny.make(tmp_path / "big", vocab_size=vocab, num_hidden_layers=6))
    small = tiny.make(tmp_path / "small", seed=1, vocab_size=vocab, num_hidden_layers=4, intermediate_size=512)
    student, rng = load.open_checkpoint(small), np.random.default_rng(0)
    data = Windows(rng.integers(0, vocab, (12, length)).astype(np.int32), np.ones((12, length), np.float32))
    recipe = replace(RECIPE, iters=2, max_seq_length=length)
    middle = Middle.of(Keep((0, 1, 3, 5), {}, ""), 6, 1.0)
    for reverse in ("forward", "reverse"):
        mx.clear_cache()
        before = mx.get_active_memory()
        model, source = load.resident(student, mx.float32), Teacher(teacher, 0, False, 2.0, 0.5, reverse, middle)  # type: ignore[arg-type]
        steps = list(distillation.steps(model, source, data, recipe, GoralW()))
        peak = max(s.peak_bytes for s in steps) - before
        job = replace(JOB, teacher=model_of(teacher), student=model_of(student), batch=2, accumulate=2, length=length)
        planned = phases.resident(replace(job, intermediate=True), 2, 0).peak_bytes
        assert planned / 4 < peak < planned, (reverse, peak / 2**20, planned / 2**20)
        del model, source
