"""lm-eval's own tasks through mlx-lm's adapter (mlx_lm.evaluate): the mark of every question, and its chance.

Needs the extra `evaluate`, data sets from the hub, and the whole model in memory."""

import difflib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from mis_mlx.models import load, policy
from mis_mlx.types import MisError

METRICS = ("acc", "exact_match", "f1")  # the first one that a task has is its mark
Sample = Mapping[str, Any]  # lm-eval's record of one question: "doc_id", "filtered_resps", and its metrics by name


def check(ids: Sequence[str]) -> None:
    """MisError where lm-eval is not installed; and for ids that it does not have, with the nearest ones."""
    if find_spec("lm_eval") is None:
        raise MisError("lm-eval's tasks need lm-eval, which is not here: pip install 'mis-mlx[evaluate]'")
    with _hushed():
        known = _manager(None).all_tasks
    for name in ids:
        if name not in known:
            near = difflib.get_close_matches(name, known, 3, 0.5) or known[:3]
            raise MisError(f"lm-eval has no task {name}: did you mean {' or '.join(near)}?")


@cache
def _manager(tasks_folder: Path | None) -> Any:
    """lm-eval's list of tasks, whose 14,000 files take 10 s to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=None if tasks_folder is None else str(tasks_folder))


def version() -> str:
    """Of lm-eval."""
    import lm_eval

    return lm_eval.__version__


def samples(folder: Path, ids: Sequence[str], count: int, tasks_folder: Path | None = None) -> dict[str, list[Sample]]:
    """{task: lm-eval's own records} of the first `count` questions of each; a group gives its tasks. Greedy.
    tasks_folder: of tasks beside lm-eval's own, described in its YAML. MisError where a data set does not come."""
    with _hushed():
        import lm_eval

        adapter = load.mlx_lm("evaluate").MLXLM(str(folder), use_chat_template=False, trust_remote_code=False)
        adapter._model.set_dtype(policy.compute_dtype(load.open_checkpoint(folder)))
        how: dict[str, Any] = {"limit": count, "log_samples": True, "bootstrap_iters": 0}
        how |= {f"{kind}_seed": 0 for kind in ("random", "numpy_random", "torch_random", "fewshot_random")}
        try:
            found = lm_eval.simple_evaluate(adapter, tasks=list(ids), task_manager=_manager(tasks_folder), **how)
        except (OSError, ValueError, RuntimeError) as error:  # as hub, datasets and requests say that nothing comes
            why = f"{', '.join(ids)} ({type(error).__name__}: {' '.join(str(error).split())[:160]})"
            remedy = "check the network, for the hub's data, or take --tasks polish-offline"
            raise MisError(f"lm-eval could not run {why}: {remedy}") from None
    return found["samples"]


def marks(name: str, found: Sequence[Sample]) -> dict[str, Any]:
    """Of a task, for JSON: its name; marks, 0 to 1, and chance of all questions; metric. Of one filter of several."""
    ordered = sorted((s for s in found if s.get("filter") == found[0].get("filter")), key=lambda s: s["doc_id"])
    metric = next((m for m in METRICS if m in ordered[0]), None)
    if metric is None:
        raise MisError(f"{name} is scored by none of {', '.join(METRICS)}: take a task that is")
    choice = ordered[0].get("resps") and metric == "acc"
    chance = [1 / len(s["resps"]) if choice and len(s["resps"]) > 1 else 0.0 for s in ordered]
    return {"task": name, "marks": [float(np.mean(s[metric])) for s in ordered], "chance": chance, "metric": metric}


@contextmanager
def _hushed() -> Iterator[None]:
    """lm-eval's and datasets' log off the user's screen; their errors still come."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
