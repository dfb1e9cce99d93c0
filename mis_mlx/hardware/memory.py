"""Memory of this machine and this process, and a sensible budget, which MLX is told here and
nowhere else.
"""

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ctypes import CDLL, c_uint64
from typing import Any

import mlx.core as mx
import psutil

from mis_mlx.hardware import macos
from mis_mlx.hardware.thermal import apple_sensors
from mis_mlx.types import GIB, Budget, MisError, gib

DEFAULT_BYTES = 5 * GIB
SHARE = 0.75  # of what is there: macOS and the browser want to live too
# by Python and libraries; Metal's runtime: until measured
GROWN_BYTES = 40 * 2**20
GROWN_METAL_BYTES = 150 * 2**20
# More of each lane that trains on a CPU: BLAS's buffer; holes in glibc's heap if all gradients are
# held at once
TRAINED_BYTES = 32 * 2**20
TRAINED_WHOLE_BYTES = 80 * 2**20
# of proc_pid_rusage: its 64-bit words, a UUID first
RUSAGE_V4 = 4
FOOTPRINT = 2 + 7
MOST_FOOTPRINT = 2 + 28
OPEN_FILES = 4096  # macOS allows 256 at first, which a model in many files is beyond
COMMANDS_AHEAD = 10  # command buffers that MLX sends before it waits (scheduler.h)
MEGABYTES = "MLX_MAX_MB_PER_BUFFER"
USUAL_MEGABYTES = "40"
WIRED_MARGIN_BYTES = 256 * 2**20  # beyond what a job needs, so that its last buffers are wired too


def room_bytes() -> int:
    """Most that a process should take: Metal's recommended working set, or the memory available
    now.
    """
    return _recommended(mx) or int(psutil.virtual_memory().available)


def _recommended(device: Any) -> int | None:
    """Metal's recommended working set in bytes; None where nothing is computed on Metal."""
    on_metal = device.default_device() == device.gpu
    return device.device_info().get("max_recommended_working_set_size") if on_metal else None


def in_flight_bytes() -> int:
    """Temporaries of commands that a GPU has not done yet: MLX sends some ten command buffers
    ahead, each with as many megabytes as its environment says (`macos.COMMAND_BUFFERS`). Read in
    MLX's source; no Mac has measured it.
    """
    small = macos.total_bytes() <= macos.SMALL_BYTES or mx.default_device() != mx.gpu
    usual = macos.COMMAND_BUFFERS[MEGABYTES] if small else USUAL_MEGABYTES
    return COMMANDS_AHEAD * int(os.environ.get(MEGABYTES) or usual) * 10**6


def free_for_us_bytes() -> int:
    """What others leave of this machine's memory, what this process holds among it.

    macOS counts neither as used nor as available what its compressor holds, 1 to 2 GB on a busy Mac
    of 8 GB: that is others', too, so the smaller of the two counts decides."""
    seen = psutil.virtual_memory()
    own = psutil.Process().memory_info().rss
    unused = seen.total - max(0, seen.used - own)
    return int(min(unused, seen.available + own))


def budget(asked_bytes: int | None, room: int | None = None) -> Budget:
    """The user's budget, or the least of 5 GiB, 75 % of the room and what others do not use now.
    MisError for more than there is. room: of another machine than this one, in bytes, where nothing
    else runs.
    """
    most = DEFAULT_BYTES
    if room is None:
        room = room_bytes()
        most = min(most, free_for_us_bytes())
    if asked_bytes is None:
        return Budget(min(most, int(SHARE * room)))
    if asked_bytes > room:
        raise MisError(
            f"--budget {gib(asked_bytes)} is more than the {gib(room)} there are: ask for less"
        )
    return Budget(asked_bytes)


