"""Phases of a distillation: chosen by the budget, and real training that stays under the plan."""

from __future__ import annotations

import gc
import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx.cli import parse_bytes
from mis_mlx.data.token_windows import Windows
from mis_mlx.distill import Settings as Distilled
from mis_mlx.distillation import strategies
from mis_mlx.distillation.block_student import BlockStudent, weights_cost
from mis_mlx.hardware import memory
from mis_mlx.hardware.rates import M1_AIR
from mis_mlx.judge import comparison
from mis_mlx.judge.comparison import comparison_cost
from mis_mlx.models.architectures import arch
from mis_mlx.models.opening import load
from mis_mlx.models.opening.model_size import model_of
from mis_mlx.models.passing import pass_cost
from mis_mlx.models.writing import model_writer
from mis_mlx.planner.distillation_spec import MODES, DistillationSpec, Mode, spec_of
from mis_mlx.pruning import select
from mis_mlx.settings.recipe import (
    RATE,
    TUNE_ITERS,
    DistillationConfig,
    QuantizationConfig,
    TrainingConfig,
)
from mis_mlx.types import GIB, Air, Budget, Checkpoint
from tests import peaks, tiny
from tests.conftest import mostly_thorough
from tests.distillation import students
from tests.planner.test_estimates import HYBRIDS, larger

MIB = 2**20
BIG = model_of({**tiny.CONFIG, "num_hidden_layers": 6}, gpu=False)
SMALL = model_of({**tiny.CONFIG, "num_hidden_layers": 4, "intermediate_size": 512}, gpu=False)
JOB = DistillationSpec(
    teacher=BIG,
    student=SMALL,
    iters=10,
    batch_size=4,
    grad_accumulation_steps=3,
    max_seq_length=32,
    num_samples=4,
    reconstruct_samples=0,
    eval_windows=5,
    save_every=5,
)
# Blocks that outweigh activations and vocabulary, so that some of them at a time take less than
# all.
BLOCKY = replace(
    JOB,
    teacher=model_of({**BIG.config, "intermediate_size": 4096}, gpu=False),
    student=model_of({**SMALL.config, "intermediate_size": 2048}, gpu=False),
)


