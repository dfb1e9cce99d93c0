"""Model folders that lie: no crash, no hang, and nothing passes that the reference refuses or reads
otherwise.
"""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest

from mis_mlx.models.architectures import arch
from mis_mlx.storage import safetensors
from tests import tiny
from tests.faults import liars
from tests.faults.conftest import Note


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of several shards and an index."""
    folder = tiny.make(
        tmp_path_factory.mktemp("liars") / "model", num_hidden_layers=2, intermediate_size=64
    )
    config = json.loads((folder / "config.json").read_text())
    specs = {name: ("F32", shape) for name, shape in arch.tensors_of(config).items()}
    arrays = safetensors.lazy(*[safetensors.index(folder)] * 2)
    mx.eval(arrays)
    (folder / "model.safetensors").unlink()
    in_order = ((name, arrays[name]) for name in specs)
    safetensors.write_tensors(
        folder,
        specs,
        tensors=in_order,
        shards=safetensors.split_into_shards(specs, 150_000),
    )
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return folder


def test_liars_are_refused_or_read_rightly(model: Path, tmp_path: Path) -> None:
    """The first 100 of the endless list."""
    found, bad = liars.tried(model, tmp_path / "room", 0, 100)
    assert not bad
    assert found.total() == 100
    # a gate that refuses everything is found out too
    assert found["refused"] > 50
    assert found["read"] > 10


@pytest.mark.slow
def test_twenty_thousand_liars(model: Path, tmp_path: Path, note: Note) -> None:
    """Many more of them."""
    found, bad = liars.tried(model, tmp_path / "room", 0, 20_000)
    note("a model folder that lies", "open, read, one forward pass", found, len(bad))
    assert not bad
    assert found.total() == 20_000


def test_without_the_gate_liars_are_found_out(model: Path, tmp_path: Path) -> None:
    """A test of the test: a folder that the reference refuses, or a dead process, is `bad`."""
    broken = liars.tried(model, tmp_path / "room", 0, 40, gate=False)[1]
    assert broken
