"""What a training is asked for: its flags; a distillation in sizes and counts. Not what it takes
(planner/phases).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal

from mis_mlx import cli
from mis_mlx.models.families import family
from mis_mlx.models.lora import Lora
from mis_mlx.planner import estimates
from mis_mlx.planner.estimates import ModelSize
from mis_mlx.types import (
    FILE_ONLY,
    Bits,
    Count,
    MisError,
    Positive,
    Rate,
    Seed,
    Share,
    Tokens,
    Whole,
    Within,
)


@dataclass(frozen=True)
class TrainingConfig:
    """Steps, batches, learning rate: mlx-lm's names."""

    iters: Count = 60
    """optimizer steps"""
    batch_size: Count = 2
    """windows in a micro-batch"""
    grad_accumulation_steps: Count = 1
    """micro-batches in a step"""
    max_seq_length: Tokens = 256
    """tokens in a window"""
    learning_rate: Rate = 3e-4
    """peak; falls to a tenth along a cosine"""
    warmup: Annotated[Whole, FILE_ONLY] = 5
    """steps until the peak"""
    weight_decay: Annotated[Share, FILE_ONLY] = 0.01
    """AdamW's"""
    save_every: Count = 20
    """steps between checkpoints"""
    seed: Seed = 0
    """of batch order, calibration windows and eps_halny"""

    def rate(self, step: int) -> float:
        """Learning rate of 0-based `step`: linear warm-up, then a cosine to a tenth of the peak."""
        warmup = min(self.warmup, self.iters)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        done = (step - warmup) / max(1, self.iters - 1 - warmup)
        return self.learning_rate * (
            0.1 + (1 - 0.1) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        )


@dataclass(frozen=True)
class DistillationConfig(TrainingConfig):
    """What a student learns from, and by which way."""

    iters: Count | None = None  # type: ignore[assignment]  # an int wherever steps are made: MemoryPlan.recipe
    """optimizer steps; default: 30, for a student is near its teacher once repaired; 60 where
    little or nothing is
    """
    minutes: Annotated[float | None, Within(0.05, 1e5)] = None
    """minutes that these steps may take, in place of --iters: as many as fit by the pace of the
    first ones; a student that is trained in parts takes as many as the plan expects to fit
    """
    learning_rate: Rate | None = None  # type: ignore[assignment]  # a float wherever steps are made, as iters
    """peak; falls to a tenth along a cosine; default: by the teacher's weights where all blocks
    learn at once (SmolLM2: 1e-4, Gemma: 2e-5), else 1e-4; thrice of it suits a student that was not
    repaired (--reconstruct-samples 0)
    """
    temperature: Annotated[Positive, FILE_ONLY] = 1.0
    """T of eq. (2), which softens both distributions"""
    halny: Annotated[Share | None, FILE_ONLY] = None
    """spread of eps_halny in eq. (2); 0 switches it off; default: from measured T_env, 0 when
    unmeasured
    """
    train: Literal["auto", "resident", "blocks", "lora", "sharded", "none"] = "auto"
    """the student whole in memory; so, but block by block, with 8-bit moments, embedding and head
    as they are; so, but only mlx-lm's low-rank adapters, which are added in the end; some blocks of
    it at a time; or repaired and no more (none). Default: the first that fits, adapters left out
    """
    targets: Literal["live", "cached"] = "live"
    """the teacher at every step; or its sampled logits, written down once, and no teacher in
    memory
    """
    reconstruct_samples: Whole = 64
    """windows for the closed-form repair before training; 0 leaves it out"""
    cross_entropy: Annotated[Share, FILE_ONLY] = 0.0
    """share of the loss that is plain cross-entropy on the text; the rest is KL to the teacher"""
    num_samples: Count = 32
    """calibration windows for importance"""
    eval_windows: Count = 24
    """held-out windows measured; a third as many of the second text"""

    def check(self) -> None:
        """MisError where values make no sense or flags do not go together."""
        cli.check_ranges(self)
        if self.minutes is not None and self.iters is not None:
            raise MisError(
                f"--minutes {self.minutes:g} counts the steps, --iters {self.iters} says them: "
                f"give one"
            )
        if self.targets == "cached" and self.temperature != 1.0:
            raise MisError(
                f"--targets cached are those of temperature 1, not {self.temperature:g}: use "
                f"--targets live"
            )
        if self.targets == "cached" and self.cross_entropy:
            raise MisError(
                "cross_entropy needs the teacher itself, --targets cached has samples: use "
                "--targets live"
            )


@dataclass(frozen=True)
class QuantizationConfig:
    """How a model is quantized: mlx-lm's names, where it has them."""

    q_group_size: Literal[32, 64, 128] = 64
    """weights that share one scale"""
    q_mode: Literal["affine", "mxfp4", "nvfp4"] = "affine"
    """format of the blocks' weights; the embedding is 8-bit affine in the others. What follows is
    for affine only
    """
    target_bpw: Bits | None = 4.5
    """bits per weight, scales included: 3 to 8 bits for each matrix, by what they cost on text.
    None: 4 bits each, and 8 for the embedding and for down_proj where blocks are missing
    """
    q_method: Literal["round", "gptq"] = "gptq"
    """every weight to its nearest value (round), or so that outputs on num_samples windows change
    least (gptq)
    """
    q_iters: Whole | None = None
    """steps of distilling scales, biases and norms; integers stay; default: 20 in `distill` of a
    student in memory
    """
    q_learning_rate: Annotated[Rate, FILE_ONLY] = 2e-4
    """peak, of those steps, a share of what learns, in 4.5 bits; a bit more halves it; falls along
    a cosine
    """

    @property
    def affine(self) -> QuantizationConfig:
        """What of these flags counts: formats that are not affine are rounded to, nothing else."""
        return (
            self
            if self.q_mode == "affine"
            else replace(self, target_bpw=None, q_method="round", q_iters=0)
        )

    @property
    def looks(self) -> bool:
        """Whether rounding looks at text."""
        return self.affine.q_method == "gptq" or self.affine.target_bpw is not None

    def steps(self, whole: bool) -> int:
        """Steps after rounding, of a student that is in memory whole or not."""
        return TUNE_ITERS * whole if self.affine.q_iters is None else self.affine.q_iters


