"""Which parts of a model a pruning keeps, and the pruned folder: calibrate, choose, write.

Does not know flags' parsing, nor what becomes of the student.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from mis_mlx.disk.files import Files
from mis_mlx.disk.spool import Spool
from mis_mlx.disk.text import Windows
from mis_mlx.maths import importance
from mis_mlx.maths.importance import Statistics
from mis_mlx.model import arch, calibrate, compare, load, slice
from mis_mlx.model.config import Shape, shape_of
from mis_mlx.training.weather import WeatherFlags
from mis_mlx.types import Checkpoint, Keep, MisError, Reading

Scenario = Literal["goral", "baca", "halny", "juhas", "zbojnik", "none"]


@dataclass(frozen=True)
class Cut(WeatherFlags):
    """What to prune and how to judge: shared by `prune` and `distill`."""

    scenario: Scenario = "goral"
    """table 1 of the paper, as ratios: goral (layers, FFN), baca (hidden), halny (FFN), juhas (layers), zbojnik"""
    layers: int | None = None
    """keep this many layers"""
    ffn: int | None = None
    """keep this many FFN neurons a layer"""
    heads: int | None = None
    """keep this many query heads"""
    hidden: int | None = None
    """keep this many hidden channels"""
    importance: Literal["aais", "activation", "random"] = "aais"
    """how channels are ranked"""
    target: Literal["fixed", "conditions"] = "fixed"
    """fixed: exact sizes; conditions: FFN size by eq. (1)'s threshold at the measured air and altitude"""
    temperature_unit: Literal["kelvin", "celsius"] = "kelvin"
    """unit of T_env in AAIS; celsius is the paper to the letter and refuses 0 and below"""


def choose(config: dict[str, Any], statistics: Statistics, cut: Cut, seed: int) -> tuple[Shape, Keep]:
    """The student's shape and who stays, with a report of how AAIS and plain importance differ."""
    shape = wanted_shape(config, cut)
    before = shape_of(config)
    layers = importance.lowest_blocks(statistics.block, shape.layers)
    weather = cut.importance == "aais" and statistics.measured and statistics.altitude_m is not None
    altitude = statistics.altitude_m or 1.0
    if cut.target == "conditions":
        if not weather:
            raise MisError(
                "--target conditions needs T_env and altitude, one is missing: add --temperature-c and "
                "--altitude-m, or use --target fixed"
            )
        sums = [statistics.ffn[i] for i in layers]
        size = importance.conditions_size(sums, shape.ffn, arch.FFN_MULTIPLE, altitude, cut.temperature_unit)
        shape = arch.target_shape(config, {}, layers=shape.layers, ffn=size, heads=shape.heads, hidden=shape.hidden)
    random = np.random.default_rng(seed)

    def scores(sums: importance.Sums) -> np.ndarray:
        if cut.importance == "random":
            return random.random(len(sums.plain))
        return importance.aais(sums, altitude) if weather else importance.activation(sums)

    kept: dict[tuple[int, str], tuple[int, ...]] = {}
    differ = 0

    def choice(key: tuple[int, str], sums: importance.Sums, pick: Callable[[np.ndarray], tuple[int, ...]]) -> None:
        nonlocal differ
        kept[key] = pick(scores(sums))
        differ += len(set(kept[key]) - set(pick(importance.activation(sums))))

    for i in layers:
        if shape.ffn < before.ffn:
            choice((i, "ffn"), statistics.ffn[i], partial(importance.top, keep=shape.ffn))
        if shape.heads < before.heads:
            pick = partial(importance.top_in_groups, groups=before.kv_heads, keep=shape.heads)
            choice((i, "heads"), statistics.heads[i], pick)
    if shape.hidden < before.hidden and statistics.hidden is not None:
        choice((-1, "hidden"), statistics.hidden, partial(importance.top, keep=shape.hidden))
    used = cut.importance if cut.importance != "aais" or weather else "activation (no T_env or altitude known)"
    air = statistics.ambient_c
    report = {
        "importance": used,
        "scenario": cut.scenario,
        "target": cut.target,
        "channels_differing_from_plain": differ,
        "channels_kept": sum(map(len, kept.values())),
        "ambient_c": [min(air), max(air)] if air else None,
        "altitude_m": statistics.altitude_m,
        "block_importance": {str(i): round(v, 6) for i, v in statistics.block.items()},
    }
    return shape, Keep(layers, kept, used, report)


def wanted_shape(config: Mapping[str, Any], cut: Cut) -> Shape:
    """The shape that `cut` asks for at fixed target. MisError when no loader would accept it."""
    ratios = arch.SCENARIOS.get(cut.scenario, {})
    return arch.target_shape(config, ratios, layers=cut.layers, ffn=cut.ffn, heads=cut.heads, hidden=cut.hidden)


def prune(
    checkpoint: Checkpoint,
    batches: Sequence[mx.array],
    held_out: Windows,
    out: Path,
    cut: Cut,
    *,
    dtype: str,
    seed: int,
    reading: Callable[[], Reading | None],
    files: Files,
    held: int | None = None,
) -> dict[str, Any]:
    """Calibrate on token ids [(B, T)], choose, write the folder `out`. Returns what was done, for the JSON line.

    Where AAIS keeps other channels than plain importance, the plain student is made too, for as long as it
    takes to compare the two on `held_out`. held: batches whose hidden states stay in memory (default: all).
    """
    wanted_shape(checkpoint.config, cut)  # refuses before the pass, not after
    files.make_folder(out.absolute().parent)
    hidden = None if held is None or held >= len(batches) else Spool(out.absolute().parent, held, files)
    statistics, _ = calibrate.calibrate(
        checkpoint, batches, load.compute_dtype(), reading, cut.temperature_unit, hidden
    )
    shape, keep = choose(dict(checkpoint.config), statistics, cut, seed)
    if keep.report["channels_differing_from_plain"] and cut.importance == "aais":
        sizes: dict[str, Any] = {a: getattr(shape, a) for a in ("layers", "ffn", "heads", "hidden")}
        as_plain = replace(cut, importance="activation", target="fixed", scenario="none", **sizes)
        _, plain = choose(dict(checkpoint.config), statistics, as_plain, seed)
        with tempfile.TemporaryDirectory(prefix=f".tmp-{out.name}-", dir=out.absolute().parent) as temp:
            both = {}
            for name, kept in (("aais", keep), ("plain", plain)):
                slice.write_student(checkpoint, shape, kept, Path(temp) / name, dtype, files)
                both[name] = load.open_checkpoint(Path(temp) / name)
            found = compare.compare(both, held_out)
        losses = {f"nll_{name}": float(found[name, "nll"].mean()) for name in both}
        keep = replace(keep, report={**keep.report, **losses})
    slice.write_student(checkpoint, shape, keep, out, dtype, files)
    config = arch.student_config(checkpoint.config, shape, keep.layers, dtype)
    return {
        "params_before": arch.params(checkpoint.config),
        "params": arch.params(config),
        "shape": str(shape),
        **{k: v for k, v in keep.report.items() if k != "block_importance"},
    }
