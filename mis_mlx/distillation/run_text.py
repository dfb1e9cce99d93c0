"""The text that a run of `distill --data teacher` trains on: the teacher writes it first, once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mis_mlx.data import preparation
from mis_mlx.distillation.distill_flags import DistillFlags
from mis_mlx.settings import recipe
from mis_mlx.storage import run_folder
from mis_mlx.types import Checkpoint

WRITTEN_TEXTS = Path("runs/text")  # folders of texts that teachers write
TEXT_TOKENS = 200  # of such a text, about


@dataclass(frozen=True, kw_only=True)
class TeacherText:
    """A text for `synthesize` to write: its folder, and what that command is told.

    texts: how many. budget, compute_dtype: as the flags of these names.
    """

    out: Path
    texts: int
    seed: int
    budget: str | None
    compute_dtype: Literal["float16", "bfloat16", "float32"] | None


def teacher_text(asked: DistillFlags, teacher: Checkpoint) -> TeacherText | None:
    """What the teacher is to write: a quarter of what training visits.

    The same for a run that goes on, whose number of steps is known by now. None where --data is
    something else than `teacher`.
    """
    if asked.data != preparation.TEACHER:
        return None
    step = asked.batch_size * asked.grad_accumulation_steps * asked.max_seq_length
    visited = recipe.steps_of(asked, teacher.config) * step
    texts = max(recipe.TEACHER_TEXTS, visited // (4 * TEXT_TOKENS))
    identity = run_folder.origin(teacher, "")["teacher"]
    return TeacherText(
        out=WRITTEN_TEXTS / f"{teacher.path.name}-{identity[:8]}-{asked.seed}-{texts}",
        texts=texts,
        seed=asked.seed,
        budget=asked.budget,
        compute_dtype=asked.compute_dtype,
    )