def test_budgets_choose() -> None:
    """Nothing fits, then some blocks, then all of them; with the way fixed, more budget never reads
    more: blocks stay, shards grow, passes merge, spools shrink.
    """
    deep = model_of({**BLOCKY.student.config, "num_hidden_layers": 8}, gpu=False)
    job = replace(BLOCKY, student=deep, batch_size=1, grad_accumulation_steps=8, num_samples=64)
    budgets = [n * MIB // 8 for n in range(8 * 130, 8 * 400, 16)]
    plans = [strategies.best_plan(job, budget, M1_AIR) for budget in budgets]
    order = list(dict.fromkeys((plan.fits, plan.mode) for plan in plans))
    assert order == [(False, "sharded"), (True, "sharded"), (True, "blocks")]
    fitting = [plan for plan in plans if plan.fits]
    assert all(plan.peak_bytes <= plan.budget_bytes for plan in fitting)
    seen = set[int]()
    for mode in MODES:
        of_mode = [plan for plan in fitting if plan.mode == mode]
        reads = [sum(phase.read_bytes for phase in plan.phases) for plan in of_mode]
        assert reads == sorted(reads, reverse=True)
        seen |= {*reads}
    assert len(seen) >= 5
    assert len({plan.shard_layers for plan in fitting}) > 2
    way = {"mode": "blocks", "micro": 1, "shard": 0, "tuned": 0}
    assert fitting[-1].strategy == way


def test_a_student_with_fewer_tokens_is_measured_in_other_languages() -> None:
    """Its teacher reads the texts with its own tokens, too; both read those in other languages."""
    shown = model_of({**BIG.config, "vocab_size": 1024}, gpu=False)
    as_many = strategies.measuring_cost(replace(JOB, shown=BIG), GIB)
    fewer = strategies.measuring_cost(replace(JOB, shown=shown), GIB)
    assert [part.name for part in as_many.parts].count("languages") == 0
    assert [part.name for part in fewer.parts].count("languages") == 1
    # of each of two kinds of text, and of all languages
    assert fewer.read_bytes - as_many.read_bytes == 3 * shown.nbytes + SMALL.nbytes
    assert fewer.flops > as_many.flops


@pytest.mark.parametrize(
    ("change", "asked", "uncut"),
    [
        ({}, {}, True),
        ({"num_hidden_layers": 4}, {}, False),
        ({}, {"train": "blocks"}, False),  # asked for
    ],
)
def test_a_student_that_is_its_teacher(
    change: dict[str, Any], asked: dict[str, Any], uncut: bool
) -> None:
    """There is nothing to repair and nothing to learn until it is rounded; its scales learn as
    usual.
    """
    teacher = model_of({**tiny.CONFIG, **change})
    student = model_of(tiny.CONFIG)
    job = spec_of(teacher, student, DistillationConfig(**asked), QuantizationConfig(), copied=True)
    assert job.uncut == uncut
    assert not spec_of(teacher, student, DistillationConfig(**asked)).uncut
    plan = strategies.best_plan(job, GIB, M1_AIR)
    assert {"repair", "distil"}.isdisjoint(p.name for p in plan.phases) == uncut
    assert plan.tuning_steps == TUNE_ITERS
    assert (plan.mode == "none") == uncut


@pytest.mark.parametrize(
    ("family", "asked", "steps"),
    [
        ("qwen3", {}, 30),
        ("qwen3", {"reconstruct_samples": 0}, 60),
        ("gemma3_text", {}, 60),
        ("gemma3_text", {"iters": 7}, 7),
    ],
)
def test_usual_steps(tmp_path: Path, family: str, asked: dict[str, Any], steps: int) -> None:
    """Twice as many where nothing is repaired before, and of Gemma, whose repair does less."""
    model = model_of(
        load.open_checkpoint(tiny.make(tmp_path / "m", **{**tiny.KINDS, **tiny.FAMILIES}[family]))
    )
    assert spec_of(model, model, DistillationConfig(**asked)).iters == steps


@pytest.mark.parametrize(("mode", "whole"), [("blocks", True), ("sharded", False)])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3", "phi3", "mixtral"])
def test_the_usual_rate_knows_the_weights(
    tmp_path: Path, family: str, mode: Mode, whole: bool
) -> None:
    """A part of what they are, where every block learns at once; elsewhere the plain one; or what
    was asked for.
    """
    asked = DistillationConfig()
    rates = list[float | None]()
    folder = tiny.make(tmp_path / "m", **{**tiny.KINDS, **tiny.FAMILIES}[family])
    for times in (1, 4):
        weights = tiny.stored_weights(folder).items()
        tiny.change(folder, {name: times * weight for name, weight in weights})
        teacher = load.open_checkpoint(folder)
        model = model_of(teacher)
        plan = strategies.plan_strategy(
            spec_of(model, model, asked),
            GIB,
            rates=M1_AIR,
            mode=mode,
            micro=2,
            shard=int(mode == "sharded"),
        )
        rates.append(plan.recipe(asked, teacher).learning_rate)
        assert plan.recipe(replace(asked, learning_rate=3e-4), teacher).learning_rate == 3e-4
    assert rates[1] == (pytest.approx(4 * rates[0], rel=0.1) if whole else RATE)
    assert whole or rates[0] == RATE


@pytest.mark.thorough
def test_steps_after_rounding_go_where_nobody_asked_for_them() -> None:
    """Under a budget that holds training and not `tune` they are left out; asked for, they do not
    fit, said so.
    """
    plain = QuantizationConfig(q_method="round", target_bpw=None)  # which takes little itself
    # nothing is trained before, and windows enough that a step outweighs what rounding takes
    job = replace(JOB, rounding=plain, modes=("none",), batch_size=16, eval_windows=1)
    asked = replace(job, rounding=replace(job.rounding, q_iters=20))
    way: dict[str, Any] = {"rates": M1_AIR, "mode": "none", "micro": 16, "shard": 0}
    whole = strategies.plan_strategy(job, GIB, **way)
    assert whole.tuning_steps == 20
    names = [phase.name for phase in whole.phases]
    assert names[-3:] == ["logit store", "distil scales", "measure"]
    plans = (strategies.plan_strategy(job, n * MIB, **way) for n in range(64, 512))
    plan = next(plan for plan in plans if plan.fits)
    assert plan.tuning_steps == 0
    assert not strategies.plan_strategy(asked, plan.budget_bytes, **way).fits
    assert strategies.plan_strategy(job, GIB, M1_AIR, **plan.strategy) != whole


def test_micro_batches_divide_the_step(tmp_path: Path) -> None:
    """Six windows are cut into 3, 2 or 1, never 4; the recipe then has as many more of them a
    step.
    """
    job = replace(JOB, batch_size=6)
    assert {way["micro"] for way in strategies.candidate_strategies(job)} == {6, 3, 2, 1}
    plan = strategies.plan_strategy(job, GIB, rates=M1_AIR, mode="blocks", micro=2, shard=0)
    asked = DistillationConfig(batch_size=6, grad_accumulation_steps=3, learning_rate=RATE)
    recipe = plan.recipe(asked, load.open_checkpoint(tiny.make(tmp_path / "m")))
    assert (recipe.batch_size, recipe.grad_accumulation_steps) == (2, 9)
    assert strategies.plan_strategy(job, GIB, M1_AIR, **plan.strategy) == plan


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"reconstruct_samples": 64},
        {"max_seq_length": 256, "eval_windows": 64},
    ],
)
def test_the_least_budget_is_enough_and_one_byte_less_is_not(change: dict[str, Any]) -> None:
    """And the sentence of a refusal names it, rounded up, with the need and the budget."""
    job = replace(JOB, **change)
    least = strategies.least_bytes(job, M1_AIR)
    assert strategies.best_plan(job, least, M1_AIR).fits
    plan = strategies.best_plan(job, least - 1, M1_AIR)
    assert not plan.fits
    assert strategies.remedy(strategies.best_plan(job, least, M1_AIR)) == ""
    said = strategies.remedy(plan)
    assert re.match(
        r"\w+ needs [\d.]+ MiB, but the budget is [\d.]+ MiB: give --budget \d+MiB", said
    )
    advised = re.search(r"--budget (\S+?)[,;]", said)
    assert advised
    assert strategies.best_plan(job, parse_bytes(advised[1]), M1_AIR).fits


