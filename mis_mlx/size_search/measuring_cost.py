"""What measuring students takes, several in one pass over their teacher (size_search/unwritten)."""

import math
from dataclasses import replace

from mis_mlx.hardware.ledger import Ledger
from mis_mlx.hardware.stage_cost import StageCost
from mis_mlx.judge.judging_cost import comparison_cost
from mis_mlx.maths.rounding import FUSED_CANDIDATES, RANGE_ENDS
from mis_mlx.models.opening.model_size import ModelSize
from mis_mlx.models.passing.pass_cost import block_matrix

MOST = 8  # students in one pass
TEXT_TOKENS = 160  # of a question and its answer, about
# Of a weight that is rounded to its nearest value: in float32, packed, and made again.
ROUNDED_BYTES = 4 + 1 + 4 + 4


# Of a weight whose grid is fitted (maths/rounding): bytes that the kernels of a GPU move, and
# operations of a CPU (4 million weights a second at 40 GFLOP/s).
FITTED_BYTES = 10 * 4 * RANGE_ENDS**2
FITTED_FLOPS = 10_000


def fitting_cost(t: ModelSize) -> StageCost:
    """Every matrix of a student rounded on fitted grids, once."""
    fits = math.ceil(t.params * RANGE_ENDS**2 / FUSED_CANDIDATES)
    return StageCost(
        name="fit",
        peak_bytes=2 * 4 * FUSED_CANDIDATES,
        flops=0.0 if t.gpu else FITTED_FLOPS * t.params,
        touched_bytes=FITTED_BYTES * t.params if t.gpu else 0,
        waits=fits,  # the time in which their kernels are launched
    )


def passes_cost(
    t: ModelSize, students: int, readers: int, texts: int, length: int, limit: int
) -> StageCost:
    """`students` of a teacher measured on the same texts, beside the readers that they need.

    Each student has its own block, made of the teacher's, while this is in memory. All are taken
    for as large as the teacher. length: of the longest text. limit: bytes of memory.
    """
    some, peak_bytes = _at_once(t, students, texts, length, limit)
    work = _forward(t, texts, min(length, TEXT_TOKENS)).repeated(students + readers)
    return replace(
        work,
        name=f"measure {students}",
        read_bytes=math.ceil(students / some) * t.nbytes,
        peak_bytes=peak_bytes,
    )


def at_once(t: ModelSize, texts: int, length: int, limit: int) -> int:
    """How many students, each with its reader, go through one pass within `limit` bytes."""
    return _at_once(t, MOST, texts, length, limit)[0]


def _at_once(t: ModelSize, most: int, texts: int, length: int, limit: int) -> tuple[int, int]:
    """(how many of `most` students go through one pass, the bytes that they hold)."""
    ledger = Ledger(limit, t.gpu)
    ledger.hold("one and its reader, compared", _forward(t, texts, length).peak_bytes)
    ledger.hold("a block", t.item * t.largest_block_params)
    ledger.hold("its largest matrix, rounded", ROUNDED_BYTES, block_matrix(t))
    states = 2 * texts * length * t.hidden_bytes
    some = 1 + ledger.fill("final states of others and their readers", states, min(most, MOST) - 1)
    return some, ledger.peak_bytes


def _forward(t: ModelSize, texts: int, length: int) -> StageCost:
    """A student in a pass, compared with its reader."""
    both = comparison_cost([t, t], texts, length)
    return replace(both, flops=both.flops / 2, waits=both.waits // 2)
