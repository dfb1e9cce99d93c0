"""How much memory of this machine other programs leave. On a Mac nobody has run this yet.

psutil's `available` is right on Linux. On macOS it is inactive + free: it leaves out active pages
of files, which macOS gives up as readily, and counts inactive pages of programs, which it does not.
So there vm_stat's own counts are taken, checked against the level that macOS itself goes by.
"""

import re
import sys
from dataclasses import dataclass

import psutil

from mis_mlx.hardware.macos import asked

PAGE = r"page size of (\d+) bytes"
FREE = "Pages free"  # without speculative pages, which are a file's
OF_FILES = "File-backed pages"
COMPRESSOR = "Pages occupied by compressor"
LEVEL = "kern.memorystatus_level"


@dataclass(frozen=True)
class FreeMemory:
    """What programs leave, in bytes, by three sources; None: the source did not answer.

    available_bytes: psutil's. untaken_bytes: vm_stat's pages that are free or a file's.
    level_bytes: macOS's level, a share of all memory. That counts pages of programs which could be
    compressed, too, so it is a bound and no measure.
    """

    available_bytes: int
    untaken_bytes: int | None = None
    level_bytes: int | None = None

    @property
    def nbytes(self) -> int:
        """What may be taken without pushing others out."""
        if self.untaken_bytes is None:
            return self.available_bytes
        if self.level_bytes is None:
            return self.untaken_bytes
        return min(self.untaken_bytes, self.level_bytes)


def counted_bytes(vm_stat: str, line: str) -> int | None:
    """Bytes in the pages of one line of vm_stat's output; None where there is no such line."""
    page = re.search(PAGE, vm_stat)
    pages = re.search(rf"{line}: +(\d+)", vm_stat)
    if not page or not pages:
        return None
    return int(page[1]) * int(pages[1])


def of_macos(vm_stat: str, level: str, *, total_bytes: int, available_bytes: int) -> FreeMemory:
    """What macOS says. vm_stat, level: the outputs of `vm_stat` and of `sysctl -n LEVEL`.

    What is neither free nor a file's is held: wired, by a program, or by the compressor. Counted
    from the other end, as all memory less these, the memory that the firmware keeps for itself
    would seem free: 0.6 GiB on a Mac of 16 GB.
    """
    free = counted_bytes(vm_stat, FREE)
    of_files = counted_bytes(vm_stat, OF_FILES)
    untaken = None
    if free is not None and of_files is not None:
        untaken = free + of_files
    share = None
    if level.isdecimal():
        share = total_bytes * int(level) // 100
    return FreeMemory(available_bytes, untaken, share)


def now() -> FreeMemory:
    """What is free on this machine at the moment."""
    machine = psutil.virtual_memory()
    if sys.platform != "darwin":
        return FreeMemory(int(min(machine.available, machine.total - machine.used)))
    return of_macos(
        asked(["vm_stat"]),
        asked(["sysctl", "-n", LEVEL]),
        total_bytes=int(machine.total),
        available_bytes=int(machine.available),
    )
