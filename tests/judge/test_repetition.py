"""Texts that repeat themselves, and ordinary ones with as much order: lists, tables, songs."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mis_mlx.data import preparation
from mis_mlx.data.rows import read
from mis_mlx.judge import repetition

LOOPS = [
    "ha" * 300,
    "你好吗。" * 80,
    "私はわかりません。" * 20,
    "ไม่รู้" * 40,
    "मुझे नहीं पता। " * 25,
    "لا أعرف. " * 30,
    "a" * 400,
    "Great" + "!" * 300,
    "I'm not sure. " * 30,
    "is a Spanish language that " * 12,
    "no, " * 60,
    "yes " * 21,
    "床前明月光，疑是地上霜。举头望明月，低头思故乡。这首诗写的是诗人的感受，" + "我不知道。" * 20,
    "床前明月光，疑是地上霜。举头望明月，低头思故乡。" + "我不知道。" * 30 + "再见了，朋友。",
    "Dear Ann, thank you for the letter that came on Monday, and for the good news in it. "
    + "I am glad to hear that. " * 4,
    " ".join(f"{number}. I am not sure about that." for number in range(1, 20)),
    "A list of shops that I know in this town, and that you may like as well, is below.\n"
    + "\n".join(f"{number}. Go to the store and buy milk." for number in range(1, 6)),
]
FRUITS = ["apples", "pears", "plums", "figs", "dates", "limes", "kiwis", "melons", "grapes"]
ORDINARY = [
    "",
    "yes " * 10,
    "A bicycle has two wheels, a frame, a saddle and handlebars; you sit on it, push the pedals, "
    "and the chain turns the rear wheel, which moves you forward along the road.",
    "\n".join(f"{number}. {fruit}" for number, fruit in enumerate(FRUITS, 1)),
    " ".join(str(number) for number in range(1, 101)),
    "\n".join(f"7 x {number} = {7 * number}" for number in range(1, 13)),
    "| City | Country | People |\n| --- | --- | --- |\n| Warsaw | Poland | 1863056 |\n"
    "| Berlin | Germany | 3677472 |\n| Paris | France | 2102650 |\n| Rome | Italy | 2748109 |",
    "Day 1: Walk for 20 minutes\nDay 2: Stretch for 10 minutes\nDay 3: Walk for 25 minutes\n"
    "Day 4: Rest\nDay 5: Walk for 30 minutes\nDay 6: Stretch for 15 minutes\nDay 7: Rest",
    "Row, row, row your boat,\nGently down the stream.\nMerrily, merrily, merrily, merrily,\n"
    "Life is but a dream.",
    "Happy birthday to you,\nHappy birthday to you,\nHappy birthday, dear Ann,\n"
    "Happy birthday to you!",
    "The wheels on the bus go round and round,\nround and round, round and round.\n"
    "The wheels on the bus go round and round,\nall through the town.",
    "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n    return a - b\n\n\n"
    "def mul(a, b):\n    return a * b\n\n\ndef div(a, b):\n    return a / b\n",
    "[[0, 0, 0, 0],\n [0, 1, 0, 0],\n [0, 0, 1, 0],\n [0, 0, 0, 1]]",
    f"Results\n{'=' * 60}\nAccuracy 0.91, recall 0.88, precision 0.93 on the rest.\n{'-' * 60}",
    "床前明月光，疑是地上霜。举头望明月，低头思故乡。这首诗写的是诗人在寂静的月夜思念家乡的感受。",
    "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。何でも薄暗いじめじめした所で"
    "ニャーニャー泣いていた事だけは記憶している。",
    "Hahahahaha, that is funny! I did not see it coming.",
    json.dumps([{"name": name, "age": 30 + len(name), "city": "Oslo"} for name in FRUITS[:5]]),
]


@pytest.mark.parametrize("text", LOOPS, ids=[text[:12] for text in LOOPS])
def test_loops_by_hand(text: str) -> None:
    """With blanks and without, in several scripts, late, with numbers that count on."""
    assert repetition.loops(text)


@pytest.mark.parametrize("text", ORDINARY, ids=[text[:12] for text in ORDINARY])
def test_ordinary_texts_by_hand(text: str) -> None:
    """Lists, tables, songs, code and rulers repeat much, but say something new in between."""
    assert not repetition.loops(text)


def kept() -> list[str]:
    """The default teacher's answers that are long enough to spoil."""
    answers = []
    for row in read(preparation.ANSWERS).rows:
        answers += [turn["content"] for turn in row["messages"] if turn["role"] == "assistant"]
    return [answer for answer in answers if len(answer.split()) >= 60][:200]


@pytest.mark.parametrize(("begin", "share"), [(0.25, 0.98), (0.5, 0.9), (0.6, 0.8), (0.7, 0.6)])
def test_loops_that_begin_late(begin: float, share: float) -> None:
    """Answers whose rest is six of their words again and again: nearly all are found."""
    answers = kept()
    rng = np.random.default_rng(0)
    found = 0
    for answer in answers:
        words = answer.split()
        first = int(begin * len(words))
        unit = list(rng.choice(words, 6))
        rest = (unit * len(words))[: len(words) - first]
        found += repetition.loops(" ".join(words[:first] + rest))
    assert len(answers) > 100
    assert found >= share * len(answers)
    assert not any(map(repetition.loops, answers))
