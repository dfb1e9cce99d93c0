"""What students of a teacher should lose, from measurements that are known: bytes against loss.

A search measures; this only reads what it kept, or what came with the package. It computes nothing
of its own: `excess.losses` adds up, as in a search, and finds every measurement in its logs.
"""

import math
import tempfile
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from mis_mlx.data.token_windows import Windows
from mis_mlx.judge.score import has_template
from mis_mlx.models.architectures import bit_floors
from mis_mlx.models.architectures.scenarios import PLAIN_NAMES
from mis_mlx.models.architectures.shape import Shape
from mis_mlx.models.architectures.sizes import shape_of, side_width
from mis_mlx.models.opening import load, resolve
from mis_mlx.pruning.vocabulary import VocabularyConfig
from mis_mlx.quantization import packed_format
from mis_mlx.settings.recipe import ITERS
from mis_mlx.size_search import (
    candidates,
    excess,
    known_losses,
    limits,
    ranking,
    shape_search,
)
from mis_mlx.storage import hub, run_folder
from mis_mlx.storage.files import DISK
from mis_mlx.types import Checkpoint, MisError

AXES = ("layers", "ffn", "heads", "vocab", "bits")  # those that `search` cuts
POINTS = 24  # of the curve
# Bits a byte: the ends of the curve.
LEAST_BITS = 0.02
MOST_BITS = 0.6


class Known(candidates.Candidates):
    """Candidates of which every measurement is in a log, so that no text is read."""

    @cached_property
    def answers(self) -> Any:
        """The scale of losses: answers. `losses` only asks whether there are some."""
        return "known"


def curve(teacher: str | None) -> list[dict[str, Any]]:
    """Students of a teacher in this folder: `loss` (bits a byte), `nbytes`, `words`, `flags`.

    None: the default teacher, if it is here. flags: of `distill`, which make the student. The
    fewest bytes for each loss, from the least loss to the most. Empty where its measurements are
    not all known, or no search knows the teacher.
    """
    folder = Path(teacher or hub.cache_root() / resolve.DEFAULT.split("/")[-1])
    try:
        return _known_curve(load.open_checkpoint(folder))
    except MisError:
        return []


def scenarios() -> list[str]:
    """Names that --scenario takes."""
    return list(PLAIN_NAMES)


def _known_curve(teacher: Checkpoint) -> list[dict[str, Any]]:
    before = shape_of(teacher.config)
    tables = side_width(teacher.config)
    if before.experts or tables or not shape_search.group_of(before):
        return []
    if bit_floors.delta_floors(teacher.config):
        return []
    if not has_template(teacher):
        return []
    about = known_losses.identity(teacher, "built-in", VocabularyConfig())
    sizes = shape_search.axis_sizes(
        teacher.config, AXES, candidates.vocabularies(teacher.config, teacher.path)
    )
    wanted: list[tuple[str, float]] = [("bits", bits) for bits in excess.BITS_PROBED]
    wanted += shape_search.probes_of(sizes, before.vocab)
    if not known_losses.all_known(about, wanted):
        return []
    with tempfile.TemporaryDirectory(prefix="mis-mlx-") as place:
        folder = Path(place)
        known_losses.copy_into_run(folder, about, DISK)
        if not (folder / packed_format.SENSITIVITY).is_file():
            return []
        losses = _losses(teacher, folder, sizes)
        together = _together(folder, losses)
    return _points(teacher, losses, sizes, together)


def _losses(teacher: Checkpoint, folder: Path, sizes: shape_search.Sizes) -> shape_search.Losses:
    """What every axis costs by itself, as the logs in the folder have it."""
    # Bits are measured on answers; how many tokens a byte of text has cancels out there.
    tokens = np.zeros((1, 2), np.int32)
    loss_mask = np.array([[1.0, 0.0]], np.float32)
    window = Windows(tokens, loss_mask, text_bytes=np.ones(1))
    run: Any = SimpleNamespace(teacher=teacher, folder=folder, files=DISK)
    nothing: Any = None
    known = Known(
        run=run,
        data=nothing,
        ranking=window,
        judging=nothing,
        settings=SimpleNamespace(mixed=True, student_iters=ITERS, streams=False),
    )
    return excess.losses(known, sizes)


def _together(folder: Path, losses: shape_search.Losses) -> float:
    """Times the sum of its axes alone that a measured student lost: the median of those known."""
    ratios = []
    for record in run_folder.records(folder / candidates.CANDIDATES):
        if record.get("nats") and record.get("predicted"):
            ratios.append(record["nats"] / record["predicted"])
    if not ratios:
        return 1.0
    return float(np.clip(np.median(ratios), *ranking.TOGETHER))


def _points(
    teacher: Checkpoint,
    losses: shape_search.Losses,
    sizes: shape_search.Sizes,
    together: float,
) -> list[dict[str, Any]]:
    config = teacher.config
    before = losses.before
    shapes = list(shape_search.shapes(config, sizes))
    points = list[dict[str, Any]]()
    for allowed in np.geomspace(LEAST_BITS, MOST_BITS, POINTS):
        nats = float(allowed) * math.log(2) / together
        found = shape_search.smallest(config, shapes, losses=losses, lose=nats, within=())
        if not found:
            continue
        choice = found[0]
        bits = losses.expected(choice) * together / math.log(2)
        nbytes = round(limits.file_bytes(config, *choice))
        words = ranking.named([choice], before)[0]
        if points and nbytes >= points[-1]["nbytes"]:
            continue
        point = {
            "loss": round(bits, 4),
            "nbytes": nbytes,
            "words": words,
            "flags": flags_of(choice, before),
        }
        points.append(point)
    return points


def flags_of(choice: shape_search.Choice, before: Shape) -> list[str]:
    """Flags of `distill` and `plan` that make this student, as `search` prints them."""
    flags = []
    for name, value in ranking.flags_of(choice, before).items():
        flags += [f"--{name.replace('_', '-')}", str(value)]
    return flags
