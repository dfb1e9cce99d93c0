"""What macOS's own counts leave for a process. The texts have vm_stat's form and the proportions of
real ones; nobody has run this on a Mac.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from mis_mlx.hardware import free_memory, jobs, memory
from mis_mlx.types import GIB
from tests.hardware.test_macos import program

MIB = 2**20
PAGE = 16384
LINES = """Mach Virtual Memory Statistics: (page size of {page} bytes)
Pages free:                          {free:>16}.
Pages active:                        {active:>16}.
Pages inactive:                      {inactive:>16}.
Pages speculative:                   {speculative:>16}.
Pages throttled:                                    0.
Pages wired down:                    {wired:>16}.
Pages purgeable:                                  612.
"Translation faults":                       574921966.
Pages purged:                                16666917.
File-backed pages:                   {files:>16}.
Anonymous pages:                     {anonymous:>16}.
Pages stored in compressor:          {stored:>16}.
Pages occupied by compressor:        {compressor:>16}.
Pageouts:                                      320741.
Swapouts:                                      929703.
"""
COUNTS = ("free", "active", "inactive", "speculative", "wired")
COUNTS += ("files", "anonymous", "stored", "compressor")


def said(*counts: int) -> str:
    """vm_stat's text, of pages in the order of COUNTS."""
    return LINES.format(page=PAGE, **dict(zip(COUNTS, counts, strict=True)))


# An Air of 8 GB: 524,288 pages, of which firmware keeps some 21,000 that stand in no line.
# Nothing is open: most of it is free, or files that were read.
IDLE = said(141_210, 118_334, 121_907, 14_820, 86_553, 148_215, 106_846, 31_400, 20_466)
# A browser: half of what is in memory is a program's, and the compressor is at work.
BROWSER = said(4_440, 133_826, 129_166, 964, 97_842, 92_263, 171_693, 281_653, 137_140)


def found(vm_stat: str, level: str, inactive: int = 2 * GIB) -> free_memory.FreeMemory:
    """What an 8 GB Mac's counts say. inactive: psutil's `available`."""
    return free_memory.of_macos(vm_stat, level, total_bytes=8 * GIB, available_bytes=inactive)


@pytest.mark.parametrize(
    ("vm_stat", "pages"),
    [(IDLE, 141_210 + 148_215), (BROWSER, 4_440 + 92_263)],
)
def test_free_is_what_nobody_holds(vm_stat: str, pages: int) -> None:
    """Free pages and those of files, active ones too; whatever psutil makes of it."""
    for inactive in (GIB // 2, 6 * GIB):
        assert found(vm_stat, "81", inactive).nbytes == pages * PAGE


def test_macos_own_level_is_a_bound() -> None:
    """Where macOS is nearer to its end than the pages say, its level counts; else not."""
    assert found(IDLE, "30").nbytes == 8 * GIB * 30 // 100
    assert found(BROWSER, "30").nbytes < 8 * GIB * 30 // 100


def test_a_silent_source_is_left_out() -> None:
    """Neither program answers: psutil's. Only one: that one, unless it is the level alone."""
    refused = "(refused: FileNotFoundError)"
    assert found(refused, refused).nbytes == 2 * GIB
    assert found(refused, "81").nbytes == 2 * GIB
    assert found(IDLE, refused).nbytes == (141_210 + 148_215) * PAGE
    assert found(IDLE.replace("File-backed", "Other"), "81").untaken_bytes is None
    assert free_memory.counted_bytes("Pages free: 12.", free_memory.FREE) is None


def test_a_mac_s_programs_are_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`vm_stat` and kern.memorystatus_level decide the budget, and the studio's free memory."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (tmp_path / "vm_stat.txt").write_text(BROWSER)
    program(programs, "vm_stat", f"cat '{tmp_path}/vm_stat.txt'")
    program(programs, "sysctl", '[ "$*" = "-n kern.memorystatus_level" ] && echo 53')
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setattr(sys, "platform", "darwin")
    seen = SimpleNamespace(total=8 * GIB, available=GIB, used=5 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: seen)
    assert free_memory.now() == free_memory.FreeMemory(
        GIB, (4_440 + 92_263) * PAGE, 8 * GIB * 53 // 100
    )
    assert jobs.free_bytes() == (4_440 + 92_263) * PAGE
    assert memory.free_for_us_bytes() > jobs.free_bytes()  # with what this process holds
