"""Several machines on one distillation, in bytes and seconds: whose blocks are whose, and what the cable carries.

All of it is computed, for machines that differ in memory and not in speed. Does not know how they find each other
(models/distributed) nor how blocks are passed through (models/pipeline_parallel).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mis_mlx import cli
from mis_mlx.hardware.rates import Rates
from mis_mlx.models import arch, distributed, pipeline_parallel, policy
from mis_mlx.models.stream import Stream
from mis_mlx.planner import estimates, phases
from mis_mlx.planner.estimates import Model
from mis_mlx.planner.job import Job
from mis_mlx.planner.phases import Plan
from mis_mlx.reporting.text import markdown_table
from mis_mlx.types import Budget, Checkpoint, MisError, duration, gib

# Bytes a second each way, TCP, both assumed: a quarter of Thunderbolt 3's 40 Gbit/s, and 1 Gbit/s less its headers.
LINKS = {"Thunderbolt": 1.25e9, "Ethernet": 0.117e9}


@dataclass(frozen=True)
class Host:
    """One machine's part of the teacher: blocks `first` to `first + blocks`, of which `kept` stay in memory."""

    budget_bytes: int
    first: int
    blocks: int
    kept: int
    read_bytes: int  # from its disk, at every pass after the first
    peak_bytes: int


def agreed(made: Plan) -> Plan:
    """The way of the first machine's plan, for each with its own budget; MisError where the student is not whole."""
    if distributed.size() == 1:
        return made
    job = made.job
    made = phases.one(job, made.budget_bytes, made.rates, **distributed.told(lambda: made.way))
    if made.mode == "sharded" or (steps := job.local_steps(made.mode)):
        how = "one part of it at a time" if made.mode == "sharded" else f"{steps} steps of each block first"
        raise MisError(
            f"{distributed.size()} machines train a student that each has whole in memory, and within "
            f"{gib(made.budget_bytes)} this one is to be trained with {how}: "
            "give more --budget, leave out --train and --local-iters, or use one machine"
        )
    return made


def shares(made: Plan) -> tuple[int, ...]:
    """How many of the teacher's blocks each machine has; () where there is one machine."""
    if distributed.size() == 1:
        return ()
    job = made.job
    cost = distributed.told(lambda: reading(job.teacher, job.step, job.length, made.rates))
    counts = pipeline_parallel.shared(job.teacher.shape.layers, distributed.gather(made.pinned), cost)
    cli.say(f"teacher blocks by machine: {', '.join(map(str, counts))}")
    return tuple(counts)


def opened(checkpoint: Checkpoint, limit: Budget, room_bytes: int, tokens: int, length: int, layers: bool) -> Stream:
    """A model for passes of `tokens` that all machines make: whole for each, or its blocks shared out (`layers`).

    room_bytes: of this machine, for the head and for blocks that stay.
    """
    where = checkpoint, policy.compute_dtype(checkpoint), room_bytes, checkpoint.nbytes > limit.limit_bytes
    if distributed.size() == 1 or not layers:
        return Stream(*where)
    m = estimates.model_of(checkpoint)
    keeps = distributed.gather(estimates.pins(m, max(0, room_bytes - m.head_work)))
    cost = distributed.told(lambda: reading(m, tokens, length, estimates.machine_rates()))
    return pipeline_parallel.Relay(*where, pipeline_parallel.shared(m.shape.layers, keeps, cost))


def reading(m: Model, tokens: int, length: int, at: Rates) -> float:
    """What reading a block takes, where passing `tokens` through it takes 1."""
    work = estimates.forward_flops(m, tokens, length, False) / m.shape.layers / at.forward_flops_per_s
    return m.block_bytes / at.read_bytes_per_s / work


def split(m: Model, budgets: Sequence[int], tokens: int, micro_tokens: int, length: int, at: Rates) -> list[Host]:
    """Who gets which blocks for passes of `tokens`. MisError where a machine has no room for one block."""
    one = estimates.streamed_pass("", m, tokens, micro_tokens, length, spool=False)
    needed = one.peak_bytes + m.head_work
    for number, budget in enumerate(budgets):
        if estimates.room(budget, needed, m.gpu) <= 0:
            raise MisError(
                f"machine {number} has {gib(budget)}, and to pass {tokens} tokens through one block at a time takes "
                f"{gib(needed)} beside the process: give it more, leave it out, or lower --max-seq-length"
            )
    keeps = [estimates.pins(m, estimates.room(budget, needed, m.gpu)) for budget in budgets]
    counts, made = pipeline_parallel.shared(m.shape.layers, keeps, reading(m, tokens, length, at)), list[Host]()
    for budget, count, keep in zip(budgets, counts, keeps, strict=True):
        kept, first = min(keep, count), sum(host.blocks for host in made)
        peak = needed + kept * m.block_work
        made.append(Host(budget, first, count, kept, (count - kept) * m.block_bytes, peak))
    return made


