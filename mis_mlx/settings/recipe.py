"""The settings of a training: its flags; and a distillation in sizes and counts.

Not what it takes (distillation/strategies).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

from mis_mlx.models.architectures.families import family
from mis_mlx.types import (
    FILE_ONLY,
    Bits,
    Count,
    Positive,
    Rate,
    Seed,
    Share,
    Tokens,
    Whole,
)

Train = Literal["auto", "blocks", "sharded", "none"]
Method = Literal["round", "gptq"]


@dataclass(frozen=True)
class Steps:
    """How many steps, of how many tokens: mlx-lm's names."""

    iters: Count = 60
    """optimizer steps"""
    batch_size: Count = 2
    """windows per micro-batch"""
    grad_accumulation_steps: Count = 1
    """micro-batches per step"""
    max_seq_length: Tokens = 256
    """tokens per window"""

    @property
    def step_tokens(self) -> int:
        """Tokens of one optimizer step."""
        return self.batch_size * self.grad_accumulation_steps * self.max_seq_length


@dataclass(frozen=True)
class TrainingConfig(Steps):
    """Steps and their learning rate."""

    WARMUP: ClassVar = 5  # steps to the peak learning rate

    learning_rate: Rate = 3e-4
    """peak learning rate; decays to a tenth along a cosine"""
    save_every: Count = 20
    """steps between checkpoints"""
    seed: Seed = 0
    """seed of batch order, calibration windows and eps_halny"""

    def rate(self, step: int) -> float:
        """Learning rate of 0-based `step`: linear warm-up, then a cosine to a tenth of the peak."""
        warmup = min(self.WARMUP, self.iters)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        done = (step - warmup) / max(1, self.iters - 1 - warmup)
        cosine = 1 + math.cos(math.pi * min(1.0, done))  # from 2 to 0
        return self.learning_rate * (0.1 + (1 - 0.1) * 0.5 * cosine)


@dataclass(frozen=True)
class DistillationConfig(TrainingConfig):
    """What a student learns from, and how."""

    # an int wherever steps are made: MemoryPlan.recipe
    iters: Count | None = None  # type: ignore[assignment]
    """optimizer steps; default: 30 after a repair, which brings the student near its teacher, or 60
    where little or nothing is repaired
    """
    # a float wherever steps are made, as iters
    learning_rate: Rate | None = None  # type: ignore[assignment]
    """peak learning rate, which decays to a tenth along a cosine; default: from the teacher's
    weights if all blocks learn at once (SmolLM2: 1e-4, Gemma: 2e-5), otherwise 1e-4; without repair
    (--reconstruct-samples 0), use 3x
    """
    temperature: Annotated[Positive, FILE_ONLY] = 1.0
    """T in eq. (2); softens both distributions, the teacher's before its tokens are kept"""
    halny: Annotated[Share | None, FILE_ONLY] = None
    """spread of eps_halny in eq. (2); 0: off; default: from measured T_env, 0 when unmeasured"""
    train: Train = "auto"
    """blocks: all blocks learn, each as soon as its gradient is there; sharded: some blocks at a
    time; none: repair only. Default: the first that fits
    """
    reconstruct_samples: Whole = 64
    """windows for the closed-form repair before training; 0: no repair"""
    num_samples: Count = 32
    """calibration windows for importance"""
    eval_windows: Count = 24
    """held-out windows to measure; a third as many of the second text"""


@dataclass(frozen=True)
class ScalesConfig(DistillationConfig):
    """The steps in which the scales of a rounded student learn."""

    WARMUP: ClassVar = 3


@dataclass(frozen=True)
class QuantizationConfig:
    """How a model is quantized: mlx-lm's names, where it has them."""

    q_group_size: Literal[32, 64, 128] = 64
    """weights that share one scale"""
    target_bpw: Bits | None = 4.5
    """average bits per weight, including scales: each matrix gets 3 to 8 bits, by the measured loss
    on text; below 3.5, also 2 bits and other group sizes. None: 4 bits, and 8 for the embedding
    """
    q_groups: Annotated[Literal["auto", "mixed", "one"], FILE_ONLY] = "auto"
    """mixed: with target_bpw, a matrix may have 2 bits, or another group size than q_group_size
    (32, 64 or 128), where that costs less; one: 3 to 8 bits, all with q_group_size; auto: mixed if
    target_bpw is below what 3 bits take
    """
    q_method: Method = "gptq"
    """round: each weight to its nearest value; gptq: so that outputs on calibration windows change
    least
    """
    q_iters: Whole | None = None
    """steps in which scales, biases and norms learn from the teacher, and integers stay; default:
    20 where rounding looks at text, if the budget has room for them
    """

    @property
    def blind(self) -> QuantizationConfig:
        """The same without what looks at text before it rounds."""
        return replace(self, target_bpw=None, q_method="round")

    @property
    def looks(self) -> bool:
        """Whether rounding looks at text."""
        return self.compensates or self.target_bpw is not None

    @property
    def compensates(self) -> bool:
        """Whether weights make up for the errors of others, on fitted grids."""
        return self.q_method != "round"

    def steps(self, usual: int = 0) -> int:
        """Steps after rounding; `usual` where nobody asked for a number."""
        return usual if self.q_iters is None else self.q_iters


TUNE_ITERS = 20
# peak learning rate of these steps, relative to the trained values, at 4.5 bits
TUNE_RATE = 2e-4
EVAL_PROMPTS = 60  # that the models of a run answer at its end
EVAL_PROMPTS_STREAMED = 24  # where the teacher is read from disk for a token: as many share a pass
# of a repaired student; families says what others need
ITERS = 30
RATE = 1e-4
# costs nothing beside the student
ROUND_TO_NEAREST = replace(QuantizationConfig().blind, q_iters=0)


def steps_of(asked: DistillationConfig, config: Mapping[str, Any]) -> int:
    """--iters, or the usual number of steps for a model of this config's family."""
    architecture = family(config)
    repaired = asked.reconstruct_samples and architecture.repairs
    return asked.iters or ITERS * (architecture.steps if repaired else 2)
