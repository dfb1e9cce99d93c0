"""Held-out text as questions: 24 words, and which six come next; three wrong endings are from elsewhere in it.

Any text in any language will do.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from mis_mlx.evaluation import questions
from mis_mlx.types import MisError

CONTEXT, ENDING, OTHERS = 24, 6, 3  # words, words, wrong endings


def rows(texts: Sequence[str]) -> list[dict]:
    """Cloze rows of all places, which do not overlap, in order. MisError where there are too few to choose from."""
    places = []
    for text in texts:
        words = text.split()
        for start in range(0, len(words) - CONTEXT - ENDING + 1, CONTEXT + ENDING):
            middle = start + CONTEXT
            places.append((" ".join(words[start:middle]), " ".join(words[middle : middle + ENDING])))
    endings, made = sorted({ending for _, ending in places}), []
    if len(endings) <= OTHERS:
        raise MisError(
            f"the held-out text has {len(endings)} places of {CONTEXT + ENDING} words, the task continue needs "
            f"{OTHERS + 1}: give a longer test.jsonl, or leave the task out"
        )
    for number, (context, ending) in enumerate(places):
        rng = random.Random(f"endings-{number}")
        wrong = questions.some(rng, [other for other in endings if other != ending], OTHERS)
        options = questions.some(rng, [ending, *wrong], OTHERS + 1)
        made.append({"text": f"{context} {questions.BLANK}", "options": options, "answer": ending})
    return [row for row in made if questions.fault(row) is None]
