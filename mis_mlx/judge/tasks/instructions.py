"""IFEval's instructions: whether they can be checked here, and how many of them an answer follows.

The package if-verifiable checks them (IFEval: Zhou et al., arXiv 2311.07911). It brings `datasets`
and NLTK, and some checkers are slow on odd texts, so it runs in a process of its own.
"""

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

from mis_mlx.hardware import child_process
from mis_mlx.types import MisError

PACKAGE = "if_verifiable"
INSTALL = "pip install '.[ifeval]' in the checkout"
# These split text into sentences with NLTK's model of English, which comes with no package.
SPLITTING = ("length_constraints:number_sentences", "change_case:capital_word_frequency")
SPLITTER = "punkt_tab"
SECONDS = 120.0  # for one batch of answers, with 2 s for the imports
# Many instructions forbid or limit something, so a text that ignores the prompt follows some. Of
# all 541 prompts IFEval gives 17.2 % to PLAIN, which stands for chance, and 27.3 % to DRESSED,
# which U Zośki says.
CONSTANT_ANSWER = "ok"
FORMATTED_ANSWER = '"this is the answer"'


class Instruction(NamedTuple):
    """One instruction: its name in IFEval, and the arguments of its checker."""

    name: str
    arguments: Mapping[str, Any]


class Levels(NamedTuple):
    """IFEval's two strict accuracies of a model, from 0 to 1."""

    prompt_strict: float  # share of prompts of which every instruction is followed
    inst_strict: float  # share of instructions that are followed

    @property
    def mean(self) -> float:
        """The published number, as in the model cards of SmolLM2."""
        return (self.prompt_strict + self.inst_strict) / 2

    def json(self) -> dict[str, float]:
        """Both and their mean, by name."""
        return {
            "prompt_strict": self.prompt_strict,
            "inst_strict": self.inst_strict,
            "mean": self.mean,
        }


def levels(followed: Sequence[int], counts: Sequence[int]) -> Levels:
    """Both accuracies.

    followed, counts (n,): how many of each prompt's instructions are followed, and how many it has.
    """
    complete = sum(done == count for done, count in zip(followed, counts, strict=True))
    return Levels(
        prompt_strict=complete / len(counts),
        inst_strict=sum(followed) / sum(counts),
    )


def marks(followed: Sequence[int], counts: Sequence[int]) -> list[float]:
    """(n,) a mark for each prompt, so that their mean is `Levels.mean`.

    m_n = (p_n + f_n * N / C) / 2, where p_n is 1 if all instructions of prompt n are followed and
    otherwise 0, f_n says how many are, N is the number of prompts and C that of all instructions:
    the mean of f_n * N / C is sum(f) / C. A prompt with more instructions than the average has a
    mark above 1 when all are followed.
    """
    weight = len(counts) / sum(counts)
    marks_of = []
    for done, count in zip(followed, counts, strict=True):
        complete = float(done == count)
        marks_of.append((complete + weight * done) / 2)
    return marks_of


def fault(row: Mapping[str, Any]) -> str | None:
    """Why a row's instructions do not have the form of IFEval's; None where they do."""
    names = row["instruction_id_list"]
    arguments = row["kwargs"]
    if not isinstance(names, list) or not names:
        return "'instruction_id_list' is not a list of one or more names"
    if not all(isinstance(name, str) for name in names):
        return "'instruction_id_list' holds something other than names"
    if not isinstance(arguments, list) or not all(isinstance(given, dict) for given in arguments):
        return "'kwargs' is not a list of objects"
    if len(names) != len(arguments):
        return f"{len(names)} instructions have {len(arguments)} 'kwargs': give one object for each"
    return None


def of_row(row: Mapping[str, Any]) -> tuple[Instruction, ...]:
    """The instructions of a row that `fault` finds nothing wrong with, without null arguments."""
    instructions = []
    for name, arguments in zip(row["instruction_id_list"], row["kwargs"], strict=True):
        given = {key: value for key, value in arguments.items() if value is not None}
        instructions.append(Instruction(name=name, arguments=given))
    return tuple(instructions)


