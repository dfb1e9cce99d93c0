"""A student's training from wherever it stands to its end: repaired or taught block by block, then distilled.

Joins the ways of training for `distill`. Every stage is on disk before the next begins, and one that was
killed goes on from its last checkpoint. Does not know how the student was pruned or what becomes of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mis_mlx import cli
from mis_mlx.data import preparation, token_windows
from mis_mlx.distillation import blockwise, cached_targets, live_teacher, sharded, train_loop
from mis_mlx.distillation.checkpoints import Checkpoints
from mis_mlx.distillation.run_loop import retry_from_checkpoint, run_training
from mis_mlx.hardware import memory
from mis_mlx.hardware.thermal.run_monitor import ThermalMonitor
from mis_mlx.maths import losses
from mis_mlx.maths.optimizer import GuardedAdamW
from mis_mlx.models import block_files, distributed, load, model_writer, stream
from mis_mlx.planner.phases import MemoryPlan, steps_per_shard
from mis_mlx.planner.recipe import DistillationConfig
from mis_mlx.pruning import reconstruct
from mis_mlx.reporting import progress
from mis_mlx.storage import run_folder
from mis_mlx.storage.files import Files, reported
from mis_mlx.types import Checkpoint, MisError, Step

LOCAL, LOCAL_RATE = "local.jsonl", 3e-4  # the peak, of every block
LEFT = ("steps", "tune-steps", "rounded", "parts", "targets")  # folders that nobody needs once the run is done


@dataclass
class Run:
    """What the stages share. `recipe`: as asked for, its micro-batches as planned."""

    recipe: DistillationConfig
    folder: Path
    teacher: Checkpoint
    data: token_windows.Windows
    plan: MemoryPlan
    files: Files
    peak: memory.Peak
    weather: ThermalMonitor
    report: Callable[[Step], None] | None = None  # somebody who is told of every step of the distillation
    shares: tuple[int, ...] = ()  # how many of the teacher's blocks each machine has; (): each has it whole

    @property
    def direct(self) -> bool:
        """Whether the teacher is read past the page cache: where the budget does not hold it."""
        return self.teacher.nbytes > self.plan.budget_bytes

    def pick(self, count: int, use: int) -> list[mx.array]:
        """`count` training windows (1, T) for one use; different uses get different ones."""
        return preparation.calibration(self.data, count, self.recipe.seed, use)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Write down what the phase that the plan knows by this name takes; also when it is stopped on the way."""
        began = train_loop.CLOCK.monotonic()
        self.peak.note(mx.get_peak_memory())
        mx.reset_peak_memory()
        try:
            with progress.phase(name):
                yield
        finally:
            took = {"seconds": round(train_loop.CLOCK.monotonic() - began, 3), "peak_bytes": mx.get_peak_memory()}
            self.files.append(
                self.folder / run_folder.PHASES, json.dumps({**self.weather.now(), "phase": name, **took})
            )


def train(c: Run, pruned: Checkpoint) -> Callable[[str], mx.array]:
    """The trained weights, by name, once they are."""
    if c.plan.mode != "sharded":
        return _resident(c, pruned, source_of(c))
    parts = _local(c, pruned)
    return _sharded(c, parts, source_of(c))


