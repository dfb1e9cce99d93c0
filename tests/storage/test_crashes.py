"""What survives a killed process, a full disk and a power cut: real ones, the last by a model."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest

from mis_mlx.storage.checkpoint import load_arrays, newest, save_step
from mis_mlx.storage.files import DISK
from tests import forks
from tests.faults.power import Drive, recorded

TRAINER = """
import itertools, pathlib, sys
import mlx.core as mx
from mis_mlx.storage.checkpoint import lock, newest, save_step
from mis_mlx.storage.files import DISK
run = pathlib.Path(sys.argv[1])
with lock(run):
    saved = newest(run / "steps")
    for n in itertools.count(saved.number + 1 if saved else 1):
        arrays = {k: {"w": mx.full((size,), n % 256, dtype=mx.uint8)} for k, size in (("model", 3 << 18), ("optimizer", 3))}
        save_step(run / "steps", n, arrays, {"step": n}, DISK)
        print(n, flush=True)
"""  # noqa: E501


@pytest.mark.parametrize("kills", [10, pytest.param(150, marks=pytest.mark.slow)])
def test_a_killed_run_continues_from_its_last_acknowledged_step(
    tmp_path: Path, kills: int, own_home: dict[str, str]
) -> None:
    """SIGKILL at random moments: what comes back is whole and never older than the last step printed."""
    rng = random.Random(1)
    last = 0
    for _ in range(kills):
        child = forks.start(["-c", TRAINER, tmp_path], own_home, stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()  # it has begun
        time.sleep(rng.random() * 0.1)
        child.kill()
        printed = [int(line) for line in child.communicate()[0].splitlines()]
        saved = newest(tmp_path / "steps")
        assert saved is not None and saved.number >= max([last + 1, *printed]) and saved.notes == ()
        assert saved.state == {"step": saved.number}
        w = load_arrays(saved, "model")["w"]
        assert w.size == 3 << 18 and mx.all(w == saved.number % 256).item()
        last = saved.number


LIMITED = """
import pathlib, resource, sys
import mlx.core as mx
from mis_mlx.storage.checkpoint import save_step
from mis_mlx.storage.files import DISK
from mis_mlx.types import MisError
steps = pathlib.Path(sys.argv[1])
save_step(steps, 1, {"model": {"w": mx.ones(1000)}}, {}, DISK)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_step(steps, 2, {"model": {"w": mx.ones(100_000)}}, {}, DISK)
except MisError as error:
    print(error)
"""


def test_a_file_that_does_not_fit_leaves_the_step_before(tmp_path: Path) -> None:
    """The kernel itself refuses in the middle of a file: one sentence, no half step, step 1 whole."""
    done = subprocess.run([sys.executable, "-c", LIMITED, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout == (
        f"The disk does not take files this large in {tmp_path}: the checkpoint was not saved; "
        "free some and start again with --resume; the last good step is 1\n"
    )
    assert os.listdir(tmp_path) == ["step-00000001"]
    saved = newest(tmp_path)
    assert saved is not None and load_arrays(saved, "model")["w"].tolist() == [1.0] * 1000


def lost_in_power_cuts(tmp_path: Path, cuts: int, forgets: str = "") -> int:
    """Save five steps, cut the power `cuts` times; how often an acknowledged step did not come back.

    Asserts that whatever does come back has exactly the bytes that were saved.
    """
    root = tmp_path / "root"
    root.mkdir()
    saved_bytes: dict[int, dict[str, bytes]] = {}
    acknowledged_at: list[int] = []
    with recorded(forgets) as trace:
        for n in range(1, 6):
            arrays = {
                "model": {"w": mx.full((700,), n), "v": mx.full((9,), n)},
                "optimizer": {"m": mx.full((500,), n)},
            }
            path = save_step(root, n, arrays, {"step": n}, DISK)
            acknowledged_at.append(len(trace))
            saved_bytes[n] = {p.name: p.read_bytes() for p in path.iterdir()}
    rng = random.Random(0)
    lost = 0
    for number in range(cuts):
        moment = rng.randrange(len(trace) + 1)
        drive = Drive()
        for operation in itertools.islice(trace, moment):
            drive.do(operation)
        out = tmp_path / f"cut-{number}"
        out.mkdir()
        drive.after_cut(rng, root, out)
        found = newest(out)
        if found is not None:
            assert {p.name: p.read_bytes() for p in found.path.iterdir()} == saved_bytes[found.number]
        lost += (found.number if found else 0) < sum(at <= moment for at in acknowledged_at)
    return lost


@pytest.mark.parametrize("cuts", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_no_power_cut_loses_an_acknowledged_step(tmp_path: Path, cuts: int) -> None:
    """At any moment of five saves: the last acknowledged step or a newer one is there, every byte right."""
    assert lost_in_power_cuts(tmp_path, cuts) == 0


@pytest.mark.parametrize("forgets", ["file", "folder"])
def test_the_power_cut_test_has_teeth(tmp_path: Path, forgets: str) -> None:
    """Without the fsync of files, or of folders, it finds lost steps (but never wrong bytes)."""
    assert lost_in_power_cuts(tmp_path, 200, forgets) > 20
