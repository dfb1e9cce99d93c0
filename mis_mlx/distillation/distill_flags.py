"""The flags of `distill`, of which `run_plan` makes a run."""

from dataclasses import dataclass
from typing import Annotated, Literal

from mis_mlx import cli
from mis_mlx.compute import precision
from mis_mlx.hardware.thermal.run_monitor import ThermalFlags
from mis_mlx.pruning.select import PruningConfig
from mis_mlx.settings.recipe import DistillationConfig, QuantizationConfig
from mis_mlx.types import MOST, Also, Whole, Within


@dataclass(frozen=True)
class DistillFlags(
    cli.Resumable,
    precision.Computing,
    ThermalFlags,
    PruningConfig,
    QuantizationConfig,
    DistillationConfig,
):
    """What `distill` is asked for; much of it is decided later, once for a run."""

    teacher: str | None = None
    """folder, hub id (docs/families.md lists the families) or gemma-3-270m; default:
    SmolLM2-135M-Instruct
    """
    out: Annotated[str | None, Also(("mlx_path",))] = None
    """run folder; default: the next free NAME-00N under runs/"""
    student: str | None = None
    """folder of a student that is already pruned; default: prune now"""
    data: str | None = None
    """folder with train.jsonl (valid.jsonl, test.jsonl), or hub data set; default: built-in
    text
    """
    conversations: Annotated[float | None, Within(0.0, 0.95)] = None
    """share of the training text in which our prompts are answered, so that the student learns to
    answer; any teacher but the default one writes first, once, unless it would be read from disk.
    Default: 0.44 if the teacher has a chat template and --data has no
    conversations; 0: none
    """
    lose: Annotated[float | None, Within(0.0, MOST)] = None
    """bits per byte that the result may lose on the teacher's answers (on text, if the teacher has
    no chat template): `search` chooses the smallest student that should stay within it. Default:
    0.1, unless you give a size, a scenario or --bytes
    """
    expected_loss: Annotated[float | None, Within(0.0, MOST)] = None
    """bits per byte that the result should lose, as predicted by the search for --lose or --bytes
    """
    bytes: str | None = None
    """size of the result's weights on disk, such as 50MB: `search` chooses the sizes and bits that
    should lose least
    """
    quantize: Literal[4, 0] = 4
    """bits per weight of the result; 0: no quantization"""
    eval_prompts: Whole | None = None
    """held-out prompts that teacher and student answer at the end; 0: none. Default: 60, or 24 of a
    teacher that would be read from disk for every token of its answers
    """
    keep_steps: bool = False
    """after the run, keep the files that only --resume needs: checkpoints, the rounded student,
    stored targets
    """
