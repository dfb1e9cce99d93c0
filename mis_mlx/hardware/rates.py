"""Say what this machine is, and how fast it reads, writes, multiplies and moves memory.

Rates are measured, or assumed.
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

# On a CPU a pass over a model, forward or in training, takes this many times as long as its matrix
# products; the rest is element-wise work (measured on phases of the default run, one thread of a
# Xeon: 2.2 of distilled scales, 2.7 of quantize; 2.7 and 3.6 before compute/quick_exp).
ELEMENTWISE = 2.5
GPU_TRAINING = 1.1 / 1.45  # training's rate as a share of a forward pass's, on an M1
WAIT_S = 3e-4  # a guess, until `measure` has timed a thousand tiny evaluations
# Between two published ones: 2.8 µs on an M3 Ultra (ml-explore/mlx issue 4521: 3,200 small kernels
# that depend on each other take 8.8 ms), and 5.8 (antonellof/ferrox issue 149).
LAUNCH_S = 5e-6
# What numpy's solvers reach: on one EPYC thread solve(1024) took 44 ms, GPTQ 0.04 to 0.13 s a group
# of matrices.
HOST_FLOPS = 3e10
# What chains of MLX's element-wise kernels wrote on one EPYC thread, 0.28 ns a number: for rates
# that were stored without it.
NUMBERS_PER_S = 3e9
SAMPLE_BYTES = 512 * 2**20
MEMORY_SAMPLE_BYTES = 256 * 2**20
LEAST_RUNS = 5  # of what is timed
PIECE = 32 * 2**20
FIRST_BFLOAT16 = 15  # Apple's name for an M3's GPU, applegpu_g15; an M1's is 13
PATIENCE_S = 7.0  # limit on writing, and on reading: a slow disk is measured on fewer bytes


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
    hot: float = 1.0  # share of the computing rates that is left once the machine is hot
    room_bytes: int | None = None  # most a process should take; None: ask hardware.memory
    host_flops_per_s: float = HOST_FLOPS  # of numpy's solvers next to a GPU, in float64
    numbers_per_s: float = NUMBERS_PER_S  # float32 numbers that a CPU's element-wise kernels write

    def __str__(self) -> str:
        read = f"{self.read_bytes_per_s / 1e9:.2f} GB/s read"
        written = f"{self.write_bytes_per_s / 1e9:.2f} written"
        memory = f"{self.memory_bytes_per_s / 1e9:.0f} GB/s"
        forward = f"{self.forward_flops_per_s / 1e9:,.0f} GFLOP/s forward"
        training = f"{self.training_flops_per_s / 1e9:,.0f} training"
        disk = f"disk {read}, {written}"
        work = f"{forward}, {training}"
        return f"{self.device}: {disk}, memory {memory}, {work} ({self.source})"


def published(name: str) -> Rates:
    """A machine of which only published figures are known: m1-air, m1-air-16gb."""
    figures = (Path(__file__).parent / f"{name}.json").read_text("utf-8")
    return Rates(**json.loads(figures))


M1_AIR = published("m1-air")


def cores() -> int:
    """Cores that this process may use: fewer than the machine has, where it is pinned."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def about() -> dict[str, Any]:
    """What a number was measured on, for people who compare. No names of hosts or users."""
    return {
        "chip": str(mx.device_info().get("device_name", "unknown")),
        "computes_on": _computes_on(),
        "cores": os.cpu_count(),
        "cores_used": cores(),
        "blas_threads": os.environ.get("OPENBLAS_NUM_THREADS"),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
        "release": _release(),
        "python": platform.python_version(),
        "mis-mlx": __version__,
        **{name: version(name) for name in ("mlx", "mlx-lm", "numpy")},
    }


def on_gpu() -> bool:
    """Whether MLX computes on a GPU by default."""
    return mx.default_device() == mx.gpu


def _computes_on() -> str:
    """GPU or CPU."""
    return "GPU" if on_gpu() else "CPU"


