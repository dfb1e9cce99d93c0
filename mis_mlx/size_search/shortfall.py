"""What a plan has to leave out in its budget, which budget would have it, and what is lost.

Losses are expected, not measured: from one student each (benchmarks/README.md).
"""

from dataclasses import dataclass, replace

from mis_mlx.distillation import strategies
from mis_mlx.settings.recipe import TUNE_ITERS
from mis_mlx.size_search import shape_search

# of the default teacher's student in 4.37 bits: as rounded by GPTQ, and with tuned scales
UNTUNED_LOSS = 0.149 / 0.129


@dataclass(frozen=True)
class LeftOut:
    """A part of a run that does not fit. budget_bytes: the least that would have it.

    loss: what the student should lose without it, as a multiple of what it loses with it; of
    training that is a bound.
    """

    name: str
    budget_bytes: int
    loss: float


def left_out(plan: strategies.MemoryPlan) -> list[LeftOut]:
    """What nobody has turned off, and the budget is too small for; [] where nothing fits."""
    if not plan.fits:
        return []
    parts = list[LeftOut]()
    job = plan.job
    if plan.mode == "none" and len(job.modes) > 1:
        training = replace(job, modes=job.modes[:-1])
        least = strategies.least_bytes(training, plan.rates)
        parts.append(LeftOut("training", least, _untrained_loss(plan)))
    if not plan.tuning_steps and job.rounding.q_iters is None:
        rounding = replace(job.rounding, q_iters=TUNE_ITERS)
        tuning = replace(job, modes=(plan.mode,), rounding=rounding)
        least = strategies.least_bytes(tuning, plan.rates)
        parts.append(LeftOut("distillation of scales", least, UNTUNED_LOSS))
    return parts


def loss_factor(plan: strategies.MemoryPlan) -> float:
    """What the student should lose, as a multiple of what it would lose with nothing left out."""
    factor = 1.0
    for part in left_out(plan):
        factor *= part.loss
    return factor


def _untrained_loss(plan: strategies.MemoryPlan) -> float:
    """At most what a student of fewer neurons loses where it does not learn: all that learning wins
    back. Of other cuts nobody has measured it.
    """
    if plan.job.whole_teacher.shape.ffn == plan.job.student.shape.ffn:
        return 1.0
    return 1 / shape_search.REMAINING_ANSWER_LOSS["ffn"]
