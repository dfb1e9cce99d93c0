"""The tasks that students are examined in, by name or folder."""

import difflib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from mis_mlx import cli
from mis_mlx.data import preparation, rows
from mis_mlx.judge.tasks import instructions, questions, rewards, tool_tasks
from mis_mlx.judge.tasks.sets import polish
from mis_mlx.storage import hub
from mis_mlx.types import MisError

TEXT = "text"
CONTINUE = "continue"
ANSWERS = "answers"  # to held-out prompts (judge/answers)
TOOLS_PRESET = "tools"
TOOLS = [tool_tasks.CALLS, tool_tasks.ROUNDS]
PLACE_WORDS = 30  # of a place in held-out text that `continue` is made of
CONTEXT_WORDS = 24  # of these; the others are the ending
WRONG_ENDINGS = 3
# made by benchmarks/task_files.py at bd583ffb
BUILT_IN = Path(__file__).parent / "sets" / "built_in"
ABOUT: dict[str, str] = polish.ABOUT["built-in"]  # -written: the model writes, instead of choosing
SILESIAN = BUILT_IN.with_name("silesian")  # NOTICE says where it comes from
PRESETS: dict[str, list[str]] = polish.ABOUT["presets"]


class EvaluationSet(NamedTuple):
    """Everything that --tasks asks for.

    text: whether held-out text is measured. answers: whether the models answer held-out prompts.
    """

    tasks: tuple[questions.Task, ...]
    text: bool
    answers: bool = False


def find(
    names: Sequence[str],
    count: int,
    data: str | None = None,
) -> EvaluationSet:
    """All tasks asked for, `count` questions of each.

    data: the text whose held-out part `continue` is made of, as --data. All rows are judged here,
    before any model is asked. MisError lists bad rows, or offers the names nearest to an unknown
    one.
    """
    parts = list[str]()
    for name in names:
        parts += PRESETS.get(name, TOOLS if name == TOOLS_PRESET else [name])
    ours = [name for name in parts if name not in (TEXT, ANSWERS)]
    of_tools = [name for name in ours if name in TOOLS]
    ours = [name for name in ours if name not in TOOLS]
    tasks = tool_tasks.tasks(of_tools, count) if of_tools else list[questions.Task]()
    for name in ours:
        tasks += _tasks_of(name, count, data)
    for task in tasks:
        _check(task)
    task_names = [task.name for task in tasks]
    for name in sorted(task_names):
        if task_names.count(name) > 1:
            raise MisError(
                f"{task_names.count(name)} tasks are called {name}: rename one of the files"
            )
    return EvaluationSet(
        tasks=tuple(tasks),
        text=TEXT in parts,
        answers=ANSWERS in parts,
    )


def _tasks_of(
    name: str,
    count: int,
    data: str | None,
) -> list[questions.Task]:
    """The tasks of one name, `count` questions of each."""
    if name in ABOUT:
        task = questions.file(BUILT_IN / f"{name}.jsonl")
        first = task.questions[:count]
        return [replace(task, questions=first, about=ABOUT[name], max_tokens=64)]
    tasks = _continued(data) if name == CONTINUE else _brought(name)
    return [task.chosen(count) for task in tasks]


def _check(task: questions.Task) -> None:
    """MisError where an answer could never be found right, or an instruction not be checked."""
    if task.kind == "checked":
        keys = [{"answer": q.answer, "language": q.language} for q in task.questions]
        where = [f"{task.name} question {number + 1}" for number in range(len(keys))]
        correct = rewards.functions("correct", None)
        rows.refuse(rewards.unanswerable(correct, keys, where))
    elif task.kind == "instructions":
        asked = [q.instructions for q in task.questions]
        rows.refuse(instructions.check(task.name, asked))