def source_of(c: Run) -> live_teacher.TargetSource:
    """The teacher, live; or what it left on disk, written now as far as it is missing."""
    keeps = c.plan.pinned * c.plan.job.teacher.block_work + c.plan.job.teacher.head_work

    def teacher(room_bytes: int | None) -> live_teacher.StreamedTeacher:
        r = c.recipe
        return live_teacher.StreamedTeacher(c.teacher, room_bytes, c.direct, r.temperature, r.cross_entropy, c.shares)

    if c.recipe.targets == "live":
        return teacher(None if c.plan.teacher_resident else keeps)
    steps = max(c.recipe.iters, c.plan.tuned)  # who learns longest
    at = cached_targets.visited(len(c.data.tokens), replace(c.recipe, iters=steps))
    data = token_windows.Windows(c.data.tokens[at], c.data.learn[at])
    cli.say(f"logit store: {len(at)} windows")
    with c.phase("logit store"), progress.bar("targets", len(at)) as show:
        store = cached_targets.write(c.teacher, partial(teacher, 0), data, c.folder / "targets", c.files,
                              seed=c.recipe.seed, show=show,
                              windows_per_pass=max(1, c.plan.held_windows("logit store") // max(1, len(c.shares))),
                              together=bool(c.shares))  # fmt: skip
    for note in [
        *store.notes,
        f"logit store: {store.bytes_per_token:.0f} bytes a token; losses are of sampled targets",
    ]:
        cli.say(note)
    mx.clear_cache()
    return cached_targets.Cached(store, at)


def _local(c: Run, pruned: Checkpoint) -> Checkpoint:
    """The student as a folder of parts, taught block by block as far as it is not yet."""
    keep = model_writer.read_keep(pruned.path)
    if keep is None:
        raise MisError(f"{pruned.path} has no keep.json, which says what each block stands for: prune it with mis_mlx")
    student = block_files.begin(pruned, c.folder / "parts", c.files)
    if (c.folder / "steps").exists():  # the next stage has begun
        return student
    r, iters = c.recipe, c.plan.job.local_iters
    recipe = replace(r, iters=iters, warmup=min(2, r.warmup), learning_rate=LOCAL_RATE, batch_size=1,
                     grad_accumulation_steps=r.batch_size * r.grad_accumulation_steps)  # fmt: skip
    cli.say(f"local: {len(keep.layers)} blocks, {iters} steps each")
    steps = blockwise.train(
        c.teacher, pruned, student, keep, c.pick(c.plan.job.local, 2), recipe, folder=c.folder,
        held=c.plan.held_windows("local"), files=c.files, direct=c.direct,
        ridge=reconstruct.RIDGE if c.plan.job.repair else 0.0,
    )  # fmt: skip
    total = len(keep.layers) * iters
    with c.phase("local"):
        run_training(steps, c.folder, total, total + 1, lambda number: None, c.weather, c.peak, c.files, LOCAL, "local")
    return student


def _resident(c: Run, begun: Checkpoint, source: live_teacher.TargetSource) -> Callable[[str], mx.array]:
    student = load.resident(begun, mx.float32)
    if c.plan.mode == "blocks":
        load.freeze_vocabulary(student)
    optimizer = GuardedAdamW(weight_decay=c.recipe.weight_decay)

    def restore(arrays: dict[str, dict[str, mx.array]], memory: dict[str, Any]) -> None:
        train_loop.restore(student, optimizer, arrays, memory)

    def begin() -> None:
        keep = model_writer.read_keep(begun.path)
        if c.plan.job.repair and keep:
            cli.say("reconstruct: refit every down_proj to the teacher's stream")
            with c.phase("repair"):
                mended, _ = reconstruct.reconstruct(c.teacher, begun, keep, c.pick(c.plan.job.repair, 2))
            student.load_weights(list(mended.items()), strict=False)
        stream.load_checked(student, f"{begun.path}: ")

    run = CheckpointedTraining(c, lambda: train_loop.arrays_of(student, optimizer), optimizer.memory)
    start = run.start(begin, restore)
    student.train()
    r = c.recipe
    steps = partial(live_teacher.steps, student, source, c.data, r, optimizer, sigma=lambda: run.sigma)
    with c.phase("distil"):
        run.finish(steps, start, r.save_every, lambda: optimizer)
    return dict(tree_flatten(student.parameters())).__getitem__


def _sharded(c: Run, begun: Checkpoint, source: live_teacher.TargetSource) -> Callable[[str], mx.array]:
    r, visit = c.recipe, steps_per_shard(c.plan.job, c.plan.shard_layers)
    room = 4 * c.plan.job.student.head_params  # the head stays, the blocks stream past
    student = sharded.Sharded(begun, c.plan.shard_layers, visit, r.weight_decay, c.files, room, c.direct)
    run = CheckpointedTraining(c, student.arrays, student.memory)
    start = run.start(student.begin, student.restore)
    steps = partial(
        sharded.steps,
        student,
        live_teacher.step_micro_batches(source, c.data, r),
        partial(source.kl_sum, frozen_head=True),
        r.schedule,
        factor=lambda step: losses.loss_noise_factor(run.sigma, r.seed, step),
    )
    with c.phase("distil"):
        every = min(r.save_every, max(1, visit // 2))  # two checkpoints of every visit: see Sharded
        run.finish(steps, start, every, lambda: student.optimizer)
    return partial(load.dense, load.open_checkpoint(begun.path))


@dataclass
class CheckpointedTraining:
    """Checkpoints of one training, whichever way it goes. sigma: spread of eps_halny until the next of them."""

    course: Run
    arrays: Callable[[], dict[str, dict[str, mx.array]]]
    memory: Callable[[], dict[str, Any]]
    steps: str = "steps"  # the folder of its checkpoints
    sigma: float = 0.0

    def start(self, begin: Callable[[], object], restore: Callable[..., None]) -> int:
        """Steps done: of the newest checkpoint, put back by `restore`; or 0 after `begin`, and that saved."""
        c, folder = self.course, self.course.folder / self.steps
        self.kept = Checkpoints(folder, self.arrays, self.memory, restore, c.weather, c.files)
        if (number := self.back()) is not None:
            return number
        if distributed.is_main():
            begin()
            with reported(c.folder, "the folder of checkpoints"):
                c.files.make_folder(folder)
        self.kept.share()
        self.save(0)
        return 0

    def back(self) -> int | None:
        """Put the newest checkpoint back: its number; None when there is none."""
        found = self.kept.back()
        if found is None:
            return None
        self.sigma = found[1]["halny_sigma"]
        return found[0]

    def save(self, number: int) -> None:
        """One checkpoint: weights, moments, and everything else a resumed run needs."""
        c = self.course
        # The wind is fixed from one checkpoint to the next, so that a resumed run meets the same.
        halny = c.recipe.halny
        self.sigma = distributed.broadcast_json(lambda: c.weather.sigma() if halny is None else halny)
        if distributed.is_main():
            self.kept.save(number, {"halny_sigma": self.sigma})

    def finish(
        self,
        steps: Callable[[int], Iterator[Step]],
        start: int,
        save_every: int,
        optimizer: Callable[[], GuardedAdamW],
        log: str = run_folder.METRICS,
        label: str = "distil",
    ) -> None:
        """Run steps(start) to their end. optimizer: the one in use (see `run_loop.retry_from_checkpoint`)."""
        c = self.course
        mine = log == run_folder.METRICS  # the student's own steps, which the plan timed
        planned = next(p.seconds(c.plan.rates) for p in c.plan.phases if p.name == "distil")
        tps = c.plan.job.step * c.plan.job.iters / max(planned, 1e-9) if mine else None

        def go(coming: Iterator[Step]) -> None:
            run_training(
                coming, c.folder, c.recipe.iters, save_every, self.save, c.weather, c.peak, c.files, log, label,
                c.plan.budget_bytes, tps, c.report if mine else None,
            )  # fmt: skip

        retry_from_checkpoint(go, steps, start, self.back, optimizer)
