"""A talk of several turns with two models: the same questions, each model's own answers."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from mis_mlx.hardware import jobs
from mis_mlx.studio_page.places import Place
from mis_mlx.types import MisError, gib


class Turn(NamedTuple):
    """What the user asked, and what each model answered to it, by the model's name."""

    prompt: str
    answers: Mapping[str, str]


class Asked(NamedTuple):
    """One answer's work: who is asked, after which turns, for how many tokens at most."""

    name: str
    model: Place
    prompt: str
    max_tokens: int


@dataclass
class Conversation:
    """The turns so far. A turn counts when every model has answered."""

    turns: list[Turn] = field(default_factory=list)

    def messages(self, name: str) -> list[dict[str, str]]:
        """The turns as one model takes them: every question, and its own answers."""
        told = []
        for turn in self.turns:
            told.append({"role": "user", "content": turn.prompt})
            told.append({"role": "assistant", "content": turn.answers[name]})
        return told

    def add(self, prompt: str, answers: Mapping[str, str]) -> None:
        """Remember a turn."""
        self.turns.append(Turn(prompt, dict(answers)))

    def begin_anew(self) -> None:
        """Forget all turns."""
        self.turns.clear()

    async def answer(self, asked: Asked, show: jobs.Show) -> jobs.Answer:
        """A model's answer to a prompt behind its turns; nothing is remembered yet.

        show: is given the text as it comes. MisError with the command's refusal, such as of a
        conversation that is longer than the model's context.
        """
        flags = ["--model", str(asked.model.path), f"--prompt={asked.prompt}"]
        flags += ["--max-tokens", str(asked.max_tokens)]
        before = self.messages(asked.name)
        stdin = ""
        if before:
            flags += ["--messages", "-"]
            stdin = json.dumps(before)
        answer = await jobs.stream("generate", flags, show, stdin=stdin)
        if answer.sentence:
            raise MisError(answer.sentence)
        return answer


def figure_words(result: Mapping[str, object], seconds: float) -> str:
    """Tokens, their speed behind the first one, memory, how full the context is."""
    tokens = _count(result, "tokens")
    words = [f"{tokens} tokens"]
    if tokens > 1 and seconds > 0:
        words.append(f"{(tokens - 1) / seconds:.1f} tokens/s")
    peak_bytes = _count(result, "peak_bytes")
    if peak_bytes:
        words.append(f"{gib(peak_bytes)} of memory")
    context = _count(result, "context_tokens")
    if context:
        used = _count(result, "prompt_tokens") + tokens
        words.append(f"{used:,} of {context:,} tokens of context")
    return ", ".join(words)


def _count(result: Mapping[str, object], key: str) -> int:
    value = result.get(key)
    return value if isinstance(value, int) else 0
