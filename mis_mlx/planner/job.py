"""A distillation as it was asked for, in sizes and counts: what plans are made of.

Does not know what it takes (planner/phases) nor what fits."""

from dataclasses import dataclass
from typing import Literal

from mis_mlx.models.families import family
from mis_mlx.models.lora import Lora
from mis_mlx.planner import estimates
from mis_mlx.planner.estimates import ModelSize
from mis_mlx.planner.recipe import DistillationConfig, QuantizationConfig

ITERS = 30  # steps of a repaired student; a Gemma, unrepaired, was worse in Polish after so few than before
PLAIN = QuantizationConfig(target_bpw=None, q_method="round", q_iters=0)  # costs nothing beside the student
VOCABULARY_WINDOWS = 16  # in which the teacher says which tokens it expects, where not all stay
SAMPLES = 50  # tokens of a position in the logit store
ADAPTERS = Lora(-1, 8, 20.0)  # mlx-lm's own rank and scale, in all blocks

Mode = Literal["resident", "blocks", "lora", "sharded"]
MODES: tuple[Mode, ...] = "resident", "blocks", "sharded"  # the best first; adapters only for who asks


@dataclass(frozen=True)
class DistillationSpec:
    """A distillation as asked for. `batch` windows of `length` tokens are a micro-batch; counts are of windows."""

    teacher: ModelSize
    student: ModelSize  # as pruned, before training
    iters: int
    batch: int
    accumulate: int
    length: int
    calibration: int
    repair: int  # 0: no closed-form fit
    held_out: int
    save_every: int
    targets: Literal["live", "cached"] = "live"
    modes: tuple[Mode, ...] = MODES
    rotation: bool = False  # the hidden size is cut along principal directions
    rounding: QuantizationConfig = PLAIN  # of the trained student
    mixed: bool = False  # the loss has cross-entropy in it
    shown: ModelSize | None = None  # the teacher with its own vocabulary, where the student has another

    @property
    def step(self) -> int:
        """Tokens of one optimizer step."""
        return self.batch * self.accumulate * self.length

    @property
    def host_lanes(self) -> int:
        """How many windows go side by side where numpy computes the losses (models/host_losses); else 0."""
        here = self.targets == "live" and not self.teacher.gpu and not self.mixed
        return estimates.together(self.student) if here else 0

    @property
    def target_bytes(self) -> int:
        """A position in the logit store, at the most: a size, and id and count of every sample."""
        return 1 + SAMPLES * ((2 if self.teacher.shape.vocab <= 2**16 else 4) + 1)


def spec_of(
    teacher: ModelSize, student: ModelSize, asked: DistillationConfig, rounding: QuantizationConfig = PLAIN,
    rotates: bool = True, shown: ModelSize | None = None,
) -> DistillationSpec:  # fmt: skip
    """The distillation that a command's settings ask for. rotates: a smaller hidden size is cut along directions."""
    repair = 0 if family(student.config).sandwich else asked.reconstruct_samples
    return DistillationSpec(
        teacher, student, asked.iters or (ITERS if repair else 2 * ITERS), asked.batch_size,
        asked.grad_accumulation_steps, asked.max_seq_length, asked.num_samples, repair, asked.eval_windows,
        asked.save_every, asked.targets, MODES if asked.train == "auto" else (asked.train,),
        rotates and student.shape.hidden < teacher.shape.hidden, rounding,
        asked.cross_entropy > 0, shown,
    )  # fmt: skip