def _release() -> str:
    """The system's name and version, without what a distribution appends."""
    if sys.platform == "darwin":
        return f"macOS {platform.mac_ver()[0]}"
    number, _, _ = platform.release().partition("-")
    return f"Linux {number}"


def computes_bfloat16() -> bool:
    """Whether this GPU has bfloat16 in hardware: Apple's from M3 on, and NVIDIA's.

    M1 and M2 emulate it at 50 to 60 % of float32's speed (philipturner/metal-flash-attention issue
    17). A GPU of which nothing is known, as on Linux's CPU under Metal's policy, counts as an M1.
    """
    about = mx.device_info()
    apple = re.match(r"applegpu_g(\d+)", str(about.get("architecture", "")))
    if apple:
        return int(apple[1]) >= FIRST_BFLOAT16
    return "NVIDIA" in str(about.get("device_name", ""))


def matmul_flops(seconds: float = 0.3) -> float:
    """Measure a matrix product, in float operations per second.

    float32 on a CPU, float16 on Metal.
    """
    size = 1024
    dtype = mx.float32
    if on_gpu():
        size = 4096
        dtype = mx.float16
    matrix = mx.random.normal((size, size), key=mx.random.key(0)).astype(dtype)
    # One number of the product is fetched: that waits for all of it.
    return 2 * size**3 / quickest(lambda: (matrix @ matrix)[0, 0].item(), seconds)


def elementwise_numbers(seconds: float = 0.05) -> float:
    """Measure a chain of element-wise kernels, in float32 numbers written per second.

    Of an array as large as those in which grids are fitted (maths/rounding). Faster products do not
    make it faster: processors of one rate here differ by ten times in `matmul_flops`.
    """
    values = mx.random.normal((2**20,), key=mx.random.key(0))
    mx.eval(values)

    def work() -> None:
        mx.eval(mx.square(mx.abs(mx.round((values - 0.1) / 0.3))))

    return 5 * values.size / quickest(work, seconds)


