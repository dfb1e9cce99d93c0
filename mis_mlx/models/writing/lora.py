"""LoRA through mlx-lm's own adapters: insert them, write them, fuse them into weights on disk."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mis_mlx.models.architectures import arch
from mis_mlx.models.architectures.families import family, shape_of
from mis_mlx.models.opening import load
from mis_mlx.storage import checkpoint as protocol
from mis_mlx.storage.files import DISK
from mis_mlx.storage.safetensors import write_arrays
from mis_mlx.types import Checkpoint, MisError

# mlx-lm's names.
FILE = "adapters.safetensors"
CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Lora:
    """Low-rank updates of every matrix in some blocks: W + scale * (A B)^T.

    num_layers: in the last so many; -1: in all.
    """

    num_layers: int
    rank: int
    scale: float

    @property
    def settings(self) -> dict[str, float]:
        """mlx-lm's names."""
        return {"rank": self.rank, "scale": self.scale, "dropout": 0.0}

    def check(self, layers: int) -> None:
        """MisError where a model of so many layers cannot have these."""
        if not (self.num_layers == -1 or 1 <= self.num_layers <= layers):
            why = f"--num-layers is {self.num_layers}, but the model has {layers} blocks"
            raise MisError(f"{why}: give 1 to {layers}, or -1 for all")

    def params(self, config: Mapping[str, Any]) -> int:
        """How many numbers are trained."""
        layers = shape_of(config).layers
        trained = layers if self.num_layers == -1 else self.num_layers
        total = 0
        for i in range(layers - trained, layers):
            for shape in arch.layer_tensors(config, block=i).values():
                if len(shape) == 2:
                    total += self.rank * sum(shape)
        return total


def insert(model: nn.Module, lora: Lora, seed: int) -> None:
    """Freeze the model and put adapters into it.

    A is drawn from `seed`, B is 0, so the model computes what it did.
    """
    model.freeze()
    mx.random.seed(seed)
    load.mlx_lm("tuner.utils").linear_to_lora_layers(model, lora.num_layers, lora.settings)


def write(
    adapters: Mapping[str, mx.array],
    lora: Lora,
    out: Path,
    config: Mapping[str, Any],
) -> None:
    """Commit the new folder `out`, which mlx_lm takes as --adapter-path. config: the model's."""
    architecture = family(config)
    adapters = _stacked(adapters, config)
    adapters = {architecture.stored_name(name): array for name, array in adapters.items()}
    adapter_config = {
        "fine_tune_type": "lora",
        "num_layers": lora.num_layers,
        "lora_parameters": lora.settings,
    }
    nbytes = sum(array.nbytes for array in adapters.values())
    with protocol.commit_folder(out, nbytes, "the adapters") as folder:
        write_arrays(folder / FILE, adapters)
        DISK.write(folder / CONFIG, json.dumps(adapter_config, indent=2).encode())


def _stacked(adapters: Mapping[str, mx.array], config: Mapping[str, Any]) -> dict[str, mx.array]:
    """The adapters with one for all experts' matrices of a kind in a block, as mlx-lm has them.

    Of E experts A (E, rank, in) and B (E, out, rank): those of matrices by themselves, turned.
    """
    named = dict[str, mx.array]()
    for name, array in adapters.items():
        path, _, part = name.rpartition(".")
        stacked = family(config).joined(path)
        own = f"{stacked}.{part}"
        if own == name:
            named[name] = array
        elif own not in named:
            parts = []
            for expert in family(config).one_by_one(own):
                parts.append(adapters[expert].T)
            named[own] = mx.stack(parts)
    return named


def fused(
    checkpoint: Checkpoint, adapters: Mapping[str, mx.array], lora: Lora
) -> Callable[[str], mx.array]:
    """take(name): the checkpoint's tensor with its adapter added, in float32.

    Memory: one tensor at a time.
    """

    def take(name: str) -> mx.array:
        weight = load.dense(checkpoint, name)
        stem = name.removesuffix(".weight")
        lora_a = adapters.get(f"{stem}.lora_a")
        if lora_a is None:
            return weight
        lora_b = adapters[f"{stem}.lora_b"]
        return weight.astype(mx.float32) + (lora.scale * lora_b.T) @ lora_a.T

    return take
