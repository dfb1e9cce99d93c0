"""Operation N of a job fails: the disk is full, or answers no more, or the process ends there; for
N = 1, 2, 3 ...

After each: what was said to be safe is there with its bytes, and the job, gone on with, ends with
those of a job that nothing happened to.
"""

from __future__ import annotations

import ast
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mis_mlx.maths import stats
from mis_mlx.storage import checkpoint as protocol
from mis_mlx.storage.files import Files
from tests.conftest import mostly_slow, mostly_thorough
from tests.faults.conftest import Note
from tests.faults.verdicts import FATES, Bench

TUNED = "quantize, tuned"  # short, with hundreds of operations
SHORT = ("prune", "quantize", TUNED, "export", "logit store", "spool")
LONG = (
    "distill",
    "distill, scales on disk",
    "distill, block by block",
    "distill, blocks in turn",
    "sft",
    "dpo",
    "grpo",
)
ONCE = [name for name in SHORT if name != TUNED]
QUICK = (TUNED, "sft", "dpo")
FEW = 4  # operations of a long job in the quick run
# Operations at which a job is stopped and gone on with in the slow run, spread over all it has. A
# job has up to a thousand, and some seconds for each would make a day of it.
EACH = 60

Benches = Callable[[str], Bench]


@pytest.mark.parametrize("name", mostly_thorough(ONCE, "prune", "logit store"))
def test_whichever_operation_fails_nothing_is_lost(name: str, bench: Benches) -> None:
    """Every operation, one after the other; the fate changes from one to the next."""
    b = bench(name)
    fates = list(FATES.values())
    for at in range(1, b.operations + 1):
        b.operation(at, fates[at % len(fates)])
    assert not b.bad
    assert b.ends["said so"] > 0
    assert b.ends["killed"] > 0


