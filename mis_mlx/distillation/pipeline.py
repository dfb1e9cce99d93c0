"""The training of a student, from wherever it stands to its end.

First it is repaired, then its weights are distilled; once it is rounded, its scales are. mlx-lm's
DWQ learns from the same model before rounding; here the teacher may be another, bigger one.
"""

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
from mis_mlx.distillation import live_teacher, packed_student, train_loop
from mis_mlx.distillation.sharded import Sharded, steps_per_shard
from mis_mlx.distillation.strategies import MemoryPlan, in_parts
from mis_mlx.distillation.whole_model import WholeModel
from mis_mlx.hardware import memory
from mis_mlx.hardware.stage_cost import INTEGERS
from mis_mlx.maths import losses
from mis_mlx.maths.optimizer import GuardedAdamW
from mis_mlx.models.architectures.sizes import softcap
from mis_mlx.models.opening import load
from mis_mlx.models.passing import distributed, stream
from mis_mlx.models.writing import model_writer
from mis_mlx.planner.distillation_spec import SCALES, STORE
from mis_mlx.pruning import reconstruct, vocabulary
from mis_mlx.quantization import learned_scales, packed_format, scale_state
from mis_mlx.reporting import progress
from mis_mlx.runs import run_loop
from mis_mlx.settings.parts import part_of
from mis_mlx.settings.recipe import DistillationConfig, ScalesConfig
from mis_mlx.storage import hidden_spool, run_folder
from mis_mlx.types import Budget, Checkpoint

DTYPE = "bfloat16"  # of unquantized weights on disk
# Of the steps after rounding, as runs have always called them on disk.
TUNE_STEPS = "tune-steps"
TUNE_LOG = "tune.jsonl"
ROUNDING = "rounding"  # what is made of a rounding that is not done
ROUNDED = "rounded"  # the model before its scales learn
TARGETS = "targets"
# Folders that nobody needs once a run is done.
TEMPORARY = (
    "steps",
    TUNE_STEPS,
    ROUNDING,
    ROUNDED,
    "parts",
    TARGETS,
    vocabulary.FOLDER,
)


@dataclass
class Run(run_loop.OpenRun):
    """What the stages share.

    recipe: as asked for, its micro-batches as planned. sigma: spread of eps_halny, fixed from one
    checkpoint to the next, so that a resumed run has the same.
    """

    recipe: DistillationConfig
    teacher: Checkpoint
    data: token_windows.Windows
    plan: MemoryPlan
    sigma: float = 0.0

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
        """What a checkpoint keeps of the weather, as it is now."""
        halny = self.recipe.halny
        own = losses.halny_sigma(self.air(look=False).spread_c) if halny is None else halny
        self.sigma = distributed.mean(own)
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
                **self.now(),
                "phase": name,
                "seconds": seconds,
                "peak_bytes": mx.get_peak_memory(),
            }
            self.files.append(self.folder / run_folder.PHASES, json.dumps(record))
            self.account.keep()


def distil(c: Run, pruned: Checkpoint, out: Path) -> None:
    """Train a pruned student to its end, then write its folder `out`, unless it is there."""
    if out.exists():
        return
    take = train(c, pruned)
    config = {**pruned.config, "torch_dtype": DTYPE}
    extra = model_writer.keep_files(model_writer.read_keep(pruned.path))
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
    student, begin = _student(c, pruned)
    training = run_loop.CheckpointedTraining(
        c,
        student,
        c.remember,
        c.recall,
    )
    _learn(c, student, training, source=source, recipe=c.recipe, begin=begin, factor=c.factor)
    return student.take


def _learn(
    c: Run,
    student: live_teacher.DistilledStudent[Any],
    training: run_loop.CheckpointedTraining,
    *,
    source: live_teacher.TargetSource,
    recipe: DistillationConfig,
    begin: Callable[[], object],
    factor: Callable[[int], float] = lambda step: 1.0,
) -> None:
    """All of the recipe's steps of a student, from wherever they stand.

    begin: called before the first step of a new run. factor: as in `train_loop.steps`.
    """
    start = training.start(begin)

    steps = partial(live_teacher.steps, student, source, c.data, recipe, factor=factor)
    assert recipe.iters is not None
    with c.phase(training.label):
        training.finish(steps, start, recipe.iters, c.recipe.save_every)


