"""A model's answers and their costs, kept in the cache, so that nothing is asked twice.

Both files of a model are journals, with a record for every prompt.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mis_mlx.data import chat_template
from mis_mlx.judge.prompts import Answer, AnswerPair, Prompt, answer_of, rounded
from mis_mlx.judge.score import log_probabilities
from mis_mlx.models.opening import load, tokenizer_check
from mis_mlx.storage import hub
from mis_mlx.storage.files import DISK, file_sha256, json_sha256
from mis_mlx.storage.journal import Journal
from mis_mlx.types import Checkpoint


@dataclass(frozen=True)
class Kept:
    """The kept answers and costs of one model with one set of settings.

    model_sha256: of the model, in hex. settings_sha256: of all else that answers depend on.
    """

    model_sha256: str
    settings_sha256: str

    def _path(self, what: str) -> Path:
        """The model's file of `what` under these settings."""
        folder = hub.cache_root() / "evaluations" / self.model_sha256[:32]
        return folder / f"{what}-{self.settings_sha256[:16]}.jsonl"

    @property
    def answers_path(self) -> Path:
        """The file of greedy answers, {"prompt_sha256", "greedy": {"text", "ended"}} a line."""
        return self._path("own-answers")

    @property
    def costs_path(self) -> Path:
        """The file of costs, {"prompt_sha256", "answer_sha256", "nats"} a line."""
        return self._path("answer-costs")

    def answers(self) -> dict[str, Answer]:
        """{prompt's sha256: its greedy answer}."""
        answers = {}
        for (prompt_sha256,), record in self._answers.read().items():
            answer = answer_of(record.get("greedy"))
            if answer is not None:
                answers[str(prompt_sha256)] = answer
        return answers

    def keep_answer(self, prompt: Prompt, answer: Answer) -> None:
        """Add one greedy answer."""
        _add(self._answers, {"prompt_sha256": prompt.sha256, "greedy": asdict(answer)})

    def costs(self) -> dict[tuple[str, str], float]:
        """{(prompt's sha256, answer's sha256): nats of the answer's tokens, with its end}."""
        costs = {}
        for (prompt_sha256, answer_sha256), record in self._costs.read().items():
            nats = record.get("nats")
            if isinstance(nats, float) and math.isfinite(nats):
                costs[str(prompt_sha256), str(answer_sha256)] = nats
        return costs

    def measured(
        self,
        model: Checkpoint,
        asked: Sequence[Prompt],
        given: Sequence[Answer],
    ) -> list[float]:
        """Each answer's nats under the model. Those not yet kept take one streamed pass."""
        known = self.costs()
        keys = [cost_key(prompt, answer) for prompt, answer in zip(asked, given, strict=True)]
        missing = [number for number, key in enumerate(keys) if key not in known]
        logprobs = log_probabilities(
            model,
            [asked[number] for number in missing],
            [given[number] for number in missing],
        )
        for number, values in zip(missing, logprobs, strict=True):
            prompt_sha256, answer_sha256 = keys[number]
            nats = rounded(-float(values.sum()))
            known[keys[number]] = nats
            record = {
                "prompt_sha256": prompt_sha256,
                "answer_sha256": answer_sha256,
                "nats": nats,
            }
            _add(self._costs, record)
        return [known[key] for key in keys]

    @property
    def _answers(self) -> Journal:
        return Journal(self.answers_path, ("prompt_sha256",))

    @property
    def _costs(self) -> Journal:
        return Journal(self.costs_path, ("prompt_sha256", "answer_sha256"))


def _add(journal: Journal, record: dict[str, object]) -> None:
    """One more record."""
    DISK.make_folder(journal.path.parent)
    journal.add(record)


def cost_key(prompt: Prompt, answer: Answer) -> tuple[str, str]:
    """(the prompt's sha256, the answer's): all that a cost depends on, apart from the model."""
    return prompt.sha256, json_sha256([answer.text, answer.ended])


def all_kept(
    of_student: Kept,
    asked: Sequence[Prompt],
    pairs: Mapping[str, AnswerPair],
) -> bool:
    """Whether a student's own answers are kept, with what the teacher's cost it."""
    own = of_student.answers()
    costs = of_student.costs()
    for prompt in asked:
        if prompt.sha256 not in own or cost_key(prompt, pairs[prompt.sha256].sampled) not in costs:
            return False
    return True


def speech_sha256(path: Path) -> str:
    """Of all that decides what a model of these weights says, in hex: what is kept of it depends on
    this.

    The tokenizer and what it puts before a text, the templates and what they are told, the tokens
    that end an answer.
    """
    checked = tokenizer_check.check_tokenizer(path)
    opened = load.opened_tokenizer(checked)
    file = path / "tokenizer.json"
    words = file_sha256(file) if file.is_file() else checked.digest.hex()
    ends = sorted(opened.eos_token_ids)
    return json_sha256([words, list(opened.encode("a")), chat_template.identity(opened), ends])