@pytest.mark.parametrize(
    "name",
    mostly_slow(
        (TUNED, *LONG),
        *QUICK,
        thorough=set(LONG),
    ),
)
def test_a_run_goes_on_after_any_operation(name: str, bench: Benches) -> None:
    """A few operations all over a run."""
    b = bench(name)
    fates = list(FATES.values())
    for i in range(FEW):
        b.operation(1 + (2 * i + 1) * b.operations // (2 * FEW), fates[i])
    assert not b.bad


@pytest.mark.slow
@pytest.mark.parametrize("name", (*SHORT, *LONG))
def test_operations_refused(name: str, bench: Benches, note: Note) -> None:
    """Full or no answer, by turns, at EACH operations of a job; under a short one both at each."""
    b = bench(name)
    fates = [FATES["I/O error"], FATES["disk full"]]
    for number, at in enumerate(stats.spread(b.operations, EACH)):
        for fate in fates if name in SHORT else [fates[number % 2]]:
            b.operation(int(at) + 1, fate)
    note("the disk refuses an operation", name, b.ends, len(b.bad))
    assert not b.bad
    assert b.ends.total() >= min(b.operations, EACH)


@pytest.mark.slow
@pytest.mark.parametrize("name", (*SHORT, *LONG))
def test_the_end_of_the_process_at_every_operation(name: str, bench: Benches, note: Note) -> None:
    """Half of operation N is done, and nothing after it, for every N: nothing is lost. From EACH
    disks that differ the job is gone on with.
    """
    b = bench(name)
    b.ends_at_each(EACH)
    note("the end of the process, at every operation in turn", name, b.ends, len(b.bad))
    assert not b.bad
    assert b.ends["killed"] == b.operations


@contextmanager
def in_place(final: Path, files: Files, *_: Any) -> Iterator[Path]:
    """What a program without a protocol does: it writes where the model will be."""
    files.make_folder(final)
    yield final


def test_without_the_protocol_it_is_found_out(
    bench: Benches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A test of the test: written in place, half a model is taken for a whole one."""
    b = bench("prune")
    monkeypatch.setattr(protocol, "commit_folder", in_place)
    for at in range(1, b.operations + 1, 4):
        b.operation(at, FATES["end of the process"])
    assert b.bad


@pytest.mark.thorough
def test_a_step_overwritten_is_found_out(bench: Benches, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test of the test: the old step gone before the new one is there, a step is lost."""
    b = bench("distill")
    commit = protocol.commit_folder

    @contextmanager
    def greedy(final: Path, *arguments: Any, **more: Any) -> Iterator[Path]:
        if protocol.STEP.fullmatch(final.name):
            for old in final.parent.glob("step-*"):
                shutil.rmtree(old)
        with commit(final, *arguments, **more) as tmp:
            yield tmp

    monkeypatch.setattr(protocol, "commit_folder", greedy)
    for at in range(b.operations // 3, 2 * b.operations // 3, 10):
        b.operation(at, FATES["end of the process"])
        if b.bad:
            break
    assert any("acknowledged but lost" in each for each in b.bad)


PACKAGE = Path(__file__).parents[2] / "mis_mlx"
CHANGES = {
    *("write_text", "write_bytes", "unlink", "mkdir", "makedirs", "rename", "rmtree", "rmdir"),
    *("copyfile", "copytree", "move", "touch", "symlink_to", "truncate", "pwrite", "ftruncate"),
    *("savez", "save_safetensors", "save_gguf"),
}
# Who changes a disk without `Files`, and why a run loses nothing by it.
WITHOUT = {
    "storage/files.py": "it is that class",
    "storage/checkpoint.py": "the text in the lock file, which is for people",
    "storage/hub.py": "a download, whole or absent: half of it lies in a folder of another name",
    "models/opening/wheel_model.py": "the same, its conversion",
    "judge/tasks/task_registry.py": "the same",
    "hardware/blas.py": "a library under other names, whole or absent; it runs before anything of "
    "ours is imported",
    "checks/engine.py": "a model made on the spot, in a temporary folder of its own",
    "checks/training_step.py": "the same",
    "checks/groups.py": "rows of a check as they are found, in that temporary folder",
    "doctor.py": "that temporary folder's parts",
    "hardware/programs.py": "the same, a wheel of a wrong hash is deleted",
    "hardware/rates.py": "a file of zeros that measures how quick the disk is",
    "hardware/thermal/recording.py": "a recording of thermometers, which the command `thermal` "
    "makes",
}


def changes(path: Path) -> list[str]:
    """Calls that change a disk and do not go through an object called files or DISK."""
    found = []
    for call in (
        n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.Call)
    ):
        writes = any(ast.unparse(a) in ("'w'", "'a'", "'wb'", "'ab'", "'xb'") for a in call.args)
        if isinstance(call.func, ast.Attribute):
            owner = ast.unparse(call.func.value)
            through = owner.endswith(("files", "DISK"))
            opened = call.func.attr == "open" and any(
                ast.unparse(a) in ("'w'", "'a'", "'wb'", "'xb'") for a in call.args
            )
            known = call.func.attr in CHANGES or f"{owner}.{call.func.attr}" in (
                "os.replace",
                "os.remove",
                "np.save",
            )
            if (known or opened) and not through and "io.BytesIO" not in ast.unparse(call):
                found.append(f"{call.lineno}: {ast.unparse(call)[:80]}")
        elif ast.unparse(call.func) == "open" and writes:
            found.append(f"{call.lineno}: {ast.unparse(call)[:80]}")
    return found


def test_a_run_changes_the_disk_through_one_class() -> None:
    """What is not behind `Files` cannot fail here: it is listed with a reason."""
    every = {str(path.relative_to(PACKAGE)): changes(path) for path in PACKAGE.rglob("*.py")}
    unlisted = {name: made for name, made in every.items() if made and name not in WITHOUT}
    assert not unlisted
    assert every["storage/files.py"]
