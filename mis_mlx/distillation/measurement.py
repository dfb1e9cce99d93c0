"""The last stage of a run: teacher and students on held-out text, and their answers to prompts."""

import mlx.core as mx

from mis_mlx.compute import precision
from mis_mlx.data import preparation, token_windows
from mis_mlx.data.token_windows import Windows
from mis_mlx.distillation import conversations, pipeline, summary
from mis_mlx.judge import answers, comparison, other_languages
from mis_mlx.models.architectures.sizes import shape_of
from mis_mlx.models.opening import load
from mis_mlx.models.passing import distributed, pipeline_parallel, stream
from mis_mlx.types import Budget, Checkpoint

# By held-out text: its windows in the tokens of the students and, where the teacher has more
# tokens, in those.
Judging = dict[str, tuple[Windows, Windows | None]]


def judging_windows(
    c: pipeline.Run,
    data: preparation.Data,
    teacher: Checkpoint,
    count: int,
) -> Judging:
    """The held-out windows that judge: `count` of the first text, a third of every other one.

    teacher: with its own vocabulary.
    """
    tokenizers = []
    if teacher is not c.teacher:
        tokenizers = [load.tokenizer(model.path) for model in (c.teacher, teacher)]
    judging: Judging = {}
    for name, held_out in data.held_out.items():
        most = max(1, count // 3) if judging else count
        windows = comparison.spread_windows(held_out, most)
        own = token_windows.retokenized(windows, *tokenizers) if tokenizers else None
        judging[name] = windows, own
    return judging


def quality(c: pipeline.Run, judging: Judging, models: comparison.Models) -> summary.Quality:
    """Rows by held-out text, on the first machine.

    Where machines share the teacher's blocks, all of them take part in its passes.
    """
    rows_of = {}
    teacher = models["teacher"]
    for name, (windows, own) in judging.items():
        hidden = _shared_pass(c, c.teacher, windows)
        own_hidden = _shared_pass(c, teacher, own) if own else None
        if not distributed.is_main():
            continue
        compared = comparison.compare({**models, "teacher": c.teacher}, windows, hidden)
        rows = comparison.rows_of(compared, windows)
        if own:
            of_teacher = comparison.compare({"teacher": teacher}, own, own_hidden)
            rows = comparison.rows_across_vocabularies(rows, of_teacher, own)
        rows_of[name] = rows
    return rows_of


def _shared_pass(c: pipeline.Run, model: Checkpoint, windows: Windows) -> stream.Hidden | None:
    """Final hidden states by machines that share a model's blocks; None: each has all of them."""
    if not c.shares:
        return None
    # The first machine brings all windows, the others bring none.
    batches = []
    if distributed.is_main():
        batches = [mx.array(window[None]) for window in windows.tokens]
    dtype = precision.dtype_of(model)
    relay = pipeline_parallel.Relay(model, dtype, 0, direct=c.direct, shares=c.shares)
    return relay.forward(batches)


def answered(
    c: pipeline.Run,
    models: comparison.Models,
    prompts: int,
) -> answers.Judgement | None:
    """Answers of the teacher, the distilled and the rounded student, kept in the run's folder.

    None where there are no prompts, or no model answers.
    """
    if not prompts or c.shares:  # no machine holds a teacher whose blocks several share
        return None
    asked = {name: model for name, model in models.items() if name != "pruned"}
    judgement = conversations.judged_answers(asked, prompts, Budget(c.plan.budget_bytes))
    if judgement:
        conversations.write_answers(judgement, c.folder, c.files)
    return judgement


def languages(c: pipeline.Run, models: comparison.Models) -> dict[str, float]:
    """{language: bits a byte that the last model loses in it}, where it has fewer tokens.

    {} otherwise, and where no machine holds the teacher.
    """
    teacher, *_, student = models.values()
    if c.shares or shape_of(student.config).vocab == shape_of(teacher.config).vocab:
        return {}
    return other_languages.excess(teacher, student)
