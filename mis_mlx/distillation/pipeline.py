"""The training of a student, from wherever it stands to its end.

First it is repaired, then its weights are distilled; once it is rounded, its scales are. mlx-lm's
DWQ learns from the same model before rounding; here the teacher may be another, bigger one.
"""

import json
from collections.abc import Callable, Iterator, Mapping
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
from mis_mlx.distillation import live_teacher, packed_student, sharded, train_loop, writers
from mis_mlx.distillation.strategies import MemoryPlan, in_parts
from mis_mlx.distillation.training_cost import steps_per_shard
from mis_mlx.hardware import memory
from mis_mlx.maths import losses
from mis_mlx.maths.optimizer import GuardedAdamW
from mis_mlx.models import distributed, load, model_writer, stream
from mis_mlx.models.config import softcap
from mis_mlx.planner.distillation_spec import SCALES, STORE
from mis_mlx.pruning import reconstruct, vocabulary
from mis_mlx.quantization import learned_scales, packed_format, scale_state
from mis_mlx.reporting import progress, text
from mis_mlx.runs import pace, run_loop
from mis_mlx.settings.recipe import DistillationConfig, TrainingConfig
from mis_mlx.storage import hidden_spool, run_folder
from mis_mlx.types import Budget, Checkpoint, Step

DTYPE = "bfloat16"  # of unquantized weights on disk
# Of the steps after rounding, as runs have always called them on disk.
TUNE_STEPS = "tune-steps"
TUNE_LOG = "tune.jsonl"
ROUNDING = "rounding"  # the journal of a rounding that is not done
ROUNDED = "rounded"  # the model before its scales learn
TARGETS = "targets"
LEARNED_TARGETS = "targets-learned"  # on the text that the student wrote
# Folders that nobody needs once a run is done.
TEMPORARY = (
    "steps",
    TUNE_STEPS,
    ROUNDING,
    ROUNDED,
    "parts",
    TARGETS,
    LEARNED_TARGETS,
    vocabulary.FOLDER,
)


