"""What judging models takes: on the same windows (judge/comparison), and timed whole."""

import math
from collections.abc import Sequence

from mis_mlx.compute.host_losses import CHUNK, GROUP
from mis_mlx.hardware.stage_cost import StageCost
from mis_mlx.models.opening.model_size import ModelSize
from mis_mlx.models.passing.pass_cost import forward_flops, pass_waits, pass_workspace, side_bytes
from mis_mlx.models.passing.stream import HEAD_PART


def comparison_cost(models: Sequence[ModelSize], windows: int, length: int) -> StageCost:
    """A pass of each model over the same windows, then their heads in parts (as in comparison).

    Parts of the first one's head and of each other's: two of each, and the temporaries that make
    and read one, logits of CHUNK tokens, and statistics of GROUP tokens.
    """
    tokens = windows * length
    passes_bytes = 0
    hidden_bytes = 0  # of a token, in all models
    flops = 0.0
    waits = 0
    for m in models:
        workspace = pass_workspace(m, tokens, length, length)
        pass_bytes = m.slots_bytes + m.body_bytes(workspace)
        passes_bytes = max(passes_bytes, pass_bytes)
        hidden_bytes += m.hidden_bytes
        flops += forward_flops(m, tokens, length)
        waits += pass_waits(m, tokens, length, length, head=False)
    heads = _heads_cost(models, tokens, length)
    peak = max(passes_bytes, heads.peak_bytes)
    peak += tokens * hidden_bytes
    peak += max(side_bytes(m, tokens) for m in models)
    return StageCost(
        name="measure",
        read_bytes=sum(m.nbytes for m in models),
        peak_bytes=peak,
        flops=flops,
        waits=waits + heads.waits,
    )


def _heads_cost(models: Sequence[ModelSize], tokens: int, length: int) -> StageCost:
    """Memory and waits of the models' heads in parts, as in `comparison_cost`."""
    vocab = min(m.shape.vocab for m in models)
    hidden = max(m.shape.hidden for m in models)
    rows = min(HEAD_PART // hidden, vocab)
    parts = math.ceil(vocab / rows)
    heads = [3 * rows * m.head_work // m.shape.vocab for m in models]
    at_once = CHUNK if any(m.gpu for m in models) else min(length, CHUNK)
    logits = 2 * 4 * at_once * rows
    temporaries = 3 * rows * hidden
    statistics = 11 * 8 * min(tokens, GROUP + length) * parts
    groups = math.ceil(tokens / GROUP)
    return StageCost(
        name="heads",
        peak_bytes=heads[0] + max(heads) + logits + temporaries + statistics,
        waits=len(models) * 3 * parts * groups,  # two heads and their statistics
    )


def timed_bytes(params: int) -> int:
    """Memory of stock mlx-lm with a model of so many parameters whole.

    As stored, and as float32.
    """
    return 6 * params


def timed_weights(models: list[ModelSize], most_bytes: int, limit: int) -> int:
    """Weights of the models that are in memory together while they are timed; 0: none is."""
    together = 0
    largest = 0
    timed = 0
    for m in models:
        weights = m.nbytes if m.packed else m.params * m.item
        needed = timed_bytes(m.params)
        together += weights
        timed += needed
        if needed <= limit:
            largest = max(largest, weights)
    return together if timed <= most_bytes else largest
