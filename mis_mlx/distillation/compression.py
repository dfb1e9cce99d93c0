"""The stages of a run around its training: prune the teacher, round the student."""

from mis_mlx import cli
from mis_mlx.distillation import pipeline
from mis_mlx.models.opening import compute_type
from mis_mlx.models.writing import model_writer
from mis_mlx.planner.distillation_spec import SCALES
from mis_mlx.pruning import select
from mis_mlx.quantization import stage
from mis_mlx.quantization.begun_rounding import BegunRounding
from mis_mlx.reporting import html
from mis_mlx.settings.recipe import QuantizationConfig
from mis_mlx.storage.files import DISK
from mis_mlx.types import Checkpoint


def prune(c: pipeline.Run, cut: select.PruningConfig, before: int) -> Checkpoint:
    """The pruned student; made now, unless it is there. before: the teacher's parameters."""
    out = c.folder / "pruned"
    if not out.exists():
        with c.phase("prune"):
            report = select.prune(
                c.teacher,
                c.pick(c.recipe.num_samples, use=1),
                out,
                cut=cut,
                dtype=pipeline.DTYPE,
                air=c.thermal_monitor.air,
                held=c.plan.held_windows("prune"),
            )
            cli.outcome(html.document("pruned.md", {**report, "params_before": before}))
    return compute_type.open_to_compute(out, c.teacher.precision)


def view(c: pipeline.Run) -> Checkpoint | None:
    """The teacher itself, where nothing is cut and it is to be rounded: nobody needs copies of it.

    None where the student is another, or a copy was begun. A teacher that was pruned itself has a
    record of that beside it, which would be taken for this student's.
    """
    begun = (c.folder / "pruned").exists()
    if not c.plan.job.viewed or begun or model_writer.read_keep(c.teacher.path):
        return None
    return c.teacher


def quantize(
    c: pipeline.Run,
    rounding: QuantizationConfig,
    dense: Checkpoint,
) -> None:
    """Round the student, then tune its scales; a folder that is there is not made again.

    A rounding that was stopped goes on after the last block that it kept. dense: the student.
    """
    out = c.folder / "model"
    rounded = c.folder / (pipeline.ROUNDED if c.plan.tuning_steps else "model")
    if not rounded.exists() and not out.exists():
        samples = c.recipe.num_samples if rounding.looks else 0
        batches = c.pick(samples, use=1)
        held = c.plan.held_windows("quantize")
        kept = c.folder / pipeline.ROUNDING
        with c.phase("quantize"):
            stage.quantize(
                dense,
                rounded,
                rounding,
                batches=batches,
                held=held,
                seed=c.recipe.seed,
                begun=BegunRounding(kept),
            )
        DISK.discard(kept)
    if not out.exists():
        cli.detail(f"{SCALES}: biases and norms learn, too; integers stay")
        pipeline.tune(c, rounded, out)
