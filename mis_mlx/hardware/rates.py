"""What this machine is, and how fast it reads, writes, multiplies and moves memory: measured, or
assumed.
"""

import datetime
import fcntl
import json
import mmap
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import psutil

from mis_mlx import __version__
from mis_mlx.storage import block_reader, files
from mis_mlx.types import MisError, gib

# On a CPU a pass over a model takes this many times its matrix products, forwards or in training,
# the rest being element-wise work (measured on the phases of the default run, two cores: 3.1 to
# 4.3).
ELEMENTWISE = 3.6
GPU_TRAINING = 1.1 / 1.45  # training's rate as a share of a forward pass's, on an M1
WAIT_S = 3e-4  # a guess, until `measure` has timed a thousand tiny evaluations
# What numpy's solvers reach: on one EPYC thread solve(1024) took 44 ms, GPTQ 0.04 to 0.13 s a group
# of matrices.
HOST_FLOPS = 3e10
SAMPLE_BYTES = 512 * 2**20
MEMORY_SAMPLE_BYTES = 256 * 2**20
PIECE = 32 * 2**20
FIRST_BFLOAT16 = 15  # Apple's name for the GPU of an M3, applegpu_g15; of an M1 it is 13
PATIENCE_S = 7.0  # most for writing, and most for reading: a slow disk is measured on fewer bytes


@dataclass(frozen=True)
class Rates:
    """One machine, in bytes and float operations per second, and where the numbers come from."""

    device: str
    gpu: bool
    read_bytes_per_s: float
    write_bytes_per_s: float
    memory_bytes_per_s: float
    forward_flops_per_s: float
    training_flops_per_s: float
    source: str
    hot: float = 1.0  # what is left of the computing rates once the machine is hot
    room_bytes: int | None = None  # most a process should take; None: ask machine.memory
    wait_s: float = WAIT_S  # of one synchronisation with a GPU
    host_flops_per_s: float = HOST_FLOPS  # of numpy's solvers beside a GPU, in float64

    def __str__(self) -> str:
        disk = (
            f"disk {self.read_bytes_per_s / 1e9:.2f} GB/s read, "
            f"{self.write_bytes_per_s / 1e9:.2f} written"
        )
        work = (
            f"{self.forward_flops_per_s / 1e9:,.0f} GFLOP/s forward, "
            f"{self.training_flops_per_s / 1e9:,.0f} training"
        )
        return (
            f"{self.device}: {disk}, memory {self.memory_bytes_per_s / 1e9:.0f} GB/s, {work} "
            f"({self.source})"
        )


@dataclass(frozen=True)
class Roof:
    """The most this machine could do: bytes and float operations per second (float32 on a CPU,
    float16 on Metal).
    """

    device: str
    threads: str  # what the CPU's arithmetic may use: another number makes it another machine
    memory_bytes_per_s: float
    flops_per_s: float
    source: str

    def seconds(self, nbytes: float, flops: float) -> float:
        """The least that moving `nbytes` and doing `flops` takes: they overlap (Williams et al.
        2009).
        """
        return max(nbytes / self.memory_bytes_per_s, flops / self.flops_per_s)


M1_AIR = Rates(**json.loads((Path(__file__).parent / "m1-air.json").read_text("utf-8")))


