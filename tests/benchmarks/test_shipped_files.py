"""Texts, prompts and tasks that come with the package are what their programs write, to the byte:
what was found right in them once stays so. What judges shares nothing with what is learned.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks.polish_text import documents
from mis_mlx.data import examples, preparation, prompts
from mis_mlx.judge import answers
from mis_mlx.judge.tasks import questions, task_registry, tool_tasks

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
OWN = ("prompts", "prompt_texts", "prompt_texts.templates", "prompt_texts.words")
RUN = 13  # words in a row, as judge/tasks/questions counts contamination


def imported(name: str, patch: pytest.MonkeyPatch) -> ModuleType:
    """A program, as it is run."""
    patch.syspath_prepend(str(BENCHMARKS))
    for module in OWN:
        patch.delitem(sys.modules, module, raising=False)
    return importlib.import_module(name)


def same(made: Path, kept: Path) -> None:
    """Every file that was made, and of the rows that are kept no other."""
    names = sorted(path.name for path in made.iterdir())
    assert names
    assert {path.name for path in kept.glob("*.jsonl")} <= {*names, "prompts.jsonl", "train.jsonl"}
    for name in names:
        assert (made / name).read_bytes() == (kept / name).read_bytes(), name


def test_texts_in_polish(tmp_path: Path) -> None:
    """Read back, they are the program's documents."""
    documents.write(tmp_path)
    same(tmp_path, preparation.MIS_FOLDER)
    texts = preparation.load(preparation.MIS)
    for name, (seed, count) in documents.SPLITS.items():
        rows = getattr(texts, name)
        assert [row["text"] for row in rows] == documents.documents(seed, count)


def test_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To learn from, and to judge by."""
    program = imported("task_files", monkeypatch)
    program.main(tmp_path / "lessons", tmp_path / "exams")
    same(tmp_path / "lessons", examples.BUILT_IN)
    same(tmp_path / "exams", task_registry.BUILT_IN)


def test_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of training, and held out."""
    places = {"TRAIN": prompts, "PROMPTS": answers}
    kept = {name: getattr(module, name).read_bytes() for name, module in places.items()}
    for name, module in places.items():
        monkeypatch.setattr(module, name, tmp_path / name / "rows.jsonl")
    program = imported("prompts", monkeypatch)
    program.main()
    for name in places:
        assert (tmp_path / name / "rows.jsonl").read_bytes() == kept[name], name


def test_prompts_with_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that judge have other tools and other words than those that are learned."""
    program = imported("tool_prompts", monkeypatch)
    program.main(tmp_path / "judges", tmp_path / "learns")
    same(tmp_path / "judges", tool_tasks.SETS)
    same(tmp_path / "learns", prompts.TRAIN.parent)


def texts_of(path: Path) -> list[str]:
    """What is said in every row of a file of prompts or conversations."""
    found = list[str]()
    for line in path.read_text("utf-8").splitlines():
        row = json.loads(line)
        found += row.get("turns") or [message["content"] for message in row["messages"]]
    return found


def runs_of(texts: Sequence[str]) -> set[tuple[str, ...]]:
    """All runs of so many words in these texts, and every shorter text whole."""
    found = set[tuple[str, ...]]()
    for text in texts:
        words = questions.words(text)
        last = max(0, len(words) - RUN)
        found |= {tuple(words[start : start + RUN]) for start in range(last + 1)}
    return found


def test_training_and_judge_share_no_text() -> None:
    """No run of 13 words, and no shorter prompt, of what judges a student is in what one learns
    from; nor any answer by which it is judged.
    """
    train = runs_of([*texts_of(prompts.TRAIN), *texts_of(preparation.ANSWERS)])
    assert len(train) > 10_000
    assert runs_of(texts_of(answers.PROMPTS)) & train == set()
    said = list[str]()
    for line in answers.SHIPPED.read_text("utf-8").splitlines()[1:]:
        record = json.loads(line)
        said += [record["sampled"]["text"], record["greedy"]["text"]]
    long = [text for text in said if len(questions.words(text)) >= RUN]
    assert len(long) > 150
    assert runs_of(long) & train == set()
