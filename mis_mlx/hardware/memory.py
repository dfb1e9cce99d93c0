"""Memory of this machine and this process, and a sensible budget.

MLX's limits are set here and nowhere else.
"""

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ctypes import CDLL, c_uint64
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import psutil

from mis_mlx.hardware import free_memory, macos
from mis_mlx.hardware.thermal import apple_sensors
from mis_mlx.types import GIB, Budget, MisError, gib

DEFAULT_BYTES = 5 * GIB  # at the most by default where there is no Metal to recommend anything
SYSTEM_BYTES = 2 * GIB  # of all memory, which the system and a program or two hold
SHARE = 0.75  # of what Metal recommends, or of free memory: macOS and the browser need some, too
# What a process holds beside arrays: Python and libraries, 105 MiB when a command begins, text and
# holes in the heap: 132 MiB at the most in 57 runs (benchmarks/random_plans.py); on Metal its
# runtime, until measured
PROCESS_BYTES = 150 * 2**20
TRAINED_BYTES = 32 * 2**20  # what each stream adds that trains on a CPU: BLAS's buffer
# proc_pid_rusage: the version asked for, and which 64-bit words of its answer count; a UUID comes
# first
RUSAGE_V4 = 4
FOOTPRINT = 2 + 7
MOST_FOOTPRINT = 2 + 28
# mallopt: blocks from this size on are mapped, and so much freed memory at most stays at the end
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
LARGE_BYTES = 2**20
OPEN_FILES = 4096  # macOS allows 256 at first, too few for a model in many files
COMMANDS_AHEAD = 10  # command buffers that MLX sends before it waits (scheduler.h)
USUAL_MEGABYTES = "40"
ELEMENT_BYTES = 4  # of a temporary: half precision has fewer


def usable_memory_bytes() -> int:
    """The most a process can be given: Metal's recommended working set, or all memory."""
    return _recommended(mx) or int(psutil.virtual_memory().total)


def _recommended(device: Any) -> int | None:
    """Metal's recommended working set in bytes; None where nothing is computed on Metal."""
    if device.default_device() != device.gpu:
        return None
    return device.device_info().get("max_recommended_working_set_size")


def in_flight_bytes() -> int:
    """Temporaries of commands that a GPU has not done yet.

    MLX sends some ten command buffers ahead. One ends with the operation that takes it over so many
    times 2**20 elements as its environment says (`macos.MEGABYTES`). Read in MLX's source; no Mac
    has measured it.
    """
    # Without a GPU the answer is that of a small Mac.
    usual = USUAL_MEGABYTES if mx.default_device() == mx.gpu else macos.SMALL_MEGABYTES
    millions = int(os.environ.get(macos.MEGABYTES) or usual) + 1
    return COMMANDS_AHEAD * millions * 2**20 * ELEMENT_BYTES


def free_for_us_bytes() -> int:
    """Memory of this machine that other processes leave, including what this process holds."""
    own, _ = held_bytes()
    return free_memory.now().nbytes + own


@dataclass(frozen=True)
class Room:
    """What a machine has for a process, in bytes.

    recommended_bytes: by Metal; None where nothing is computed on Metal. free_bytes: what other
    programs leave now; None: of another machine, on which nothing else runs.
    """

    usable_bytes: int
    recommended_bytes: int | None
    free_bytes: int | None

    def and_free(self, why: str) -> str:
        """A reason, and what is free now where that is known."""
        if self.free_bytes is None:
            return why
        return f"{why}; {gib(self.free_bytes)} are free now"


def room_here() -> Room:
    """What this machine has now."""
    return Room(usable_memory_bytes(), _recommended(mx), free_for_us_bytes())


def default_budget(room: Room) -> Budget:
    """The budget where nobody asks for one, in whole MiB: this is the rule, there is no other.

    On Metal three quarters of what Metal recommends, which is two thirds of a small Mac's memory:
    4.00 GiB of 8 GB. Elsewhere three quarters of what is free, 5 GiB at the most. Never more than
    other programs leave free now.
    """
    if room.recommended_bytes is None:
        base = room.usable_bytes if room.free_bytes is None else room.free_bytes
        share = int(SHARE * base)
        if share > DEFAULT_BYTES:
            return Budget(DEFAULT_BYTES, room.and_free("the most by default without Metal"))
        return Budget(_whole(share), f"three quarters of the {gib(base)} that are free now")
    share = int(SHARE * room.recommended_bytes)
    rule = f"three quarters of the {gib(room.recommended_bytes)} that Metal recommends"
    if room.free_bytes is not None and room.free_bytes < share:
        why = f"what other programs leave free now, less than {gib(share)}, {rule}"
        return Budget(_whole(room.free_bytes), why)
    return Budget(_whole(share), room.and_free(rule))


def _whole(nbytes: int) -> int:
    """Bytes in whole MiB, rounded down, so that --budget can say them."""
    return nbytes // 2**20 * 2**20