def cores() -> int:
    """Cores that this process may use: fewer than there are, where it is pinned."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def about() -> dict[str, Any]:
    """What a number was measured on, for people who compare. No names of hosts or users."""
    mac = sys.platform == "darwin"
    return {
        "chip": str(mx.device_info().get("device_name", "unknown")),
        "computes_on": "GPU" if mx.default_device() == mx.gpu else "CPU",
        "cores": os.cpu_count(),
        "cores_used": cores(),
        "blas_threads": os.environ.get("OPENBLAS_NUM_THREADS"),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
        "release": f"macOS {platform.mac_ver()[0]}"
        if mac
        else f"Linux {platform.release().partition('-')[0]}",
        "python": platform.python_version(),
        "mis-mlx": __version__,
        **{name: version(name) for name in ("mlx", "mlx-lm", "numpy")},
    }


def computes_bfloat16() -> bool:
    """Whether this GPU has bfloat16 in hardware: Apple's from M3 on, other makers'. M1 and M2
    emulate it at 50 to 60 % of float32's speed (philipturner/metal-flash-attention issue 17). Where
    nothing is known of a GPU, as on Linux's CPU under Metal's policy, it is taken for an M1.
    """
    about = mx.device_info()
    apple = re.match(r"applegpu_g(\d+)", str(about.get("architecture", "")))
    if apple:
        return int(apple[1]) >= FIRST_BFLOAT16
    return "NVIDIA" in str(about.get("device_name", ""))


def matmul_flops(seconds: float = 0.3) -> float:
    """Float operations per second of a matrix product here and now: float32 on a CPU, float16 on
    Metal.
    """
    gpu = mx.default_device() == mx.gpu
    size = 4096 if gpu else 1024
    a = mx.random.normal((size, size), key=mx.random.key(0)).astype(
        mx.float16 if gpu else mx.float32
    )
    return 2 * size**3 / quickest(lambda: (a @ a)[0, 0].item(), seconds)


def memory_bytes() -> float:
    """Bytes per second that memory moves, by a copy or a pass that reads (CPU: product; Metal:
    maximum), if quicker.
    """
    nbytes = MEMORY_SAMPLE_BYTES
    one, other = (np.ones(nbytes // 8, np.float32) for _ in range(2))
    copying = nbytes / quickest(lambda: np.copyto(other, one), 0.4)
    if mx.default_device() == mx.gpu:
        halves = mx.zeros((nbytes // 2,), mx.float16)
        return max(copying, nbytes / quickest(lambda: mx.max(halves).item(), 0.4))
    return max(copying, nbytes / quickest(lambda: np.dot(one, other), 0.4))


def wait_seconds(count: int = 1000) -> float:
    """Seconds of one tiny evaluation, of so many in a row: what every synchronisation with the
    device costs.
    """
    x = mx.array(0.0)
    (x + 1).item()
    began = time.perf_counter()
    for _ in range(count):
        x = x + 1
        x.item()
    return (time.perf_counter() - began) / count


def quickest(work: Callable[[], object], seconds: float) -> float:
    """Shortest time of `work` among those begun within `seconds` of the end of a first one that
    warms up.
    """
    work()
    best = float("inf")
    until = time.perf_counter() + seconds
    while (began := time.perf_counter()) < until:
        work()
        best = min(best, time.perf_counter() - began)
    return best


def disk_bytes(folder: Path, nbytes: int) -> tuple[float, float]:
    """(read, written) bytes per second, past the page cache, of a new file in `folder` that goes
    again; of fewer bytes where the disk has little room or is slow. MisError when there is no room
    at all.
    """
    free = files.DISK.free_bytes(folder)
    piece = min(nbytes, PIECE)
    if free < 4 * piece:
        raise MisError(
            f"{folder} has {gib(free)} free, a measurement wants {gib(4 * piece)}: free some"
        )
    path = folder / f".tmp-rates-{os.getpid()}"
    try:
        written, seconds = _write(path, os.urandom(piece), min(nbytes, free // 4) // piece)
        # Read by two threads, as passes over a model do.
        reader = block_reader.Reader({}, direct=True, also=[path])
        room = memoryview(mmap.mmap(-1, PIECE))
        room[:] = bytes(PIECE)  # pages that exist: their first touch is no part of the disk's time
        began = time.perf_counter()
        done = 0
        while done < written and time.perf_counter() - began < PATIENCE_S:
            end = min(done + PIECE, written)
            reader.begin([(path, done, end, room[: end - done])])()
            done = end
        return done / (time.perf_counter() - began), written / seconds
    finally:
        path.unlink(missing_ok=True)


def _write(path: Path, piece: bytes, count: int) -> tuple[int, float]:
    """(bytes, seconds until they are on the disk)."""
    began = time.perf_counter()
    written = 0
    with path.open("wb", buffering=0) as file:
        if sys.platform == "darwin":
            # pages cached once are read from there, whoever asks
            fcntl.fcntl(file.fileno(), block_reader.F_NOCACHE, 1)
        while written < count * len(piece) and time.perf_counter() - began < PATIENCE_S:
            written += file.write(piece)
    files.DISK.fsync(path)
    return written, time.perf_counter() - began


def device_name() -> str:
    """What MLX computes on."""
    kind = "GPU" if mx.default_device() == mx.gpu else "CPU"
    return f"{kind} {mx.device_info().get('device_name', 'of unknown name')}"


def assumed() -> Rates:
    """Matrix products measured in a moment; disk and memory are those of an ordinary machine, not
    measured.
    """
    gpu = mx.default_device() == mx.gpu
    return _rates(
        1e9, 0.5e9, 50e9 if gpu else 10e9, "disk and memory assumed: --measure measures them"
    )


def measure(folder: Path, nbytes: int | None = None) -> Rates:
    """All rates, within 20 s, with a temporary file of `nbytes` (default 512 MiB) in the existing
    `folder`.
    """
    read, written = disk_bytes(folder, SAMPLE_BYTES if nbytes is None else nbytes)
    return _rates(read, written, memory_bytes(), f"measured {datetime.date.today()}")


def measure_roof() -> Roof:
    """Memory and arithmetic here and now, in about 2 s."""
    threads = (
        f"{cores()} cores, OPENBLAS_NUM_THREADS={os.environ.get('OPENBLAS_NUM_THREADS', 'not set')}"
    )
    return Roof(
        device_name(),
        threads,
        memory_bytes(),
        matmul_flops(0.5),
        f"measured {datetime.date.today()}",
    )


def _rates(read: float, written: float, memory: float, source: str) -> Rates:
    gpu = mx.default_device() == mx.gpu
    flops = matmul_flops()
    forward, training = (flops, flops * GPU_TRAINING) if gpu else [flops / ELEMENTWISE] * 2
    return Rates(
        device_name(), gpu, read, written, memory, forward, training, source, wait_s=wait_seconds()
    )


def to_json(rates: Rates) -> str:
    """What `load` reads."""
    return json.dumps(asdict(rates), indent=2) + "\n"


def load(path: Path) -> Rates | None:
    """The rates in `path`; None when there are none, or they are another device's or version's."""
    try:
        rates = Rates(**json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return rates if rates.device == device_name() else None