def pass_seconds(m: Model, hosts: Sequence[Host], tokens: int, micro_tokens: int, length: int, at: Rates) -> float:
    """One pass. Machines that read work one after the other; where all blocks are in memory, on a micro-batch each."""
    work = estimates.forward_flops(m, tokens, length, False) / m.shape.layers / at.forward_flops_per_s
    each = [max(host.blocks * work, host.read_bytes / at.read_bytes_per_s) for host in hosts]
    if any(host.read_bytes for host in hosts):
        return sum(each)
    parts = -(-tokens // micro_tokens)
    return (sum(each) + (parts - 1) * max(each)) / parts


def relayed_bytes(m: Model, machines: int, tokens: int) -> int:
    """Over a link, one way, for one pass: hidden states to the next machine, and the last ones to all."""
    return 0 if machines == 1 else int(tokens * m.shape.hidden * m.item * (1 + 2 * (machines - 1) / machines))


def gradient_bytes(job: Job, machines: int) -> int:
    """Over a link, one way, in one step: float32 gradients, added in a ring."""
    return int(4 * arch.params(job.student.config) * 2 * (machines - 1) / machines)


def step_seconds(plan: Plan, machines: int, link: float) -> float:
    """A step of `distil`, its windows shared out, and what it sends over the link, which it waits for."""
    phase = next(p for p in plan.phases if p.name == "distil")
    steps = max(plan.job.iters, 1)
    work = phase.flops / plan.rates.training_flops_per_s / machines + phase.update_seconds(plan.rates)
    return max(work, phase.read_bytes / plan.rates.read_bytes_per_s) / steps + gradient_bytes(plan.job, machines) / link


def table(plan: Plan, hosts: Sequence[Host]) -> str:
    """Markdown for people: the machines, one pass of the teacher, one step of the student."""
    job, m, n, micro = plan.job, plan.job.teacher, len(hosts), plan.micro_batch * plan.job.length
    part = max(job.length, job.step // n)  # of one machine's own windows

    def alone(host: Host, tokens: int) -> float:
        own = split(m, [host.budget_bytes], tokens, min(micro, tokens), job.length, plan.rates)
        return pass_seconds(m, own, tokens, min(micro, tokens), job.length, plan.rates)

    machines = []
    for number, h in enumerate(hosts):
        blocks = f"{h.first} to {h.first + h.blocks - 1}" if h.blocks else "none"
        sizes = [gib(h.budget_bytes), blocks, str(h.kept), gib(h.read_bytes), gib(h.peak_bytes)]
        machines.append([str(number), *sizes])
    wire = relayed_bytes(m, n, job.step)
    relayed = pass_seconds(m, hosts, job.step, micro, job.length, plan.rates)
    one, shared = alone(hosts[0], job.step), max(alone(host, part) for host in hosts)
    times = []
    for name, sent, first, each in (
        ("a pass of a step's windows, --spread layers", wire, one, [relayed + wire / link for link in LINKS.values()]),
        ("a pass of a step's windows, --spread whole", 0, one, [shared for _ in LINKS]),
        ("a step of the student", gradient_bytes(job, n), step_seconds(plan, 1, 1.0),
         [step_seconds(plan, n, link) for link in LINKS.values()]),
    ):  # fmt: skip
        times.append([f"{name}, {gib(sent)} over a cable", *map(duration, (first, *each))])
    head = ["machine", "budget", "teacher blocks", "of these in memory", "read at every pass", "peak memory"]
    return "\n\n".join(
        [
            markdown_table(head, machines),
            "This is the teacher alone, as for its logit store; beside a student in training fewer blocks stay.",
            markdown_table([f"computed, {n} machines", "machine 0 alone", *LINKS], times),
        ]
    )
