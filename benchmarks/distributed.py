"""What a second machine costs and what it would give: bytes over the link, a step's time, and the
model of two Airs.

    scripts/mis benchmarks/distributed.py --student RUN/pruned    # some minutes on 2 cores, 5 GB of
    memory

Each part in processes of their own, over MLX's ring on loopback. `steps`: distillation of the
student from the default teacher, live, the same global batch on one and on two; bytes are what the
operating system counts of the ring's connections (Linux), beside what the arithmetic says, 4 · 2 (n
- 1) / n a parameter. Two processes share one machine's cores and its memory's bandwidth here, so
that no speed-up can be seen and none is claimed. `layers`: a pass of the teacher, whole on one,
half of its blocks on each of two. `computed`: the same distillation on MacBook Air M1s, by the
planner's published rates and assumed links; nothing of it is measured.

Writes benchmarks/results/<machine>/distributed.json.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import laboratory
import mlx.core as mx

from mis_mlx import cli, distill
from mis_mlx.compute import precision
from mis_mlx.data import preparation
from mis_mlx.distillation import live_teacher, strategies
from mis_mlx.distillation.strategies import MemoryPlan
from mis_mlx.distillation.whole_model import WholeModel
from mis_mlx.hardware import memory, rates
from mis_mlx.maths import optimizer
from mis_mlx.maths.optimizer import GuardedAdamW
from mis_mlx.models.architectures import arch
from mis_mlx.models.opening import compute_type, load, resolve
from mis_mlx.models.opening.model_size import model_of
from mis_mlx.models.passing import distributed, pipeline_parallel, stream
from mis_mlx.planner import estimates
from mis_mlx.planner.distillation_spec import DistillationSpec, spec_of
from mis_mlx.settings.recipe import RATE, DistillationConfig

# where struct tcp_info of Linux has the bytes that were sent and have arrived; those received
# follow
ACKED = 120
# what a run takes of an 8 GB Air
AIR_BYTES = memory.budget(None, rates.M1_AIR.room_bytes).limit_bytes
ACCUMULATE = (1, 4, 16)  # micro-batches in a step of the computed table
# Bytes a second each way, TCP, both assumed: a quarter of Thunderbolt 3's 40 Gbit/s, and 1 Gbit/s
# less its headers.
LINKS = {"Thunderbolt": 1.25e9, "Ethernet": 0.117e9}


@dataclass(frozen=True)
class Settings:
    """What is run."""

    student: str
    """folder of a pruned student"""
    steps: int = 3
    """timed, after a first one"""
    windows: int = 2
    """in a step, all machines together"""
    length: int = 256
    """tokens of a window"""
    processes: tuple[int, ...] = (1, 2)
    work: str | None = None
    """what one of the processes does; set by the program itself"""


def sent_bytes() -> int | None:
    """That this process has sent over its TCP connections and that have arrived; None where that is
    not told.
    """
    if sys.platform != "linux":
        return None
    total = 0
    for name in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as end:
            end.getpeername()
            total += struct.unpack_from(
                "Q", end.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192), ACKED
            )[0]
    return total


def steps(s: Settings) -> dict[str, Any]:
    """One process's part of the distillation: seconds and bytes of every step but the first."""
    big = compute_type.open_to_compute(resolve.resolve_model(None).path)
    small = compute_type.open_to_compute(Path(s.student))
    data = preparation.prepare(None, load.tokenizer(big.path), s.length).train
    sizes = {"batch_size": 1, "grad_accumulation_steps": s.windows, "max_seq_length": s.length}
    r = DistillationConfig(iters=s.steps + 1, learning_rate=RATE, **sizes)  # type: ignore[arg-type]
    student = load.resident_model(small, mx.float32)
    source = live_teacher.StreamedTeacher(big, None)
    stream.load_checked(student)
    seconds = []
    sent = []
    losses = []
    began = time.perf_counter()
    before = sent_bytes()
    for step in live_teacher.steps(WholeModel(student, GuardedAdamW()), source, data, r):
        distributed.all_gather(0)  # nobody measures what another is still sending
        now = time.perf_counter()
        after = sent_bytes()
        if step.number > 1:
            seconds.append(now - began)
            sent.append(None if after is None or before is None else after - before)
        losses.append(step.loss)
        began = time.perf_counter()
        before = sent_bytes()
    return {"seconds": seconds, "sent_bytes": sent, "losses": losses}


def layers(s: Settings) -> dict[str, Any]:
    """One process's part of a pass of the teacher, which stays in memory, over the windows of a
    step.
    """
    big = compute_type.open_to_compute(resolve.resolve_model(None).path)
    data = preparation.prepare(None, load.tokenizer(big.path), s.length).train
    n = distributed.size()
    counts = pipeline_parallel.share_blocks(int(big.config["num_hidden_layers"]), [999] * n, 1.0)
    where = big, precision.dtype_of(big), None, False
    source = pipeline_parallel.Relay(*where, counts) if n > 1 else stream.Stream(*where)
    mine = distributed.shard([mx.array(w[None]) for w in data.tokens[: s.windows]])
    source.forward(mine)
    seconds = []
    sent = []
    for _ in range(s.steps):
        distributed.all_gather(0)
        began = time.perf_counter()
        before = sent_bytes()
        source.forward(mine)
        distributed.all_gather(0)
        after = sent_bytes()
        seconds.append(time.perf_counter() - began)
        sent.append(None if after is None or before is None else after - before)
    return {"seconds": seconds, "sent_bytes": sent, "blocks": counts}


