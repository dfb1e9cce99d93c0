"""A real disk that is full: the page says so in a sentence, lives on, and the run goes on later."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mis_mlx.storage import run_folder
from tests import disks
from tests.studio_page.conftest import write_settings
from tests.studio_page.driving import (
    QUICK,
    Tab,
    browser,
    needs_browser,
    page_of,
    to_the_plan,
)

FULL = re.compile(r"disk space|No space left|disk is full", re.IGNORECASE)
# KiB: the pruned weights do not fit; its repair does not; the training state does not.
TOO_SMALL = (64, 700, 1800)
ENOUGH = 64_000


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """`small_disk(kib)`: a folder on a disk of that size, or from now on of that size."""
    with disks.small_disk(tmp_path / "disk") as sized:
        yield sized


@needs_browser
@pytest.mark.slow
def test_a_full_disk_is_said_and_waited_out(
    folder: Path, home: dict[str, str], small_disk: Callable[[int], Path]
) -> None:
    """No room for the record of a run, then for its folders, one after the other; then room.

    Every time a sentence stands on the page, which goes on; what was saved is used.
    """
    write_settings(folder / "quick.yaml", {**QUICK, "iters": 12})
    (folder / "runs").symlink_to(small_disk(4))
    with page_of(folder, home, "--models", "more") as served, browser() as context:
        tab = Tab(context, served.address)
        to_the_plan(tab)
        tab.press("Start the run")
        tab.page.get_by_text(FULL).first.wait_for()
        assert not list((folder / "runs").rglob("*.json"))
        small_disk(TOO_SMALL[0])
        tab.press("Start the run")
        steps = 0
        for kib in TOO_SMALL:
            if small_disk(kib) and kib != TOO_SMALL[0]:
                tab.press("Resume")
            tab.sees("tiny-001: running")
            tab.sees("tiny-001: stopped")
            tab.page.get_by_text(FULL).first.wait_for()
            assert served.process.poll() is None
            saved = folder / "runs" / "tiny-001"
            before = steps
            steps = len(run_folder.metrics(saved)) if saved.is_dir() else 0
            assert steps >= before
        small_disk(ENOUGH)
        tab.press("Resume")
        tab.sees("tiny-001: finished")
        assert len(run_folder.metrics(folder / "runs" / "tiny-001")) == 12
        assert not tab.errors
