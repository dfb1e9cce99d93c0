"""What the logits of some positions at a time take."""

import math

from mis_mlx.hardware.memory import COMMANDS_AHEAD
from mis_mlx.maths import losses

ARRAYS = 5  # (n, V) float32 that MLX holds at a time of one chunk
# of logits, whose memory MLX takes before the first of them is done (measured on a CPU)
CHUNKS_AHEAD = 3
# (n, V) that a chunk makes, five of them alive at a time; a GPU may hold all it has begun
CHUNK_ARRAYS = 12


def logit_bytes(vocab: int, positions: int, *, gpu: bool) -> int:
    """Logits in flight: chunks of float32 arrays (n, V).

    A GPU holds the arrays that it needs and those of the commands in flight, one each, for (n, V)
    fills a command buffer.
    """
    rows = losses.chunk_rows(vocab)
    chunks = math.ceil(positions / rows)
    arrays = ARRAYS * min(CHUNKS_AHEAD, chunks)
    if gpu:
        arrays = min(ARRAYS + COMMANDS_AHEAD, CHUNK_ARRAYS * chunks)
    return arrays * rows * vocab * 4
