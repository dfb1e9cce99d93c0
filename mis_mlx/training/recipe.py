"""The flags that every training command has.

Does not know what is trained.
"""

from __future__ import annotations

from dataclasses import dataclass

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
