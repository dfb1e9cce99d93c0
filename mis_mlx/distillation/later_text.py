"""The text that scales learn from, where the rounded student writes a part of it.

A run then has two texts, each with its fingerprint: sizes, bits and rounding know the first one, in
which the answers that come with the package stand in; the second one has the student's own answers
in their place. The teacher reads that once, and its logits are what is learned.
"""

from dataclasses import replace
from pathlib import Path

from mis_mlx import cli
from mis_mlx.data import preparation, token_windows
from mis_mlx.distillation import conversations, pipeline, teacher_answers, writers
from mis_mlx.distillation.conversations import Wanted
from mis_mlx.models.opening import compute_type, load
from mis_mlx.runs import run_loop
from mis_mlx.storage import run_folder
from mis_mlx.types import Budget, MisError

FOLDER = "written"  # in a run's, with the student's answers


def of_student(
    c: pipeline.Run, rounded: Path, source: preparation.Source, wanted: Wanted
) -> pipeline.Run:
    """The run with the text that the scales of the student in `rounded` learn from.

    It is the run itself unless its plan has the student write. source: of the text before. Answers
    that are there are not written again.
    """
    if not c.plan.student_writes:
        return c
    file = c.folder / FOLDER / "answers.jsonl"
    if not file.exists():
        _write(c, rounded, conversations.writing_of(c.teacher, wanted), file)
    if not file.exists():
        return c
    length = c.data.tokens.shape[1]
    tokenizer = load.tokenizer(c.teacher.path)
    data = preparation.prepare(source._replace(answers=file), tokenizer, length).train
    run_loop.forget_text()
    fingerprint = token_windows.fingerprint(data)
    run_folder.same_learned(c.folder, fingerprint, c.files)
    return replace(c, data=data, targets=pipeline.LEARNED_TARGETS)


def _write(
    c: pipeline.Run, rounded: Path, settings: teacher_answers.WritingSettings, file: Path
) -> None:
    """Have the student answer; where too few of its answers are usable, that is said."""
    student = compute_type.open_to_compute(rounded, c.teacher.precision)
    limit = Budget(c.plan.budget_bytes)
    count = len(settings.prompts)
    cli.say(f"conversations: the rounded student answers {count} prompts")
    try:
        with c.phase(writers.STUDENT):
            kept = teacher_answers.write(student, settings, file, limit, who=writers.STUDENT)
    except MisError as error:
        cli.say(f"scales learn from the same text as before: {error}")
        return
    cli.say(f"conversations: {kept} of {count} are kept; the teacher reads them once")