def memory_bytes() -> float:
    """Measure memory, in bytes per second.

    The better of a copy and a pass that only reads (CPU: product of vectors; Metal: maximum).
    """
    nbytes = MEMORY_SAMPLE_BYTES
    source = np.ones(nbytes // 8, np.float32)
    target = np.ones(nbytes // 8, np.float32)
    copying = nbytes / quickest(lambda: np.copyto(target, source), 0.4)
    if on_gpu():
        halves = mx.zeros((nbytes // 2,), mx.float16)
        reading = nbytes / quickest(lambda: mx.max(halves).item(), 0.4)
    else:
        reading = nbytes / quickest(lambda: np.dot(source, target), 0.4)
    return max(copying, reading)


def wait_seconds(count: int = 1000) -> float:
    """Seconds of one tiny evaluation, out of `count` in a row.

    Every synchronisation with the device costs that much.
    """
    x = mx.array(0.0)
    (x + 1).item()
    began = time.perf_counter()
    for _ in range(count):
        x = x + 1
        x.item()
    return (time.perf_counter() - began) / count


def launch_seconds(count: int = 1000) -> float:
    """Seconds of one tiny operation, out of `count` in one evaluation, each on the one before."""

    def work() -> None:
        x = mx.array(0.0)
        for _ in range(count):
            x = x + 1
        x.item()

    return quickest(work, 0.1) / count


def quickest(work: Callable[[], object], seconds: float) -> float:
    """Shortest time of `work`, in seconds.

    A first run warms up. Runs that begin within `seconds` of its end count, and LEAST_RUNS in any
    case: on a busy machine a single run may wait for a core longer than it computes.
    """
    work()
    best = float("inf")
    runs = 0
    until = time.perf_counter() + seconds
    while (began := time.perf_counter()) < until or runs < LEAST_RUNS:
        work()
        best = min(best, time.perf_counter() - began)
        runs += 1
    return best


def disk_bytes(folder: Path, nbytes: int) -> tuple[float, float]:
    """Measure the disk under `folder`: (read, written) bytes per second, past the page cache.

    A new file of `nbytes` is written, read and deleted; of fewer bytes where the disk has little
    room or is slow. MisError when there is no room at all.
    """
    free = files.DISK.free_bytes(folder)
    piece = min(nbytes, PIECE)
    if free < 4 * piece:
        raise MisError(
            f"{folder} has {gib(free)} free, but a measurement needs {gib(4 * piece)}: free some"
        )
    path = folder / f".tmp-rates-{os.getpid()}"
    try:
        pieces = min(nbytes, free // 4) // piece
        written, seconds = _write(path, os.urandom(piece), pieces)
        return _read_rate(path, written), written / seconds
    finally:
        path.unlink(missing_ok=True)


def _read_rate(path: Path, size: int) -> float:
    """Bytes per second of reading the first `size` bytes of a file; fewer if that takes long."""
    # Read by two threads, as passes over a model do.
    reader = block_reader.Reader({}, direct=True, also=[path])
    buffer = memoryview(mmap.mmap(-1, PIECE))
    buffer[:] = bytes(PIECE)  # pages that exist: their first touch is no part of the disk's time
    began = time.perf_counter()
    done = 0
    while done < size and time.perf_counter() - began < PATIENCE_S:
        end = min(done + PIECE, size)
        wait = reader.begin([(path, done, end, buffer[: end - done])])
        wait()
        done = end
    return done / (time.perf_counter() - began)


def _write(path: Path, piece: bytes, count: int) -> tuple[int, float]:
    """Write a piece `count` times; (bytes, seconds until they are on the disk)."""
    began = time.perf_counter()
    written = 0
    with path.open("wb", buffering=0) as file:
        if sys.platform == "darwin":
            # Pages cached once would be read from the cache.
            fcntl.fcntl(file.fileno(), block_reader.F_NOCACHE, 1)
        while written < count * len(piece) and time.perf_counter() - began < PATIENCE_S:
            written += file.write(piece)
    files.DISK.fsync(path)
    return written, time.perf_counter() - began


def device_name() -> str:
    """The device that MLX computes on."""
    return f"{_computes_on()} {mx.device_info().get('device_name', 'of unknown name')}"


def assumed() -> Rates:
    """Measure matrix products in a moment, and assume an ordinary machine's disk and memory."""
    memory = 50e9 if on_gpu() else 10e9
    return _rates(1e9, 0.5e9, memory, "disk and memory assumed: --measure measures them")


def measure(folder: Path, nbytes: int | None = None) -> Rates:
    """Measure all rates, within 20 s, with a temporary file in the existing `folder`.

    nbytes: of that file; default: 512 MiB.
    """
    if nbytes is None:
        nbytes = SAMPLE_BYTES
    read, written = disk_bytes(folder, nbytes)
    return _rates(read, written, memory_bytes(), f"measured {datetime.date.today()}")


def _rates(read: float, written: float, memory: float, source: str) -> Rates:
    """Rates with these bytes per second and with products measured now."""
    gpu = on_gpu()
    flops = matmul_flops()
    numbers = NUMBERS_PER_S
    if gpu:
        forward = flops
        training = flops * GPU_TRAINING
    else:
        forward = training = flops / ELEMENTWISE
        numbers = elementwise_numbers()
    return Rates(
        device=device_name(),
        gpu=gpu,
        read_bytes_per_s=read,
        write_bytes_per_s=written,
        memory_bytes_per_s=memory,
        forward_flops_per_s=forward,
        training_flops_per_s=training,
        source=source,
        numbers_per_s=numbers,
    )


def to_json(rates: Rates) -> str:
    """The text that `load` reads."""
    return json.dumps(asdict(rates), indent=2) + "\n"


def load(path: Path) -> Rates | None:
    """Read the rates in `path`; None where there are none of this device and version."""
    try:
        stored = json.loads(path.read_text("utf-8"))
        rates = Rates(**stored)
    except (OSError, ValueError, TypeError):
        return None
    if rates.device != device_name():
        return None
    return rates