WORK = {"steps": steps, "layers": layers}


def together(s: Settings, n: int, work: str) -> dict[str, Any]:
    """`work` in n processes: what the first one has, and the most bytes that any has sent."""
    ends = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    names = [[f"127.0.0.1:{end.getsockname()[1]}"] for end in ends]
    for end in ends:
        end.close()
    flags = [
        f"--{name}={value}"
        for name, value in asdict(s).items()
        if name in ("student", "steps", "windows", "length")
    ]
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(json.dumps(names))
        file.flush()
        env = {**os.environ, "MLX_HOSTFILE": file.name}
        made = [
            subprocess.Popen(
                [sys.executable, __file__, *flags, f"--work={work}"],
                env={**env, "MLX_RANK": str(rank)},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(n)
        ]
        said = [process.communicate()[0] for process in made]
    if any(process.returncode for process in made):
        raise SystemExit(f"{work} in {n} processes did not end well")
    found = [json.loads(text.splitlines()[-1]) for text in said]
    by_machine = [f["sent_bytes"] for f in found]
    sent = [max(each) for each in zip(*by_machine, strict=True) if None not in each]
    first = found[0] | {"sent_bytes": statistics.median(sent) if sent else None}
    return first | {"median_s": statistics.median(first["seconds"])}


def gradient_bytes(job: DistillationSpec, machines: int) -> int:
    """Over a link, one way, in one step: float32 gradients, added in a ring."""
    return int(4 * arch.params(job.student.config) * 2 * (machines - 1) / machines)


def step_seconds(plan: MemoryPlan, machines: int, link: float) -> float:
    """A step of `distil`, its windows shared out, and what it sends over the link, which it waits
    for.
    """
    phase = next(p for p in plan.phases if p.name == "distil")
    steps = max(plan.job.iters, 1)
    update = (
        optimizer.TRAFFIC_BYTES * phase.updated / plan.rates.memory_bytes_per_s
        if plan.rates.gpu
        else 0.0
    )
    work = phase.flops / plan.rates.training_flops_per_s / machines + update
    return (
        max(work, phase.read_bytes / plan.rates.read_bytes_per_s) / steps
        + gradient_bytes(plan.job, machines) / link
    )


def computed(s: Settings) -> list[dict[str, Any]]:
    """Steps of two Airs: by the planner, of micro-batches of one window, for more and more of them
    in a step.
    """
    at = estimates.machine_rates("m1-air")
    big, small = (
        model_of(compute_type.open_to_compute(p), at.gpu)
        for p in (resolve.resolve_model(None).path, Path(s.student))
    )
    rows = []
    for count in ACCUMULATE:
        asked = distill.Settings(
            batch_size=1, grad_accumulation_steps=2 * count, max_seq_length=s.length
        )
        plan = strategies.best_plan(spec_of(big, small, asked, asked), AIR_BYTES, at)
        one = step_seconds(plan, 1, 1.0)
        row: dict[str, Any] = {"windows": 2 * count, "tokens": plan.job.step_tokens, "one_s": one}
        row["link_bytes"] = gradient_bytes(plan.job, 2)
        for link, rate in LINKS.items():
            row[f"two_{link.lower()}_s"] = two = step_seconds(plan, 2, rate)
            row[f"faster_{link.lower()}"] = one / two
        rows.append(row)
    return rows


def main(s: Settings) -> None:
    """All parts; or `work`, of one process, whose JSON is its last line."""
    if s.work:
        print(json.dumps(WORK[s.work](s)))
        return
    found: dict[str, Any] = {
        "given": {k: v for k, v in asdict(s).items() if k not in ("student", "work")}
    }
    small = compute_type.open_to_compute(Path(s.student))
    model = model_of(small)
    found["student_sha256"] = laboratory.weights_sha256(small.path)
    noise = laboratory.busy("at the start")
    for work in WORK:
        found[work] = {str(n): together(s, n, work) for n in s.processes}
        for n, row in found[work].items():
            cli.say(f"{work}, {n}: {row['median_s']:.2f} s, {row['sent_bytes']} bytes sent by one")
    job = spec_of(model, model, distill.Settings(), distill.Settings())
    found["gradient_bytes"] = {str(n): gradient_bytes(job, n) for n in s.processes}
    found["computed: two MacBook Air M1"] = computed(s)
    found["links, assumed, bytes/s"] = LINKS
    found["noise"] = noise + laboratory.busy("at the end")
    sizes = "".join(
        f" --{name} {value}" for name, value in found["given"].items() if name != "processes"
    )
    laboratory.write(
        "distributed", f"scripts/mis benchmarks/distributed.py --student RUN/pruned{sizes}", found
    )


if __name__ == "__main__":
    main(cli.parse(Settings))
