"""The tiny llama of a fixture in MLX, and a comparison of gradients.

fixtures/trl_preference.npz holds what TRL 1.16.0's SFT and DPO trainers computed (torch 2.13.0,
transformers 5.24.0), and DPO-P, which TRL does not have, by its formula in torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mis_mlx.models.opening import load
from mis_mlx.models.writing import model_writer
from mis_mlx.types import Checkpoint

FIXTURE = Path(__file__).parent / "fixtures" / "trl_preference.npz"


def stored() -> dict[str, np.ndarray]:
    """Everything in the fixture, by name."""
    with np.load(FIXTURE) as found:
        return dict(found)


def checkpoint(found: dict[str, np.ndarray], role: str, folder: Path) -> Checkpoint:
    """The policy's or the reference's weights as a model folder."""
    config = json.loads(str(found["config"]))
    prefix = f"{role}/"
    take = {
        name.removeprefix(prefix): mx.array(a)
        for name, a in found.items()
        if name.startswith(prefix)
    }
    model_writer.write_model(
        config, take.__getitem__, source=folder.parent, out=folder, dtype="float32"
    )
    return load.open_checkpoint(folder)


def model(found: dict[str, np.ndarray], role: str, folder: Path) -> nn.Module:
    """`checkpoint` in memory."""
    made = load.resident_model(checkpoint(found, role, folder / role), mx.float32)
    mx.eval(made.parameters())
    return made


def worst(gradients: Any, found: dict[str, np.ndarray], case: str, count: float = 1.0) -> float:
    """The largest |difference| to TRL's gradients over the largest |gradient|, of any tensor."""
    ours = dict(tree_flatten(gradients))
    prefix = f"{case}/grad/"
    theirs = {name.removeprefix(prefix): a for name, a in found.items() if name.startswith(prefix)}
    assert theirs
    assert set(theirs) == set(ours)
    return max(
        float(np.abs(np.array(ours[n]) / count - a).max() / np.abs(a).max())
        for n, a in theirs.items()
    )
