"""The conversations of a run: where they come from, and reports of the answers at its end."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mis_mlx import cli
from mis_mlx.compute import precision
from mis_mlx.data import chat_template, preparation
from mis_mlx.data.preparation import Source
from mis_mlx.distillation import teacher_answers
from mis_mlx.judge import answers, keep
from mis_mlx.judge.answer_figures import MORE_LOOPS
from mis_mlx.models.opening import load
from mis_mlx.models.opening.model_size import model_of
from mis_mlx.models.writing.draws import half_version
from mis_mlx.planner.distillation_spec import DistillationSpec
from mis_mlx.reporting import html, progress
from mis_mlx.storage import checkpoint as protocol
from mis_mlx.storage import run_folder
from mis_mlx.storage.files import DISK, json_sha256
from mis_mlx.types import Budget, Checkpoint, MisError, Row, duration, evenly, gib

WRITTEN = Path("runs/answers")  # files of what teachers answered
WRITES = "teacher_writes"  # in a run's plan.json, beside the strategy
# Prompts that a teacher is asked. 240 and 48 answers taught the same (writers.py at bd583ffb).
FEWEST = 96
MOST = 2400
SHOWN = 3  # prompts whose answers a run prints
LANGUAGES = {"en": "English", "pl": "Polish"}
FEW = 4  # prompts; of fewer in a language there is no table


def source(
    teacher: Checkpoint,
    wanted: Source,
    limit: Budget,
    *,
    writes: bool | None = None,
    dry_run: bool = False,
) -> Source:
    """The text of a run that asks for `wanted`.

    With a teacher that has a chat template, answers to our prompts are a part of it. The default
    teacher's come with the package; another teacher writes them now, once, and they are kept and
    used again. writes: whether it does; where it would be read from disk for every token, those of
    the package stand in. None: as its size says. dry_run: says what the writing would take, and
    writes nothing.
    """
    unasked = _unasked(teacher, wanted)
    if unasked is not None:
        return unasked
    writing = _writing(teacher, wanted)
    file = file_of(teacher, writing)
    known = file.exists()
    if writes is None:
        writes = known or teacher_answers.is_whole(model_of(teacher), writing, limit)
    if not writes:
        cli.say(
            "conversations: the teacher would be read from disk for every token that it writes, so "
            "it reads the answers that come with the package"
        )
        return _shipped(wanted)
    if known:
        fallen = 0
        if not dry_run:
            fallen = teacher_answers.filter_again(file)
        gone = f"; {fallen} that repeat themselves are left out now" if fallen else ""
        tell = cli.say if fallen or dry_run else cli.detail
        tell(f"conversations: reusing the teacher's answers in {file}{gone}")
    elif not _write(teacher, writing, file, limit, dry_run=dry_run):
        return wanted._replace(share=0.0)
    return wanted._replace(answers=file)


def planned(
    job: DistillationSpec,
    teacher: Checkpoint,
    wanted: Source,
    limit: Budget,
    writes: bool | None = None,
) -> DistillationSpec:
    """The job with the answers that its teacher writes first, as `source` decides.

    writes: as of a run that goes on, which does not choose again, whatever it may take by now.
    """
    if _unasked(teacher, wanted) is not None:
        return job
    writing = _writing(teacher, wanted)
    known = file_of(teacher, writing).exists()
    if writes is None:
        writes = known or teacher_answers.is_whole(job.whole_teacher, writing, limit)
    return replace(
        job,
        conversations=len(writing.prompts) if writes and not known else 0,
        asks_tools=any(prompt.tools for prompt in writing.prompts),
        teacher_writes=writes,
    )


def file_of(teacher: Checkpoint, writing: teacher_answers.WritingSettings) -> Path:
    """The file of a teacher's answers, which later runs use again."""
    identity = run_folder.origin(teacher, "")["teacher"]
    settings = {
        **writing.settings,
        "speech": keep.speech_sha256(teacher.path),
        **half_version(precision.dtype_of(teacher)),
    }
    written = f"{teacher.path.name}-{identity[:8]}-{json_sha256(settings)[:8]}/answers.jsonl"
    return WRITTEN / written


def _shipped(wanted: Source) -> Source:
    """The text with the answers that come with the package, which the built-in text has."""
    if wanted.data is None:
        return wanted
    return wanted._replace(answers=preparation.ANSWERS)


def _unasked(teacher: Checkpoint, wanted: Source) -> Source | None:
    """The text of a run for which the teacher is not asked; None where it is."""
    tokenizer = load.tokenizer(teacher.path)
    if wanted.share == 0 or not preparation.takes_conversations(tokenizer):
        return wanted._replace(share=0.0)
    own = wanted.data if wanted.share is None else None
    if own is not None and preparation.has_conversations(own, wanted.tokens):
        return wanted
    return _shipped(wanted) if answers.shipped_for(teacher) else None


