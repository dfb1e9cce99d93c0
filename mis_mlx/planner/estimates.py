"""Whether a stage of work fits a budget, and how that is said.

Does not know what stages there are: the modules that do the work say what they hold.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import mlx.core as mx

from mis_mlx import cli
from mis_mlx.hardware import rates
from mis_mlx.hardware.memory import needed_bytes
from mis_mlx.hardware.stage_cost import StageCost
from mis_mlx.models.opening import compute_type
from mis_mlx.models.opening.model_size import ModelSize, model_of
from mis_mlx.models.passing.pass_cost import streamed_pass
from mis_mlx.storage import hub
from mis_mlx.storage.files import DISK, as_mis_error
from mis_mlx.types import UNDECIDED, Budget, Checkpoint, MisError, Precision, duration, gib

Machine = Literal["here", "m1-air", "m1-air-16gb"]
SETTLED_TOKENS = 512  # of the pass by which a type is chosen


def settle_precision(
    limit: Budget, checkpoint: Checkpoint, wanted: Precision = UNDECIDED
) -> Checkpoint:
    """The model, with what it computes in decided, under a budget.

    Where float16 does not hold it, float32 is an answer only if the budget holds one pass in it,
    streamed from disk.
    """

    def fits(model: Checkpoint, dtype: mx.Dtype) -> bool:
        """Whether one pass of SETTLED_TOKENS fits when the model computes in `dtype`."""
        cost = streamed_pass(
            "",
            model_of(model, dtype=dtype),
            tokens=SETTLED_TOKENS,
            length=SETTLED_TOKENS,
            spool=False,
        )
        return needed_bytes(cost.peak_bytes) <= limit.limit_bytes

    return compute_type.with_precision(checkpoint, wanted, fits)


def budget_flag(nbytes: int) -> str:
    """A size as --budget takes it, rounded up: '612MiB'."""
    return f"{math.ceil(nbytes / 2**20)}MiB"


def require_fit(
    budget: Budget, *phases: StageCost, other: str = ", or lower --max-seq-length or --batch-size"
) -> None:
    """Refuse before work starts when the largest phase does not fit with its process.

    MisError with both numbers, a budget that is enough, and what else helps.
    """
    worst = max(phases, key=lambda p: p.peak_bytes)
    need = needed_bytes(worst.peak_bytes)
    budget.need(need, worst.name, f"give --budget {budget_flag(need)} or more{other}")


def require_tokenizer(budget: Budget, m: ModelSize) -> None:
    """Refuse, before anything is opened, a budget that a model's tokenizer alone exceeds."""
    flag = budget_flag(m.opening_bytes)
    what = f"opening a tokenizer of {m.shape.vocab:,} tokens"
    budget.need(m.opening_bytes, what, f"give --budget {flag} or more")


def report_costs(
    phases: Sequence[StageCost],
    limit_bytes: int,
    machine: rates.Rates,
    tell: Callable[..., None] = cli.say,
) -> dict[str, Any]:
    """Say what each phase takes; returned is what a --dry-run says of them. tell: says it."""
    peak = 0
    for p in phases:
        moved = f"{gib(p.read_bytes)} read, {gib(p.written_bytes)} written"
        need = needed_bytes(p.peak_bytes)
        peak = max(peak, need)
        tell(f"{p.name}: {gib(need)} of memory, {moved}, about {duration(p.seconds(machine))}")
    return {
        "peak_bytes": peak,
        "budget_bytes": limit_bytes,
        "read_bytes": sum(p.read_bytes for p in phases),
        "written_bytes": sum(p.written_bytes for p in phases),
        "seconds": round(sum(p.seconds(machine) for p in phases)),
        "check_failed": peak > limit_bytes,
    }


def machine_rates(name: Machine = "here", measure: bool = False) -> rates.Rates:
    """Rates of this machine, or the published ones of an M1 Air with 8 or 16 GB.

    This machine's are measured now, measured earlier (kept in the cache folder), or assumed.
    """
    if name != "here":
        if measure:
            raise MisError(
                f"--measure measures this machine, but --machine {name} plans for another: leave "
                f"one of them out"
            )
        return rates.published(name)
    path = hub.cache_root() / "rates.json"
    if not measure:
        return rates.load(path) or rates.assumed()
    with hub.locked(path.parent), as_mis_error(path.parent, "a measurement of the disk"):
        measured = rates.measure(path.parent)
        DISK.replace_text(path, rates.to_json(measured))
    return measured
