"""A model whole in memory, given out block by block as `stream.Stream` gives one on disk."""

from collections.abc import Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn

from mis_mlx.models.architectures import side_inputs
from mis_mlx.models.architectures.families import family
from mis_mlx.models.opening import load
from mis_mlx.models.passing.stream import NotNumbers


class Resident:
    """A model that `load.resident_model` has made; it may learn between two passes.

    where: what an error calls it.
    """

    resident = True
    mixture = False  # its experts are parts of its blocks

    def __init__(self, model: nn.Module, where: str = "the model in memory"):
        self._model = model
        self._where = where
        self.config = model._config
        self.args = family(self.config).model_args()
        self.layers = len(model.model.layers)
        self.sides = side_inputs.of_config(self.config)

    def embed(self, batches: Sequence[mx.array]) -> list[mx.array]:
        """Token ids [(B, T)] -> hidden states [(B, T, D)] before the first block; lazy."""
        hidden = [load.embedded(self._model, tokens) for tokens in batches]
        self.sides = side_inputs.of_model(self._model, batches, hidden)
        return hidden

    def blocks(self) -> Iterator[tuple[int, nn.Module]]:
        """(i, block i) of all blocks."""
        yield from enumerate(self._model.model.layers)

    def norm(self, hidden: Sequence[mx.array]) -> list[mx.array]:
        """Every batch after the last norm; lazy."""
        return [self._model.model.norm(states) for states in hidden]

    def head(self) -> nn.Module:
        """The vocabulary head, for `load.logits`."""
        model = self._model
        head: nn.Module = model.lm_head if hasattr(model, "lm_head") else model.model.embed_tokens
        return head

    def finite(self, out: mx.array) -> mx.array:
        """`out` itself; NotNumbers where it holds NaN or infinity."""
        if not mx.isfinite(out).all().item():
            raise NotNumbers(f"{self._where}: a block gives values that are not numbers", out.dtype)
        return out
