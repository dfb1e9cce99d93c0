"""Plan: bytes, passes, hours and memory of a distillation, from the configs alone, before any work."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mis_mlx import cli
from mis_mlx.machine import memory, rates
from mis_mlx.maths.losses import chunk_rows
from mis_mlx.model import arch, load, teacher
from mis_mlx.model.config import shape_of
from mis_mlx.types import gib

# A training step spends about this many times its matrix products' time, the rest being element-wise work
# on one thread (measured: CPU, 512 tokens a step, 49,152 tokens in the vocabulary).
ELEMENTWISE = 2.5
CHUNKS_AHEAD = 3  # of `losses.kl_sum`, whose memory MLX takes before the first of them is done (measured)


@dataclass(frozen=True)
class Phase:
    """One stage: model passes, bytes read and written, float operations, peak memory, seconds (an estimate)."""

    name: str
    passes: int
    read_bytes: int
    written_bytes: int
    flops: float
    peak_bytes: int
    seconds: float = 0.0


@dataclass(frozen=True)
class Plan:
    """All phases, whether the teacher can stay in memory beside the student, and the budget they must fit."""

    phases: tuple[Phase, ...]
    teacher_resident: bool
    budget_bytes: int

    @property
    def peak_bytes(self) -> int:
        """The largest phase."""
        return max(p.peak_bytes for p in self.phases)

    @property
    def seconds(self) -> float:
        """Of all phases together."""
        return sum(p.seconds for p in self.phases)


def activation_bytes(config: Mapping[str, Any], batch: int, length: int) -> int:
    """What one micro-batch (B, T) keeps for the backward pass: float32, all blocks."""
    s = shape_of(config)
    per_token = 8 * s.hidden + 4 * s.ffn + 2 * s.heads * s.head_dim + 2 * s.kv_heads * s.head_dim + 2 * s.heads * length
    return 4 * s.layers * batch * length * per_token


def training_bytes(config: Mapping[str, Any], batch: int, length: int) -> int:
    """Weights, gradients, two moments (float32), activations, the head's gradient and the chunks of logits."""
    s, rows = shape_of(config), chunk_rows(shape_of(config).vocab)
    chunks = min(CHUNKS_AHEAD, math.ceil(batch * length / rows))
    head = 2 * s.vocab * s.hidden * 4 + 5 * chunks * rows * s.vocab * 4
    return 4 * 4 * arch.params(config) + activation_bytes(config, batch, length) + head


def _pass_bytes(config: Mapping[str, Any], tokens: int, item: int = 4) -> int:
    """Peak of a streamed pass: the largest unit twice (as stored and as computed) and two hidden streams."""
    s = shape_of(config)
    block = sum(math.prod(d) for d in arch.layer_tensors(config).values())
    return 2 * max(block, s.vocab * s.hidden) * item + 2 * tokens * s.hidden * item


def timed_bytes(budget_bytes: int, *params: int) -> list[int]:
    """Memory of stock mlx-lm with each model whole (as stored, and as float32) that fits the budget; the others
    are not timed."""
    return [6 * p for p in params if 6 * p <= budget_bytes]


def _measure_bytes(big: Mapping[str, Any], small: Mapping[str, Any], tokens: int) -> int:
    """Streamed passes, then the heads of teacher, pruned, distilled and 4-bit, and one chunk of logits."""
    b, s = shape_of(big), shape_of(small)
    heads = 4 * b.vocab * (b.hidden + 3 * s.hidden)
    hidden = 4 * tokens * (b.hidden + 3 * s.hidden)
    return max(_pass_bytes(big, tokens), heads + 8 * 4 * chunk_rows(b.vocab) * b.vocab) + hidden