def test_the_remedy_is_one_that_helps() -> None:
    """A repair too big is left out; windows too long are cut; where nothing helps it says so."""
    repair = replace(
        JOB,
        reconstruct_samples=1,
        modes=("blocks",),
        student=model_of({**SMALL.config, "intermediate_size": 6144}, False),
    )
    plain = strategies.best_plan(replace(repair, reconstruct_samples=0), GIB, M1_AIR)
    assert "--reconstruct-samples 0" in strategies.remedy(
        strategies.best_plan(repair, plain.peak_bytes + MIB, M1_AIR)
    )
    long = replace(JOB, max_seq_length=512, batch_size=1)
    budget = strategies.least_bytes(replace(long, max_seq_length=128), M1_AIR)
    said = strategies.remedy(strategies.best_plan(long, budget, M1_AIR))
    assert "--max-seq-length 128 instead of 512" in said
    assert strategies.best_plan(replace(long, max_seq_length=128), budget, M1_AIR).fits
    assert "do not help" in strategies.remedy(strategies.best_plan(long, MIB, M1_AIR))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Checkpoint]:
    """Teacher and student whose blocks outweigh activations and vocabulary."""
    root = tmp_path_factory.mktemp("wide")
    teacher = load.open_checkpoint(tiny.make(root / "big", num_hidden_layers=5, **WIDE))
    return teacher, load.open_checkpoint(
        tiny.make(root / "small", seed=1, num_hidden_layers=4, **WIDE)
    )


WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 1536, "head_dim": 64}
ROWS: dict[str, Any] = {"vocab_size": 76_000}
BY_BLOCKS: list[tuple[dict[str, Any], int, int, int, int]] = [
    (WIDE, 2, 1, 32, 0),
    (WIDE, 2, 2, 32, 0),
    (WIDE, 1, 2, 32, 1),
    (WIDE, 2, 2, 32, 3),
    (ROWS, 2, 1, 64, 0),
    (ROWS | {"tie_word_embeddings": False}, 2, 1, 64, 0),
    ({}, 4, 1, 128, 0),
    (tiny.FAMILIES["gemma3_text"], 4, 1, 128, 0),
    *product(map(larger, HYBRIDS), (2,), (2,), (64,), (0, 2)),
]


