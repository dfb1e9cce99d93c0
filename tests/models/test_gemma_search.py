"""`search` on Gemma 4, whose blocks are not alike: sizes are those of the files, and a
search goes from end to end.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mis_mlx import distill
from mis_mlx.models.architectures import arch, tensor_shapes
from mis_mlx.models.architectures.shape import weight_count
from mis_mlx.models.architectures.sizes import shape_of
from mis_mlx.models.opening import load
from mis_mlx.quantization import packed_format
from mis_mlx.size_search import shape_search
from mis_mlx.storage.files import DISK
from tests import tiny

WIDE: dict[str, Any] = {"hidden_size_per_layer_input": 64}
BRIEF: dict[str, Any] = {
    "max_seq_length": 32,
    "num_samples": 4,
    "reconstruct_samples": 0,
    "conversations": 0,
    "iters": 2,
}
# of a distillation
SHORT = {**BRIEF, "eval_windows": 3, "eval_prompts": 0, "q_iters": 0}


def made(folder: Path) -> Path:
    """A tiny model whose rows groups of 64 divide."""
    return tiny.make(folder, **{**tiny.FAMILIES["gemma4_text"], **WIDE})


def test_sizes_are_those_of_files(tmp_path: Path) -> None:
    """Parameters to the last one, bytes of the rounded model to a thousandth."""
    model = load.open_checkpoint(made(tmp_path / "m"))
    config = model.config
    shape = shape_of(config)
    tensors = shape_search.tensors_of(config, shape)
    weights = weight_count(shape_search.matrices_of(tensors))
    assert weight_count(tensors) == arch.params(config)
    plan = packed_format.formats_of(config, 64)
    packed_format.write_quantized(model, tmp_path / "q", plan, DISK)
    rounded = load.open_checkpoint(tmp_path / "q")
    bits = 0.0
    for name, size in arch.tensors_of(config).items():
        path = name.removesuffix(".weight")
        if path in plan:
            bits += plan[path].bits_per_weight * shape_product(size)
    told = shape_search.file_bytes(config, shape, bits / weights)
    file = next(iter(rounded.tensors.values())).file.name
    nbytes = sum(path.stat().st_size for path in (tmp_path / "q").glob("*.safetensors"))
    assert file == "model.safetensors"
    # The header is estimated, 120 bytes a tensor.
    headers = shape_search.TENSOR_BYTES * len(rounded.tensors)
    assert abs(told - nbytes) < 0.3 * headers


def shape_product(size: tuple[int, ...]) -> int:
    """The numbers in a tensor of this shape."""
    total = 1
    for length in size:
        total *= length
    return total


def test_the_fewest_bits_count_small_matrices() -> None:
    """They have 8 bits always: fewer bits on average than that no student can have."""
    config = {**tiny.CONFIG, **tiny.FAMILIES["gemma4_text"], **WIDE}
    shape = shape_of(config)
    shapes = arch.tensors_of(config)
    gates = tensor_shapes.gates(config)
    wide = sum(shape_product(shapes[f"{path}.weight"]) for path in gates)
    weights = weight_count(shape_search.matrices_of(shapes))
    fewest, most = shape_search.bpw_range(config, shape)
    assert 0 <= fewest - (3.5 + 5 * wide / weights) < 0.01
    assert most == 8.5
    assert shape_search.bpw_range(tiny.CONFIG, shape_of(tiny.CONFIG)) == (3.5, 8.5)


@pytest.mark.slow
def test_distill_by_loss(tmp_path: Path, text_folder: Path) -> None:
    """The student of `distill --lose` is the one that the search found, and stock sizes fit it."""
    model = made(tmp_path / "m")
    settings = distill.Settings(
        teacher=str(model),
        data=str(text_folder),
        lose=0.5,
        out=str(tmp_path / "run"),
        **SHORT,
    )
    done = distill.run(settings)
    assert done["expected_loss"] <= 0.52
    assert done["bytes_4-bit"] < done["bytes_teacher"] / 3


def test_nothing_said_leaves_blocks_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without sizes a search chooses tokens and bits: tables are most of such a model."""
    model = made(tmp_path / "m")
    planned = distill.run(distill.Settings(teacher=str(model), dry_run=True, conversations=0))
    said = capsys.readouterr().err
    assert "within --lose 0.1; a search chooses sizes and bits" in said
    assert planned["params_student"] == planned["params_teacher"]
