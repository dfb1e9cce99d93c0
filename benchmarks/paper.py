"""The paper's figures on the paper's laptop: which of them the planner's arithmetic allows.
Computed, not measured.

    scripts/mis benchmarks/paper.py

The teacher is Miś-137B by its own shape, and by the 137 billion parameters and 70 GB that the paper
gives it; the machine an 8 GB MacBook Air M1 by published rates.
"""

from __future__ import annotations

from dataclasses import dataclass

from mis_mlx import cli
from mis_mlx.distillation import strategies
from mis_mlx.distillation.strategies import MemoryPlan
from mis_mlx.hardware import memory, rates
from mis_mlx.models.architectures import arch, scenarios
from mis_mlx.models.opening.model_size import model_of
from mis_mlx.models.passing import pass_cost
from mis_mlx.planner.distillation_spec import spec_of
from mis_mlx.reporting.text import markdown_table
from mis_mlx.settings.recipe import DistillationConfig, QuantizationConfig
from mis_mlx.types import duration, gib

PASSES = (1, 128, 512)  # tokens
ACCEPTED = (4, 6)  # guessed tokens that one pass confirms


@dataclass(frozen=True)
class Settings:
    """What is counted."""

    tokens: int = 1_000_000
    """of an epoch"""


def table(plan: MemoryPlan, tokens: int) -> str:
    """What this machine makes of the paper's figures: by its teacher's own shape, and by its 137B
    and 70 GB.
    """
    at = plan.rates
    m = plan.job.teacher
    labels = [
        *(f"a pass of {n:,} token{'s'[: n > 1]}" for n in PASSES),
        "N*: arithmetic takes as long as reading",
    ]
    labels += [f"{tokens:,} tokens, cool and hot", "one generated token, plain"]
    labels += [f"the same, {n} of N* guesses accepted" for n in ACCEPTED]
    columns = []
    verdicts = []
    streamed = m.shape.layers * m.block_bytes + m.head_bytes
    for params, nbytes in ((pass_cost.forward_flops(m, 1, 0) / 2, streamed), (137e9, 70e9)):
        # s a pass, s a token
        reading = nbytes / at.read_bytes_per_s
        computing = 2 * params / at.forward_flops_per_s
        cells = [duration(max(reading, computing * n)) for n in PASSES]
        epochs = [f"{max(reading, computing * tokens / hot) / 3600:.0f} h" for hot in (1.0, at.hot)]
        cells += [f"{reading / computing:.0f}", " and ".join(epochs)]
        cells += [f"{reading / n:.1f} s, {n / reading:.3f} tokens/s" for n in (1, *ACCEPTED)]
        columns.append(cells)
        best = ACCEPTED[-1] / reading  # tokens/s
        if best >= 0.45:
            word = "possible"
        elif best >= 0.3:
            word = "possible at its lower end"
        else:
            word = "not possible"
        verdicts.append(
            f"{word}, {0.3 * reading:.1f} to {0.45 * reading:.1f} guesses a pass would have to be "
            f"right"
        )
    shape = arch.params(m.config) / 1e9
    least = strategies.least_bytes(plan.job, at)
    room = memory.usable_memory_bytes() if at.room_bytes is None else at.room_bytes
    read = [hours * 3600 * at.forward_flops_per_s * at.hot / 2 / 137e9 / 1e6 for hours in (48, 72)]
    head = ["", f"by its shape: {shape:.1f}B, {m.nbytes / 1e9:.1f} GB", "by the paper: 137B, 70 GB"]
    return "\n".join(
        [
            markdown_table(head, zip(labels, *columns, strict=True)),
            "",
            f'- "137B teacher": not possible, its own shape gives {shape:.1f}B; the figure does '
            f"not follow from it.",
            f'- "70 GB in 4 bits": not possible, 137B take {137 * 0.5625:.1f} GB in groups of 64 '
            f"with float16 scales; "
            f"70 GB are {70 * 8 / 137:.2f} bits a parameter.",
            f'- "0.3-0.45 tokens/s": with 137B {verdicts[1]}; with its shape {verdicts[0]} (4 to 6 '
            f"are usual).",
            f'- "48-72 h of distillation": possible for the teacher\'s part, {read[0]:.1f} to '
            f"{read[1]:.1f} million "
            f"tokens once; the student's is {'possible' if least <= room else 'not possible'}, it "
            f"takes {gib(least)} "
            f"of memory and the machine gives {gib(room)}.",
        ]
    )


def main(s: Settings) -> None:
    """Print the table."""
    whole = arch.PUBLISHED["mis-137b"]
    student = arch.student_config(whole, arch.target_shape(whole, scenarios.RATIOS["balanced"]))
    teacher, small = (model_of(config, gpu=True) for config in (whole, student))
    job = spec_of(teacher, small, DistillationConfig(), QuantizationConfig())
    budget = memory.budget(None, rates.M1_AIR.room_bytes)
    print(table(strategies.best_plan(job, budget.limit_bytes, rates.M1_AIR), s.tokens))


if __name__ == "__main__":
    main(cli.parse(Settings))