def budget(asked_bytes: int | None, usable_bytes: int | None = None) -> Budget:
    """The user's budget, or that of the run that goes on; else the default.

    usable_bytes: what Metal recommends on another machine, on which nothing else runs; default:
    this one. MisError when more is asked for than the machine has. That other programs hold some of
    it now refuses nothing: a run that goes on may have begun beside fewer.
    """
    room = room_here() if usable_bytes is None else Room(usable_bytes, usable_bytes, None)
    if asked_bytes is None:
        return default_budget(room)
    if asked_bytes > room.usable_bytes:
        raise MisError(
            f"--budget {gib(asked_bytes)} is more than the {gib(room.usable_bytes)} that this "
            f"machine can give: ask for less"
        )
    return Budget(asked_bytes, room.and_free("as asked for"))


def crowds_page_cache(streamed_bytes: int, limit: Budget) -> bool:
    """Whether a model that is streamed again and again should be read past the page cache.

    The cache would keep as much of it as this process and the system leave. Where that is not all
    of it, the next pass finds none: each block has pushed out the one that is needed next, and the
    browser before that.
    """
    return streamed_bytes + limit.limit_bytes > macos.total_bytes() - SYSTEM_BYTES


def held_bytes() -> tuple[int, int]:
    """(bytes this process holds now, the most it has held so far).

    On a Mac its physical footprint, as Activity Monitor shows it, including buffers of the GPU,
    which the resident set has only in part; elsewhere the resident set.
    """
    try:
        answer = (c_uint64 * (2 + 35))()
        if apple_sensors.functions("memory").proc_pid_rusage(os.getpid(), RUSAGE_V4, answer):
            raise OSError("proc_pid_rusage does not answer")
        return int(answer[FOOTPRINT]), int(answer[MOST_FOOTPRINT])
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if sys.platform != "darwin":  # macOS counts bytes, Linux KiB
            peak *= 1024
        return psutil.Process().memory_info().rss, peak


class Peak:
    """The most memory that work took, from when this was made.

    It is the larger of MLX's own count, which has no arrays of numpy, and the growth of what the
    process held.
    """

    def __init__(self) -> None:
        give_back()  # else the work could use freed memory, and its growth would not show
        self.before_bytes = held_bytes()[0]
        self._mlx = 0

    def note(self, mlx_peak_bytes: int) -> None:
        """Remember a peak that MLX counted before it was reset."""
        self._mlx = max(self._mlx, mlx_peak_bytes)

    @property
    def nbytes(self) -> int:
        """Bytes above what the process held when this was made."""
        return max(self._mlx, mx.get_peak_memory(), held_bytes()[1] - self.before_bytes)


def needed_bytes(taken_bytes: int) -> int:
    """What so many bytes of arrays need of a budget, with the process around them.

    A peak is compared with a budget by this, and nowhere else.
    """
    return taken_bytes + PROCESS_BYTES


def headroom_bytes(limit_bytes: int, taken_bytes: int) -> int:
    """What a budget leaves for things that are welcome but not needed; as of `needed_bytes`."""
    return max(0, limit_bytes - needed_bytes(taken_bytes))


def give_back(cache: bool = True) -> None:
    """Return freed memory to the system.

    glibc held 1.8 GB of it after training, while the next phase ran, and more with every step of a
    large vocabulary. cache: return what MLX keeps, too.
    """
    if cache:
        mx.clear_cache()
    library = CDLL(None)
    if hasattr(library, "malloc_trim"):  # glibc's; macOS has none
        library.malloc_trim(0)


def return_large_blocks() -> None:
    """Ask glibc to give a freed block of LARGE_BYTES or more back to the system at once.

    Left alone it raises that limit to 32 MiB while a program runs, and freed matrices leave holes:
    a run within 480 MiB held 540 MiB, 479 MiB so (mallopt(3)).
    """
    library = CDLL(None)
    if sys.platform == "linux" and hasattr(library, "mallopt"):
        for which in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            library.mallopt(which, LARGE_BYTES)


def _open_more_files() -> None:
    """Raise this process's limit on open files to OPEN_FILES, as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # macOS has a limit of its own on this limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@contextmanager
def limited(limit: Budget, device: Any = mx) -> Iterator[None]:
    """Keep MLX within the budget, less what the process grows by; its own limits come back after.

    MLX throttles itself at the limit and keeps little freed memory. Nothing is wired: that has
    frozen Macs of 16 GB, and the kernel has panicked under it (mlx issue 3186). device: `mlx.core`,
    or a test's substitute.
    """
    _open_more_files()
    return_large_blocks()
    gpu = device.default_device() == device.gpu
    arrays = headroom_bytes(limit.limit_bytes, 0)
    memory = device.set_memory_limit(arrays)
    # Freed memory that MLX may keep: none on a CPU, where a step takes as long as with 2 GiB. On
    # Metal it is emptied before arrays and cache pass MLX's limit.
    cache_bytes = min(GIB, limit.limit_bytes // 4) if gpu else 0
    cache = device.set_cache_limit(cache_bytes)
    try:
        yield
    finally:  # what comes after has limits of its own
        device.set_memory_limit(memory)
        device.set_cache_limit(cache)
