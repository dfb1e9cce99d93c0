"""What judging models takes: on the same windows (judge/comparison), and timed whole."""

import math
from collections.abc import Sequence

from mis_mlx.compute.host_losses import CHUNK, GROUP
from mis_mlx.hardware.ledger import Ledger
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
    ledger = Ledger()
    flops = 0.0
    waits = 0
    for number, m in enumerate(models):
        body = m.body_bytes(pass_workspace(m, tokens, length, length))
        ledger.hold("final states", m.hidden_bytes, tokens)
        ledger.moment(f"pass of model {number}", slots=m.slots_bytes, body=body)
        flops += forward_flops(m, tokens, length)
        waits += pass_waits(m, tokens, length, length, head=False)
    ledger.hold("what blocks share", max(side_bytes(m, tokens) for m in models))
    vocab = min(m.shape.vocab for m in models)
    hidden = max(m.shape.hidden for m in models)
    rows = min(HEAD_PART // hidden, vocab)
    parts = math.ceil(vocab / rows)
    heads = [3 * rows * m.head_work // m.shape.vocab for m in models]
    at_once = CHUNK if any(m.gpu for m in models) else min(length, CHUNK)
    ledger.moment(
        "heads",
        parts=heads[0] + max(heads),
        logits=2 * 4 * at_once * rows,
        temporaries=3 * rows * hidden,
        statistics=11 * 8 * min(tokens, GROUP + length) * parts,
    )
    # two heads and their statistics
    waits += len(models) * 3 * parts * math.ceil(tokens / GROUP)
    return StageCost(
        name="measure",
        read_bytes=sum(m.nbytes for m in models),
        peak_bytes=ledger.peak_bytes,
        flops=flops,
        waits=waits,
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
