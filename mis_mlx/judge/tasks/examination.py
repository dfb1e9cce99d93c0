"""All models are asked all tasks: the outcomes that the recovery table is made of."""

from collections.abc import Iterator, Mapping

import numpy as np

from mis_mlx.judge import comparison
from mis_mlx.judge.comparison import Models
from mis_mlx.judge.recovery_table import Outcome
from mis_mlx.judge.tasks import answering, instructions, questions, tool_tasks
from mis_mlx.judge.tasks.task_registry import EvaluationSet
from mis_mlx.models.opening import load
from mis_mlx.types import Budget, Checkpoint

Hashes = Mapping[str, str]  # `answering.sha256` of the models, by name


def outcomes(
    wanted: EvaluationSet,
    models: Models,
    hashes: Hashes,
    limit: Budget,
    *,
    seen: Checkpoint,
) -> Iterator[Outcome]:
    """Each model is asked all tasks before the next model.

    seen: the teacher with its students' vocabulary.
    """
    marks_of = {}
    # Model by model, not task by task: a tokenizer is opened once for all tasks.
    for name, model in models.items():
        marks_of[name] = [
            answering.scores(model, hashes[name], task, limit) for task in wanted.tasks
        ]
    for number, task in enumerate(wanted.tasks):
        if task.kind in tool_tasks.KINDS:
            outcome = _tools_outcome(task, hashes)
            yield outcome._replace(forced=forced(task, {**models, "teacher": seen}))
            continue
        levels = _levels(hashes, task)
        yield Outcome(
            task=task.name,
            about=task.about,
            marks={name: marks[number] for name, marks in marks_of.items()},
            chance=answering.chance(task),
            constant=answering.best_constant(task),
            sha256=task.sha256,
            uniform=answering.uniform(models["teacher"], task),
            levels=levels,
            ways=_ways(models, task),
        )


def _levels(hashes: Hashes, task: questions.Task) -> dict[str, instructions.Levels] | None:
    """{model: IFEval's two accuracies}; None for a task without instructions."""
    levels_of = {}
    for name, sha256 in hashes.items():
        levels = answering.levels(sha256, task)
        if levels:
            levels_of[name] = levels
    return levels_of or None


def forced(task: questions.Task, models: Models) -> dict[str, dict[str, np.ndarray]]:
    """{student: {figure: (n,)}} on the tokens of the right calls, a value for each question that
    wants some: nats a token that the student finds them less likely than the teacher, and KL.

    Every model reads the same tokens, those of the teacher.
    """
    teacher, *students = models
    tokenizer = load.tokenizer(models[teacher].path)
    means = comparison.compare(models, tool_tasks.right_calls(task, tokenizer))
    figures = {}
    for name in students:
        less = means[name, "nll"] - means[teacher, "nll"]
        figures[name] = {"less likely": less, "KL": means[name, "kl"]}
    return figures


def _tools_outcome(task: questions.Task, hashes: Hashes) -> Outcome:
    """Of answers that are kept. Where the teacher is right in less than half of the cases, all
    models are compared with its own calls; what it gets right is said in either case.
    """
    said = {name: answering.calls(sha256, task) for name, sha256 in hashes.items()}
    teacher = next(iter(said))
    shares = {name: tool_tasks.shares(task, calls) for name, calls in said.items()}
    about = f"{task.about}; every model is told of the tools by its chat template"
    judged_by = task
    right = [verdict.right for verdict in tool_tasks.verdicts(task, said[teacher])]
    if np.mean(right) < tool_tasks.ENOUGH:
        judged_by = tool_tasks.as_said(task, said[teacher])
        about += (
            f"; {teacher} is right in {np.mean(right):.0%} of the cases, under half, so the marks "
            f"say how often a model does what {teacher} does"
        )
    return Outcome(
        task=task.name,
        about=about,
        marks={name: tool_tasks.marks(judged_by, calls) for name, calls in said.items()},
        chance=tool_tasks.chance(judged_by),
        sha256=task.sha256,
        shares=shares,
    )


def _ways(models: Models, task: questions.Task) -> dict[str, str] | None:
    """{model: how the task's options were put to it}; None where all models get the same."""
    ways = {}
    for name, model in models.items():
        way = answering.way_of(model, task)
        if way:
            ways[name] = way
    return ways or None
