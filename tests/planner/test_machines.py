"""The plan of several machines: blocks by hand, bytes by hand, refusals; what it says is what `distill` does."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest

from mis_mlx.hardware.rates import M1_AIR
from mis_mlx.models import arch, pipeline_parallel
from mis_mlx.planner import estimates, machines, phases
from mis_mlx.types import Checkpoint, MisError
from tests import tiny
from tests.conftest import Done, last_line, sentence
from tests.planner.test_phases import BIG, JOB


@pytest.mark.parametrize(
    ("layers", "keeps", "reading", "counts"),
    [
        (30, [30, 30], 5.0, [15, 15]),  # all in memory: halves
        (9, [9, 9, 9], 5.0, [3, 3, 3]),
        (10, [2, 8], 5.0, [2, 8]),  # room for all between them: as much as each has room for
        (12, [2, 8], 5.0, [2, 10]),  # reading 2 takes no longer than computing 10
        (20, [2, 2], 5.0, [10, 10]),
        (10, [0, 0], 0.5, [5, 5]),  # reading is for free beside the work
        (3, [0, 9], 4.0, [0, 3]),  # the small one has none
    ],
)
def test_blocks_go_where_they_cost_least(layers: int, keeps: list[int], reading: float, counts: list[int]) -> None:
    """Pencil cases; where machines work one after the other, no division in two takes less."""
    assert pipeline_parallel.shared(layers, keeps, reading) == counts and sum(counts) == layers
    if len(keeps) == 2 and sum(keeps) < layers:
        took = [sum(max(n, reading * max(0, n - k)) for n, k in zip(each, keeps, strict=True))
                for each in (counts, *([n, layers - n] for n in range(layers + 1)))]  # fmt: skip
        assert took[0] == min(took)


def test_bytes_by_hand() -> None:
    """Gradients: 2 (n - 1) / n of 4 bytes a parameter; a relay: the states once on, and those of the end to all."""
    params = arch.params(JOB.student.config)
    assert [machines.gradient_bytes(JOB, n) for n in (1, 2, 4)] == [0, 4 * params, 6 * params]
    states = 100 * BIG.shape.hidden * 4
    assert [machines.relayed_bytes(BIG, n, 100) for n in (1, 2)] == [0, 2 * states]


def test_a_split_covers_the_model_and_its_memory_the_budgets() -> None:
    """Every block once, in order; more memory on one machine, more blocks there; a machine too small is named."""
    m = estimates.model_of({**tiny.CONFIG, "num_hidden_layers": 40, "hidden_size": 512}, gpu=True)
    least = estimates.streamed_pass("", m, 64, 32, 32, spool=False).peak_bytes + m.head_work
    small, large = (next(b for b in range(2**24, 2**31, 2**20) if estimates.room(b, least) >= n * m.block_work)
                    for n in (8, 24))  # fmt: skip
    found = machines.split(m, [small, large], 64, 32, 32, replace(M1_AIR, read_bytes_per_s=1e6))
    assert [h.first for h in found] == [0, found[0].blocks] and sum(h.blocks for h in found) == 40
    assert found[0].blocks < found[1].blocks and found[0].kept >= 8
    for h in found:
        assert h.peak_bytes <= h.budget_bytes and h.read_bytes == (h.blocks - h.kept) * m.block_bytes
    with pytest.raises(MisError, match=r"machine 1 has 1 MiB, and to pass 64 tokens .* takes"):
        machines.split(m, [large, 2**20], 64, 32, 32, M1_AIR)


def test_a_pass_by_hand() -> None:
    """Two halves in memory, four micro-batches: (2 + 3) / 8 of one machine's time; read anew, one after the other."""
    m = estimates.model_of({**tiny.CONFIG, "num_hidden_layers": 10}, gpu=True)
    work = estimates.forward_flops(m, 64, 16, False) / M1_AIR.forward_flops_per_s
    kept = [machines.Host(0, 0, 5, 5, 0, 0), machines.Host(0, 5, 5, 5, 0, 0)]
    assert machines.pass_seconds(m, kept, 64, 16, 16, M1_AIR) == pytest.approx(work * 5 / 8)
    read = [replace(h, kept=0, read_bytes=10**9) for h in kept]
    assert machines.pass_seconds(m, read, 64, 16, 16, M1_AIR) == pytest.approx(2e9 / M1_AIR.read_bytes_per_s)


def test_a_step_by_hand() -> None:
    """Half the work on each of two machines, and the gradients over the cable."""
    plan = phases.make(JOB, 2**31, M1_AIR)
    one, two = (machines.step_seconds(plan, n, 1e6) for n in (1, 2))
    distil = next(p for p in plan.phases if p.name == "distil")
    reading = distil.read_bytes / M1_AIR.read_bytes_per_s / plan.job.iters
    work = distil.flops / M1_AIR.training_flops_per_s / plan.job.iters
    update = 28 * arch.params(plan.job.student.config) / 68e9  # which every machine makes
    assert one == pytest.approx(max(work + update, reading)) and update > 0
    sent = machines.gradient_bytes(plan.job, 2) / 1e6
    assert two == pytest.approx(max(work / 2 + update, reading) + sent) and math.isfinite(two)


def test_the_command(command: Callable[..., Done], llama: Checkpoint) -> None:
    """`plan --hosts`: two tables and the parts in the JSON line; a budget that is none is a sentence."""
    argv = ("plan", "--teacher", llama.path, "--machine", "m1-air", "--scenario", "goral")
    done = command(*argv, "--hosts", "1GiB, 2GiB")
    assert done.returncode == 0, done.stderr
    result = last_line(done)
    assert [h["blocks"] for h in result["hosts"]] == [2, 1] and result["hosts"][1]["budget_bytes"] == 2**31
    assert "| computed, 2 machines | machine 0 alone | Thunderbolt | Ethernet |" in done.stdout
    assert "--hosts" in sentence(command(*argv, "--hosts", "much"))
    assert "--hosts" in sentence(command(*argv, "--hosts", "1GiB,"))
