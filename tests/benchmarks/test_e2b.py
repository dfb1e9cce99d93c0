"""The model that benchmarks/e2b.py makes: packed in slices, opened by this program, with a
tokenizer of as many tokens as it has rows.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
from tokenizers import Tokenizer

from mis_mlx.models.architectures import arch
from mis_mlx.models.opening import load
from mis_mlx.models.opening.trimmed_tokenizer import Vocabulary
from tests import tiny
from tests.test_docs import program

ROOT = Path(__file__).parents[2]
ROWS = ("vocab_size", "vocab_size_per_layer_input")


@pytest.fixture(scope="module")
def made() -> SimpleNamespace:
    """The programs and the renderer."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return SimpleNamespace(e2b=program(ROOT / "benchmarks/e2b.py"))
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def test_a_model_in_slices(
    made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many parts are one model: 4 bits, weights of both signs, and the numbers of its config."""
    monkeypatch.setattr(made.e2b, "PART", 2**12)
    config = {**tiny.CONFIG, **tiny.FAMILIES["gemma4_text"], "hidden_size_per_layer_input": 64}
    took = made.e2b.write_model(tmp_path / "m", config)
    assert took["seconds"] >= 0
    checkpoint = load.open_checkpoint(tmp_path / "m")
    assert arch.params(checkpoint.config) == arch.params(config)
    table = "model.embed_tokens_per_layer.weight"
    assert load.packing(checkpoint, table) == {"group_size": 64, "bits": 4, "mode": "affine"}
    values = load.dense(checkpoint, table)
    assert values.shape == (512, 7 * 64)
    step = made.e2b.STEP
    least = values.min().item()
    most = values.max().item()
    assert abs(least + 8 * step) < 1e-3
    assert abs(most - 7 * step) < 1e-3
    assert len({tuple(row[:8]) for row in values.tolist()}) == 512  # no part comes twice
    logits = load.resident_model(checkpoint, mx.float32)(mx.array([[3, 500, 17]]))
    assert mx.isfinite(logits).all().item()


def test_a_trimmed_model_in_slices(made: SimpleNamespace, tmp_path: Path) -> None:
    """In bfloat16, with fewer rows in both tables, for `quantize` alone."""
    config = {**tiny.CONFIG, **tiny.FAMILIES["gemma4_text"]}
    made.e2b.write_dense(tmp_path / "m", config, "0.5x")
    checkpoint = load.open_checkpoint(tmp_path / "m")
    assert [checkpoint.config[key] for key in ROWS] == [256, 256]
    for name, tensor in checkpoint.tensors.items():
        assert tensor.dtype == "BF16", name
    values = load.dense(checkpoint, "model.embed_tokens_per_layer.weight")
    sizes = mx.abs(values)
    assert sizes.min().item() >= 2**-7
    assert sizes.max().item() < 2**-5
    assert abs((values > 0).mean().item() - 0.5) < 0.05


def test_every_token_can_be_trimmed(made: SimpleNamespace, tmp_path: Path) -> None:
    """Learned tokens and those that join two of them: each comes with its parts."""
    made.e2b.write_tokenizer(tmp_path, 9000)
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 1}))
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 9000
    text = "The with statement, twice; zażółć."
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    vocabulary = Vocabulary(tmp_path)
    for row in (300, made.e2b.LEARNED + 5, 8999):
        assert len(vocabulary.parts(row)) > 2
