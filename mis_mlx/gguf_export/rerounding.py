"""How far a GGUF is from the numbers that MLX packed."""

import math
from dataclasses import dataclass

import numpy as np


@dataclass
class Rerounding:
    """What the file changes of numbers that MLX packed, added up over tensors.

    inexact: scales and biases of exact tensors that float16 does not hold. change, total: sums of
    squares over the weights of tensors that are rounded again: what the file adds to them, and what
    they are.
    """

    inexact: int = 0
    change: float = 0.0
    total: float = 0.0

    @property
    def relative(self) -> float:
        """Root mean square of the second rounding, as a share of the weights' own."""
        if not self.total:
            return 0.0
        return math.sqrt(self.change / self.total)

    def add(self, packed: np.ndarray, written: np.ndarray) -> None:
        """Count weights (rows, in) that were packed, and what the file has in their place."""
        self.change += float(np.square(written - packed).sum(dtype=np.float64))
        self.total += float(np.square(packed).sum(dtype=np.float64))
