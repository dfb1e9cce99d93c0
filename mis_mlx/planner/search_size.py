"""What a search for a shape takes: bytes, memory, operations of ranking, and of finalists."""

from dataclasses import replace
from typing import Any

from mis_mlx.hardware import memory
from mis_mlx.models import arch
from mis_mlx.models.config import Shape
from mis_mlx.planner import compression_size, estimates, phases
from mis_mlx.planner.recipe import QuantizationConfig, spec_of
from mis_mlx.types import Budget, Checkpoint

SENSED = 8  # windows that say what bits cost
NOT_OURS = ("prune", "measure")  # phases of a distillation that a finalist does not go through


def work(
    s: Any, teacher: Checkpoint, most: Shape, how: QuantizationConfig, probes: int, rows: bool, limit: Budget
) -> tuple[dict[str, list[estimates.StageCost]], phases.MemoryPlan]:
    """What a search with these settings takes to rank, and to train, round and judge finalists, each student counted as
    one of the shape `most`, rounded as `how` says; and that one's distillation. probes: axes measured alone.
    rows: whether some students have fewer tokens."""
    t, length, rates = estimates.model_of(teacher), s.max_seq_length, estimates.machine_rates()
    small = estimates.model_of(arch.student_config(teacher.config, most))
    made = phases.make(spec_of(t, small, s, how), limit.limit_bytes, rates)
    m, count, finals = made.job.student, s.evaluations, s.finalists
    known = estimates.TENSOR_BYTES * t.tensors
    own = known + memory.process_bytes(max(0, limit.limit_bytes - known))  # as in a plan, whose phases have it

    def times(p: estimates.StageCost, n: int, name: str, written: int, beside: int = own) -> estimates.StageCost:
        return replace(p, name=name, read_bytes=n * p.read_bytes, written_bytes=n * written, flops=n * p.flops,
                       peak_bytes=p.peak_bytes + beside)  # fmt: skip

    prune = next(p for p in made.phases if p.name == "prune")
    windows, judging = (-(-4 * n // 3) for n in (s.rank_windows, s.eval_windows))  # of two texts
    one = estimates.compared([t, m], windows, length)
    passed = estimates.forward_flops(t, windows * length, length, False)  # the teacher's pass, which is done once
    one = replace(one, peak_bytes=max(one.peak_bytes, estimates.tensor_bytes(t)), flops=one.flops - passed)
    rank = [times(prune, 1, "calibrate", prune.written_bytes - m.nbytes, 0)]
    rank += [times(sensitivity(t, length, limit.limit_bytes), 1, "sensitivity", 0)] if s.mixed else []
    rank += [times(one, probes, f"{probes} axes alone", m.nbytes), times(one, count, f"rank {count}", 2 * m.nbytes)]
    if rows:
        rank.append(times(compression_size.vocabulary(t, length, limit.limit_bytes), 1, "choose tokens", 0))
    ours = [p for p in made.phases if p.name not in NOT_OURS]
    trained = [times(p, finals, f"{p.name}, {finals} finalists", p.written_bytes, 0) for p in ours]
    judged = estimates.compared([t, m, m, m], judging, length)
    trained.append(times(judged, finals, "judge them", 2 * m.nbytes))
    return {"rank": rank, "finalists": trained if finals else []}, made


def sensitivity(teacher: estimates.ModelSize, length: int, limit_bytes: int) -> estimates.StageCost:
    """To see on SENSED windows what every matrix of the teacher costs in fewer bits."""
    return compression_size.quantize(teacher, QuantizationConfig(q_method="round"), SENSED, length, limit_bytes)
