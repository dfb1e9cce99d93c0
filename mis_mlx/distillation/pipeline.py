"""The stages of a run: the student is pruned, trained, rounded and measured.

First it is repaired, then its weights are distilled; once it is rounded, its scales are. mlx-lm's
DWQ learns from the same model before rounding; here the teacher may be another, bigger one.
"""

import gc
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mis_mlx import cli
from mis_mlx.data import preparation, token_windows
from mis_mlx.data.token_windows import Windows
from mis_mlx.distillation import conversations, summary, targets, train_loop
from mis_mlx.distillation.block_student import BlockStudent, steps_per_shard
from mis_mlx.distillation.strategies import MemoryPlan, in_parts
from mis_mlx.hardware import memory
from mis_mlx.hardware.stage_cost import INTEGERS
from mis_mlx.judge import answers, comparison, other_languages
from mis_mlx.maths import losses
from mis_mlx.models.architectures.families import family, shape_of
from mis_mlx.models.opening import compute_type, load
from mis_mlx.models.passing import distributed
from mis_mlx.models.writing import model_writer
from mis_mlx.planner.distillation_spec import SCALES, STORE
from mis_mlx.pruning import reconstruct, select, vocabulary
from mis_mlx.quantization import learned_scales, packed_format, scale_state, stage
from mis_mlx.quantization.begun_rounding import BegunRounding
from mis_mlx.reporting import html, progress
from mis_mlx.runs import run_loop
from mis_mlx.settings.parts import part_of
from mis_mlx.settings.recipe import TUNE_RATE, DistillationConfig, QuantizationConfig, ScalesConfig
from mis_mlx.storage import hidden_spool, run_folder
from mis_mlx.storage.files import DISK
from mis_mlx.types import MOST, Budget, Checkpoint, Step

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

# By held-out text: its windows in the tokens of the students and, where the teacher has more
# tokens, in those.
Judging = dict[str, tuple[Windows, Windows | None]]


@dataclass
class Run(run_loop.OpenRun):
    """What the stages share.

    recipe: as asked for, its micro-batches as planned. sigma: spread of eps_halny, fixed from one
    checkpoint to the next, so that a resumed run has the same.
    """

    recipe: DistillationConfig
    teacher: Checkpoint
    data: Windows
    plan: MemoryPlan
    sigma: float = 0.0

    @property
    def direct(self) -> bool:
        """Whether the teacher is read past the page cache."""
        return memory.crowds_page_cache(self.teacher.nbytes, Budget(self.plan.budget_bytes))

    def pick(self, count: int, use: int) -> list[mx.array]:
        """`count` training windows (1, T) for one use; different uses get different ones."""
        return preparation.calibration(self.data, count, self.recipe.seed, use)

    @cached_property
    def kept(self) -> targets.KeptTargets:
        """The teacher's targets, for both trainings; the missing ones are written at the first use.

        Its pass is over before a student takes memory.
        """
        # Tuning may take more steps than the distillation: windows for either, if there are both.
        iters = self.plan.tuning_steps
        if self.plan.mode != "none":
            iters = max(self.plan.job.iters, iters)
        windows = targets.visited_windows(self.data, replace(self.recipe, iters=iters))
        with self.phase(STORE), progress.bar("targets", len(windows)) as show:
            store = targets.write_store(
                self.teacher,
                self.data.pick(windows),
                self.folder / TARGETS,
                temperature=self.recipe.temperature,
                seed=self.recipe.seed,
                windows_per_pass=max(1, self.plan.held_windows(STORE)),
                direct=self.direct,
                show=show,
            )
        memory.give_back()
        cli.say(*store.notes)
        cli.detail(
            f"logit store: {store.bytes_per_token:.0f} bytes per token; losses use sampled targets"
        )
        return targets.KeptTargets(store, windows, family(self.teacher.config).softcap)

    def kinds(self, count: int, use: int) -> list[int]:
        """The kind of text of each window that `pick` gives, by number."""
        if self.data.kind is None:
            return [0] * min(count, len(self.data.tokens))
        windows = preparation.calibration_indices(self.data, count, self.recipe.seed, use)
        return self.data.kind[windows].tolist()

    def remember(self, number: int) -> dict[str, Any]:
        """What a checkpoint keeps of the weather, as it is now."""
        halny = self.recipe.halny
        own = (
            losses.halny_sigma(self.thermal_monitor.air(look=False).spread_c)
            if halny is None
            else halny
        )
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
        # A trained student refers to itself: 288 MiB of one stayed while the next phase rounded.
        gc.collect()
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
            DISK.append(self.folder / run_folder.PHASES, json.dumps(record))
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
        extra=extra,
    )