@dataclass
class Run(run_loop.OpenRun):
    """What the stages share.

    recipe: as asked for, its micro-batches as planned. report: is told of every step of the
    distillation. shares: how many of the teacher's blocks each machine has; (): each has all.
    sigma: spread of eps_halny, fixed from one checkpoint to the next, so that a resumed run has the
    same. targets: the folder of those that are stored.
    """

    recipe: DistillationConfig
    teacher: Checkpoint
    data: token_windows.Windows
    plan: MemoryPlan
    report: Callable[[Step], None] | None = None
    shares: tuple[int, ...] = ()
    sigma: float = 0.0
    targets: str = TARGETS

    @property
    def direct(self) -> bool:
        """Whether the teacher is read past the page cache."""
        return memory.crowds_page_cache(self.teacher.nbytes, Budget(self.plan.budget_bytes))

    def pick(self, count: int, use: int) -> list[mx.array]:
        """`count` training windows (1, T) for one use; different uses get different ones."""
        return preparation.calibration(self.data, count, self.recipe.seed, use)

    def kinds(self, count: int, use: int) -> list[int]:
        """The kind of text of each window that `pick` gives, by number."""
        if self.data.kind is None:
            return [0] * min(count, len(self.data.tokens))
        windows = preparation.calibration_indices(self.data, count, self.recipe.seed, use)
        return self.data.kind[windows].tolist()

    def remember(self, number: int) -> dict[str, Any]:
        """What a checkpoint keeps of the weather, which the first machine measures now."""
        halny = self.recipe.halny
        self.sigma = distributed.broadcast_json(
            lambda: self.thermal_monitor.sigma() if halny is None else halny
        )
        return {"halny_sigma": self.sigma}

    def recall(self, state: dict[str, Any]) -> None:
        """Take back what `remember` gave to a checkpoint."""
        self.sigma = state["halny_sigma"]

    def factor(self, step: int) -> float:
        """Eq. (2)'s (1 + eps_halny) of a step, counted from 0."""
        return losses.loss_noise_factor(self.sigma, self.recipe.seed, step)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure a phase, named as in the plan, and log what it takes; also when it is stopped."""
        memory.give_back()
        began = train_loop.CLOCK.monotonic()
        self.account.peak.note(mx.get_peak_memory())
        mx.reset_peak_memory()
        try:
            with progress.phase(name):
                yield
        finally:
            seconds = round(train_loop.CLOCK.monotonic() - began, 3)
            record = {
                **self.thermal_monitor.now(),
                "phase": name,
                "seconds": seconds,
                "peak_bytes": mx.get_peak_memory(),
            }
            self.files.append(self.folder / run_folder.PHASES, json.dumps(record))
            self.account.keep()


def distil(c: Run, pruned: Checkpoint, out: Path) -> None:
    """Train a pruned student to its end, then write its folder `out`, unless it is there."""
    if distributed.broadcast_json(out.exists):
        return
    take = train(c, pruned)
    config = {**pruned.config, "torch_dtype": DTYPE}
    extra = model_writer.keep_files(model_writer.read_keep(pruned.path))
    if distributed.is_main():
        model_writer.write_model(
            config,
            take,
            pruned.path,
            out,
            dtype=DTYPE,
            files=c.files,
            extra=extra,
        )


def train(c: Run, pruned: Checkpoint) -> model_writer.Take:
    """Train a pruned student as planned; the function gives its weights by name."""
    if c.plan.mode == "none":
        return _repaired_only(c, pruned)
    source = target_source(c)
    if c.plan.mode != "resident":
        return _by_blocks(c, pruned, source)
    student = load.resident_model(pruned, mx.float32)

    def begin() -> None:
        student.load_weights(list(_repaired(c, pruned).items()), strict=False)
        stream.load_checked(student, f"{pruned.path}: ")

    train_whole(c, student, source, begin)
    return dict(tree_flatten(student.parameters())).__getitem__


def _repaired_only(c: Run, pruned: Checkpoint) -> model_writer.Take:
    """The weights of a student that is repaired and not trained."""
    parts = None
    if in_parts(c.plan.job, "none"):
        parts = model_writer.by_block(pruned, c.folder / "parts", c.files, DTYPE)
    repaired = _repaired(c, pruned, parts)

    def take(name: str) -> Any:
        return repaired[name] if name in repaired else model_writer.dense(parts or pruned, name)

    return take


def _streamed_teacher(c: Run, headroom_bytes: int | None) -> live_teacher.StreamedTeacher:
    """The run's teacher.

    headroom_bytes: for its head and blocks that stay in memory; None: all do.
    """
    return live_teacher.StreamedTeacher(
        c.teacher,
        headroom_bytes,
        direct=c.direct,
        temperature=c.recipe.temperature,
        cross_entropy=c.recipe.cross_entropy,
        shares=c.shares,
        same_head=c.plan.job.same_head,
    )


def target_source(c: Run) -> live_teacher.TargetSource:
    """The teacher, live; or its targets on disk, of which the missing ones are written now."""
    teacher = c.plan.job.teacher
    if c.recipe.targets == "live":
        headroom_bytes = None
        if c.plan.pinned != teacher.shape.layers:
            headroom_bytes = c.plan.pinned * teacher.block_work + teacher.head_work
        return _streamed_teacher(c, headroom_bytes)
    learned = c.targets == LEARNED_TARGETS
    # Tuning may take more steps than the distillation: windows for either.
    iters = c.plan.tuned if learned else max(c.plan.job.iters, c.plan.tuned)
    name = STORE
    if learned and writers.SECOND_STORE in c.plan.planned:
        name = writers.SECOND_STORE
    windows = live_teacher.visited_windows(c.data, replace(c.recipe, iters=iters))
    cli.say(f"logit store: {len(windows)} windows")
    # Each machine brings its own windows into a pass through a teacher that several share.
    held = c.plan.held_windows(name)
    with c.phase(name), progress.bar("targets", len(windows)) as show:
        store = live_teacher.write_store(
            c.teacher,
            partial(_streamed_teacher, c, 0),
            c.data.pick(windows),
            c.folder / c.targets,
            files=c.files,
            seed=c.recipe.seed,
            windows_per_pass=max(1, held // max(1, len(c.shares))),
            show=show,
            together=bool(c.shares),
        )
    cli.say(
        *store.notes,
        f"logit store: {store.bytes_per_token:.0f} bytes per token; losses use sampled targets",
    )
    return live_teacher.CachedTeacher(store, windows, softcap(c.teacher.config))


def _repaired(c: Run, pruned: Checkpoint, parts: Checkpoint | None = None) -> dict[str, mx.array]:
    """The weights that the closed-form repair changes, by name.

    parts: a folder of the student by blocks; changed weights are then written there at once, and
    hidden states go to disk as far as memory does not hold them.
    """
    samples = c.plan.job.reconstruct_samples
    keep = model_writer.read_keep(pruned.path) if samples else None
    if keep is None:
        return {}
    name = reconstruct.repaired_name(pruned)
    cli.say(
        f"reconstruct: fit every block's {name.removesuffix('.weight')} to the teacher's "
        f"hidden states"
    )
    planned = next(phase for phase in c.plan.phases if phase.name == "repair")
    windows = c.pick(samples, use=2)
    kinds = c.kinds(samples, use=2)
    c.files.require_space(c.folder, planned.spooled_bytes, "the spool of hidden states")
    spool = None
    put = None
    if parts is not None:
        spool = partial(hidden_spool.Spool, c.folder, c.plan.held_windows("repair"), c.files)
        put = partial(_put_in_block, c, parts)
    with c.phase("repair"):
        repaired, _ = reconstruct.reconstruct(
            c.teacher,
            pruned,
            keep,
            windows,
            direct=c.direct,
            spool=spool,
            put=put,
            kinds=kinds,
        )
    return repaired


def _put_in_block(c: Run, parts: Checkpoint, name: str, weight: mx.array) -> None:
    """Replace one weight in the file of its block."""
    *_, number, inside = name.split(".", 3)
    dtype = getattr(mx, parts.config["torch_dtype"])
    block = load.block(parts, int(number), load.model_args(parts.config), dtype)
    block.load_weights([(inside, weight.astype(dtype))], strict=False)
    weights = dict(tree_flatten(block.parameters()))
    model_writer.replace_block(parts, int(number), weights, c.files)


def train_whole(
    c: Run,
    student: nn.Module,
    source: live_teacher.TargetSource,
    begin: Callable[[], object],
) -> None:
    """All of `c.recipe`'s steps of a student in memory, from wherever they stand.

    begin: called before the first step of a new run.
    """
    optimizer = GuardedAdamW(weight_decay=c.recipe.weight_decay)
    trained = train_loop.WholeModel(student, optimizer)
    training = run_loop.CheckpointedTraining(c, trained, c.remember, c.recall, **_reported(c))
    start = training.start(begin)
    student.train()

    def steps_of(recipe: DistillationConfig) -> Callable[[int], Iterator[Step]]:
        return partial(
            live_teacher.steps, student, source, c.data, recipe, optimizer, factor=c.factor
        )

    with c.phase(training.label):
        pace.finish(training, c.recipe, steps_of, start, save_every=c.recipe.save_every)


def _reported(c: Run) -> Mapping[str, Any]:
    """How a distillation's steps are reported, as fields of `CheckpointedTraining`."""
    tokens = c.plan.job.step * c.plan.job.iters
    return {
        "planned_tps": tokens / max(c.plan.planned["distil"], 1e-9),
        "report": c.report,
    }


