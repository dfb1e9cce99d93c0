"""A real disk of a few kilobytes, mounted for a test."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


def mount(*words: object) -> None:
    """Call mount(8)."""
    subprocess.run(["mount", *map(str, words)], check=True, capture_output=True)


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[Callable[[int], Path]]:
    """`small_disk(kib)`: a folder on a disk of that size; called again, the disk is as large as it
    says then. Skips the test where nobody may mount.
    """

    def sized(kib: int) -> Path:
        options = f"size={kib}k"
        if place.exists():
            mount("-o", f"remount,{options}", place)
        else:
            place.mkdir()
            words = ("-t", "tmpfs", "-o", options, "tmpfs", place)
            mount(*words)
        return place

    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("a small disk takes Linux and root")
    try:
        sized(100)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this machine does not let root mount ({error})")
    yield sized
    mount("-o", "remount,rw", place)
    subprocess.run(["umount", place], check=True)
