"""A student's training, from where it stands to its end: repaired, then distilled; once rounded,
its scales tuned.

mlx-lm's DWQ learns from the same model before rounding; here the teacher may be another, bigger
one.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mis_mlx import cli
from mis_mlx.data import preparation, token_windows
from mis_mlx.distillation import live_teacher, pace, run_loop, sharded, train_loop
from mis_mlx.hardware import memory
from mis_mlx.maths import losses
from mis_mlx.maths.optimizer import GuardedAdamW
from mis_mlx.models import distributed, load, lora, model_writer, stream
from mis_mlx.models.config import softcap
from mis_mlx.planner.phases import MemoryPlan, in_parts, steps_per_shard
from mis_mlx.planner.recipe import ADAPTERS, DistillationConfig, TrainingConfig
from mis_mlx.pruning import reconstruct, vocabulary
from mis_mlx.quantization import packed_format
from mis_mlx.reporting import progress, text
from mis_mlx.storage import hidden_spool, run_folder
from mis_mlx.types import Checkpoint, Step

DTYPE = "bfloat16"  # of unquantized weights on disk
TUNE_STEPS = "tune-steps"
TUNE_LOG = "tune.jsonl"
# nobody needs them once a run is done
LEFT = ("steps", TUNE_STEPS, "rounded", "parts", "targets", vocabulary.FOLDER)


@dataclass
class Run(run_loop.OpenRun):
    """What the stages share. `recipe`: as asked for, its micro-batches as planned."""

    recipe: DistillationConfig
    teacher: Checkpoint
    data: token_windows.Windows
    plan: MemoryPlan
    # somebody who is told of every step of the distillation
    report: Callable[[Step], None] | None = None
    # how many of the teacher's blocks each machine has; (): each has it whole
    shares: tuple[int, ...] = ()
    # spread of eps_halny: fixed from one checkpoint to the next, so that a resumed run has the same
    sigma: float = 0.0

    @property
    def direct(self) -> bool:
        """Whether the teacher is read past the page cache: where the budget does not hold it."""
        return self.teacher.nbytes > self.plan.budget_bytes

    def pick(self, count: int, use: int) -> list[mx.array]:
        """`count` training windows (1, T) for one use; different uses get different ones."""
        return preparation.calibration(self.data, count, self.recipe.seed, use)

    def kinds(self, count: int, use: int) -> list[int]:
        """The kind of text of each window that `pick` gives, by number."""
        if self.data.kind is None:
            return [0] * min(count, len(self.data.tokens))
        return self.data.kind[preparation.drawn(self.data, count, self.recipe.seed, use)].tolist()

    def remember(self, number: int) -> dict[str, Any]:
        """Look at the weather, on the first machine: what a checkpoint keeps of it."""
        halny = self.recipe.halny
        self.sigma = distributed.broadcast_json(
            lambda: self.weather.sigma() if halny is None else halny
        )
        return {"halny_sigma": self.sigma}

    def recall(self, state: dict[str, Any]) -> None:
        """What the checkpoint kept."""
        self.sigma = state["halny_sigma"]

    def factor(self, step: int) -> float:
        """Eq. (2)'s (1 + eps_halny) of a step, counted from 0."""
        return losses.loss_noise_factor(self.sigma, self.recipe.seed, step)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Write down what the phase that the plan knows by this name takes; also when it is stopped
        on the way.
        """
        memory.give_back()
        began = train_loop.CLOCK.monotonic()
        self.peak.note(mx.get_peak_memory())
        mx.reset_peak_memory()
        try:
            with progress.phase(name):
                yield
        finally:
            seconds = round(train_loop.CLOCK.monotonic() - began, 3)
            record = {
                **self.weather.now(),
                "phase": name,
                "seconds": seconds,
                "peak_bytes": mx.get_peak_memory(),
            }
            self.files.append(self.folder / run_folder.PHASES, json.dumps(record))


def distil(c: Run, pruned: Checkpoint, out: Path) -> None:
    """Train to the end from wherever the run stands, then write the student's folder `out`, unless
    it is there.
    """
    if not distributed.broadcast_json(out.exists):
        take = train(c, pruned)
        config = {**pruned.config, "torch_dtype": DTYPE}
        extra = model_writer.keep_files(model_writer.read_keep(pruned.path))
        if distributed.is_main():
            model_writer.write_model(config, take, pruned.path, out, DTYPE, c.files, extra)


def train(c: Run, pruned: Checkpoint) -> model_writer.Take:
    """The trained weights, by name, once they are."""
    if c.plan.mode == "none":
        cut = in_parts(c.plan.job, "none")
        parts = model_writer.by_block(pruned, c.folder / "parts", c.files, DTYPE) if cut else None
        mended = _mended(c, pruned, parts)
        return lambda name: (
            mended[name] if name in mended else model_writer.dense(parts or pruned, name)
        )
    source = source_of(c)
    if c.plan.mode != "resident":
        return _by_blocks(c, pruned, source)
    student = load.resident(pruned, mx.float32)

    def begin() -> None:
        student.load_weights(list(_mended(c, pruned).items()), strict=False)
        stream.load_checked(student, f"{pruned.path}: ")

    train_whole(c, student, source, begin)
    return dict(tree_flatten(student.parameters())).__getitem__


def source_of(c: Run) -> live_teacher.TargetSource:
    """The teacher, live; or what it left on disk, written now as far as it is missing."""
    r = c.recipe
    m = c.plan.job.teacher

    def teacher(room_bytes: int | None) -> live_teacher.StreamedTeacher:
        how = r.temperature, r.cross_entropy, c.shares, c.plan.job.same_head
        return live_teacher.StreamedTeacher(c.teacher, room_bytes, c.direct, *how)

    if r.targets == "live":
        return teacher(
            None if c.plan.pinned == m.shape.layers else c.plan.pinned * m.block_work + m.head_work
        )
    at = live_teacher.visited(c.data, replace(r, iters=max(c.plan.job.iters, c.plan.tuned)))
    data = c.data.pick(at)
    cli.say(f"logit store: {len(at)} windows")
    with c.phase("logit store"), progress.bar("targets", len(at)) as show:
        at_once = max(1, c.plan.held_windows("logit store") // max(1, len(c.shares)))
        store = live_teacher.write_store(
            c.teacher,
            partial(teacher, 0),
            data,
            c.folder / "targets",
            c.files,
            seed=r.seed,
            windows_per_pass=at_once,
            show=show,
            together=bool(c.shares),
        )
    cli.say(
        *store.notes,
        f"logit store: {store.bytes_per_token:.0f} bytes a token; losses are of sampled targets",
    )
    return live_teacher.Cached(store, at, softcap(c.teacher.config))


def _mended(c: Run, pruned: Checkpoint, parts: Checkpoint | None = None) -> dict[str, mx.array]:
    """What the closed-form repair changes, by name. parts: the student's folder, where these go at
    once; then hidden states are on disk as far as memory does not hold them.
    """
    if not (c.plan.job.reconstruct_samples and (keep := model_writer.read_keep(pruned.path))):
        return {}
    name = reconstruct.mended_name(pruned)
    cli.say(
        f"reconstruct: refit every block's {name.removesuffix('.weight')} to the teacher's stream"
    )
    planned = next(p for p in c.plan.phases if p.name == "repair")
    windows = c.pick(c.plan.job.reconstruct_samples, 2)
    kinds = c.kinds(c.plan.job.reconstruct_samples, 2)
    c.files.require_space(c.folder, planned.spooled_bytes, "the spool of hidden states")
    with c.phase("repair"):
        if parts is None:
            return reconstruct.reconstruct(c.teacher, pruned, keep, windows, c.direct, kinds=kinds)[
                0
            ]

        def put(name: str, weight: mx.array) -> None:
            *_, number, inside = name.split(".", 3)
            dtype = getattr(mx, parts.config["torch_dtype"])
            block = load.block(parts, int(number), load.model_args(parts.config), dtype)
            block.load_weights([(inside, weight.astype(dtype))], strict=False)
            model_writer.replace_block(
                parts, int(number), dict(tree_flatten(block.parameters())), c.files
            )

        spool = partial(hidden_spool.Spool, c.folder, c.plan.held_windows("repair"), c.files)
        return reconstruct.reconstruct(
            c.teacher, pruned, keep, windows, c.direct, spool, put, kinds
        )[0]


def train_whole(
    c: Run,
    student: nn.Module,
    source: live_teacher.TargetSource,
    begin: Callable[[], object],
    tuned: bool = False,
) -> None:
    """All of `c.recipe`'s steps of a student in memory, from wherever they stand. begin: before the
    first of them. tuned: of a packed student, whose checkpoints and log are its own.
    """
    optimizer = GuardedAdamW(weight_decay=c.recipe.weight_decay, relative=tuned)
    how = {"steps": TUNE_STEPS, "log": TUNE_LOG, "label": "tune"} if tuned else _beside_the_plan(c)
    training = run_loop.CheckpointedTraining(
        c, train_loop.Whole(student, optimizer), c.remember, c.recall, **how
    )
    start = training.start(begin)
    student.train()
    with c.phase(training.label):
        if tuned:
            steps = partial(live_teacher.steps, student, source, c.data, c.recipe, optimizer)
            training.finish(steps, start, c.plan.tuned, c.recipe.save_every)
            return

        def steps_of(recipe: DistillationConfig) -> Callable[[int], Iterator[Step]]:
            return partial(
                live_teacher.steps, student, source, c.data, recipe, optimizer, factor=c.factor
            )

        pace.finish(training, c.recipe, steps_of, start, c.recipe.save_every)


def _beside_the_plan(c: Run) -> dict[str, Any]:
    """What a distillation's steps are shown beside, for `CheckpointedTraining`."""
    return {
        "planned_tps": c.plan.job.step * c.plan.job.iters / max(c.plan.planned["distil"], 1e-9),
        "report": c.report,
    }