TUNE_ITERS = 20
EVAL_PROMPTS = 60  # that the models of a run answer at its end
FIRST_STEPS = 4  # whose pace says how many fit into --minutes; fewer than `warmup`
# of a repaired student; families says what others need
ITERS = 30
RATE = 1e-4
# costs nothing beside the student
PLAIN = QuantizationConfig(target_bpw=None, q_method="round", q_iters=0)
VOCABULARY_WINDOWS = 16  # in which the teacher says which tokens it expects, where not all stay
VOCABULARY_LOGITS = 2**25  # of all its tokens that are held then, in float32
SAMPLES = 50  # tokens of a position in the logit store
ADAPTERS = Lora(-1, 8, 20.0)  # mlx-lm's own rank and scale, in all blocks

Mode = Literal["resident", "blocks", "lora", "sharded", "none"]
# the best first; adapters only for who asks
MODES: tuple[Mode, ...] = "resident", "blocks", "sharded"


@dataclass(frozen=True, kw_only=True)
class DistillationSpec(DistillationConfig):
    """A distillation as asked for, of models of these sizes; what depends on them is decided."""

    teacher: ModelSize
    student: ModelSize  # as pruned, before training
    iters: int
    modes: tuple[Mode, ...] = MODES
    # the student's is the teacher's to the bit, until one of them is trained
    same_head: bool = False
    rotation: bool = False  # the hidden size is cut along principal directions
    rounding: QuantizationConfig = PLAIN  # of the trained student
    # the teacher with its own vocabulary, where the student has another
    shown: ModelSize | None = None
    answers: int = 0  # held-out prompts that teacher and student answer at the end
    answers_known: bool = False  # the teacher's are kept from before, or came with the package
    # the student is the teacher: nothing to repair, nothing to learn before rounding
    uncut: bool = False

    @property
    def step(self) -> int:
        """Tokens of one optimizer step."""
        return self.batch_size * self.grad_accumulation_steps * self.max_seq_length

    @property
    def host_lanes(self) -> int:
        """How many windows go side by side where numpy computes the losses (models/host_losses);
        else 0.
        """
        here = self.targets == "live" and not self.teacher.gpu and not self.cross_entropy
        return estimates.together(self.student) if here else 0

    @property
    def target_bytes(self) -> int:
        """A position in the logit store, at the most: a size, and id and count of every sample."""
        return 1 + SAMPLES * ((2 if self.teacher.shape.vocab <= 2**16 else 4) + 1)


def steps_of(asked: DistillationConfig, config: Mapping[str, Any]) -> int:
    """--iters, or the usual number of steps for a model of this config's family."""
    repaired = asked.reconstruct_samples and not family(config).versions
    usual = ITERS * (family(config).steps if repaired else 2)
    return asked.iters or usual


def spec_of(
    teacher: ModelSize,
    student: ModelSize,
    asked: DistillationConfig,
    rounding: QuantizationConfig = PLAIN,
    rotates: bool = True,
    shown: ModelSize | None = None,
    copied: bool = False,
    answers: int = 0,
    answers_known: bool = False,
) -> DistillationSpec:
    """The distillation that a command's settings ask for. rotates: a smaller hidden size is cut
    along directions. copied: what the student has is cut out of this teacher. answers: prompts that
    the models answer at the end; answers_known: the teacher's answers are there already.
    """
    # A head is told by its width and type.
    two = [
        (m.shape.hidden, m.packed, m.config.get("torch_dtype") or m.config.get("dtype"))
        for m in (teacher, student)
    ]
    known = {f.name: getattr(asked, f.name) for f in fields(DistillationConfig)}
    known["iters"] = steps_of(asked, student.config)
    if family(student.config).versions:  # no fit knows what comes of several hidden states
        known["reconstruct_samples"] = 0
    modes: tuple[Mode, ...] = (
        (*MODES, "none")
        if known["reconstruct_samples"] or family(student.config).experts
        else MODES
    )
    uncut = (
        copied
        and asked.train == "auto"
        and not asked.cross_entropy
        and student.shape == teacher.shape
    )
    known["reconstruct_samples"] *= not uncut
    return DistillationSpec(
        **known,
        teacher=teacher,
        student=student,
        modes=("none",) if uncut else modes if asked.train == "auto" else (asked.train,),
        rotation=rotates and student.shape.hidden < teacher.shape.hidden,
        rounding=rounding,
        shown=shown,
        same_head=copied and two[0] == two[1],
        uncut=uncut,
        answers=answers,
        answers_known=answers_known,
    )