def _writing(teacher: Checkpoint, wanted: Source) -> teacher_answers.WritingSettings:
    """How our prompts are answered for a run, one for so much training.

    A model that can call tools shall not forget it, so some prompts ask it to.
    """
    share = preparation.SHARES[preparation.CONVERSATIONS] if wanted.share is None else wanted.share
    tokens = int(share * wanted.tokens)
    count = max(FEWEST, min(MOST, tokens // teacher_answers.TYPICAL_TOKENS))
    tools = chat_template.knows_tools(load.tokenizer(teacher.path))
    return teacher_answers.settings_of(count, wanted.seed, tools=tools)


def _write(
    teacher: Checkpoint,
    writing: teacher_answers.WritingSettings,
    file: Path,
    limit: Budget,
    *,
    dry_run: bool,
) -> bool:
    """Have the teacher answer; whether enough answers are usable, else that is said."""
    count = len(writing.prompts)
    plan = teacher_answers.plan(model_of(teacher), writing, limit)
    size = f"{gib(plan.peak_bytes)} of {gib(limit.limit_bytes)}, about {duration(plan.seconds)}"
    cli.say(
        f"conversations: the teacher answers {count} prompts first, {plan.at_once} at once: "
        f"{size}; into {file}"
    )
    if dry_run:
        return True
    try:
        with protocol.only_maker(file, cli.say) as missing:
            if missing:
                with progress.phase(teacher_answers.PHASE):
                    kept = teacher_answers.write(teacher, writing, file, limit)
                    cli.outcome(f"conversations: {kept} of {count} answers are kept")
    except MisError as error:
        cli.say(f"conversations are left out of the training text: {error}")
    return file.exists()


def tables(judgement: answers.Judgement) -> dict[str, list[Row]]:
    """Rows of every model by language, of languages with enough prompts."""
    rows = {}
    for code, language in LANGUAGES.items():
        chosen = _in_language(judgement, code)
        if len(chosen) >= FEW:
            rows[language] = judgement.part(chosen).rows
    return rows


def _in_language(judgement: answers.Judgement, code: str) -> list[int]:
    """Numbers of the prompts in a language."""
    prompts = enumerate(judgement.answers.prompts)
    return [number for number, prompt in prompts if prompt.language == code]


def answer_rows(judgement: answers.Judgement) -> list[dict[str, Any]]:
    """Rows (prompt, language, kind, model, text, ended) of all greedy answers, prompt by prompt."""
    rows = list[dict[str, Any]]()
    for number, prompt in enumerate(judgement.answers.prompts):
        for model, given in judgement.greedy.items():
            if not given:
                continue
            rows.append(
                {
                    "prompt": prompt.messages[-1]["content"],
                    "language": prompt.language,
                    "kind": prompt.kind,
                    "model": model,
                    "text": given[number].text,
                    "ended": given[number].ended,
                }
            )
    return rows


def write_answers(judgement: answers.Judgement, folder: Path) -> None:
    """Write all greedy answers into a run's folder, a line each."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in answer_rows(judgement)]
    DISK.replace_text(folder / run_folder.ANSWERS, "".join(lines))


def loop_warning(judgement: answers.Judgement) -> str:
    """The sentence on a student that repeats itself more than its teacher; '': it does not."""
    loops = {row.model: row for row in judgement.rows if row.metric == "loops"}
    teacher, *_, student = loops.values()
    if student.value - teacher.value <= MORE_LOOPS:
        return ""
    count = student.n or 0
    values = {
        "student": round(student.value * count / 100),
        "teacher": round(teacher.value * count / 100),
        "count": count,
    }
    return html.document("loops.md", values)


def dialogue(judgement: answers.Judgement) -> str:
    """Some prompts with the answers of the teacher and of the last model, for the end of a run."""
    greedy = judgement.greedy
    teacher, *_, student = greedy
    english = _in_language(judgement, "en")
    talks = list[dict[str, Any]]()
    for number in evenly(english, SHOWN):
        prompt = judgement.answers.prompts[number]
        talks.append(
            {
                "prompt": prompt.messages[-1]["content"],
                "answers": {"teacher": greedy[teacher][number], "student": greedy[student][number]},
            }
        )
    return html.document("dialogue.md", {"talks": talks})


def figures(judgement: answers.Judgement) -> Mapping[str, float | int]:
    """For a run's JSON: {metric_model: value} of all prompts, and how many these are."""
    values: dict[str, float | int] = {
        f"{row.metric}_{row.model}": round(row.value, 4) for row in judgement.rows
    }
    return {"answers_prompts": len(judgement.answers.prompts), **values}


def judged_answers(
    models: Mapping[str, Checkpoint], count: int, limit: Budget
) -> answers.Judgement | None:
    """The teacher's and the students' answers to `count` held-out prompts, judged.

    Only the teacher and the last student answer in their own words. None where nothing can be
    judged, which is said.
    """
    _, *others, student = models
    try:
        judgement = answers.judged(models, answers.prompts(count), limit, silent=others)
    except MisError as error:
        cli.say(f"answers are not judged: {error}")
        return None
    # Without a chat template it does not answer, which was said.
    if judgement is None or student not in judgement.models:
        return None
    return judgement
