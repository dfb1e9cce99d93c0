"""The recovery table of a distilled run: pruned, distilled, 4-bit; and random weights, which must
recover 0 %.

    scripts/mis benchmarks/recovery_table.py runs/NAME [QUESTIONS [TASKS]]        # about 25 minutes
    on one core

100 questions of each task that needs no hub: `builtin`, `dialects` (Firefox in Silesian), to the
default teacher and the run's students. The random
student has the teacher's shape and tokenizer, norms of 1 and N(0, 0.02) elsewhere, and a table of
its own. Killed, it goes on where it was. Writes
benchmarks/results/<machine>/recovery_table.{json,md,svg}.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
from laboratory import RESULTS, write

from mis_mlx import evaluate
from mis_mlx.models.opening import compute_type, resolve
from mis_mlx.types import Checkpoint

TASKS = ("builtin", "dialects")
WINDOWS = 12  # of held-out text
# column: folder of the run
STUDENTS = {"pruned": "pruned", "distilled": "distilled", "4-bit": "model"}


def random_student(like: Checkpoint, out: Path) -> None:
    """A model that has learned nothing, always the same one."""
    out.mkdir()
    for file in [*like.path.glob("*.json"), *like.path.glob("*.jinja")]:
        if not file.name.endswith(".index.json"):
            shutil.copy(file, out)
    weights = {}
    for number, (name, tensor) in enumerate(sorted(like.tensors.items())):
        noise = 0.02 * mx.random.normal(tensor.shape, key=mx.random.key(number))
        weights[name] = (mx.ones(tensor.shape) if len(tensor.shape) == 1 else noise).astype(
            mx.bfloat16
        )
    mx.save_safetensors(str(out / "model.safetensors"), weights)


def table(students: list[str], tasks: tuple[str, ...], count: int, out: Path) -> tuple[dict, str]:
    """(JSON, Markdown) of one table."""
    named = evaluate.Settings(students=tuple(students), tasks=tasks, out=str(out))
    evaluate.run(replace(named, num_questions=count, eval_windows=WINDOWS))
    return json.loads((out / "recovery.json").read_text()), (out / "recovery.md").read_text()


def main(run: Path, count: int, tasks: tuple[str, ...]) -> None:
    """Ask all models and store both tables."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        students = []
        for column, part in STUDENTS.items():
            (folder / column).symlink_to((run / part).resolve(), target_is_directory=True)
            students.append(str(folder / column))
        random_student(
            compute_type.open_to_compute(resolve.resolve_model(None).path), folder / "random"
        )
        found, page = table(students, tasks, count, folder / "out")
        control, control_page = table([str(folder / "random")], tasks, count, folder / "control")
        found["random_weights"] = control
        write(
            "recovery_table",
            f"scripts/mis benchmarks/recovery_table.py runs/NAME {count} {' '.join(tasks)}",
            found,
        )
        page += "\nRandom weights\n\n" + control_page
        (RESULTS / "recovery_table.md").write_text(page)


if __name__ == "__main__":
    main(
        Path(sys.argv[1]),
        int(sys.argv[2]) if len(sys.argv) > 2 else 100,
        tuple(sys.argv[3:]) or TASKS,
    )
