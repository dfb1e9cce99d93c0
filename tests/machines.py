"""Several processes on this machine that work together as several machines do, over the ring back
end on loopback.

`started` begins them as `mlx.launch` does, by its two environment variables, so that a test knows
their process ids. As a program it is one of them: what `work` writes must not depend on how many
there are.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mis_mlx.alignment import sequence_packing
from mis_mlx.compute import precision
from mis_mlx.data.token_windows import Windows
from mis_mlx.distillation import live_teacher, train_loop
from mis_mlx.distillation.whole_model import WholeModel
from mis_mlx.maths.optimizer import GuardedAdamW
from mis_mlx.models.opening import load
from mis_mlx.models.passing import distributed, pipeline_parallel, stream
from mis_mlx.pruning import calibrate
from mis_mlx.settings.recipe import TrainingConfig
from mis_mlx.storage.files import DISK
from mis_mlx.types import Air, Checkpoint
from tests import forks

ROOT = Path(__file__).parents[1]
Processes = list["forks.Fork | subprocess.Popen[str]"]
RECIPE = TrainingConfig(
    iters=10,
    batch_size=3,
    grad_accumulation_steps=2,
    max_seq_length=16,
    learning_rate=1e-3,
    warmup=1,
)


def ports(count: int) -> list[int]:
    """Free ones, as far as anybody can say."""
    ends = [socket.socket() for _ in range(count)]
    for end in ends:
        end.bind(("127.0.0.1", 0))
    found = [end.getsockname()[1] for end in ends]
    for end in ends:
        end.close()
    return found


@contextmanager
def started(
    n: int, argv: Sequence[object], env: Mapping[str, str], cwd: Sequence[Path] = ()
) -> Iterator[Processes]:
    """`python argv` n times, each a machine of n, perhaps in a folder of its own. Who is left at
    the end is killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        hosts = Path(folder) / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports(n)]))
        several = {"MLX_HOSTFILE": str(hosts)} if n > 1 else {}
        made = [
            forks.start(
                argv,
                {**env, **several, "MLX_RANK": str(rank)} if n > 1 else env,
                cwd[rank] if cwd else None,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            for rank in range(n)
        ]
        try:
            yield made
        finally:
            for process in made:
                process.kill()
                process.communicate()


def ended(processes: Processes, seconds: float = 300) -> list[subprocess.CompletedProcess[str]]:
    """All of them, once they are."""
    said = [process.communicate(timeout=seconds) for process in processes]
    return [
        subprocess.CompletedProcess(p.args, p.returncode, *texts)
        for p, texts in zip(processes, said, strict=True)
    ]


def uneven(n: int, length: int = 16) -> Windows:
    """Windows of which some tokens count; of every seventh window none does."""
    rng = np.random.default_rng(2)
    loss_mask = (rng.random((n, length)) < 0.7).astype(np.float32)
    loss_mask[:, -1] = 0
    loss_mask[::7] = 0
    return Windows(rng.integers(0, 512, (n, length)).astype(np.int32), loss_mask)


def lesson() -> sequence_packing.PackedDataset:
    """Rows of 3 to 40 tokens, one a window."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(3, 41, 30)
    rows = [
        (rng.integers(0, 512, n).astype(np.int32), (np.arange(n) >= n // 2).astype(np.float32))
        for n in lengths
    ]
    return sequence_packing.PackedDataset(rows)


def distilled(
    teacher: Checkpoint, student: Checkpoint, shares: Sequence[int] = ()
) -> dict[str, np.ndarray]:
    """Ten steps from the live teacher."""
    model = load.resident_model(student, mx.float32)
    optimizer = GuardedAdamW()
    source = live_teacher.StreamedTeacher(teacher, shares=shares)
    return _learned(
        model,
        list(live_teacher.steps(WholeModel(model, optimizer), source, uneven(24), RECIPE)),
    )


def tuned(student: Checkpoint) -> dict[str, np.ndarray]:
    """Ten steps on rows of uneven lengths, 5 a step: of 3 machines one has fewer."""
    model = load.resident_model(student, mx.float32)
    optimizer = GuardedAdamW()
    rows = lesson()
    text = live_teacher.TextTargets()
    five = replace(RECIPE, batch_size=5, grad_accumulation_steps=1, seed=0)
    batches = partial(rows.micro_batches, text, five)
    return _learned(
        model,
        list(
            train_loop.steps(
                WholeModel(model, optimizer), batches, partial(rows.loss, text, False), RECIPE
            )
        ),
    )


def _learned(model: Any, steps: Sequence[object]) -> dict[str, np.ndarray]:
    parameters = tree_flatten(model.parameters())
    found = {name: np.array(array) for name, array in parameters}
    for name in ("loss", "grad_norm", "tokens"):
        found[f"steps {name}"] = np.array([getattr(step, name) for step in steps])
    return found


def passed(
    teacher: Checkpoint, shares: Sequence[int], headroom_bytes: int | None
) -> dict[str, np.ndarray]:
    """Final hidden states of this machine's part of five windows of different lengths, in two
    passes; by window.
    """
    batches = [mx.random.randint(0, 512, (1, 8 + 5 * k), key=mx.random.key(k)) for k in range(5)]
    where = teacher, mx.float32, headroom_bytes, False
    source = pipeline_parallel.Relay(*where, shares) if shares else stream.Stream(*where)
    source.forward(distributed.shard(batches[:1]))
    hidden = source.forward(distributed.shard(batches))
    return {str(k): np.array(h) for k, h in zip(distributed.shard(range(5)), hidden, strict=True)}


def calibrated(teacher: Checkpoint, shares: Sequence[int] = ()) -> dict[str, np.ndarray]:
    """Statistics of five windows of different lengths, each in air of its own."""
    whole = [mx.random.randint(0, 512, (1, 8 + 5 * k), key=mx.random.key(k)) for k in range(5)]
    airs = [Air(10.0 + 3 * k, altitude_m=832.0) for k in range(5)]
    n = distributed.size()
    air = iter(distributed.shard(airs))
    relay = None
    if shares:
        air = chain.from_iterable(airs[rank::n] for rank in range(n))
        dtype = precision.dtype_of(teacher)
        relay = pipeline_parallel.Relay(
            teacher, dtype, headroom_bytes=0, direct=False, shares=shares
        )
    s, _ = calibrate.calibrate(teacher, distributed.shard(whole), lambda: next(air), relay=relay)
    found = {
        "block": np.array([s.block[i] for i in sorted(s.block)]),
        "measured": np.array(s.measured),
        "ambient": np.array(sorted(set(s.ambient_c))),
    }
    for axis, of in (("ffn", s.ffn), ("heads", s.heads), ("hidden", s.hidden)):
        for i, sums in of.items():
            for key in ("mean", "square", "env_weighted"):
                found[f"{axis} {i} {key}"] = np.asarray(getattr(sums, key), np.float64)
    return found


def work(teacher: Path, student: Path, out: Path) -> None:
    """Everything above, into files of `out`; the logit store of every machine into a folder of its
    own.
    """
    big = load.open_checkpoint(teacher)
    small = load.open_checkpoint(student)
    made = {
        "distilled": distilled(big, small),
        "tuned": tuned(small),
        "calibrated": calibrated(big),
    }
    shares = {1: (), 2: (1, 2), 3: (2, 1, 0)}[distributed.size()]
    made["read"] = passed(big, shares, 0)
    made["kept"] = passed(big, shares, None)
    made["calibrated in layers"] = calibrated(big, shares)
    made["distilled in layers"] = distilled(big, small, shares)
    rank = distributed.shard(range(distributed.size()))[0]
    Teacher = live_teacher.StreamedTeacher
    write = live_teacher.write_store
    store = write(
        big,
        lambda: Teacher(big),
        data=uneven(80),
        folder=out / f"targets-{rank}",
        files=DISK,
        count=20,
        windows_per_pass=7,
    )
    other = write(
        big,
        lambda: Teacher(big, 0, shares=shares),
        data=uneven(80),
        folder=out / f"layers-{rank}",
        files=DISK,
        count=20,
        windows_per_pass=9,
        together=bool(shares),
    )
    assert store.missing() == other.missing() == []
    for name, arrays in made.items():
        np.savez(out / f"{name}-{rank}.npz", **arrays)


if __name__ == "__main__":
    mx.set_default_device(mx.cpu)
    work(*map(Path, sys.argv[1:4]))
    os._exit(0)  # not a second of anybody's shutdown
