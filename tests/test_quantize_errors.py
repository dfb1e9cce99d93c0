"""What `quantize` and `export` cannot do ends in one sentence, and nothing half-written is left on
the disk.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mis_mlx import quantize
from mis_mlx.models.opening import load
from mis_mlx.types import MisError
from tests import tiny
from tests.conftest import Done, sentence


def made(model: Path, out: Path, method: Any = "round", text: Path | None = None) -> dict[str, Any]:
    """`quantize` with little text, which rounding does not need."""
    flags = {
        "q_method": method,
        "target_bpw": None,
        "num_samples": 2,
        "max_seq_length": 32,
        "data": text and str(text),
    }
    return quantize.run(quantize.Settings(model=str(model), mlx_path=str(out), **flags))


def nan(folder: Path, name: str) -> Path:
    """A tiny model with one NaN, at the end of tensor `name`."""
    model = tiny.make(folder)
    data = bytearray((model / "model.safetensors").read_bytes())
    at = load.open_checkpoint(model).tensors[name]
    data[at.offset + at.nbytes - 4 : at.offset + at.nbytes] = np.float32("nan").tobytes()
    (model / "model.safetensors").write_bytes(data)
    return model


def mute(folder: Path) -> Path:
    """A tiny model without a tokenizer."""
    model = tiny.make(folder)
    (model / "tokenizer.json").unlink()
    return model


def packed(folder: Path) -> Path:
    """A tiny model in 4 bits."""
    made(tiny.make(folder / "dense"), folder / "four")
    return folder / "four"


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a dimension that does not divide": (
        lambda folder: tiny.make(folder, intermediate_size=760),
        r"down_proj.weight has rows of 760 weights, which are not divisible by 64: prune that axis",
    ),
    "a dimension that only a smaller group divides": (
        lambda folder: tiny.make(folder, intermediate_size=736),
        r"rows of 736 weights, which are not divisible by 64: use --q-group-size 32",
    ),
    "quantized already": (packed, "four is quantized already: start from the unquantized model"),
    "NaN in a norm": (
        lambda folder: nan(folder, "model.layers.1.input_layernorm.weight"),
        "layers.1.input_layernorm.weight holds 1 values that are not numbers: download the model "
        "again",
    ),
    "NaN in a matrix": (
        lambda folder: nan(folder, "model.layers.1.mlp.up_proj.weight"),
        "layers.1.mlp.up_proj.weight holds 1 values that are not numbers: download the model again",
    ),
}


@pytest.mark.parametrize("method", ["round", "gptq"])
@pytest.mark.parametrize("what", sorted(BAD))
def test_quantize(tmp_path: Path, what: str, method: str, text_folder: Path) -> None:
    """The folder that the result would lie in stays empty."""
    make, why = BAD[what]
    model = make(tmp_path / "model")
    place = tmp_path / "place"
    place.mkdir()
    with pytest.raises(MisError, match=why):
        made(model, place / "out", method, text_folder)
    assert not list(place.iterdir())


@pytest.mark.parametrize("method", ["round", "gptq"])
def test_a_tokenizer_that_is_not_there(tmp_path: Path, method: str) -> None:
    """A model that nobody could speak to is not made."""
    with pytest.raises(MisError, match=r"mute.* tokenizer.*: copy the tokenizer files"):
        made(mute(tmp_path / "mute"), tmp_path / "out", method)
    assert not (tmp_path / "out").exists()


def test_export_of_rows_without_whole_blocks(
    tmp_path: Path, in_process: Callable[..., Done]
) -> None:
    """One line on stderr for a user, exit code 1, no folder."""
    model = tiny.make(tmp_path / "odd", intermediate_size=760)
    said = sentence(
        in_process("export", "--model", model, "--out", tmp_path / "out", "--out-type", "q8_0")
    )
    assert (
        "down_proj.weight has rows of 760 weights, which Q8_0's block of 32 does not divide" in said
    )
    assert [p.name for p in tmp_path.iterdir()] == ["odd"]
