"""Several machines on one job: which of a model's blocks each has.

Not how they find each other (models/passing/distributed), nor how blocks are passed through
(models/passing/pipeline_parallel).
"""

from mis_mlx.compute import precision
from mis_mlx.hardware import memory
from mis_mlx.hardware.rates import Rates
from mis_mlx.models.opening.model_size import ModelSize, model_of
from mis_mlx.models.passing import distributed, pass_cost, pipeline_parallel
from mis_mlx.models.passing.stream import Stream
from mis_mlx.planner import estimates
from mis_mlx.types import Budget, Checkpoint


def open_stream(
    checkpoint: Checkpoint,
    limit: Budget,
    *,
    headroom_bytes: int,
    tokens: int,
    length: int,
    layers: bool,
) -> Stream:
    """A model for passes of `tokens` that all machines make.

    Each has all of it, or its blocks are shared out (`layers`). headroom_bytes: of this machine,
    for the head and for blocks that stay.
    """
    dtype = precision.dtype_of(checkpoint)
    direct = memory.crowds_page_cache(checkpoint.nbytes, limit)
    if distributed.size() == 1 or not layers:
        return Stream(checkpoint, dtype, headroom_bytes, direct)
    m = model_of(checkpoint)
    pinned = pass_cost.stays(m, headroom_bytes).blocks
    counts = block_shares(m, pinned, tokens=tokens, length=length, rates=estimates.machine_rates())
    return pipeline_parallel.Relay(
        checkpoint, dtype, headroom_bytes=headroom_bytes, direct=direct, shares=counts
    )


def block_shares(
    m: ModelSize,
    pinned: int,
    *,
    tokens: int,
    length: int,
    rates: Rates,
) -> list[int]:
    """How many blocks each machine has in passes of `tokens`, by the first one's rates.

    pinned: blocks with room here.
    """
    flops = pass_cost.forward_flops(m, tokens, length, head=False)
    work_s = flops / m.shape.layers / rates.forward_flops_per_s  # of a block
    # time to read a block, as a multiple of the time to compute it
    reading = distributed.broadcast_json(lambda: m.block_bytes / rates.read_bytes_per_s / work_s)
    return pipeline_parallel.share_blocks(m.shape.layers, distributed.all_gather(pinned), reading)
