"""Gemma 4: what its blocks take beside hidden states,
forwards, backwards, on disk. Parity and bits are in test_families.py, configs in test_contract.py,
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mis_mlx import distill, dpo, search
from mis_mlx.judge.tasks import option_likelihood
from mis_mlx.models.architectures import arch
from mis_mlx.models.architectures.families import family, shape_of
from mis_mlx.models.architectures.shape import weight_count
from mis_mlx.models.opening import load
from mis_mlx.models.passing import backward_pass, stream
from mis_mlx.models.writing import model_writer
from mis_mlx.pruning import vocabulary
from mis_mlx.quantization import bit_allocation, packed_format
from mis_mlx.size_search import shape_search
from mis_mlx.types import Checkpoint, MisError
from tests import family_checks, stock, tiny
from tests.family_checks import TOKENS

KIND = "gemma4_text"
# groups of 64, in which a search rounds, divide its rows
SEARCHED: dict[str, Any] = {**tiny.FAMILIES[KIND], "hidden_size_per_layer_input": 64}


@pytest.fixture(scope="module")
def gemma(models: Callable[[str], Checkpoint]) -> Checkpoint:
    return models(KIND)


def test_who_makes_keys_and_values() -> None:
    """The last block of each kind before those that share; E2B's by hand."""
    config = {**tiny.CONFIG, **tiny.FAMILIES[KIND]}
    assert family(config).key_owners() == (None, None, None, 1, 2, 1, 2)
    assert [family(config).ffn_size(i) for i in range(7)] == [768, 768, 768, 1536, 1536, 1536, 1536]
    e2b = arch.PUBLISHED["gemma-4-e2b"]
    assert family(e2b).key_owners()[:15] == (None,) * 15
    assert family(e2b).key_owners()[15:20] == (13, 13, 13, 13, 14)
    assert family(e2b).fixed_blocks() == {13, 14, 34}


