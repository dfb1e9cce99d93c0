"""transformers on torch, where that is, opens what `export --format hf` and `prune` write, with
MLX's logits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx import export, prune
from mis_mlx.models.opening import load
from tests import tiny

pytestmark = pytest.mark.slow  # it is no part of what the README installs
torch = pytest.importorskip(
    "torch", reason="transformers runs models on torch: pip install -e '.[transformers]'"
)

TEXT = "Baca pasł owce: the with statement, 1234567 + 89 = café?"
KINDS: dict[str, dict[str, Any]] = {
    **tiny.KINDS,
    **tiny.MODELS,
    **tiny.PHIS,
    "long": {"rope_scaling": {**tiny.LLAMA3, "original_max_position_embeddings": 32}},
}
# Their ministral3 has one window for all blocks, mlx-lm's goes by the blocks' kinds; the published
# ones have none.
KINDS["ministral3"] = {**KINDS["ministral3"], "sliding_window": None, "layer_types": None}
# Written in mlx-lm's names, which transformers does not know: parts of models that see and hear,
# and experts with gates and ups apart.
for unknown in ("qwen3_5_text", "gpt_oss"):
    del KINDS[unknown]
WINDOW = {"num_samples": 4, "max_seq_length": 32}


def made(folder: Path, **changes: Any) -> str:
    """A tiny float32 model whose config.json has its type in transformers 5's spelling too."""
    config = tiny.make(folder, **changes) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "float32"}))
    return str(folder)


def same_logits(folder: Path, ids: list[int], dtype: torch.dtype) -> None:
    """transformers' own model in float32 gives MLX's float32 logits to 1e-3, and its config says
    the weights' type.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    assert AutoConfig.from_pretrained(folder).dtype == dtype
    model, told = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(told.values()), told  # no weight missing, left over or of another shape
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits[0].numpy()
    ours = np.array(
        load.resident_model(load.open_checkpoint(folder), mx.float32)(mx.array(ids)[None])[0]
    )
    assert np.ptp(ours) > 0.5
    np.testing.assert_allclose(theirs, ours, atol=1e-3)


def same_tokens(folder: Path) -> list[int]:
    """The ids of TEXT, which transformers' tokenizer and the one that mlx-lm opens cut alike."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]
    assert ids == load.tokenizer(folder).encode(TEXT)
    assert len(ids) > 10
    return ids


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_bfloat16_folder_of_export(tmp_path: Path, kind: str) -> None:
    """Every architecture, with biases, with stretched positions; the folder's own type is
    float32.
    """
    export.run(
        export.Settings(
            model=made(tmp_path / "m", **KINDS[kind]), format="hf", out=str(tmp_path / "hf")
        )
    )
    same_logits(tmp_path / "hf", same_tokens(tmp_path / "hf"), torch.bfloat16)


@pytest.mark.parametrize(
    "axes", [{"scenario": "goral"}, {"scenario": "none", "hidden": 48}, {"heads": 2}]
)
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_the_folder_of_prune(
    tmp_path: Path, kind: str, axes: dict[str, Any], text_folder: Path
) -> None:
    """Fewer blocks and neurons; a hidden size that its heads do not divide; fewer heads."""
    model = made(tmp_path / "m", **tiny.KINDS[kind])
    out = str(tmp_path / "pruned")
    prune.run(prune.Settings(model=model, data=str(text_folder), mlx_path=out, **WINDOW, **axes))
    same_logits(tmp_path / "pruned", same_tokens(tmp_path / "pruned"), torch.bfloat16)


def test_joined_matrices(tmp_path: Path) -> None:
    """A phi3, as transformers itself opens it."""
    config = tiny.joined(tmp_path / "phi3") / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "float32"}))
    same_logits(tmp_path / "phi3", same_tokens(tmp_path / "phi3"), torch.float32)
