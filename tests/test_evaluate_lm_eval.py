"""lm-eval as the witness: a task from a local file, one model, the same answers. Skipped without
lm-eval.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mis_mlx.data import examples
from mis_mlx.hardware import memory
from mis_mlx.judge.tasks import answering, harness, questions, task_registry
from mis_mlx.types import Checkpoint, MisError
from tests.conftest import Done, sentence

WHY = "the extra `evaluate` is not installed: pip install '.[evaluate]' in the checkout"
here = pytest.mark.skipif(harness.find_spec("lm_eval") is None, reason=WHY)
pytestmark = pytest.mark.filterwarnings("ignore")  # lm-eval's and datasets' own

COUNT = 150
YAML = """task: generated
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}\\nAnswer:"
doc_to_choice: options
doc_to_target: "{{{{options.index(answer)}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of 150 questions, two or three options each, and the same as a task of lm-eval's;
    caches of its own.
    """
    monkeypatch.setenv("MIS_MLX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    made: list[dict[str, Any]] = []
    lines = (examples.BUILT_IN / "train.jsonl").read_text("utf-8").splitlines()
    english = [row for row in map(json.loads, lines) if row["language"] == "en"]
    for number, row in enumerate(english[:COUNT]):
        options = [row["answer"], row["rejected"].rpartition(": ")[2], "nobody knows"][
            : 2 + number % 2
        ]
        made.append(
            {"question": row["prompt"], "options": sorted(options), "answer": row["answer"]}
        )
    (tmp_path / "task").mkdir()
    file = tmp_path / "task" / "generated.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in made))
    (tmp_path / "task" / "generated.yaml").write_text(YAML.format(file=file))
    own = pytest.importorskip("lm_eval.tasks").TaskManager(include_path=str(tmp_path / "task"))
    monkeypatch.setattr(harness, "_manager", lambda: own)
    return tmp_path / "task"


@here
def test_log_likelihoods_are_lm_evals(folder: Path, llama: Checkpoint) -> None:
    """Every option of every question to 1e-4 nats; both accuracies question by question."""
    witness = sorted(
        harness.harness_samples(llama, "generated", COUNT)["generated"],
        key=lambda s: s["doc_id"],
    )
    task = questions.file(folder / "generated.jsonl")
    limit = memory.budget(None)
    marks = answering.scores(llama, "0" * 64, task, limit)
    kept = answering.read(answering.answers_path("0" * 64, task.sha256))
    assert len(witness) == len(task.questions) == COUNT
    for n, sample in enumerate(witness):
        theirs = [float(ll) for ll, _ in sample["filtered_resps"]]
        np.testing.assert_allclose(kept[n]["ll"], theirs, atol=1e-4)
    assert marks.tolist() == [s["acc"] for s in witness]
    rows = [json.loads(line) for line in (folder / "generated.jsonl").read_text().splitlines()]
    per_character = questions.task("t", rows, "", per_character=True)
    assert answering.scores(llama, "0" * 64, per_character, limit).tolist() == [
        s["acc_norm"] for s in witness
    ]


@here
def test_its_marks_come_in_order_with_their_chance(folder: Path, llama: Checkpoint) -> None:
    """What `evaluate` takes from lm-eval is what we count ourselves."""
    found = harness.harness_marks(
        "generated", harness.harness_samples(llama, "generated", 30)["generated"]
    )
    task = questions.file(folder / "generated.jsonl")
    ours = answering.scores(llama, "0" * 64, task, memory.budget(None))[:30]
    assert found["metric"] == "acc"
    assert found["marks"] == ours.tolist()
    assert found["chance"] == [q.chance for q in task.questions[:30]]


@here
def test_a_model_that_does_not_fit_is_a_sentence(
    llama: Checkpoint, command: Callable[..., Done]
) -> None:
    """lm-eval's way has the whole model in memory; ours does not."""
    said = sentence(
        command(
            "evaluate", "--teacher", llama.path, "--tasks", "lm_eval/arc_easy", "--budget", "5MiB"
        )
    )
    assert "whole in memory" in said
    assert "the budget is 5 MiB: give a larger --budget" in said


@here
def test_presets_name_tasks_that_lm_eval_has() -> None:
    """And a typo brings the nearest of its own."""
    ids = task_registry.find(["polish", "english"], 10).harness
    harness.check_harness(ids)
    with pytest.raises(
        MisError, match="lm-eval has no task belebele_pol_Latm: did you mean belebele_pol_Latn"
    ):
        harness.check_harness(["belebele_pol_Latm"])


@pytest.mark.skipif(harness.find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_without_lm_eval_the_extra_is_named(
    llama: Checkpoint, command: Callable[..., Done]
) -> None:
    """One sentence, with the command that brings it."""
    said = sentence(command("evaluate", "--teacher", llama.path, "--tasks", "english"))
    assert "need lm-eval, which is not installed: pip install '.[evaluate]' in the checkout" in said