def train(c: Run, pruned: Checkpoint) -> model_writer.Take:
    """Train a pruned student as planned; the function gives its weights by name."""
    if c.plan.mode == "none":
        return _repaired_only(c, pruned)
    kept = c.kept
    parts = None
    shard = None
    visit = MOST
    if c.plan.mode == "sharded":
        parts = model_writer.by_block(pruned, c.folder / "parts")
        shard = c.plan.shard_layers
        visit = steps_per_shard(c.plan.job, shard)
    student = BlockStudent(
        parts or pruned,
        "weights",
        at_once=shard,
        steps_each=visit,
        direct=c.direct,
    )
    steps = partial(kept.steps, student, c.data, c.recipe, factor=c.factor)
    _learn(c, student, lambda: student.begin(_repaired(c, pruned, parts)), steps, c.recipe)
    return student.take


def _learn(
    c: Run,
    student: BlockStudent,
    begin: Callable[[], object],
    steps_from: Callable[[int], Iterator[Step]],
    recipe: DistillationConfig,
    **names: str,
) -> None:
    """The steps of a student, from its newest checkpoint or from `begin` to the recipe's last.

    names: of its checkpoints and logs, as of `run_loop.CheckpointedTraining`.
    """
    training = run_loop.CheckpointedTraining(c, student, c.remember, c.recall, **names)
    start = training.start(begin)
    assert recipe.iters is not None
    with c.phase(training.label):
        training.finish(steps_from, start, recipe.iters, recipe.save_every)


def _repaired_only(c: Run, pruned: Checkpoint) -> model_writer.Take:
    """The weights of a student that is repaired and not trained."""
    parts = None
    if in_parts(c.plan.job, "none"):
        parts = model_writer.by_block(pruned, c.folder / "parts", DTYPE)
    repaired = _repaired(c, pruned, parts)

    def take(name: str) -> Any:
        return repaired[name] if name in repaired else model_writer.dense(parts or pruned, name)

    return take


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
    DISK.require_space(c.folder, planned.scratch_bytes, "the spool of hidden states")
    spool = None
    put = None
    if parts is not None:
        spool = partial(hidden_spool.Spool, c.folder, c.plan.held_windows("repair"))
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
    block = load.block(parts, int(number), family(parts.config).model_args(), dtype)
    block.load_weights([(inside, weight.astype(dtype))], strict=False)
    weights = dict(tree_flatten(block.parameters()))
    model_writer.replace_block(parts, int(number), weights)


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


def prune(c: Run, cut: select.PruningConfig, before: int) -> Checkpoint:
    """The pruned student; made now, unless it is there. before: the teacher's parameters."""
    out = c.folder / "pruned"
    if not out.exists():
        with c.phase("prune"):
            report = select.prune(
                c.teacher,
                c.pick(c.recipe.num_samples, use=1),
                out,
                cut=cut,
                dtype=DTYPE,
                air=c.thermal_monitor.air,
                held=c.plan.held_windows("prune"),
            )
            cli.outcome(html.document("pruned.md", {**report, "params_before": before}))
    return compute_type.open_to_compute(out, c.teacher.precision)


