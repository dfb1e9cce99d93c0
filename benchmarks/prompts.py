"""Write the built-in prompts anew: questions that a teacher answers for training, and others that
judge a student.

    scripts/mis benchmarks/prompts.py

Seconds. The files come out as they are in the checkout, to the byte, unless prompt_texts/ was
changed. Training prompts and held-out ones come from other templates and other words, so that a
student cannot know one from the other.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from prompt_texts import templates, words

from mis_mlx.data import prompts
from mis_mlx.judge import answers

T = TypeVar("T")
SLOT = re.compile(r"\{(\w+)\}")
NUMBERS = {"n": (11, 60), "m": (2, 10)}
TRIES = 50  # draws for one new prompt, before a template counts as used up


@dataclass(frozen=True)
class Source:
    """What prompts of one language and one split are made of."""

    templates: Mapping[str, Sequence[templates.Template]]
    words: Mapping[str, Sequence[str]]
    paragraphs: Sequence[str]
    paragraph_slot: str


ENGLISH = Source(
    templates.TRAIN, {**words.TRAIN_PL, **words.TRAIN}, templates.PARAGRAPHS, "paragraph"
)
POLISH = Source(templates.TRAIN_PL, words.TRAIN_PL, templates.PARAGRAPHS_PL, "akapit")
HELD_OUT_ENGLISH = Source(
    templates.HELD_OUT, words.HELD_OUT, templates.HELD_OUT_PARAGRAPHS, "paragraph"
)
HELD_OUT_POLISH = Source(
    templates.HELD_OUT_PL, words.HELD_OUT_PL, templates.HELD_OUT_PARAGRAPHS_PL, "akapit"
)


def pick(rng: random.Random, items: Sequence[T]) -> T:
    """One of the items, by rng.random() alone: a seed means the same under every Python."""
    return items[int(rng.random() * len(items))]


def filled(template: templates.Template, source: Source, rng: random.Random) -> list[str]:
    """The turns of a template with a word in every slot; one slot has the same word in all
    turns.
    """
    turns = [template] if isinstance(template, str) else list(template)
    paragraph = pick(rng, source.paragraphs)
    turns = [turn.replace(f"{{{source.paragraph_slot}}}", paragraph) for turn in turns]
    drawn = dict[str, str]()
    for slot in SLOT.findall(" ".join(turns)):
        if slot in drawn:
            continue
        if slot in NUMBERS:
            low, high = NUMBERS[slot]
            drawn[slot] = str(low + int(rng.random() * (high - low + 1)))
        else:
            drawn[slot] = pick(rng, source.words[slot])
    texts = [SLOT.sub(lambda found: drawn[found[1]], turn) for turn in turns]
    return [text[0].upper() + text[1:] for text in texts]


def drawn(source: Source, count: int, seed: int) -> list[tuple[str, list[str]]]:
    """`count` different prompts (kind, turns): kinds in turn, and within a kind its templates in
    turn.
    """
    rng = random.Random(seed)
    made = list[tuple[str, list[str]]]()
    seen = set[str]()
    kinds = list(source.templates)
    number = 0
    while len(made) < count:
        kind = kinds[number % len(kinds)]
        of_kind = source.templates[kind]
        template = of_kind[number // len(kinds) % len(of_kind)]
        number += 1
        for _ in range(TRIES):
            turns = filled(template, source, rng)
            key = json.dumps(turns)
            if key not in seen:
                seen.add(key)
                made.append((kind, turns))
                break
    return made


def conversation(turns: Sequence[str]) -> list[dict[str, str]]:
    """Turns as messages, the user's first."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]


def mixed(english: Sequence[T], polish: Sequence[T]) -> list[T]:
    """Both, the second spread evenly among the first."""
    rows = list[T]()
    each = len(english) // len(polish)
    for i, row in enumerate(english):
        rows.append(row)
        if i % each == each - 1 and i // each < len(polish):
            rows.append(polish[i // each])
    return rows


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A row a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def main() -> None:
    """Both files."""
    train = []
    for language, source, count in (("en", ENGLISH, 2400), ("pl", POLISH, 400)):
        rows = drawn(source, count, seed=0)
        train.append([{"kind": kind, "language": language, "turns": turns} for kind, turns in rows])
    held_out = []
    for language, source, count in (("en", HELD_OUT_ENGLISH, 120), ("pl", HELD_OUT_POLISH, 24)):
        rows = drawn(source, count, seed=1)
        held_out.append(
            [
                {"kind": kind, "language": language, "messages": conversation(turns)}
                for kind, turns in rows
            ]
        )
    write(prompts.TRAIN, mixed(*train))
    write(answers.PROMPTS, mixed(*held_out))


if __name__ == "__main__":
    main()
