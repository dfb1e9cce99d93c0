"""What `quantize` cannot do ends in one sentence, and nothing half-written is left on
the disk.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mis_mlx import quantize
from mis_mlx.types import MisError
from tests import tiny


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
        "down_proj.weight .* 760 .* 64",
    ),
    "a dimension that only a smaller group divides": (
        lambda folder: tiny.make(folder, intermediate_size=736),
        " 736 .* 64: .*--q-group-size 32",
    ),
    "quantized already": (packed, "four"),
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