def test_tables_go_through_memory_in_parts(
    gemma: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trimmed, cut in depth and rounded: never more rows of the table at once than a part has."""
    rows = 20
    largest = list[int]()
    monkeypatch.setattr(load, "TABLE_PART", rows * 7 * 32)
    read = load.Reader.rows

    def watched(self: Any, at: Any, ids: np.ndarray) -> mx.array:
        if at.shape == (512, 7 * 32):
            largest.append(len(ids))
        return read(self, at, ids)

    monkeypatch.setattr(load.Reader, "rows", watched)
    seen = vocabulary.write(gemma, range(0, 512, 2), tmp_path / "rows")
    tiny.packed(gemma, tmp_path / "four", 32)
    parts = model_writer.by_block(gemma, tmp_path / "parts")
    assert sum(largest) == 256 + 2 * 512
    assert max(largest) <= rows
    name = f"{arch.PER_LAYER}weight"
    assert mx.array_equal(load.dense(seen, name), load.dense(gemma, name)[::2])
    assert mx.array_equal(load.dense(parts, name), load.dense(gemma, name))


@pytest.mark.usefixtures("cpu_policy")
def test_what_comes_back_to_the_first_block(
    gemma: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The streamed pass back against autodiff of stock mlx_lm: at the first block's input, and of
    what every block gets of the tables.
    """
    monkeypatch.setattr(mx.random, "categorical", lambda z, key: mx.argmax(z, axis=-1))
    channels = dict[int, mx.array]()

    visit = family_checks.block_gradients(gemma)
    (below,) = backward_pass.input_gradients(
        gemma, [TOKENS], visit, at_channels=lambda i, b, c: channels.update({i: c})
    )
    model = stock.opened(gemma.path)
    inner = model.model
    hidden = inner.embed_tokens(TOKENS)
    sides = inner._get_per_layer_inputs(TOKENS)
    drawn = mx.argmax(model(TOKENS), axis=-1)
    project = inner._project_per_layer_inputs

    def likely(hidden: mx.array, sides: mx.array) -> mx.array:
        # `hidden` reaches the blocks alone: what is projected from it is another path.
        projected = project(mx.stop_gradient(hidden * inner.embed_scale), sides)
        object.__setattr__(inner, "_project_per_layer_inputs", lambda *_: projected)
        z = model(TOKENS, input_embeddings=hidden, per_layer_inputs=sides)
        return mx.take_along_axis(nn.log_softmax(z, axis=-1), drawn[..., None], axis=-1).sum()

    at_hidden, at_sides = mx.grad(likely, argnums=(0, 1))(hidden, sides)
    assert (
        mx.abs(below * inner.embed_scale - at_hidden).max().item()
        <= 1e-4 * mx.abs(at_hidden).max().item()
    )
    ours = mx.stack([channels[i] for i in range(7)], axis=2) * 2.0**-0.5
    assert mx.abs(ours - at_sides).max().item() <= 1e-4 * mx.abs(at_sides).max().item()


def test_bits_go_to_the_table_of_per_layer_inputs(
    gemma: Checkpoint, batches: list[mx.array]
) -> None:
    """It has a cost like every matrix, more in fewer bits; rows that do not occur cost nothing."""
    found = bit_allocation.costs(gemma, batches, 32, (3, 8))
    table = found["model.embed_tokens_per_layer"]
    assert table[3] > 10 * table[8] > 0
    shapes = arch.tensors_of(gemma.config).items()
    matrices = {name.removesuffix(".weight") for name, shape in shapes if len(shape) > 1}
    assert found.keys() == matrices - packed_format.wide_projections(gemma.config)


def test_groups_that_do_not_divide_are_not_searched(gemma: Checkpoint, text_folder: Path) -> None:
    """One sentence before any work."""
    asked: dict[str, Any] = {"teacher": str(gemma.path), "data": str(text_folder)}
    with pytest.raises(MisError, match=r"groups of 64 .* \(32\) does not divide by"):
        search.run(search.Settings(bytes="1MB", **asked))


@pytest.mark.usefixtures("cpu_policy")
def test_log_probabilities_know_the_cap(gemma: Checkpoint) -> None:
    """Of preference pairs, and of options of a question, beside stock mlx_lm's logits."""
    z = nn.log_softmax(stock.opened(gemma.path)(TOKENS), axis=-1)[0]
    each = np.array(mx.take_along_axis(z[:-1], TOKENS[0, 1:, None], axis=-1))[:, 0]
    model = load.resident_model(gemma, mx.float32)
    loss_mask = mx.array([[1.0] * 11 + [0.0]])
    for frozen in (False, True):
        sums, count = dpo._sums(model, TOKENS, loss_mask, frozen)
        assert count.item() == 11
        assert sums.item() == pytest.approx(each.sum(), rel=1e-5)
    ids = TOKENS[0].tolist()
    questions = [(ids[:5], [ids[5:], [9, 300]]), (ids[:2], [[17], [44, 44]])]
    scores = option_likelihood.score(stream.Stream(gemma, mx.float32), questions)
    assert scores[0][0] == pytest.approx(each[4:].sum(), rel=1e-5)


def test_sizes_are_those_of_files(tmp_path: Path) -> None:
    """Parameters to the last one, bytes of the rounded model to a thousandth."""
    model = load.open_checkpoint(tiny.make(tmp_path / "m", **SEARCHED))
    config = model.config
    shape = shape_of(config)
    tensors = shape_search.tensors_of(config, shape)
    weights = weight_count(shape_search.matrices_of(tensors))
    assert weight_count(tensors) == arch.params(config)
    plan = packed_format.formats_of(config, 64)
    packed_format.write_quantized(model, tmp_path / "q", plan)
    rounded = load.open_checkpoint(tmp_path / "q")
    bits = 0.0
    for name, size in arch.tensors_of(config).items():
        path = name.removesuffix(".weight")
        if path in plan:
            bits += plan[path].bits_per_weight * math.prod(size)
    told = shape_search.file_bytes(config, shape, bits / weights)
    nbytes = sum(path.stat().st_size for path in (tmp_path / "q").glob("*.safetensors"))
    # The header is estimated, 120 bytes a tensor.
    headers = shape_search.TENSOR_BYTES * len(rounded.tensors)
    assert abs(told - nbytes) < 0.3 * headers


def test_the_fewest_bits_count_small_matrices() -> None:
    """They have 8 bits always: fewer bits on average than that no student can have."""
    config = {**tiny.CONFIG, **SEARCHED}
    shape = shape_of(config)
    shapes = arch.tensors_of(config)
    gates = arch.family(config).gates()
    wide = sum(math.prod(shapes[f"{path}.weight"]) for path in gates)
    weights = weight_count(shape_search.matrices_of(shapes))
    fewest, most = shape_search.bpw_range(config, shape)
    assert 0 <= fewest - (3.5 + 5 * wide / weights) < 0.01
    assert most == 8.5
    assert shape_search.bpw_range(tiny.CONFIG, shape_of(tiny.CONFIG)) == (3.5, 8.5)


def test_nothing_said_leaves_blocks_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without sizes a search chooses tokens and bits: tables are most of such a model."""
    model = tiny.make(tmp_path / "m", **SEARCHED)
    planned = distill.run(distill.Settings(teacher=str(model), dry_run=True, conversations=0))
    said = capsys.readouterr().err
    assert "within --lose 0.1; a search chooses sizes and bits" in said
    assert planned["params_student"] == planned["params_teacher"]
