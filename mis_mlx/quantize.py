"""Quantize every linear layer; stock mlx-lm opens the result."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mis_mlx import cli
from mis_mlx.compute import precision
from mis_mlx.data import preparation
from mis_mlx.data.token_windows import Windows
from mis_mlx.distillation import live_teacher, pipeline, training_cost
from mis_mlx.hardware import memory
from mis_mlx.hardware.stage_cost import StageCost
from mis_mlx.models import load, model_writer, opening, resolve
from mis_mlx.models.model_size import model_of
from mis_mlx.planner import estimates
from mis_mlx.planner.distillation_spec import DistillationSpec
from mis_mlx.pruning import vocabulary
from mis_mlx.quantization import (
    learned_scales,
    packed_format,
    rounding_cost,
    scale_state,
    stage,
)
from mis_mlx.reporting import progress
from mis_mlx.runs import run_loop
from mis_mlx.settings.recipe import DistillationConfig, QuantizationConfig
from mis_mlx.storage.files import Files
from mis_mlx.types import Budget, Checkpoint, Count, MisError, Seed, Tokens, Whole


@dataclass(frozen=True)
class Settings(cli.Budgeted, precision.Computing, QuantizationConfig):
    """Only quantizes; `distill` does this in its last stages."""

    model: str | None = None
    """folder or hub id of an unquantized model; default: SmolLM2-135M-Instruct"""
    teacher: str | None = None
    """folder or hub id of the model that the scales learn from in --q-iters steps; default: the
    unquantized model
    """
    mlx_path: str = "quantized"
    """folder to write"""
    data: str | None = None
    """calibration text: a folder with train.jsonl, or a hub data set; default: built-in text"""
    num_samples: Whole = 32
    """calibration windows for --q-method gptq and --target-bpw"""
    max_seq_length: Tokens = 256
    """tokens per window"""
    batch_size: Count = 2
    """windows per --q-iters step"""
    seed: Seed = 0
    """selects the windows, and the tokens that the model samples after them"""


def _planned(
    s: Settings,
    checkpoint: Checkpoint,
    other: Checkpoint,
    *,
    count: int,
    limit: Budget,
) -> list[StageCost]:
    """The costs of rounding, and of the steps after it, if any; MisError when one does not fit.

    other: the model that the scales learn from. count: windows to look at.
    """
    m = model_of(checkpoint)
    rounding = rounding_cost.quantizing_cost(
        m,
        s,
        windows=count,
        length=s.max_seq_length,
        limit=limit.limit_bytes,
    )
    remedy = ", or --q-method round without --target-bpw" if count else ""
    steps = s.steps()
    if not steps:
        estimates.require_fit(limit, rounding, other=remedy)
        return [rounding]
    job = DistillationSpec(
        teacher=model_of(other),
        student=m,
        iters=steps,
        batch_size=s.batch_size,
        max_seq_length=s.max_seq_length,
        save_every=steps,
        rounding=s,
    )
    tuning = training_cost.tuning_cost(job, s.batch_size, limit.limit_bytes, steps)
    estimates.require_fit(limit, rounding, other=remedy)
    estimates.require_fit(limit, tuning, other=", or --q-iters 0")
    return [rounding, tuning]


def _tuned(
    s: Settings,
    rounded: Path,
    *,
    other: Checkpoint,
    data: Windows,
    planned: StageCost,
    out: Path,
    files: Files,
) -> None:
    """Write `out`: `rounded`, whose scales have learned from the model `other`.

    planned: how many blocks of both stay in memory.
    """
    checkpoint = load.open_checkpoint(rounded)
    m = model_of(other)
    room = None  # everything
    if planned.pinned != m.shape.layers:
        room = planned.pinned * m.block_work + m.head_work
    source = live_teacher.StreamedTeacher(other, room)
    asked = DistillationConfig(batch_size=s.batch_size, seed=s.seed)
    recipe = pipeline.tuning_recipe(asked, checkpoint, s.steps(), s.q_learning_rate)
    with scale_state.place(planned, rounded, files) as state:
        learned = pipeline.learn_scales(
            checkpoint, planned.kept, source, data, recipe=recipe, state=state
        )
        learned_scales.write_learned(checkpoint, learned, out, files)


def run(settings: Settings) -> dict[str, Any]:
    """The command."""
    s = settings
    checkpoint = run_loop.open_model(s, s.model, place=s.mlx_path, new="--mlx-path")
    s = replace(s, **packed_format.of_mixture(checkpoint.config, s))
    if s.looks and s.num_samples < 1:
        flag = f"--q-method {s.q_method}" if s.compensates else "--target-bpw"
        raise MisError(f"{flag} needs text, but --num-samples is {s.num_samples}: give 1 or more")
    packed_format.check_dense(checkpoint)
    model_writer.need_tokenizer(checkpoint.path)
    stage.check(checkpoint.config, s, s.num_samples)
    other = checkpoint
    if s.teacher:
        other = opening.open_to_compute(resolve.resolve_model(s.teacher).path, s.precision)
    with vocabulary.shared(other, [checkpoint]) as teacher:
        return _run(s, checkpoint, teacher)


def _run(s: Settings, checkpoint: Checkpoint, other: Checkpoint) -> dict[str, Any]:
    """Plan, round, and let scales learn from the model `other`, which reads the same tokens."""
    limit = memory.budget(s.budget_bytes)
    count = s.num_samples if s.looks else 0
    steps = s.steps()
    planned = _planned(s, checkpoint, other, count=count, limit=limit)
    out = Path(s.mlx_path)
    files = Files()
    batches: list[mx.array] = []
    if s.looks or steps:
        data = preparation.prepare(s.data, load.tokenizer(checkpoint.path), s.max_seq_length).train
        batches = preparation.calibration(data, count, s.seed)

    def quantized(folder: Path) -> dict[str, Any]:
        held = planned[0].held_tokens // s.max_seq_length
        return stage.quantize(
            checkpoint,
            folder,
            rounding=s,
            files=files,
            batches=batches,
            held=held,
            seed=s.seed,
        )

    with progress.run("quantize"), memory.limited(limit):
        if not steps:
            done = quantized(out)
        else:
            # swept where we are killed
            rounded = out.absolute().with_name(f".tmp-{out.name}-rounded-{os.getpid()}")
            files.discard(rounded)  # left behind by a process of the same number
            try:
                done = quantized(rounded)
                _tuned(
                    s,
                    rounded,
                    other=other,
                    data=data,
                    planned=planned[1],
                    out=out,
                    files=files,
                )
            finally:
                files.discard(rounded)
    cli.say(
        f"{out}: {done['bits_per_weight']:.2f} bits per weight, "
        f"{done['bits_per_block_weight']:.2f} in blocks"
    )
    return {"model": str(checkpoint.path), "mlx_path": s.mlx_path, "method": s.q_method, **done}


if __name__ == "__main__":
    cli.main(Settings, run)
