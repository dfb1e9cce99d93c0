"""Expected cost of rounding the embedding, the head, and the table of per-layer inputs.

Their rounding errors are not computed but expected: an affine group's errors are taken as uniform
and independent, of variance (range / (2^bits - 1))^2 / 12. `squares` of each class is {module path:
sum over tokens of the mean of <d log p / dW, error>^2}, for errors of 2^bits - 1 times their size;
`bit_allocation.costs` divides by (2^bits - 1)^2.
"""

import mlx.core as mx
import numpy as np

from mis_mlx.models.architectures import arch
from mis_mlx.models.architectures.families import family
from mis_mlx.models.opening import load
from mis_mlx.models.passing import stream
from mis_mlx.models.passing.stream import Batches
from mis_mlx.storage.block_reader import Reader
from mis_mlx.types import Checkpoint


def _group_variances(rows: mx.array, group: int) -> mx.array:
    """Error variances (rows, D / group) float32 of weights (rows, D), in 1 bit. Lazy."""
    groups = mx.unflatten(rows, 1, (-1, group))
    high = groups.max(axis=-1).astype(mx.float32)
    low = groups.min(axis=-1)
    return mx.square(high - low) / 12


def _row_gradients(ids: np.ndarray, below: mx.array) -> tuple[np.ndarray, np.ndarray]:
    """(distinct ids, rising; their cotangents (ids, D) float64), from cotangents (B, T, D).

    A row's error is the same wherever the row is used, so its cotangents are added up before they
    are squared.
    """
    width = below.shape[-1]
    rows, places = np.unique(ids, return_inverse=True)
    gradients = np.zeros((len(rows), width))
    cotangents = np.array(below.astype(mx.float32)).reshape(-1, width)
    np.add.at(gradients, places.reshape(-1), cotangents)
    return rows, gradients


def _group_squares(gradients: np.ndarray, group: int) -> np.ndarray:
    """Sums of squares over each group: (n, D) -> (n, D / group)."""
    groups = np.square(gradients).reshape(len(gradients), -1, group)
    return groups.sum(axis=-1)


class VocabularyCosts:
    """Cost of rounding the embedding and the head; their module paths are one where tied."""

    def __init__(self, checkpoint: Checkpoint, group: int):
        scale = family(checkpoint.config).embedding_scale(mx.float32)
        self.group = group
        self.scale = 1.0 if scale is None else float(scale)
        self.table = load.EMBEDDING.rstrip(".")
        self.head = load.head_prefix(checkpoint).rstrip(".")
        self.squares = dict.fromkeys((self.table, self.head), 0.0)
        self.variances: dict[str, mx.array] = {}  # (V, D / group) float32
        for path in self.squares:
            # Part by part, each evaluated: only a number per group stays of the table.
            parts = list[mx.array]()
            for rows in load.dense_parts(checkpoint, f"{path}.weight"):
                parts.append(_group_variances(rows, group))
                stream.evaluate_now(parts[-1])
                del rows
            self.variances[path] = mx.concatenate(parts)
            stream.evaluate_now(self.variances[path])

    def at_head(
        self, x: mx.array, above: mx.array, slopes: mx.array | None = None, first: int = 0
    ) -> None:
        """Add some positions: head inputs x (n, D), d log p(drawn) / d logits `above` (n, v).

        `above` has the mean square p (1 - p) over draws: |above| is p, or 1 - p for the drawn one.
        slopes (n, v): d logits / d what the head gives, under a softcap. first: of the v tokens.
        """
        inputs = mx.square(x.astype(mx.float32)).reshape(len(x), -1, self.group)
        variances = self.variances[self.head][first : first + above.shape[1]]
        errors = inputs.sum(axis=-1) @ variances.T
        chance = mx.abs(above)
        expected = chance * (1 - chance) * errors
        if slopes is not None:
            expected = expected * mx.square(slopes)
        self.squares[self.head] += float(expected.sum())

    def at_rows(self, ids: mx.array, below: mx.array) -> None:
        """Add a batch: its ids (B, T) and the cotangents at the first block (B, T, D)."""
        rows, gradients = _row_gradients(np.array(ids), below)
        squares = _group_squares(gradients * self.scale, self.group)
        variances = self.variances[self.table][mx.array(rows)]
        self.squares[self.table] += float((squares * np.array(variances)).sum())


class PerLayerCosts:
    """Cost of rounding the table of per-layer inputs.

    Only the rows of tokens that occur are read, and the variances of their groups kept. The part
    that reaches the embedding through the projection beside that table is left out.
    """

    def __init__(self, checkpoint: Checkpoint, batches: Batches, group: int):
        self._group = group
        self._width = family(checkpoint.config).side_width
        # of a row on its way into a block (`Architecture.side_channels`)
        self._scale = self._width**0.5 * 2.0**-0.5
        self._batches = []
        for batch in batches:
            ids = np.array(batch).reshape(-1)
            self._batches.append(ids)
        self._ids = np.unique(np.concatenate(self._batches))
        self._path = arch.PER_LAYER.rstrip(".")
        table = checkpoint.tensors[f"{arch.PER_LAYER}weight"]
        reader = Reader({f"{arch.PER_LAYER}weight": table})
        step = stream.head_rows(table.shape[1], table.shape[0])
        parts = []
        for start in range(0, len(self._ids), step):
            rows = reader.rows(table, self._ids[start : start + step])
            parts.append(np.array(_group_variances(rows, group)))
        self._variances = np.concatenate(parts)  # (ids, L * P / group)
        self.squares = {self._path: 0.0}

    def at_channels(self, i: int, b: int, below: mx.array) -> None:
        """Add the cotangents (B, T, P) of batch b's channels for block i."""
        ids, gradients = _row_gradients(self._batches[b], below)
        squares = _group_squares(gradients * self._scale, self._group)
        # A row has the channels of all blocks one after the other.
        groups = self._width // self._group
        columns = slice(i * groups, (i + 1) * groups)
        variances = self._variances[np.searchsorted(self._ids, ids), columns]
        self.squares[self._path] += float((squares * variances).sum())
