"""A distillation as sizes and counts: what the planner plans."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from mis_mlx.models.architectures import arch
from mis_mlx.models.architectures.families import family
from mis_mlx.models.opening.model_size import ModelSize
from mis_mlx.settings.recipe import (
    ROUND_TO_NEAREST,
    DistillationConfig,
    QuantizationConfig,
    steps_of,
)
from mis_mlx.storage import logit_store

Mode = Literal["blocks", "sharded", "none"]

SCALES = "distil scales"  # the phase behind rounding; "distil" is the one before it
STORE = "logit store"  # the phase that keeps a teacher's targets
# the best first
MODES: tuple[Mode, ...] = "blocks", "sharded"


@dataclass(frozen=True, kw_only=True)
class DistillationSpec(DistillationConfig):
    """A distillation as asked for, of models of these sizes; what depends on them is decided."""

    teacher: ModelSize
    student: ModelSize  # as pruned, before training
    iters: int
    modes: tuple[Mode, ...] = MODES
    rotation: bool = False  # the hidden size is cut along principal directions
    rounding: QuantizationConfig = ROUND_TO_NEAREST  # of the trained student
    # the teacher with its own vocabulary, where the student has another
    shown: ModelSize | None = None
    conversations: int = 0  # prompts that the teacher answers so that the student learns from it
    asks_tools: bool = False  # whether some of them ask for calls of tools
    teacher_writes: bool = True  # else answers that came with the package stand in
    answers: int = 0  # held-out prompts that teacher and student answer at the end
    answers_known: bool = False  # the teacher's are kept from before, or came with the package
    # the student is the teacher: nothing to repair, nothing to learn before rounding
    uncut: bool = False
    # it is rounded from the teacher's own files, and no copy is written
    viewed: bool = False
    # the student is there already: it is rounded, its scales may learn, and nothing is measured
    rounds_only: bool = False

    @property
    def whole_teacher(self) -> ModelSize:
        """The teacher with its own vocabulary."""
        return self.shown or self.teacher

    @property
    def rounds(self) -> bool:
        """Whether the trained student is rounded."""
        return self.rounding is not ROUND_TO_NEAREST

    @property
    def rounds_teacher(self) -> bool:
        """Whether what is rounded is the teacher itself, so that no trained student is written."""
        return self.uncut and self.rounds

    @property
    def checkpoints(self) -> int:
        """How many are written in all steps, at the most."""
        return self.iters // self.save_every + 2

    @property
    def target_bytes(self) -> int:
        """A position in the logit store, at the most."""
        wide = self.teacher.shape.vocab > 2**16
        return logit_store.position_bytes(wide)


def spec_of(
    teacher: ModelSize,
    student: ModelSize,
    asked: DistillationConfig,
    rounding: QuantizationConfig = ROUND_TO_NEAREST,
    *,
    shown: ModelSize | None = None,
    copied: bool = False,
    sized: bool = True,
    answers: int = 0,
    answers_known: bool = False,
) -> DistillationSpec:
    """The distillation that a command's settings ask for.

    shown: the teacher with its own
    vocabulary, where the student has another. copied: the student is cut out of this teacher.
    sized: its sizes are exact, and not the largest that it may have. answers: prompts that the
    models answer at the end; answers_known: the teacher's answers are there already.
    """
    # block by block: a shape knows one width for all
    same_tensors = arch.tensors_of(student.config) == arch.tensors_of(teacher.config)
    uncut = copied and sized and asked.train == "auto" and same_tensors
    modes: tuple[Mode, ...] = MODES
    if uncut:
        modes = ("none",)
    elif asked.train != "auto":
        modes = (asked.train,)
    elif student.shape.experts or (asked.reconstruct_samples and family(student.config).repairs):
        modes = (*MODES, "none")
    settings = {f.name: getattr(asked, f.name) for f in fields(DistillationConfig)}
    settings["iters"] = steps_of(asked, student.config)
    # No fit knows what comes of several hidden states.
    if uncut or not family(student.config).repairs:
        settings["reconstruct_samples"] = 0
    return DistillationSpec(
        **settings,
        teacher=teacher,
        student=student,
        modes=modes,
        rotation=student.shape.hidden < teacher.shape.hidden,
        rounding=rounding,
        shown=shown,
        uncut=uncut,
        viewed=uncut and not teacher.packed and rounding is not ROUND_TO_NEAREST,
        answers=answers,
        answers_known=answers_known,
    )
