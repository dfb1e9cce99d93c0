"""Prompts, the answers to them, and the files of a teacher's answers.

A file is JSON lines: an optional header, then a record for every prompt, {"prompt_sha256",
"sampled": {"text", "ended"}, "greedy": {"text", "ended"}, "nats"}.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mis_mlx.data import rows
from mis_mlx.storage import run_folder
from mis_mlx.storage.files import json_sha256
from mis_mlx.storage.journal import Journal

LANGUAGES = ("en", "pl")


@dataclass(frozen=True)
class Prompt:
    """A conversation whose last message is the user's: {"role", "content"} each.

    tools: that the model may call, as chat templates take them.
    """

    messages: tuple[dict[str, Any], ...]
    kind: str
    language: str
    tools: tuple[Mapping[str, Any], ...] = ()

    @property
    def sha256(self) -> str:
        """Of the messages, in hex."""
        messages = [[message["role"], message["content"]] for message in self.messages]
        return json_sha256(messages)


@dataclass(frozen=True)
class Answer:
    """A model's answer. ended: a stop token came; otherwise it was cut off."""

    text: str
    ended: bool


@dataclass(frozen=True)
class AnswerPair:
    """The teacher's answers to one prompt.

    nats: the cost of the sampled one under the teacher itself; None where it is not yet measured.
    """

    sampled: Answer
    greedy: Answer
    nats: float | None = None


def prompt_of(row: rows.Row) -> Prompt:
    """The prompt of a row that `prompt_fault` finds nothing wrong with."""
    messages = []
    for message in row["messages"]:
        messages.append({"role": message["role"], "content": message["content"]})
    return Prompt(tuple(messages), row["kind"], row["language"])


def prompt_fault(row: object) -> str | None:
    """Why a row is no prompt; None where it is one."""
    reason = rows.fault(row, {"messages": ("messages",)})
    if reason is not None:
        return reason
    assert isinstance(row, dict)
    last = row["messages"][-1]["role"]
    if last != "user":
        return f"its last message is the {last}'s, not the user's"
    language = row.get("language")
    if language not in LANGUAGES:
        return f"'language' is {language!r}, known: {', '.join(LANGUAGES)}"
    return rows.text_fault("kind", row.get("kind"))


def rounded(nats: float) -> float:
    """Nats as they are kept, so that a measured value equals the one read later."""
    return round(nats, 4)


def record_of(prompt: Prompt, pair: AnswerPair) -> dict[str, Any]:
    """The record of a prompt's answers."""
    record: dict[str, Any] = {
        "prompt_sha256": prompt.sha256,
        "sampled": asdict(pair.sampled),
        "greedy": asdict(pair.greedy),
    }
    if pair.nats is not None:
        record["nats"] = rounded(pair.nats)
    return record


def journal_at(path: Path) -> Journal:
    """The journal of a teacher's answers: a record for each prompt."""
    return Journal(path, ("prompt_sha256",))


def read_pairs(path: Path) -> dict[str, AnswerPair]:
    """{prompt's sha256: its answers} of a file; {} where there is none."""
    pairs = {}
    for (prompt_sha256,), record in journal_at(path).read().items():
        sampled = answer_of(record.get("sampled"))
        greedy = answer_of(record.get("greedy"))
        if sampled is not None and greedy is not None:
            nats = record.get("nats")
            cost = nats if isinstance(nats, float) else None
            pairs[str(prompt_sha256)] = AnswerPair(sampled, greedy, cost)
    return pairs


def answer_of(value: Any) -> Answer | None:
    """The answer in a record's value; None where the value is no answer."""
    if not isinstance(value, dict):
        return None
    text = value.get("text")
    ended = value.get("ended")
    if not isinstance(text, str) or not isinstance(ended, bool):
        return None
    return Answer(text, ended)


def read_header(path: Path) -> dict[str, Any]:
    """The first line of a file of answers, which says whose they are; {} where there is none."""
    return next(iter(run_folder.records(path)), {})
