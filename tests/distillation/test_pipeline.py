"""The stages of a run, one after the other."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any, NoReturn

import pytest

from mis_mlx import distill
from mis_mlx.distillation import pipeline
from mis_mlx.quantization import stage
from mis_mlx.types import Checkpoint


class Cycle:
    """What only the garbage collector finds, as a trained student."""

    def __init__(self) -> None:
        self.itself = self


def test_a_phase_begins_without_what_the_last_one_left(
    llama: Checkpoint, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding has the memory that training had, whenever Python would have collected it."""
    left = list[weakref.ref[Cycle]]()
    trained = pipeline.distil

    def leaving(*given: Any) -> None:
        trained(*given)
        left.append(weakref.ref(Cycle()))

    def rounding(*_: object, **__: object) -> NoReturn:
        assert [reference() for reference in left] == [None]
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "distil", leaving)
    monkeypatch.setattr(stage, "quantize", rounding)
    sizes: dict[str, Any] = {"max_seq_length": 32, "num_samples": 2, "reconstruct_samples": 2}
    settings = distill.Settings(
        teacher=str(llama.path),
        data=str(text_folder),
        out=str(tmp_path / "run"),
        scenario="gazda",
        iters=1,
        eval_windows=2,
        **sizes,
    )
    gc.disable()
    try:
        with pytest.raises(KeyboardInterrupt):
            distill.run(settings)
    finally:
        gc.enable()
