"""Built-in prompts: the program makes the files as they are; what judges a student shares nothing
with its training.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mis_mlx.data import preparation, prompts
from mis_mlx.judge import answers
from mis_mlx.judge.tasks import questions

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NAMES = ("prompts", "prompt_texts", "prompt_texts.templates", "prompt_texts.words")
RUN = 13  # words in a row, as judge/tasks/questions counts contamination


@pytest.fixture(scope="module")
def program() -> Iterator[ModuleType]:
    """benchmarks/prompts.py, imported as it is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        for name in NAMES:
            patch.delitem(sys.modules, name, raising=False)
        yield importlib.import_module("prompts")
        for name in NAMES:
            sys.modules.pop(name, None)


def test_the_files_are_what_the_program_writes(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both, to the byte."""
    kept = {
        name: path.read_bytes()
        for name, path in (("train", prompts.TRAIN), ("held out", answers.PROMPTS))
    }
    monkeypatch.setattr(prompts, "TRAIN", tmp_path / "train" / "train.jsonl")
    monkeypatch.setattr(answers, "PROMPTS", tmp_path / "sets" / "prompts.jsonl")

    program.main()

    assert prompts.TRAIN.read_bytes() == kept["train"]
    assert answers.PROMPTS.read_bytes() == kept["held out"]


def entries(*lists: Mapping[str, Sequence[str | tuple[str, ...]]]) -> set[str]:
    """Every text of these, turns apart, in small letters."""
    found = set[str]()
    for by_name in lists:
        for texts in by_name.values():
            for text in texts:
                found |= (
                    {text.casefold()}
                    if isinstance(text, str)
                    else {turn.casefold() for turn in text}
                )
    return found


def test_no_template_and_no_word_is_in_both(program: Any) -> None:
    """Neither in English nor in Polish, nor across; paragraphs to read and answer questions on
    included.
    """
    templates = program.templates
    words = program.words

    train = entries(templates.TRAIN, templates.TRAIN_PL)
    held_out = entries(templates.HELD_OUT, templates.HELD_OUT_PL)
    assert len(train) > 100
    assert len(held_out) > 50
    assert train & held_out == set()
    train_words = entries(words.TRAIN, words.TRAIN_PL)
    held_out_words = entries(words.HELD_OUT, words.HELD_OUT_PL)
    assert len(train_words) > 400
    assert len(held_out_words) > 100
    assert train_words & held_out_words == set()
    paragraphs = {*templates.PARAGRAPHS, *templates.PARAGRAPHS_PL}
    assert paragraphs & {*templates.HELD_OUT_PARAGRAPHS, *templates.HELD_OUT_PARAGRAPHS_PL} == set()


def test_every_slot_has_its_words(program: Any) -> None:
    """Nothing in braces is left in a prompt."""
    for path in (prompts.TRAIN, answers.PROMPTS):
        assert not re.findall(r"\{\w+\}", path.read_text("utf-8").replace('{"', ""))
    sources = (program.ENGLISH, program.POLISH, program.HELD_OUT_ENGLISH, program.HELD_OUT_POLISH)
    for source in sources:
        slots = set(re.findall(r"\{(\w+)\}", " ".join(entries(source.templates))))
        assert slots <= {*source.words, *program.NUMBERS, source.paragraph_slot}


def texts_of(path: Path) -> list[str]:
    """What is said in every row of a file of prompts or conversations."""
    found = list[str]()
    for line in path.read_text("utf-8").splitlines():
        row = json.loads(line)
        found += (
            row["turns"] if "turns" in row else [message["content"] for message in row["messages"]]
        )
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
    asked = texts_of(answers.PROMPTS)
    records = [json.loads(line) for line in answers.SHIPPED.read_text("utf-8").splitlines()[1:]]
    said = list[str]()
    for record in records:
        said += [record["sampled"]["text"], record["greedy"]["text"]]

    assert len(train) > 10_000
    assert runs_of(asked) & train == set()
    long = [text for text in said if len(questions.words(text)) >= RUN]
    assert len(long) > 150
    assert runs_of(long) & train == set()