def _by_blocks(c: Run, pruned: Checkpoint, source: live_teacher.TargetSource) -> model_writer.Take:
    """Train a student block by block: all of its blocks in memory, or a shard at a time."""
    job = c.plan.job
    in_shards = c.plan.mode == "sharded"
    begun = pruned
    shard = job.student.shape.layers
    visit = job.iters
    if in_shards:
        begun = model_writer.by_block(pruned, c.folder / "parts", c.files)
        shard = c.plan.shard_layers
        visit = steps_per_shard(job, shard)
    student = sharded.Sharded(
        begun,
        shard_layers=shard,
        steps_per_shard=visit,
        weight_decay=c.recipe.weight_decay,
        files=c.files,
        headroom_bytes=4 * job.student.head_params,  # the head stays, the blocks are streamed
        direct=c.direct,
    )
    training = run_loop.CheckpointedTraining(c, student, c.remember, c.recall, **_reported(c))
    parts = begun if in_shards else None
    start = training.start(lambda: student.begin(_repaired(c, pruned, parts)))
    micro_batches = partial(live_teacher.step_micro_batches, source, c.data, c.recipe)
    loss = source.token_loss(own_head=True)

    def steps_of(recipe: DistillationConfig) -> Callable[[int], Iterator[Step]]:
        return partial(student.steps, micro_batches, loss, recipe, factor=c.factor)

    save_every = c.recipe.save_every
    with c.phase("distil"):
        if in_shards:
            # Two checkpoints of every visit: see Sharded.
            save_every = min(save_every, max(1, visit // 2))
            training.finish(steps_of(c.recipe), start, job.iters, save_every)
        else:
            pace.finish(training, c.recipe, steps_of, start, save_every=save_every)
    return student.take


def tuning_recipe(
    asked: DistillationConfig, rounded: Checkpoint, iters: int, rate: float
) -> DistillationConfig:
    """`asked` with the steps of `rounded`'s scales, and no decay: a scale need not be small.

    rate: of 4.5 bits a weight of the blocks; a bit more halves it, as it halves the error that
    rounding makes in a weight.
    """
    bits = packed_format.block_bits(rounded.config, packed_format.formats(rounded))
    rate *= 2 ** (4.5 - bits)
    return replace(asked, iters=iters, learning_rate=rate, warmup=min(3, iters), weight_decay=0.0)


def learn_scales(
    rounded: Checkpoint,
    kept: int,
    source: live_teacher.TargetSource,
    data: token_windows.Windows,
    recipe: TrainingConfig,
    state: scale_state.ScaleState | None = None,
) -> Mapping[str, mx.array]:
    """What a packed model's scales, biases and norms are after their steps, by name.

    Without checkpoints. kept: how many blocks' integers stay in memory. state: where what learns
    lives, also after this returns; default: in memory.
    """
    student = packed_student.PackedStudent(
        rounded, kept, weight_decay=recipe.weight_decay, state=state
    )
    with progress.bar(SCALES, recipe.iters) as show:
        for step in _scale_steps(student, source, data, recipe):
            show(step.number, text.step_text(step))
            memory.give_back(cache=False)
    return student.learned()


def _scale_steps(
    student: packed_student.PackedStudent,
    source: live_teacher.TargetSource,
    data: token_windows.Windows,
    recipe: TrainingConfig,
    start: int = 0,
) -> Iterator[Step]:
    micro_batches = partial(live_teacher.step_micro_batches, source, data, recipe)
    loss = source.token_loss()
    return student.steps(micro_batches, loss, recipe, start=start)


def tune(c: Run, rounded: Path, out: Path, rate: float) -> None:
    """Write the folder `out`: the model `rounded` after its steps.

    A run that was killed goes on from its checkpoints. rate: as of `tuning_recipe`.
    """
    checkpoint = load.open_checkpoint(rounded)
    recipe = tuning_recipe(c.recipe, checkpoint, c.plan.tuned, rate)
    planned = next(phase for phase in c.plan.phases if phase.name == SCALES)
    source = target_source(c)  # its pass is over before the student takes memory
    with scale_state.place(planned, c.folder, c.files) as state:
        student = packed_student.PackedStudent(
            checkpoint, planned.kept, weight_decay=recipe.weight_decay, state=state
        )
        training = run_loop.CheckpointedTraining(
            c, student, c.remember, c.recall, steps=TUNE_STEPS, log=TUNE_LOG, label=SCALES
        )
        start = training.start(lambda: None)
        steps_of = partial(_scale_steps, student, source, c.data, recipe)
        with c.phase(training.label):
            training.finish(steps_of, start, c.plan.tuned, c.recipe.save_every)
        if distributed.is_main():
            learned_scales.write_learned(checkpoint, student.learned(), out, c.files)