def check(task: str, asked: Sequence[Sequence[Instruction]]) -> list[str]:
    """Problems with the instructions of a task's questions, as sentences that name the question.

    MisError where they cannot be checked on this machine: no package, or no model that splits
    sentences.
    """
    if find_spec(PACKAGE) is None:
        raise MisError(
            f"{task}: its {len(asked)} answers need if-verifiable, which is not installed: "
            f"{INSTALL}"
        )
    try:
        verdict = child_process.ask(__name__, _unusable.__name__, {"asked": asked}, SECONDS)
    except child_process.NoAnswer as error:
        raise MisError(f"{task}: if-verifiable does not work here ({error}): {INSTALL}") from None
    splitting = sum(_splits(question) for question in asked)
    if splitting and not verdict["splitter"]:
        why = (
            f"{task}: {splitting} of {len(asked)} questions count sentences or words with "
            f"NLTK's "
            f"{SPLITTER}"
        )
        raise MisError(f"{why}, which is not installed: python -m nltk.downloader {SPLITTER}")
    problems = []
    for number, why in verdict["problems"]:
        problems.append(f"{task} question {number + 1}: {why}")
    return problems


def _splits(question: Sequence[Instruction]) -> bool:
    """Whether one of a question's instructions needs text split into sentences."""
    names = {instruction.name for instruction in question}
    return not names.isdisjoint(SPLITTING)


def _unusable(asked: Sequence[Sequence[tuple[str, Mapping[str, Any]]]]) -> dict[str, Any]:
    """Runs in the child process. Gives "problems", [(question's number from 0, why)], and
    "splitter", whether NLTK can split sentences.
    """
    from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT
    from nltk.tokenize import sent_tokenize

    try:
        sent_tokenize("One. Two.")
        splitter = True
    except LookupError:
        splitter = False
    problems = []
    for number, question in enumerate(asked):
        for name, arguments in question:
            if name not in INSTRUCTION_DICT:
                problems.append((number, f"if-verifiable knows no instruction {name!r}"))
                continue
            try:
                INSTRUCTION_DICT[name](name).build_description(**arguments)
            except Exception as error:  # a checker may raise anything on arguments it cannot use
                given = json.dumps(arguments)[:80]
                problems.append((number, f"{name} does not take {given} ({error})"))
    return {"problems": problems, "splitter": splitter}


def followed(
    prompts: Sequence[str],
    completions: Sequence[str],
    asked: Sequence[Sequence[tuple[str, Mapping[str, Any]]]],
) -> list[int]:
    """How many instructions each completion follows, strictly.

    Runs in the child process, as a reward (judge/tasks/rewards).
    """
    return [strict for strict, _ in _both(prompts, completions, asked)]


def followed_loosely(
    prompts: Sequence[str],
    completions: Sequence[str],
    asked: Sequence[Sequence[tuple[str, Mapping[str, Any]]]],
) -> list[int]:
    """How many instructions each completion follows, loosely, as IFEval's authors define it.

    An instruction counts where the text follows it without its first line, its last line, its
    asterisks, or any of these together. Runs in the child process, too.
    """
    return [loose for _, loose in _both(prompts, completions, asked)]


def _both(
    prompts: Sequence[str],
    completions: Sequence[str],
    asked: Sequence[Sequence[tuple[str, Mapping[str, Any]]]],
) -> list[tuple[int, int]]:
    """(strictly, loosely): how many instructions each completion follows."""
    import langdetect

    # Without a seed the language of an odd text is drawn anew every time.
    langdetect.DetectorFactory.seed = 0
    counts = []
    for prompt, text, question in zip(prompts, completions, asked, strict=True):
        counts.append(_followed(prompt, text, question))
    return counts


def _followed(
    prompt: str, text: str, question: Sequence[tuple[str, Mapping[str, Any]]]
) -> tuple[int, int]:
    """(strictly, loosely): how many instructions one text follows. An empty one follows none."""
    from if_verifiable.common import evaluate_instructions
    from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT

    results, _ = evaluate_instructions(
        response=text,
        instruction_id_list=[name for name, _ in question],
        kwargs_list=[dict(arguments) for _, arguments in question],
        prompt=prompt,
        instruction_registry=INSTRUCTION_DICT,
    )
    strict = sum(result.strict_pass for result in results)
    loose = sum(result.loose_pass for result in results)
    return strict, loose