def _student(c: Run, pruned: Checkpoint) -> tuple[WholeModel | Sharded, Callable[[], object]]:
    """The student as planned: in memory whole, or block by block. And what begins a new run."""
    job = c.plan.job
    if c.plan.mode == "resident":
        model = load.resident_model(pruned, mx.float32)

        def begin() -> None:
            model.load_weights(list(_repaired(c, pruned).items()), strict=False)
            stream.load_checked(model, f"{pruned.path}: ")

        return WholeModel(model, GuardedAdamW()), begin
    parts = None
    shard = job.student.shape.layers
    visit = job.iters
    if c.plan.mode == "sharded":
        parts = model_writer.by_block(pruned, c.folder / "parts", c.files)
        shard = c.plan.shard_layers
        visit = steps_per_shard(job, shard)
    student = Sharded(
        parts or pruned,
        shard_layers=shard,
        steps_per_shard=visit,
        files=c.files,
        headroom_bytes=4 * job.student.head_params,  # the head stays, the blocks are streamed
        direct=c.direct,
    )
    return student, lambda: student.begin(_repaired(c, pruned, parts))


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
    # Tuning may take more steps than the distillation: windows for either, if there are both.
    iters = c.plan.tuning_steps
    if c.plan.mode != "none":
        iters = max(c.plan.job.iters, iters)
    windows = live_teacher.visited_windows(c.data, replace(c.recipe, iters=iters))
    with c.phase(STORE), progress.bar("targets", len(windows)) as show:
        store = live_teacher.write_store(
            c.teacher,
            partial(_streamed_teacher, c, 0),
            c.data.pick(windows),
            c.folder / TARGETS,
            files=c.files,
            seed=c.recipe.seed,
            windows_per_pass=max(1, c.plan.held_windows(STORE)),
            show=show,
        )
    cli.say(*store.notes)
    cli.detail(
        f"logit store: {store.bytes_per_token:.0f} bytes per token; losses use sampled targets"
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
    cli.detail("reconstruct: fit every block's mlp.down_proj to the teacher's hidden states")
    planned = next(phase for phase in c.plan.phases if phase.name == "repair")
    windows = c.pick(samples, use=2)
    kinds = c.kinds(samples, use=2)
    c.files.require_space(c.folder, planned.scratch_bytes, "the spool of hidden states")
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


def tuning_recipe(
    asked: DistillationConfig, rounded: Checkpoint, iters: int, rate: float
) -> DistillationConfig:
    """`asked` with the steps of `rounded`'s scales.

    rate: of 4.5 bits a weight of the blocks; a bit more halves it, as it halves the error that
    rounding makes in a weight.
    """
    bits = packed_format.block_bits(rounded.config, packed_format.formats(rounded))
    rate *= 2 ** (4.5 - bits)
    return part_of(ScalesConfig, {**vars(asked), "iters": iters, "learning_rate": rate})


def tune(c: Run, rounded: Path, out: Path, rate: float) -> None:
    """Write the folder `out`: the model `rounded` after its steps.

    A run that was killed goes on from its checkpoints. rate: as of `tuning_recipe`.
    """
    checkpoint = load.open_checkpoint(rounded)
    recipe = tuning_recipe(c.recipe, checkpoint, c.plan.tuning_steps, rate)
    planned = next(phase for phase in c.plan.phases if phase.name == SCALES)
    source = target_source(c)  # its pass is over before the student takes memory
    with scale_state.place(planned, c.folder, c.files) as state:
        student = packed_student.PackedStudent(checkpoint, planned.stays[INTEGERS], state=state)
        training = run_loop.CheckpointedTraining(
            c, student, c.remember, c.recall, steps=TUNE_STEPS, log=TUNE_LOG, label=SCALES
        )
        _learn(c, student, training, source=source, recipe=recipe, begin=lambda: None)
        learned_scales.write_learned(checkpoint, student.learned(), out, c.files)
