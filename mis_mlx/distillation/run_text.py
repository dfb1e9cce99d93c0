"""The text that a run of `distill` trains on, which its teacher perhaps writes first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mis_mlx.data import preparation
from mis_mlx.distillation import conversations
from mis_mlx.distillation.conversations import Wanted
from mis_mlx.distillation.distill_flags import DistillFlags
from mis_mlx.settings import recipe
from mis_mlx.storage import run_folder
from mis_mlx.types import Checkpoint

WRITTEN_TEXTS = Path("runs/text")  # folders of texts that teachers write
TEXT_TOKENS = 200  # of such a text, about


@dataclass(frozen=True, kw_only=True)
class RunText:
    """What a run learns from. written: what the teacher writes of it first."""

    wanted: Wanted
    written: TeacherText | None


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


def text_of(asked: DistillFlags, teacher: Checkpoint, iters: int) -> RunText:
    """The text of a run of `distill`. iters: of its training."""
    data = asked.data
    written = teacher_text(asked, teacher)
    if written:
        data = str(written.out)
    visited = iters * asked.step_tokens
    wanted = conversations.wanted_of(data, asked.conversations, visited=visited, seed=asked.seed)
    return RunText(wanted=wanted, written=written)


def teacher_text(asked: DistillFlags, teacher: Checkpoint) -> TeacherText | None:
    """What the teacher is to write: a quarter of what training visits.

    The same for a run that goes on, whose number of steps is known by now. None where --data is
    something else than `teacher`.
    """
    if asked.data != preparation.TEACHER:
        return None
    visited = recipe.steps_of(asked, teacher.config) * asked.step_tokens
    texts = max(recipe.TEACHER_TEXTS, visited // (4 * TEXT_TOKENS))
    identity = run_folder.origin(teacher, "")["teacher"]
    name = f"{teacher.path.name}-{identity[:8]}-{asked.seed}-{texts}"
    return TeacherText(
        out=WRITTEN_TEXTS / name,
        texts=texts,
        seed=asked.seed,
        budget=asked.budget,
        compute_dtype=asked.compute_dtype,
    )