def view(c: Run) -> Checkpoint | None:
    """The teacher itself, where nothing is cut and it is to be rounded: nobody needs copies of it.

    None where the student is another, or a copy was begun. A teacher that was pruned itself has a
    record of that beside it, which would be taken for this student's.
    """
    begun = (c.folder / "pruned").exists()
    if not c.plan.job.viewed or begun or model_writer.read_keep(c.teacher.path):
        return None
    return c.teacher


def quantize(
    c: Run,
    rounding: QuantizationConfig,
    dense: Checkpoint,
) -> None:
    """Round the student, then tune its scales; a folder that is there is not made again.

    A rounding that was stopped goes on after the last block that it kept, and the steps go on from
    their checkpoints. dense: the student.
    """
    out = c.folder / "model"
    rounded = c.folder / (ROUNDED if c.plan.tuning_steps else "model")
    if not rounded.exists() and not out.exists():
        samples = c.recipe.num_samples if rounding.looks else 0
        batches = c.pick(samples, use=1)
        held = c.plan.held_windows("quantize")
        begun = c.folder / ROUNDING
        with c.phase("quantize"):
            stage.quantize(
                dense,
                rounded,
                rounding,
                batches=batches,
                held=held,
                seed=c.recipe.seed,
                begun=BegunRounding(begun),
            )
        DISK.discard(begun)
    if out.exists():
        return
    cli.detail(f"{SCALES}: biases and norms learn, too; integers stay")
    checkpoint = load.open_checkpoint(rounded)
    recipe = tuning_recipe(c.recipe, checkpoint, c.plan.tuning_steps, TUNE_RATE)
    planned = next(phase for phase in c.plan.phases if phase.name == SCALES)
    kept = c.kept
    with scale_state.place(planned, c.folder) as state:
        student = BlockStudent(
            checkpoint,
            "scales",
            state=state,
            kept=planned.stays[INTEGERS],
        )
        steps = partial(kept.steps, student, c.data, recipe)
        names = {"steps": TUNE_STEPS, "log": TUNE_LOG, "label": SCALES}
        _learn(c, student, student.begin, steps, recipe, **names)
        learned_scales.write_learned(checkpoint, student.learned, out)


def judging_windows(
    c: Run,
    data: preparation.Data,
    teacher: Checkpoint,
    count: int,
) -> Judging:
    """The held-out windows that judge: `count` of the first text, a third of every other one.

    teacher: with its own vocabulary.
    """
    tokenizers = []
    if teacher is not c.teacher:
        tokenizers = [load.tokenizer(model.path) for model in (c.teacher, teacher)]
    judging: Judging = {}
    for name, held_out in data.held_out.items():
        most = max(1, count // 3) if judging else count
        windows = comparison.spread_windows(held_out, most)
        own = token_windows.retokenized(windows, *tokenizers) if tokenizers else None
        judging[name] = windows, own
    return judging


def measured(
    c: Run, judging: Judging, models: comparison.Models, prompts: int
) -> tuple[answers.Judgement | None, summary.Quality, dict[str, float]]:
    """(answers to prompts, rows by held-out text, {language: bits a byte that the last model loses
    in it}).

    The teacher, the distilled and the rounded student answer; their answers are kept in the run's
    folder. None where there are no prompts, or no model answers. Languages are measured where the
    last model has fewer tokens than the teacher.
    """
    teacher, *_, student = models.values()
    judgement = None
    if prompts:
        asked = {name: model for name, model in models.items() if name != "pruned"}
        judgement = conversations.judged_answers(asked, prompts, Budget(c.plan.budget_bytes))
    if judgement:
        conversations.write_answers(judgement, c.folder)
    rows_of = {}
    for name, (windows, own) in judging.items():
        rows_of[name] = comparison.held_out_rows(models, c.teacher, windows, own)
    languages = dict[str, float]()
    if shape_of(student.config).vocab != shape_of(teacher.config).vocab:
        languages = other_languages.excess(teacher, student)
    return judgement, rows_of, languages