def _by_blocks(c: Run, pruned: Checkpoint, source: live_teacher.TargetSource) -> model_writer.Take:
    r = c.recipe
    job = c.plan.job
    whole = c.plan.mode != "sharded"
    begun = pruned if whole else model_writer.by_block(pruned, c.folder / "parts", c.files)
    visit = job.iters if whole else steps_per_shard(job, c.plan.shard_layers)
    room = 4 * job.student.head_params  # the head stays, the blocks stream past
    shard = job.student.shape.layers if whole else c.plan.shard_layers
    adapters = partial(lora.insert, lora=ADAPTERS, seed=r.seed) if c.plan.mode == "lora" else None
    student = sharded.Sharded(
        begun, shard, visit, r.weight_decay, c.files, room, c.direct, adapters
    )
    training = run_loop.CheckpointedTraining(
        c, student, c.remember, c.recall, **_beside_the_plan(c)
    )
    start = training.start(lambda: student.begin(_mended(c, pruned, None if whole else begun)))
    micro_batches = partial(live_teacher.step_micro_batches, source, c.data, r)
    loss = partial(source.kl_sum, frozen_head=True)
    slopes = source.frozen_slopes() if isinstance(source, live_teacher.StreamedTeacher) else None

    def steps_of(recipe: DistillationConfig) -> Callable[[int], Iterator[Step]]:
        return partial(student.steps, micro_batches, loss, recipe, factor=c.factor, slopes=slopes)

    with c.phase("distil"):
        if whole:
            pace.finish(training, r, steps_of, start, r.save_every)
        else:  # two checkpoints of every visit: see Sharded
            training.finish(steps_of(r), start, job.iters, min(r.save_every, max(1, visit // 2)))
    return student.take


def tuning_recipe(
    asked: DistillationConfig, rounded: Checkpoint, iters: int, rate: float
) -> DistillationConfig:
    """`asked` with the steps of `rounded`'s scales, and no decay, for a scale has no reason to be
    small.

    rate: of 4.5 bits a weight of the blocks; a bit more halves it, as it halves what rounding takes
    of a weight.
    """
    rate *= 2 ** (4.5 - packed_format.block_bits(rounded.config, packed_format.formats(rounded)))
    return replace(asked, iters=iters, learning_rate=rate, warmup=min(3, iters), weight_decay=0.0)


def tuned(
    rounded: Checkpoint,
    source: live_teacher.TargetSource,
    data: token_windows.Windows,
    recipe: TrainingConfig,
) -> nn.Module:
    """The packed model in memory after its steps, in one go: scales, biases and norms learn,
    integers stay.
    """
    model = packed_format.resident(rounded).train()
    dog = GuardedAdamW(weight_decay=recipe.weight_decay, relative=True)
    with progress.bar("tune", recipe.iters) as show:
        for step in live_teacher.steps(model, source, data, recipe, dog):
            show(step.number, text.step_text(step))
            memory.give_back(cache=False)
    return model


def tune(c: Run, rounded: Path, out: Path, rate: float) -> None:
    """Write the folder `out`: `rounded` after its steps. Killed on the way, it goes on from its
    checkpoints.
    """
    model = packed_format.resident(checkpoint := load.open_checkpoint(rounded))
    recipe = tuning_recipe(c.recipe, checkpoint, c.plan.tuned, rate)
    train_whole(replace(c, recipe=recipe), model, source_of(c), lambda: None, tuned=True)
    if distributed.is_main():
        packed_format.write_learned(checkpoint, model, out, c.files)
