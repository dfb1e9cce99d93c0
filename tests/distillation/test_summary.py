"""The page of a run: a student that came out worse than it went in is said to be so, by text."""

from __future__ import annotations

import pytest

from mis_mlx.distillation import summary
from mis_mlx.types import Checkpoint, Row


@pytest.mark.parametrize(("distilled", "worse"), [(3.0, []), (3.9, ["Polish"])])
def test_worse_than_pruned_is_said(distilled: float, worse: list[str], llama: Checkpoint) -> None:
    """English falls, Polish rises or does not; both numbers and a way out stand there."""
    models = dict.fromkeys(("teacher", "pruned", "distilled"), llama)
    sizes = [Row(name, "params", 1.0) for name in models]
    quality = {"English": (2.0, 4.0, 2.5), "Polish": (2.0, 3.5, distilled)}
    rows = {text: [Row(m, "nll", v, 0.1, 0.1, 3) for m, v in zip(models, losses, strict=True)]
            for text, losses in quality.items()}  # fmt: skip
    page = summary.page(models, sizes, rows, 32)
    said = [text for text in quality if f"On {text} distillation made the student worse" in page]
    assert said == worse and ("3.900 nats/token, where it had 3.500" in page) == bool(worse)
