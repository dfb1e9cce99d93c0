"""lm-eval's own tasks, through mlx-lm's adapter (mlx_lm.evaluate). Marks are kept as ours are.

They need the extra `evaluate`, data sets from the hub, and the whole model in memory.
"""

import difflib
import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np

from mis_mlx.compute import precision
from mis_mlx.hardware import memory
from mis_mlx.judge.tasks.answering import answers_path
from mis_mlx.models.architectures import mlx_modules
from mis_mlx.models.opening import load
from mis_mlx.models.passing import distributed
from mis_mlx.storage import run_folder
from mis_mlx.storage.files import DISK
from mis_mlx.types import Checkpoint, MisError

METRICS = ("acc", "exact_match", "f1")  # the first one that a task has is its mark
# lm-eval's record of one question: "doc_id", "filtered_resps", and its metrics by name
Sample = Mapping[str, Any]


@contextmanager
def _hushed() -> Iterator[None]:
    """Keep the logs of lm-eval and datasets off the user's screen; their errors still appear."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@cache
def _manager() -> Any:
    """lm-eval's list of tasks, whose 14,000 files take 10 s to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def check_harness(ids: Sequence[str]) -> None:
    """MisError where lm-eval is not installed, or does not have one of these tasks."""
    if find_spec("lm_eval") is None:
        raise MisError(
            "lm-eval's tasks need lm-eval, which is not installed: pip install '.[evaluate]' in "
            "the checkout"
        )
    with _hushed():
        known = _manager().all_tasks
    for name in ids:
        if name not in known:
            near = difflib.get_close_matches(name, known, 3, 0.5) or known[:3]
            raise MisError(f"lm-eval has no task {name}: did you mean {' or '.join(near)}?")


def harness_samples(checkpoint: Checkpoint, name: str, count: int) -> dict[str, list[Sample]]:
    """{task: lm-eval's own records} of `count` questions, asked greedily.

    name: a task, or a group, which gives several tasks. MisError where its data did not come.
    """
    with _hushed(), memory.nothing_wired():
        import lm_eval

        adapter = load.mlx_lm("evaluate").MLXLM(
            str(checkpoint.path), use_chat_template=False, trust_remote_code=False
        )
        mlx_modules.set_dtype(adapter._model, checkpoint.config, precision.dtype_of(checkpoint))
        try:
            results = lm_eval.simple_evaluate(
                adapter,
                tasks=[name],
                task_manager=_manager(),
                limit=count,
                log_samples=True,
                bootstrap_iters=0,
                random_seed=0,
                numpy_random_seed=0,
                torch_random_seed=0,
                fewshot_random_seed=0,
            )
        # The hub, datasets and requests say with one of these that no data came.
        except (OSError, ValueError, RuntimeError) as error:
            message = " ".join(str(error).split())[:160]
            why = f"{name} ({type(error).__name__}: {message})"
            remedy = (
                "check the network, because the data comes from the hub, or use --tasks "
                "polish-offline"
            )
            raise MisError(f"lm-eval could not run {why}: {remedy}") from None
    return results["samples"]


def harness_marks(name: str, samples: Sequence[Sample]) -> dict[str, Any]:
    """A task of lm-eval, for JSON: its name, marks from 0 to 1, chance of all questions, metric.

    Where a task has several filters, the first one's records count. MisError where it has none of
    METRICS.
    """
    same_filter = [sample for sample in samples if sample.get("filter") == samples[0].get("filter")]
    ordered = sorted(same_filter, key=lambda sample: sample["doc_id"])
    metric = next((metric for metric in METRICS if metric in ordered[0]), None)
    if metric is None:
        raise MisError(f"{name} has none of the metrics {', '.join(METRICS)}: use another task")
    is_choice = ordered[0].get("resps") and metric == "acc"
    chance = []
    for sample in ordered:
        options = len(sample["resps"]) if is_choice else 1
        chance.append(1 / options if options > 1 else 0.0)
    return {
        "task": name,
        "marks": [float(np.mean(sample[metric])) for sample in ordered],
        "chance": chance,
        "metric": metric,
    }


def by_harness(
    checkpoint: Checkpoint,
    model_sha256: str,
    ids: Sequence[str],
    count: int,
) -> list[dict[str, Any]]:
    """`harness_marks` of the first `count` questions of each; a group gives several.

    The first of several machines asks; all of them must call this.
    """

    def rows() -> list[dict[str, Any]]:
        every = list[dict[str, Any]]()
        for name in ids:
            every += _harness_rows(checkpoint, model_sha256, name, count)
        return every

    return distributed.broadcast_json(rows)


def _harness_rows(
    checkpoint: Checkpoint,
    model_sha256: str,
    name: str,
    count: int,
) -> list[dict[str, Any]]:
    """`harness_marks` of one task or group, kept or asked now."""
    key = f"lm_eval {importlib.metadata.version('lm_eval')} {name} {count}"
    path = answers_path(model_sha256, hashlib.sha256(key.encode()).hexdigest())
    if not path.is_file():
        by_task = harness_samples(checkpoint, name, count)
        DISK.make_folder(path.parent)
        lines = [
            json.dumps(harness_marks(task, samples)) + "\n" for task, samples in by_task.items()
        ]
        DISK.replace_text(path, "".join(lines))
    return run_folder.records(path)
