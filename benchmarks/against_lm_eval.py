"""Are our log-likelihoods lm-eval's, and what do they cost? One task from a local file, one model,
both ways in turn.

    scripts/mis benchmarks/against_lm_eval.py [MODEL]        # about 8 minutes on one core; needs
    the extra `evaluate`

240 generated questions (maths, bus, cooking, logic; English and Polish) become a file of choice
rows and a task in lm-eval's YAML. lm-eval runs through mlx-lm's adapter, whose weights are turned
to the type that we compute in. Its clock runs in `loglikelihood` alone; ours also while weights and
tokenizer are read. Each goes twice, in the order ours, lm-eval, lm-eval, ours; the faster one
counts. Writes benchmarks/results/<machine>/against_lm_eval.json.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from laboratory import write
from polish_text import problems

from mis_mlx.compute import precision
from mis_mlx.hardware import memory
from mis_mlx.judge.tasks import answering, harness, questions
from mis_mlx.models.opening import compute_type, load, resolve
from mis_mlx.types import Checkpoint

COUNT = 240
YAML = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}\\n{{{{'Odpowiedź' if language == 'pl' else 'Answer'}}}}:"
doc_to_choice: options
doc_to_target: "{{{{options.index(answer)}}}}"
metric_list: [{{metric: acc}}]
"""


def question_rows(count: int) -> list[dict[str, Any]]:
    """Choice rows: the right answer and a likely slip, in turns."""
    made = []
    for number, row in enumerate(problems.rows("test", 0, count)):
        mark = problems.MARK[row["language"]]  # type: ignore[index]
        wrong = row["rejected"].rpartition(f"{mark}: ")[2]
        options = [row["answer"], wrong] if number // 2 % 2 else [wrong, row["answer"]]
        made.append({"question": row["prompt"], "options": options, "answer": row["answer"]})
        made[-1]["language"] = row["language"]
    return made


def ours(
    checkpoint: Checkpoint, task: questions.Task, cache: Path
) -> tuple[float, float, list[list[float]]]:
    """(seconds, seconds of processor, log-likelihoods): nothing is known at the start."""
    os.environ["MIS_MLX_CACHE"] = str(cache)
    wall = time.monotonic()
    used = time.process_time()
    answering.scores(checkpoint, "0" * 64, task, memory.budget(None))
    wall = time.monotonic() - wall
    used = time.process_time() - used
    kept = answering.read(answering.answers_path("0" * 64, task.sha256))
    return wall, used, [kept[n]["ll"] for n in range(len(task.questions))]


def theirs(adapter: Any, name: str, folder: Path) -> tuple[float, float, list[list[float]], float]:
    """(seconds, seconds of processor, log-likelihoods, accuracy); the seconds are those of the
    adapter's own loop.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    loop = adapter.loglikelihood
    spent = list[tuple[float, float]]()

    def timed(requests: Any) -> Any:
        wall = time.monotonic()
        used = time.process_time()
        found = loop(requests)
        spent.append((time.monotonic() - wall, time.process_time() - used))
        return found

    adapter.loglikelihood = timed
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=adapter, tasks=[name], task_manager=manager, log_samples=True, bootstrap_iters=0
    )
    adapter.loglikelihood = loop
    samples = sorted(found["samples"][name], key=lambda s: s["doc_id"])
    likelihoods = []
    for sample in samples:
        likelihoods.append([float(ll) for ll, _ in sample["filtered_resps"]])
    return *spent[0], likelihoods, float(np.mean([s["acc"] for s in samples]))


def main(model: str | None) -> None:
    """Compare, print and store."""
    harness.check_harness(())
    checkpoint = compute_type.open_to_compute(resolve.resolve_model(model).path)
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "datasets")
        file = folder / "generated.jsonl"
        file.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in question_rows(COUNT))
        )
        (folder / "generated.yaml").write_text(YAML.format(name="generated", file=file))
        task = questions.file(file).as_text()
        adapter = load.mlx_lm("evaluate").MLXLM(str(checkpoint.path), use_chat_template=False)
        dtype = precision.usual_dtype()
        adapter._model.set_dtype(dtype)
        mx.eval(adapter._model.parameters())
        runs_ours = [ours(checkpoint, task, folder / "1")]
        runs_theirs = [theirs(adapter, "generated", folder)]
        runs_theirs.append(theirs(adapter, "generated", folder))
        runs_ours.append(ours(checkpoint, task, folder / "2"))
    right = np.array([q.right for q in task.questions])
    mine, witness = (np.array(r[0][2]) for r in (runs_ours, runs_theirs))
    found = {
        "model": checkpoint.path.name,
        "dtype": str(dtype),
        "questions": len(right),
        "lm_eval": importlib.metadata.version("lm_eval"),
        "accuracy": float((mine.argmax(1) == right).mean()),
        "accuracy_lm_eval": runs_theirs[0][3],
        "choices_that_differ": int((mine.argmax(1) != witness.argmax(1)).sum()),
        "largest_difference_nats": float(np.abs(mine - witness).max()),
        "seconds": [round(r[0], 2) for r in runs_ours],
        "seconds_lm_eval": [round(r[0], 2) for r in runs_theirs],
        "processor_seconds": [round(r[1], 2) for r in runs_ours],
        "processor_seconds_lm_eval": [round(r[1], 2) for r in runs_theirs],
        "time_ratio": round(min(r[0] for r in runs_ours) / min(r[0] for r in runs_theirs), 3),
        "processor_ratio": round(min(r[1] for r in runs_ours) / min(r[1] for r in runs_theirs), 3),
    }
    write("against_lm_eval", "scripts/mis benchmarks/against_lm_eval.py", found)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