def held_bytes() -> tuple[int, int]:
    """(now, most so far) of this process: its physical footprint on a Mac, as Activity Monitor
    shows it, buffers of the GPU among it, which the resident set has only in part; elsewhere the
    resident set.
    """
    try:
        answer = (c_uint64 * (2 + 35))()
        if apple_sensors.functions("memory").proc_pid_rusage(os.getpid(), RUSAGE_V4, answer):
            raise OSError("proc_pid_rusage does not answer")
        return int(answer[FOOTPRINT]), int(answer[MOST_FOOTPRINT])
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts bytes, Linux KiB
        return psutil.Process().memory_info().rss, peak if sys.platform == "darwin" else peak * 1024


class Peak:
    """The most memory the work took: the larger of MLX's own count and the growth of what the
    process held.
    """

    def __init__(self) -> None:
        give_back()
        self.before_bytes = held_bytes()[0]
        self._mlx = 0

    def note(self, mlx_peak_bytes: int) -> None:
        """Remember a peak that MLX counted before it was reset."""
        self._mlx = max(self._mlx, mlx_peak_bytes)

    @property
    def nbytes(self) -> int:
        """Bytes above what the process held when this was made."""
        return max(self._mlx, mx.get_peak_memory(), held_bytes()[1] - self.before_bytes)


def process_bytes(limit_bytes: int, gpu: bool | None = None, trained_bytes: int = 0) -> int:
    """What a process takes of a budget beside its arrays, a sixth of it at most: what Python and
    libraries grow by (measured on a CPU: 13 to 20 MiB, whatever the model). gpu: as this process
    computes, if not said. trained_bytes: more on a CPU, of all lanes that train.
    """
    gpu = mx.default_device() == mx.gpu if gpu is None else gpu
    return min(GROWN_METAL_BYTES if gpu else GROWN_BYTES + trained_bytes, limit_bytes // 6)


def give_back(cache: bool = True) -> None:
    """Freed memory goes back to the system: glibc held 1.8 GB of it after training, beside the next
    phase, and more with every step of a large vocabulary. cache: what MLX keeps, too.
    """
    if cache:
        mx.clear_cache()
    if hasattr(library := CDLL(None), "malloc_trim"):
        library.malloc_trim(0)


def wiring_asked() -> bool:
    """Whether the user wants memory wired. Nobody gets it unasked: wired memory has frozen Macs of
    16 GB, and the kernel has panicked under it (mlx issue 3186)."""
    return os.environ.get("MIS_MLX_WIRE") == "1"


def undo_foreign_wiring(device: Any = mx) -> None:
    """Unwire what a library has just wired without being asked: mlx-lm's batch generator wires all
    that Metal recommends. Nothing happens with MIS_MLX_WIRE=1, or where nothing is wired. device:
    as of `limited`.
    """
    if _recommended(device) and not wiring_asked() and hasattr(device, "set_wired_limit"):
        device.set_wired_limit(0)


@contextmanager
def limited(limit: Budget, wired_bytes: int = 0, device: Any = mx) -> Iterator[None]:
    """MLX throttles itself at the budget, less what the process grows by, and keeps little freed
    memory; its own limits come back after. wired_bytes: what a job is planned to take that trains a
    model whole in memory: with MIS_MLX_WIRE=1 that much is wired on Metal, so that macOS does not
    page it out. device: `mlx.core`, or what a test takes for it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # macOS has a limit of its own on this limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    gpu = device.default_device() == device.gpu
    memory = device.set_memory_limit(limit.limit_bytes - process_bytes(limit.limit_bytes, gpu))
    # Freed memory that MLX may keep: none on a CPU, where a step takes as long as with 2 GiB. On
    # Metal it is emptied before arrays and cache pass MLX's limit.
    cache = device.set_cache_limit(min(GIB, limit.limit_bytes // 4) if gpu else 0)
    most = _recommended(device)
    wired = None
    if wired_bytes and most and wiring_asked() and hasattr(device, "set_wired_limit"):
        # Never more than Metal recommends, that would be fatal.
        wired = device.set_wired_limit(min(most, wired_bytes + WIRED_MARGIN_BYTES))
    try:
        yield
    finally:
        device.set_memory_limit(memory)
        device.set_cache_limit(cache)
        if wired is not None:
            device.set_wired_limit(wired)
