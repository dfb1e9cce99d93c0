"""Stored targets against the live teacher at equal steps: full KD and RS-KD.

    scripts/mis benchmarks/rskd.py --student STUDENT        # about an hour on 2 quiet cores

The default teacher and its GÓRAL student after the closed-form repair, made once (kept in STUDENT,
a folder that is made when it is not there). A seed chooses the batches and the samples; both ways
see the same batches. Measured on the English held-out windows, in nats per token; `seconds` is
training, `write_s` the teacher's pass before it. Writes benchmarks/results/<machine>/rskd.json.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from laboratory import Judge, write
from mlx.utils import tree_flatten

from mis_mlx import cli, distill
from mis_mlx.data import preparation
from mis_mlx.data.token_windows import Windows
from mis_mlx.distillation import live_teacher, pipeline
from mis_mlx.distillation.whole_model import WholeModel
from mis_mlx.judge import comparison
from mis_mlx.maths.optimizer import GuardedAdamW
from mis_mlx.models.opening import compute_type, load, resolve
from mis_mlx.models.passing import stream
from mis_mlx.models.writing import model_writer
from mis_mlx.pruning import reconstruct, select
from mis_mlx.settings.recipe import TrainingConfig
from mis_mlx.storage.files import DISK
from mis_mlx.types import Air, Checkpoint

WAYS = {"full": 0, "rs-kd 50": 50}  # name in the table -> samples a position (0: the live teacher)


@dataclass(frozen=True)
class Settings:
    """What is compared; the defaults are what the README shows."""

    iters: int = 30
    """optimizer steps of each way"""
    seeds: int = 3
    """runs of each way"""
    student: str | None = None
    """folder of the pruned and repaired student, made when it is not there; default: a temporary
    one
    """
    max_seq_length: int = 256
    """tokens in a window"""
    eval_windows: int = 24
    """held-out windows"""


def prepare(checkpoint: Checkpoint, data: preparation.Data, out: Path) -> None:
    """Prune and repair as `distill` does by default, and write the result in float32."""
    s = distill.Settings()

    def pick(count: int, use: int) -> list[mx.array]:
        return preparation.calibration(data.train, count, s.seed, use)

    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp) / "pruned"
        samples = pick(s.num_samples, 1)
        select.prune(
            checkpoint,
            samples,
            out=folder,
            cut=s,
            dtype=pipeline.DTYPE,
            air=Air,
            files=DISK,
        )
        pruned = compute_type.open_to_compute(folder)
        keep = model_writer.read_keep(folder)
        assert keep is not None
        repaired, _ = reconstruct.reconstruct(
            checkpoint, pruned, keep, pick(s.reconstruct_samples, 2)
        )
        model = load.resident_model(pruned, mx.float32)
        model.load_weights(list(repaired.items()), strict=False)
        config = {**pruned.config, "torch_dtype": "float32"}
        weights = dict(tree_flatten(model.parameters()))
        model_writer.write_model(
            config, weights.__getitem__, source=folder, out=out, dtype="float32", files=DISK
        )


def train(
    way: str,
    student: Checkpoint,
    source: live_teacher.StreamedTeacher,
    checkpoint: Checkpoint,
    data: Windows,
    recipe: TrainingConfig,
) -> tuple[Any, dict[str, Any]]:
    """(the student trained one way, what it cost)."""
    count = WAYS[way]
    cost: dict[str, Any] = {"bytes_per_token": None, "write_s": None}
    with tempfile.TemporaryDirectory() as temp:
        target: live_teacher.TargetSource = source
        if count:
            began = time.monotonic()
            at = live_teacher.visited_windows(len(data.tokens), recipe)
            picked = Windows(data.tokens[at], data.loss_mask[at])
            store = live_teacher.write_store(
                checkpoint,
                lambda: source,
                data=picked,
                folder=Path(temp),
                files=DISK,
                count=count,
                seed=recipe.seed,
            )
            cost = {
                "bytes_per_token": round(store.bytes_per_token, 1),
                "write_s": round(time.monotonic() - began, 1),
            }
            target = live_teacher.CachedTeacher(store, at)
        model = stream.load_checked(load.resident_model(student, mx.float32))
        model.train()
        steps = list(live_teacher.steps(WholeModel(model, GuardedAdamW()), target, data, recipe))
    model.eval()
    return model, {**cost, "seconds": round(sum(s.seconds for s in steps), 1)}


def main(s: Settings) -> None:
    """All seeds and ways; print one line each, write one JSON file."""
    checkpoint = compute_type.open_to_compute(resolve.resolve_model().path)
    data = preparation.prepare(None, load.tokenizer(checkpoint.path), s.max_seq_length)
    held_out = comparison.spread_windows(data.held_out["English"], s.eval_windows)
    rows = []
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(s.student or Path(temp) / "student")
        if not folder.exists():
            prepare(checkpoint, data, folder)
        student = compute_type.open_to_compute(folder)
        source = live_teacher.StreamedTeacher(checkpoint, None)
        judge = Judge(source, held_out)
        start = judge(stream.load_checked(load.resident_model(student, mx.float32)))
        print(json.dumps({"way": "before training", **start}), flush=True)
        for seed in range(s.seeds):
            recipe = TrainingConfig(iters=s.iters, max_seq_length=s.max_seq_length, seed=seed)
            for way in WAYS:
                model, cost = train(
                    way,
                    student,
                    source=source,
                    checkpoint=checkpoint,
                    data=data.train,
                    recipe=recipe,
                )
                rows.append({"seed": seed, "way": way, **judge(model), **cost})
                print(json.dumps(rows[-1]), flush=True)
                del model
                mx.clear_cache()
    full = {r["seed"]: r["nll"] for r in rows if r["way"] == "full"}
    gap = {way: list[float]() for way in WAYS if way != "full"}
    for row in rows:
        if row["way"] in gap:
            gap[row["way"]].append(round(row["nll"] - full[row["seed"]], 4))
    print(json.dumps({"nll_minus_full": gap}))
    flags = [
        f"--{name.replace('_', '-')} {value}"
        for name, value in vars(replace(s, student=None)).items()
        if value
    ]
    command = " ".join(["scripts/mis benchmarks/rskd.py", *flags])
    write("rskd", command, {"before_training": start, "rows": rows, "nll_minus_full": gap})


if __name__ == "__main__":
    main(cli.parse(Settings))
