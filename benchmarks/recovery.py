"""Our pruning recipe, at the tokens of Minitron's, whose arms are in this file at bd583ffb.

    scripts/mis benchmarks/recovery.py             # three seeds
    scripts/mis benchmarks/recovery.py --seeds 0   # one

SmolLM2-135M-Instruct to -33 % parameters. A row is one student: pruned, perhaps repaired, distilled
with forward KL, judged on the same held-out windows before and after. A seed chooses calibration
windows and the order of batches; all arms of a seed see the same ones. Every row is written when it
is done, and a finished one is not run again. Writes
benchmarks/results/<machine>/recovery/<arm>-<seed>.json.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
from laboratory import Laboratory, kept_targets, stored, write

from mis_mlx import cli
from mis_mlx.distillation.block_student import BlockStudent
from mis_mlx.maths.importance import Statistics
from mis_mlx.models.architectures import arch
from mis_mlx.models.opening import compute_type, load
from mis_mlx.models.passing import stream
from mis_mlx.models.writing import model_writer
from mis_mlx.pruning import calibrate, reconstruct, select, slicing
from mis_mlx.settings.recipe import DistillationConfig
from mis_mlx.types import Checkpoint

# GÓRAL, neurons by root mean square, blocks by 1 - cosine
PLAIN = select.PruningConfig(scenario="goral", importance="rms")
WIDE = {"layers": 28, "ffn": 768}


@dataclass(frozen=True)
class Arm:
    """One way to make the student."""

    cut: select.PruningConfig = PLAIN
    repair: bool = False
    learning_rate: float = 3e-4


def cut(**changes: Any) -> select.PruningConfig:
    """GÓRAL, but for `changes`."""
    return replace(PLAIN, **changes)


ARMS = {"ours-l2": Arm(cut=cut(**WIDE), repair=True, learning_rate=1e-4)}


@dataclass(frozen=True)
class Settings:
    """What is run; the defaults are what the notebook shows."""

    only: tuple[str, ...] = ()
    """arms; default: all"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """runs of each arm"""
    iters: int = 60
    """optimizer steps of two windows"""
    max_seq_length: int = 256
    """tokens in a window"""
    eval_windows: int = 16
    """held-out English windows; a third as many Polish ones"""


class Bench(Laboratory):
    """The laboratory, with the statistics of each seed's calibration windows."""

    @cache  # noqa: B019 one object, as long as the program
    def statistics(self, seed: int) -> Statistics:
        """Of 32 windows."""
        found, _ = calibrate.calibrate(self.checkpoint, self.pick(32, seed, 1))
        return found

    def pruned(self, arm: Arm, seed: int, out: Path) -> Checkpoint:
        """The student's folder before repair."""
        shape, keep = select.select_units(self.checkpoint.config, self.statistics(seed), arm.cut)
        slicing.write_student(self.checkpoint, shape, keep=keep, out=out, dtype="bfloat16")
        return compute_type.open_to_compute(out)

    def row(self, arm: Arm, seed: int, recipe: DistillationConfig) -> dict[str, Any]:
        """Make one student and judge it."""
        began = time.monotonic()
        with TemporaryDirectory() as temp:
            student = self.pruned(arm, seed, Path(temp) / "pruned")
            keep = model_writer.read_keep(student.path)
            assert keep is not None
            model = stream.load_checked(load.resident_model(student, mx.float32))
            pruned = self.judge(model)
            repaired: dict[str, mx.array] = {}
            if arm.repair:
                windows = self.pick(recipe.reconstruct_samples, seed, 2)
                repaired, _ = reconstruct.reconstruct(self.checkpoint, student, keep, windows)
                model.load_weights(list(repaired.items()), strict=False)
                stream.load_checked(model)
            begun = self.judge(model)
            kept = kept_targets(self.checkpoint, self.data.train, recipe)
            learner = BlockStudent(student, "weights")
            learner.begin(repaired)
            steps = list(kept.steps(learner, self.data.train, recipe))
        named = [(name, learner.learned(name)) for name in student.tensors]
        model.load_weights([(n, array) for n, array in named if array is not None], strict=False)
        return {
            "seed": seed,
            "params": arch.params(student.config),
            "layers": list(keep.layers),
            "iters": len(steps),
            "tokens": sum(s.tokens for s in steps),
            "pruned": pruned,
            "start": begun,
            "end": self.judge(model),
            "train_loss": [round(s.loss, 4) for s in steps],
            "notes": [f"{s.number}: {s.note}" for s in steps if s.note],
            "seconds": round(time.monotonic() - began),
        }


def main(s: Settings) -> None:
    """Every arm that was asked for and is not there yet."""
    asked = [(name, seed) for seed, name in product(s.seeds, s.only or ARMS)]
    todo = [(name, seed) for name, seed in asked if not stored(f"recovery/{name}-{seed}")]
    cli.say(f"{len(todo)} rows to make")
    if not todo:
        return
    bench = Bench(s.max_seq_length, s.eval_windows)
    if not stored("recovery/teacher"):
        write(
            "recovery/teacher", "scripts/mis benchmarks/recovery.py", {"nll": bench.teacher_nll()}
        )
    for name, seed in todo:
        arm = ARMS[name]
        recipe = DistillationConfig(
            iters=s.iters,
            seed=seed,
            max_seq_length=s.max_seq_length,
            reconstruct_samples=64,
            learning_rate=arm.learning_rate,
        )
        found = bench.row(arm, seed, recipe)
        command = f"scripts/mis benchmarks/recovery.py --only {name} --seeds {seed}"
        command += f" --iters {s.iters} --eval-windows {s.eval_windows}"
        write(f"recovery/{name}-{seed}", command, {"arm": name, **found})
        losses = " -> ".join(f"{found[when]['nll']:.3f}" for when in ("pruned", "start", "end"))
        cli.say(f"{name}, seed {seed}: {losses} nats, {found['seconds']} s")
        mx.clear_cache()


if __name__ == "__main__":
    main(cli.parse(Settings))