def _brought(name: str) -> list[questions.Task]:
    """The tasks of a dialect, a folder or a file. MisError offers names near to an unknown one."""
    if name == "dialects":
        return _dialects()
    if name in polish.SLOTS:
        return _dialect(name)
    folder = Path(name).expanduser()
    if folder.name in polish.SLOTS and (folder / polish.PAIRS).is_file():
        pairs = polish.read_pairs(folder.name, folder)
        return polish.dialect(folder.name, pairs, f"your own, in {folder.name}")
    if folder.is_dir():
        return questions.folder(folder)
    if folder.suffix == ".jsonl":
        return [questions.file(folder)]
    known = [*PRESETS, *ABOUT, CONTINUE, "dialects", *polish.SLOTS]
    known += [TOOLS_PRESET, *TOOLS, TEXT, ANSWERS]
    hint = f"known tasks: {', '.join(known)}"
    near = difflib.get_close_matches(name, known, 3, 0.5)
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    raise MisError(f"--tasks names {name}, which is not a task, a folder or a .jsonl file: {hint}")


def _continued(data: str | None) -> list[questions.Task]:
    """Which words come next? Of the held-out part of both built-in texts, or of the user's."""
    texts: dict[str, str | None] = {CONTINUE: data}
    if not data:
        texts = {f"{CONTINUE}-en": None, f"{CONTINUE}-pl": preparation.MIS}
    tasks = []
    for name, source in texts.items():
        held_out = [questions.text_of(row) for row in preparation.load(source).test]
        places = _places(held_out)
        task = questions.task(name, places, "", per_character=True)
        about = "held-out text; the next 6 words of 30 against three endings from elsewhere"
        tasks.append(replace(task, about=about))
    return tasks


def _places(texts: Sequence[str]) -> list[dict]:
    """Cloze rows of all places in order: 24 words, and which six come next?

    The three wrong endings are from other places. MisError where the texts are too short.
    """
    places = []
    for text in texts:
        words = text.split()
        for start in range(0, len(words) - PLACE_WORDS + 1, PLACE_WORDS):
            end = start + PLACE_WORDS
            middle = start + CONTEXT_WORDS
            places.append((" ".join(words[start:middle]), " ".join(words[middle:end])))
    endings = sorted({ending for _, ending in places})
    if len(endings) <= WRONG_ENDINGS:
        why = (
            f"the held-out text has {len(endings)} places of {PLACE_WORDS} words, the task "
            f"{CONTINUE} needs {WRONG_ENDINGS + 1}"
        )
        raise MisError(f"{why}: give a longer test.jsonl, or leave the task out")
    cloze = []
    for number, (context, right) in enumerate(places):
        row = questions.cloze_row(
            seed=f"endings-{number}",
            text=f"{context} {questions.BLANK}",
            right=right,
            answers=endings,
            others=WRONG_ENDINGS,
        )
        if questions.fault(row) is None:
            cloze.append(row)
    return cloze


def _slot(slot: str) -> Path:
    """The folder of our cache that holds a dialect's pairs."""
    return hub.cache_root() / "dialects" / slot


def _dialect(slot: str) -> list[questions.Task]:
    """The tasks of one slot. MisError where it is empty."""
    folder = _slot(slot)
    if slot == SILESIAN.name and not (folder / polish.PAIRS).is_file():
        pairs = polish.read_pairs(slot, SILESIAN)
        return polish.dialect(slot, pairs, "Firefox's translations, MPL-2.0")
    pairs = polish.read_pairs(slot, folder)
    origin = hub.provenance(folder).get("source", "your own")
    return polish.dialect(slot, pairs, origin)


def _dialects() -> list[questions.Task]:
    """The tasks of every slot that is filled, or can be; the empty ones are named aloud.

    MisError where all are empty.
    """
    tasks = list[questions.Task]()
    empty = []
    for slot in polish.SLOTS:
        try:
            tasks += _dialect(slot)
        except MisError as error:
            if (_slot(slot) / polish.PAIRS).is_file():  # filled, but with bad rows
                raise
            empty.append(slot)
            last = error
    if not tasks:
        raise last
    cli.say(f"empty slots: {', '.join(empty)}; {polish.PAIRS} goes into {_slot('NAME')}")
    return tasks
