"""A talk with two models: each continues the questions and its own answers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from mis_mlx.models.opening import load
from mis_mlx.studio_page.conversation import Asked, Conversation
from mis_mlx.studio_page.places import Place
from tests import tiny

FIRST = "What is if?"
PROMPT = "And for?"
TOKENS = 8


def place(folder: Path, seed: int) -> Place:
    """A tiny model that talks."""
    return Place(f"key-{seed}", folder.name, tiny.talking(folder, seed=seed, ending=0.3), 1)


@pytest.fixture
def pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_home: dict[str, str], cpu_policy: None
) -> dict[str, Place]:
    """Two models, of other weights."""
    for name in ("HOME", "MIS_MLX_CACHE", "HF_HUB_OFFLINE", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, own_home[name])
    return {
        "teacher": place(tmp_path / "teacher", 0),
        "student": place(tmp_path / "student", 1),
    }


def stock(model: Path, messages: list[dict[str, str]]) -> str:
    """What mlx-lm itself answers, greedily."""
    loaded, tokenizer = load.mlx_lm("utils").load(str(model))
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return load.mlx_lm("generate").generate(loaded, tokenizer, ids, max_tokens=TOKENS).strip()


def test_both_hear_the_questions_and_themselves(pair: dict[str, Place]) -> None:
    """The student's second turn is what stock mlx-lm answers to its own conversation."""
    conversation = Conversation()
    told: dict[str, list[dict[str, str]]] = {}
    for name, model in pair.items():
        question = {"role": "user", "content": FIRST}
        answer = stock(model.path, [question])
        told[name] = [question, {"role": "assistant", "content": answer}]
    conversation.add(FIRST, {name: told[name][1]["content"] for name in told})
    question = {"role": "user", "content": PROMPT}
    answers = {}
    for name, model in pair.items():
        told[name].append(question)
        answers[name] = stock(model.path, told[name])
        told[name].append({"role": "assistant", "content": answers[name]})
    shown: list[str] = []
    asked = Asked("student", pair["student"], prompt=PROMPT, max_tokens=TOKENS)
    said = asyncio.run(conversation.answer(asked, shown.append))
    assert said.result["text"].strip() == "".join(shown).strip() == answers["student"]
    conversation.add(PROMPT, answers)
    assert conversation.messages("teacher") == told["teacher"]
    assert conversation.messages("student") == told["student"]
    assert told["teacher"] != told["student"]
    conversation.begin_anew()
    assert conversation.messages("teacher") == []
