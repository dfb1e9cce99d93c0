"""The flags that every training command has.

Does not know what is trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mis_mlx.training.loop import Schedule


@dataclass(frozen=True)
class Recipe:
    """Steps, batches, learning rate: mlx-lm's names."""

    iters: int = 60
    """optimizer steps"""
    batch_size: int = 2
    """windows in a micro-batch"""
    grad_accumulation_steps: int = 1
    """micro-batches in a step"""
    max_seq_length: int = 256
    """tokens in a window"""
    learning_rate: float = 3e-4
    """peak; falls to a tenth along a cosine"""
    warmup: int = 5
    """steps until the peak"""
    weight_decay: float = 0.01
    """AdamW's"""
    save_every: int = 20
    """steps between checkpoints"""
    seed: int = 0
    """of batch order, calibration windows and eps_halny"""

    @property
    def schedule(self) -> Schedule:
        """The learning rate of every step."""
        return Schedule(self.iters, self.learning_rate, min(self.warmup, self.iters))


@dataclass(frozen=True)
class Distillation(Recipe):
    """What a student learns from, and by which way."""

    temperature: float = 1.0
    """T of eq. (2), which softens both distributions"""
    halny: float | None = None
    """spread of eps_halny in eq. (2); 0 switches it off; default: from measured T_env, 0 when unmeasured"""
    train: Literal["auto", "resident", "sharded"] = "auto"
    """the student whole in memory, or some blocks of it at a time; default: what fits the budget"""
    targets: Literal["live", "cached"] = "live"
    """the teacher at every step; or its sampled logits, written down once, and no teacher in memory"""
    samples: int = 50
    """of the vocabulary, for each token, in cached targets"""
    reconstruct_samples: int = 64
    """windows for the closed-form repair before training; 0 leaves it out"""
    local_iters: int | None = None
    """steps for each block to learn what the teacher does in its place, before the whole is trained; default: 0,
    or 16 where the student does not fit"""
    local_samples: int = 64
    """windows for that"""
    local_learning_rate: float = 3e-4
    """peak, of every block"""
