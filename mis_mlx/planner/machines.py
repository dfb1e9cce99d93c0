"""Several machines on one job: which of a model's blocks are whose.

Not how they find each other (models/distributed), nor how blocks are passed through
(models/pipeline_parallel).
"""

from mis_mlx import cli
from mis_mlx.hardware.rates import Rates
from mis_mlx.models import distributed, pipeline_parallel, policy
from mis_mlx.models.stream import Stream
from mis_mlx.planner import estimates, phases
from mis_mlx.types import Budget, Checkpoint


def shares(made: phases.MemoryPlan) -> tuple[int, ...]:
    """How many of the teacher's blocks each machine has; () where there is one machine."""
    if distributed.size() == 1:
        return ()
    job = made.job
    counts = _shared(job.teacher, made.pinned, job.step, job.max_seq_length, made.rates)
    cli.say(f"teacher blocks by machine: {', '.join(map(str, counts))}")
    return tuple(counts)


def opened(
    checkpoint: Checkpoint, limit: Budget, room_bytes: int, tokens: int, length: int, layers: bool
) -> Stream:
    """A model for passes of `tokens` that all machines make: whole for each, or its blocks shared
    out (`layers`). room_bytes: of this machine, for the head and for blocks that stay.
    """
    where = (
        checkpoint,
        policy.compute_dtype(checkpoint),
        room_bytes,
        checkpoint.nbytes > limit.limit_bytes,
    )
    if distributed.size() == 1 or not layers:
        return Stream(*where)
    m = estimates.model_of(checkpoint)
    keeps = estimates.pins(m, max(0, room_bytes - m.head_work))
    return pipeline_parallel.Relay(
        *where, _shared(m, keeps, tokens, length, estimates.machine_rates())
    )


def _shared(m: estimates.ModelSize, keeps: int, tokens: int, length: int, at: Rates) -> list[int]:
    """How many blocks each machine has in passes of `tokens`, by the first one's rates. keeps:
    those with room here.
    """
    work = (
        estimates.forward_flops(m, tokens, length, False) / m.shape.layers / at.forward_flops_per_s
    )
    # of a block; work: 1
    reading = distributed.broadcast_json(lambda: m.block_bytes / at.read_bytes_per_s / work)
    return pipeline_parallel.shared(m.shape.layers, distributed.all_gather(keeps), reading)
