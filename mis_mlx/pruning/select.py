"""Which parts of a model a pruning keeps, and the pruned folder: calibrate, choose, write."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from mis_mlx.hardware.stage_cost import StageCost, in_turn
from mis_mlx.hardware.thermal.run_monitor import AirFlags
from mis_mlx.maths import importance
from mis_mlx.maths.importance import Key, Statistics
from mis_mlx.models.architectures import arch, scenarios
from mis_mlx.models.architectures.families import family, shape_of
from mis_mlx.models.architectures.mixture import MOST_EXPERTS
from mis_mlx.models.architectures.shape import ALL, Shape
from mis_mlx.models.opening.model_size import ModelSize
from mis_mlx.models.passing import stream
from mis_mlx.pruning import calibrate, slicing, vocabulary
from mis_mlx.storage.files import DISK
from mis_mlx.storage.hidden_spool import Spool
from mis_mlx.types import Air, Also, Checkpoint, Count, KeptUnits, MisError

# Of a report where all units stay, so that none were ranked.
UNCUT = "nothing is cut"
NOT_RANKED = {"importance": UNCUT, "block_importance": {}}
# in a report, for pictures: not for a line of JSON
BULKY = ("block_importance", "differing", "profile")


@dataclass(frozen=True)
class PruningConfig(AirFlags, vocabulary.VocabularyConfig):
    """What to prune and how to judge: shared by `prune` and `distill`."""

    scenario: scenarios.Scenario | None = None
    """what to cut: half-vocab (half of the vocabulary, a third of the FFN), half-ffn (half of the
    FFN, few layers), or as in table 1 of the paper: balanced (layers, FFN), narrow (hidden),
    ffn-only (FFN), shallow (layers), smallest (layers, FFN). Default: in distill, sizes by --lose,
    or nothing. In prune, fewer-experts (three quarters of the experts) for a mixture of experts;
    half-vocab if the vocabulary holds an eighth of the parameters or more; none (only tokens go) if
    half of the vocabulary holds nearly a third; else half-ffn. The mountain names are accepted,
    too: redyk, gazda, goral, baca, halny, juhas, zbojnik and stado, in this order
    """
    layers: Annotated[Count | None, Also(("num_layers",))] = None
    """keep this many layers"""
    ffn: Count | None = None
    """keep this many FFN neurons per layer"""
    experts: str | None = None
    """keep this many experts per block of a mixture: a number, or a share such as 0.75x; those with
    the largest gate times output norm, averaged over the tokens that choose them, stay
    """
    heads: Count | None = None
    """keep this many query heads, in whole groups with their key-value head if the number permits
    """
    hidden: Count | None = None
    """keep this many hidden channels: the teacher is rotated to its principal directions first
    (two more passes over it), and an ordinary model is stored
    """
    importance: Literal["aais", "rms"] = "aais"
    """how to rank neurons, heads and channels. rms: root mean square of activations; aais: that
    times air temperature over altitude
    """
    target: Literal["fixed", "conditions"] = "fixed"
    """fixed: exact sizes; conditions: FFN size from the threshold of eq. (1) at the measured air
    temperature and altitude
    """

    def __post_init__(self) -> None:
        # frozen, but still being made
        object.__setattr__(self, "scenario", scenarios.plain(self.scenario))


Ranking = Callable[[Key], np.ndarray]  # (layer, axis) -> scores (units,); the highest stay


def ranking(statistics: Statistics, cut: PruningConfig) -> tuple[Ranking, str]:
    """How `cut` ranks a layer's units, and the name of that."""
    by_weather = (
        cut.importance == "aais" and statistics.measured and statistics.altitude_m is not None
    )

    def scores(key: Key) -> np.ndarray:
        i, axis = key
        sums: importance.Sums = getattr(statistics, axis)[i]
        if by_weather:
            return importance.aais(sums, statistics.altitude_m or 1.0)
        return importance.rms(sums)

    if cut.importance == "aais" and not by_weather:
        return scores, "rms (no T_env or altitude known)"
    return scores, cut.importance