@pytest.mark.usefixtures("cpu_policy")
@pytest.mark.parametrize(
    ("sizes", "batch", "accumulate", "length", "shard"),
    mostly_thorough(BY_BLOCKS, BY_BLOCKS[1], BY_BLOCKS[3], BY_BLOCKS[8], of_several=True),
)
def test_training_by_blocks_stays_under_the_plan(
    tmp_path: Path, sizes: dict[str, Any], batch: int, accumulate: int, length: int, shard: int
) -> None:
    """Two real steps with MLX's limit at the plan, with blocks or a vocabulary that outweigh the
    rest, tied or not, all blocks or some: the peak is under the plan, and above half of it.
    """
    folders = []
    for n in (5, 4):
        own = sizes if "layer_types" in sizes else {**sizes, "num_hidden_layers": n}
        folders.append(tiny.make(tmp_path / str(n), seed=n, **own))
    teacher, small = [load.open_checkpoint(folder) for folder in folders]
    tokens = np.random.default_rng(0).integers(0, 512, (12, length)).astype(np.int32)
    data = Windows(tokens, np.ones((12, length), np.float32))
    recipe = TrainingConfig(
        iters=2, batch_size=batch, grad_accumulation_steps=accumulate, max_seq_length=length
    )
    job = replace(
        JOB,
        teacher=model_of(teacher),
        student=model_of(small),
        batch_size=batch,
        grad_accumulation_steps=accumulate,
        max_seq_length=length,
    )
    planned = weights_cost(job, batch, shard).peak_bytes
    source = students.kept(teacher, data, recipe, tmp_path / "targets")
    if shard:
        small = model_writer.by_block(small, tmp_path / "parts")
    mx.clear_cache()
    gc.collect()  # what an earlier test left would be freed during the work
    before = mx.get_active_memory()
    with memory.limited(Budget(before + planned)):
        student = BlockStudent(small, "weights", at_once=shard or None, steps_each=1)
        student.begin()
        steps = list(source.steps(student, data, recipe))
    peak = max(s.peak_bytes for s in steps) - before
    assert planned / 2 < peak < peaks.allocated(planned), (peak / MIB, planned / MIB)


@pytest.mark.parametrize("how", [{}, {"hidden": 192}])
def test_pruning_stays_under_the_plan(
    tmp_path: Path, wide: tuple[Checkpoint, Checkpoint], how: dict[str, Any]
) -> None:
    """Calibration, or a rotation: MLX's peak; numpy's part is not in its count."""
    teacher, _ = wide
    cut = select.PruningConfig(scenario="none", layers=4, ffn=768, **{"importance": "rms", **how})
    shape = select.wanted_shape(teacher.config, cut)
    small = model_of(arch.student_config(teacher.config, shape, tuple(range(4)), "float32"))
    asked = replace(Distilled(), **{**how, "num_samples": 6, "max_seq_length": 64})
    job = spec_of(model_of(teacher), small, asked)
    planned = select.pruning_cost(
        job.teacher, small.nbytes, windows=6, length=64, limit=GIB, rotation=job.rotation
    )
    batches = [mx.random.randint(0, 512, (1, 64), key=mx.random.key(k)) for k in range(6)]
    mx.eval(batches)
    with peaks.of_mlx(planned.peak_bytes) as peak:
        select.prune(
            teacher,
            batches,
            out=tmp_path / "s",
            cut=cut,
            dtype="float32",
            air=Air,
        )
    assert planned.peak_bytes / 4 < peak.nbytes < peaks.allocated(planned.peak_bytes)


def test_comparing_stays_under_the_plan(
    tmp_path: Path, wide: tuple[Checkpoint, Checkpoint]
) -> None:
    """Teacher, student and its 4-bit form on three windows: blocks in turn, then parts of two
    heads.
    """
    teacher, student = wide
    four = tiny.packed(student, tmp_path / "4-bit")
    models = {"teacher": teacher, "student": student, "4-bit": four}
    tokens = np.random.default_rng(0).integers(0, 512, (3, 64)).astype(np.int32)
    planned = comparison_cost([model_of(m) for m in models.values()], 3, 64).peak_bytes
    with peaks.of_mlx(planned) as peak:
        comparison.compare(models, Windows(tokens, np.ones((3, 64), np.float32)))
    assert planned / 2 < peak.nbytes < peaks.allocated(planned + pass_cost.SMALL_BYTES)
