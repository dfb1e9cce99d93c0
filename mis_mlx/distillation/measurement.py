"""The last stage of a run: teacher and students on held-out text, and their answers to prompts."""

from mis_mlx.data import preparation, token_windows
from mis_mlx.data.token_windows import Windows
from mis_mlx.distillation import conversations, pipeline, summary
from mis_mlx.judge import answers, comparison, other_languages
from mis_mlx.models.architectures.sizes import shape_of
from mis_mlx.models.opening import load
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


def measured(
    c: pipeline.Run, judging: Judging, models: comparison.Models, prompts: int
) -> tuple[answers.Judgement | None, summary.Quality, dict[str, float]]:
    """(answers to prompts, rows by held-out text, {language: bits a byte that the last model loses
    in it}).

    The teacher, the distilled and the rounded student answer; their answers are kept in the run's
    folder. None where there are no prompts, or no model answers. Languages are measured where the
    last model has fewer tokens than the teacher.
    """
    teacher, *_, student = models.values()
    judgement = None
    if prompts:
        asked = {name: model for name, model in models.items() if name != "pruned"}
        judgement = conversations.judged_answers(asked, prompts, Budget(c.plan.budget_bytes))
    if judgement:
        conversations.write_answers(judgement, c.folder)
    rows_of = {}
    for name, (windows, own) in judging.items():
        rows_of[name] = comparison.held_out_rows(models, c.teacher, windows, own)
    languages = dict[str, float]()
    if shape_of(student.config).vocab != shape_of(teacher.config).vocab:
        languages = other_languages.excess(teacher, student)
    return judgement, rows_of, languages