def select_units(
    config: Mapping[str, Any],
    statistics: Statistics,
    cut: PruningConfig,
    shape: Shape | None = None,
) -> tuple[Shape, KeptUnits]:
    """The student's shape, if it is not given, and the units that stay.

    These come with a report of how AAIS and plain importance differ. MisError where `--target
    conditions` has no T_env or altitude.
    """
    shape = shape or wanted_shape(config, cut)
    before = shape_of(config)
    stays = dict.fromkeys(family(config).fixed_blocks(), math.inf)
    blocks = {**statistics.block, **stays}
    layers = importance.select_blocks(blocks, shape.layers, arch.layer_phase(config))
    scores, used = ranking(statistics, cut)
    if cut.target == "conditions":
        shape = _shape_by_conditions(
            statistics, cut, shape, layers=layers, used=used, experts=max(1, before.experts)
        )
    kept: dict[Key, tuple[int, ...]] = {}
    differ: dict[Key, int] = {}

    def choose(key: Key) -> None:
        i, axis = key
        kept[key] = _pick(axis, scores(key), before, shape)
        plain = importance.rms(getattr(statistics, axis)[i])
        differ[key] = len(set(kept[key]) - set(_pick(axis, plain, before, shape)))

    for i in layers:
        attending = family(config).attends(i)
        axes = ["experts", "ffn"]
        if attending:
            axes.append("heads")
        for axis in axes:
            if getattr(shape, axis) < getattr(before, axis):
                choose((i, axis))
        if not attending and shape.hidden < before.hidden:
            choose((i, "channels"))
        if attending and shape.kv_heads < before.kv_heads:
            group = before.heads // before.kv_heads
            kept[i, "kv_heads"] = tuple(sorted({head // group for head in kept[i, "heads"]}))
    celsius = statistics.ambient_c
    report = {
        "importance": used,
        "scenario": cut.scenario,
        "target": cut.target,
        "channels_differing_from_plain": sum(differ.values()),
        "differing": {f"{i}/{axis}": n for (i, axis), n in differ.items() if n},
        "channels_kept": sum(map(len, kept.values())),
        "ambient_c": [min(celsius), max(celsius)] if celsius else None,
        "altitude_m": statistics.altitude_m,
        "block_importance": {str(i): round(v, 6) for i, v in statistics.block.items()},
        "profile": profile(statistics, layers, kept, scores),
    }
    return shape, KeptUnits(layers, kept, used, report)


def _shape_by_conditions(
    statistics: Statistics,
    cut: PruningConfig,
    shape: Shape,
    *,
    layers: Sequence[int],
    used: str,
    experts: int,
) -> Shape:
    """The shape with the FFN size that eq. (1) gives in the measured air, of the kept layers.

    experts: the teacher's; 1 where it is dense.
    """
    if cut.importance != "aais":
        raise MisError(
            f"--target conditions needs --importance aais, but {cut.importance} was given, which "
            f"does not know the air: leave one of them out"
        )
    if used != "aais" or statistics.altitude_m is None:
        lost = "--target conditions needs T_env and the altitude, and one is missing"
        raise MisError(f"{lost}: add --temperature-c and --altitude-m, or use --target fixed")
    ffn = importance.conditions_size(
        [statistics.ffn[i] for i in layers],
        size=shape.ffn,
        multiple=arch.FFN_MULTIPLE,
        altitude_m=statistics.altitude_m,
        experts=experts,
    )
    return replace(shape, ffn=ffn)


def _pick(axis: str, scores: np.ndarray, before: Shape, shape: Shape) -> tuple[int, ...]:
    """The units of an axis that stay when a layer of shape `before` is cut to `shape`."""
    if axis == "ffn":
        experts = max(1, before.experts)  # of each, equally many neurons stay
        keep = len(scores) * shape.ffn // before.ffn
        return importance.top_in_groups(scores, experts, keep, experts)
    if axis == "heads":
        return importance.top_in_groups(scores, before.kv_heads, shape.heads, shape.kv_heads)
    if axis == "channels":  # a short convolution is as wide as the stream
        return importance.top(scores, keep=shape.hidden)
    return importance.top(scores, keep=getattr(shape, axis))


def profile(
    statistics: Statistics, layers: Sequence[int], kept: Mapping[Key, Any], scores: Ranking
) -> dict[str, Any]:
    """{"layer/axis": {"kept": share of its importance that stays}} of all teacher layers."""
    shares = {}
    for axis in ("ffn", "heads", "experts"):
        for i in sorted(getattr(statistics, axis)):
            units = np.abs(scores((i, axis)))
            stays = 0.0
            if i in layers:
                stays = units[list(kept.get((i, axis), range(len(units))))].sum()
            share = float(stays / max(units.sum(), 1e-30))
            shares[f"{i}/{axis}"] = {"kept": round(share, 4)}
    return shares


def wanted_shape(config: Mapping[str, Any], cut: PruningConfig) -> Shape:
    """The shape that `cut` asks for at fixed target. MisError when no loader would accept it."""
    ratios = scenarios.RATIOS.get(cut.scenario or "half-ffn", {})
    before = shape_of(config)
    exact = {axis: getattr(cut, axis) for axis in ALL if axis != "kv_heads"}
    most = before.experts or MOST_EXPERTS
    exact["experts"] = arch.count("--experts", cut.experts, most, "experts")
    shape = arch.target_shape(config, ratios, **exact)
    if cut.scenario != "none" and shape == before and cut.target == "fixed":
        why = (
            f"--scenario {cut.scenario} would cut nothing of {before}, because FFN goes in steps "
            f"of {arch.FFN_MULTIPLE}, hidden in steps of {math.lcm(16, before.heads)}"
        )
        raise MisError(f"{why}: give --layers, --ffn or --hidden, or another scenario")
    return shape


def largest_student(config: Mapping[str, Any], cut: PruningConfig, dtype: str) -> dict[str, Any]:
    """The config of the largest student that `cut` may leave: for plans, which are made before.

    The air decides no sooner than in the pruning, and may leave as many neurons as the teacher has.
    """
    shape = wanted_shape(config, cut)
    if cut.target == "conditions":
        shape = replace(shape, ffn=shape_of(config).ffn)
    return arch.student_config(config, shape, dtype=dtype)


def prune(
    checkpoint: Checkpoint,
    batches: stream.Batches,
    out: Path,
    cut: PruningConfig,
    *,
    dtype: str,
    air: Callable[[], Air],
    held: int | None = None,
) -> dict[str, Any]:
    """Calibrate on token ids [(B, T)], choose, write the folder `out`.

    Returns what was done, for the JSON line. Nothing is calibrated where nothing is cut. held:
    batches whose hidden states stay in memory (default: all).
    """
    wanted_shape(checkpoint.config, cut)  # refuses before the pass, not after
    folder = out.absolute().parent
    DISK.make_folder(folder)
    spooled = held is not None and held < len(batches)

    def states() -> stream.Hidden:
        """A place for the hidden states of a pass."""
        return Spool(folder, held or 0) if spooled else []

    config = checkpoint.config
    uncut = cut.target == "fixed" and wanted_shape(config, cut) == shape_of(config)
    if uncut:
        statistics = Statistics(block=dict.fromkeys(range(shape_of(checkpoint.config).layers), 0.0))
    else:
        statistics, _ = calibrate.calibrate(
            checkpoint, batches, air=air, by_air=cut.importance == "aais", hidden=states()
        )
    shape, keep = select_units(checkpoint.config, statistics, cut)
    if uncut:
        keep = replace(keep, why=UNCUT, report={**keep.report, **NOT_RANKED})

    keep = slicing.write_student(
        checkpoint,
        shape,
        keep,
        out=out,
        dtype=dtype,
        directions=lambda: slicing.principal_directions(checkpoint, batches, states),
    )
    student = arch.student_config(checkpoint.config, shape, keep.layers, dtype)
    return {
        "params_before": arch.params(checkpoint.config),
        "params": arch.params(student),
        "shape": str(shape),
        **{name: value for name, value in keep.report.items() if name not in BULKY},
    }


def pruning_cost(
    t: ModelSize,
    student_bytes: int,
    *,
    windows: int,
    length: int,
    limit: int,
    rotation: bool,
    shown: ModelSize | None = None,
) -> StageCost:
    """Choose the tokens, calibrate on windows, if any, then copy tensor by tensor.

    All with the text's tokenizer in memory. shown: the teacher with all of its tokens, where some
    go.
    """
    text_bytes = (shown or t).text_bytes
    stages = [StageCost("")]  # nothing is ranked
    if windows:
        calibration = calibrate.calibration_cost(
            t, windows, length, limit, rotation=rotation, beside_bytes=text_bytes
        )
        stages = [calibration]
    if shown:
        stages.append(vocabulary.vocabulary_cost(shown, length).beside(text_bytes))
    copying = StageCost(
        "copy",
        read_bytes=t.nbytes,
        written_bytes=student_bytes,
        peak_bytes=slicing.copying_bytes(t, rotation=rotation) + text_bytes,
    )
    return in_turn("prune", *stages, copying)
