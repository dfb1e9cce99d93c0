"""Who writes the conversations that a student learns from, and what that takes.

What is learned are the teacher's probabilities, and they can be read off any text. So a teacher
that fits in memory answers our prompts itself, before anything else. One that would be read from
disk for every token does not. Then the answers that come with the package stand in where text
calibrates, and the rounded student, which is small, writes those that its scales learn from.
"""

from dataclasses import replace
from functools import cache

from mis_mlx.data import prompts
from mis_mlx.distillation import teacher_answers
from mis_mlx.hardware.stage_cost import StageCost
from mis_mlx.judge.write import WritingPlan
from mis_mlx.models.opening.model_size import ModelSize
from mis_mlx.models.passing.pass_cost import TENSOR_BYTES
from mis_mlx.planner.distillation_spec import DistillationSpec, Writer
from mis_mlx.quantization import rounded_size
from mis_mlx.settings.recipe import EVAL_PROMPTS, EVAL_PROMPTS_STREAMED
from mis_mlx.types import Budget, MisError

# The phases in which they write.
TEACHER = "teacher's answers"
STUDENT = "student's answers"
# The teacher's logits on what the student wrote, where there are others before.
SECOND_STORE = "second logit store"


def settings_of(
    count: int, seed: int = 0, *, tools: bool = False
) -> teacher_answers.WritingSettings:
    """How the first `count` of our prompts are answered. tools: as in `prompts.train`."""
    return teacher_answers.WritingSettings(_prompts(count, tools), seed=seed)


@cache
def _prompts(count: int, tools: bool) -> tuple[prompts.Prompt, ...]:
    """The first ones, read once a process: a plan asks many times."""
    return tuple(prompts.train(count, tools=tools))


def who_writes(teacher: ModelSize, count: int, limit: Budget, *, tools: bool = False) -> Writer:
    """Who answers `count` prompts: the teacher, where it is whole in memory meanwhile."""
    # as in a plan of all phases
    left = limit.limit_bytes - TENSOR_BYTES * teacher.tensors
    plan = _plan(teacher, count, Budget(max(0, left)), tools=tools)
    return "teacher" if plan and plan.headroom_bytes is None else "student"


def judging_prompts(teacher: ModelSize, limit: Budget) -> int:
    """How many held-out prompts teacher and student answer where nobody says a number."""
    if who_writes(teacher, EVAL_PROMPTS_STREAMED, limit) == "teacher":
        return EVAL_PROMPTS
    return EVAL_PROMPTS_STREAMED


def _plan(m: ModelSize, count: int, limit: Budget, *, tools: bool) -> WritingPlan | None:
    """How a model writes; None where it does not fit the budget in any way."""
    try:
        return teacher_answers.plan(m, settings_of(count, tools=tools), limit)
    except MisError:
        return None


def answering_cost(job: DistillationSpec, limit: int, writer: Writer) -> list[StageCost]:
    """[what this writer takes to answer], [] where nobody or the other one does.

    The student writes once it is rounded.
    """
    if not job.conversations or job.writer != writer:
        return []
    if writer == "teacher":
        name = TEACHER
        m = job.whole_teacher
    else:
        name = STUDENT
        m = rounded_size.rounded_size(job.student, job.rounding)
    plan = _plan(m, job.conversations, Budget(limit), tools=job.asks_tools)
    return [replace(plan.cost, name=name)] if plan else []