def make(
    big: Mapping[str, Any],
    small: Mapping[str, Any],
    *,
    teacher_bytes: int,
    iters: int,
    micro_batch: int,
    accumulate: int,
    length: int,
    calibration: int,
    held_out: int,
    saves: int,
    budget_bytes: int,
    flops_per_s: float,
) -> Plan:
    """The plan of `distill`: teacher config `big`, student config `small`, windows of `length` tokens."""
    p_t, p_s, s = arch.params(big), arch.params(small), shape_of(small)
    seen, step = calibration * length, micro_batch * accumulate * length
    train = training_bytes(small, micro_batch, length)
    resident = train + 4 * p_t <= budget_bytes
    beside = 4 * p_t if resident else _pass_bytes(big, step)
    reads = teacher_bytes if resident else teacher_bytes * iters
    phases = [
        Phase("prune", 1, teacher_bytes * 2, 2 * p_s, 2 * p_t * seen, _pass_bytes(big, seen)),
        Phase(
            "reconstruct",
            2,
            teacher_bytes + 2 * p_s,
            0,
            2 * (p_t + p_s + s.layers * s.ffn * (s.ffn + s.hidden)) * seen,
            _pass_bytes(big, seen) + _pass_bytes(small, seen) + 4 * seen * (s.ffn + s.hidden) + 32 * s.ffn**2,
        ),
        Phase(
            "distil", iters, reads, saves * 12 * p_s, iters * step * (2 * p_t + 6 * p_s) * ELEMENTWISE, train + beside
        ),
        Phase("quantize", 1, 2 * p_s, p_s * 5 // 8, 0, 3 * 4 * p_s),
        Phase(
            "measure",
            4,
            teacher_bytes + 6 * p_s,
            0,
            2 * (p_t + 3 * p_s) * held_out * length * 1.5,
            max([_measure_bytes(big, small, held_out * length), *timed_bytes(budget_bytes, p_t, p_s)]),
        ),
    ]
    timed = tuple(Phase(**{**asdict(p), "seconds": p.flops / flops_per_s}) for p in phases)
    return Plan(timed, resident, budget_bytes)


def table(plan: Plan) -> str:
    """Markdown for people."""
    lines = ["| phase | passes | read | written | peak memory | time, estimated |", "|---|---:|---:|---:|---:|---:|"]
    lines += [
        f"| {p.name} | {p.passes} | {gib(p.read_bytes)} | {gib(p.written_bytes)} | {gib(p.peak_bytes)} | "
        f"{p.seconds / 60:.1f} min |"
        for p in plan.phases
    ]
    fits = "fits" if plan.peak_bytes <= plan.budget_bytes else "does NOT fit"
    where = "stays in memory" if plan.teacher_resident else "is streamed from disk at every step"
    return "\n".join(
        [
            *lines,
            "",
            f"Peak {gib(plan.peak_bytes)} {fits} the budget of {gib(plan.budget_bytes)}; the "
            f"teacher {where}; about {plan.seconds / 3600:.2f} h in all.",
        ]
    )


@dataclass(frozen=True)
class Settings:
    """What would it take? Reads configs, computes, starts nothing."""

    teacher: str | None = None
    """folder or hub id; default: SmolLM2-135M-Instruct"""
    scenario: Literal["goral", "baca", "halny", "juhas", "zbojnik"] = "goral"
    """a row of the paper's table 1"""
    budget: str | None = None
    """memory this may take, such as 5GiB"""
    iters: int = 100
    batch_size: int = 2
    max_seq_length: int = 256
    config: cli.ConfigFile = None
    """YAML file with any of these flags"""


def run(settings: Settings) -> dict[str, Any]:
    """The command: print the plan."""
    found = teacher.find(settings.teacher)
    checkpoint = load.open_checkpoint(found.path)
    shape = arch.target_shape(checkpoint.config, arch.SCENARIOS[settings.scenario])
    small = arch.student_config(checkpoint.config, shape, tuple(range(shape.layers)), "bfloat16")
    asked = None if settings.budget is None else cli.parse_bytes(settings.budget)
    plan = make(
        checkpoint.config,
        small,
        teacher_bytes=checkpoint.nbytes,
        iters=settings.iters,
        micro_batch=settings.batch_size,
        accumulate=1,
        length=settings.max_seq_length,
        calibration=32,
        held_out=32,
        saves=4,
        budget_bytes=memory.budget(asked).limit_bytes,
        flops_per_s=rates.matmul_flops(),
    )
    print(f"{arch.params(checkpoint.config):,} -> {arch.params(small):,} parameters: {shape}\n")
    print(table(plan))
    return {
        "teacher": str(found.path),
        "params_teacher": arch.params(checkpoint.config),
        "params_student": arch.params(small),
        "peak_bytes": plan.peak_bytes,
        "budget_bytes": plan.budget_bytes,
        "seconds": round(plan.seconds),
        "check_failed": plan.peak_bytes > plan.budget_bytes,
    }


if __name__ == "__main__":
    cli.main(Settings, run)
