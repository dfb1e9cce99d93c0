"""Does AAIS help? The same teacher pruned by plain importance and by AAIS, on air that warms during
calibration.

    scripts/mis benchmarks/aais.py        # about 6 minutes on 2 cores

Three seeds choose the calibration windows. The air warms from 8 to 33 °C over the first
16 batches and stays there, at 832 m. Held-out loss is measured right after pruning,
before any training, on the same windows for all. `--target conditions` is tried at three altitudes
on the first seed. Writes benchmarks/results/<machine>/aais.json.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
from laboratory import write

from mis_mlx.data import preparation
from mis_mlx.judge import comparison
from mis_mlx.maths import importance
from mis_mlx.models.architectures import arch
from mis_mlx.models.opening import compute_type, load, resolve
from mis_mlx.pruning import calibrate, select, slicing
from mis_mlx.types import Air

SEEDS = (0, 1, 2)
WINDOWS = 32
# the warm wind falls on the hut within the first 16 windows
HALNY_C = np.linspace(8.0, 59.67, WINDOWS).clip(max=33.0)
HELD_OUT = 16
LENGTH = 256


def main() -> None:
    """Run all seeds, print one table, write one JSON file."""
    checkpoint = compute_type.open_to_compute(resolve.resolve_model().path)
    data = preparation.prepare(None, load.tokenizer(checkpoint.path), LENGTH)
    held_out = comparison.spread_windows(data.held_out["English"], HELD_OUT)
    cut = select.PruningConfig(scenario="goral")
    rows = []
    sizes = {}
    for seed in SEEDS:
        at = np.random.default_rng(seed).permutation(len(data.train.tokens))[:WINDOWS]
        batches = [mx.array(data.train.tokens[i][None]) for i in at]
        warming = (Air(celsius=celsius, altitude_m=832.0) for celsius in HALNY_C)
        kelvin, _ = calibrate.calibrate(checkpoint, batches, partial(next, warming))
        if seed == SEEDS[0]:
            sums = [kelvin.ffn[i] for i in importance.select_blocks(kelvin.block, 20)]
            for metres in (100.0, 832.0, 2500.0):
                sizes[metres] = importance.conditions_size(sums, 1280, arch.FFN_MULTIPLE, metres)
        chosen = {
            "plain": select.select_units(
                dict(checkpoint.config), kelvin, replace(cut, importance="rms")
            ),
            "kelvin": select.select_units(dict(checkpoint.config), kelvin, cut),
        }
        with tempfile.TemporaryDirectory() as folder:
            models = {"teacher": checkpoint}
            for name, (shape, keep) in chosen.items():
                slicing.write_student(
                    checkpoint,
                    shape,
                    keep=keep,
                    out=Path(folder) / name,
                    dtype="bfloat16",
                )
                models[name] = compute_type.open_to_compute(Path(folder) / name)
            found = comparison.compare(models, held_out)
        for name, (_, keep) in chosen.items():
            differ = keep.report["channels_differing_from_plain"]
            gap = (found[name, "nll"] - found["plain", "nll"]).mean()
            rows.append(
                {
                    "seed": seed,
                    "importance": name,
                    "differ": differ,
                    "kept": keep.report["channels_kept"],
                    "nll": float(found[name, "nll"].mean()),
                    "kl": float(found[name, "kl"].mean()),
                    "nll_minus_plain": float(gap),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    write("aais", "scripts/mis benchmarks/aais.py", {"rows": rows, "ffn_size_at_altitude_m": sizes})
    print(json.dumps({"ffn_size_at_altitude_m": sizes}))


if __name__ == "__main__":
    main()
