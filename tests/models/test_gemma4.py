"""Gemma 4: what its blocks take beside hidden states,
forwards, backwards, on disk. Parity and bits are in test_families.py, configs in test_contract.py,
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mis_mlx import dpo, prune, search
from mis_mlx.compute import streams
from mis_mlx.compute.precision import dtype_of
from mis_mlx.distillation.block_student import BlockStudent
from mis_mlx.judge.speed import rounds
from mis_mlx.judge.tasks import option_likelihood
from mis_mlx.maths import losses
from mis_mlx.models.architectures import arch
from mis_mlx.models.architectures.sizes import ffn_size as ffn_of
from mis_mlx.models.architectures.sizes import key_owners, softcap
from mis_mlx.models.opening import load
from mis_mlx.models.passing import backward_pass, stream
from mis_mlx.models.writing import model_writer
from mis_mlx.pruning import vocabulary
from mis_mlx.quantization import bit_allocation, packed_format
from mis_mlx.storage.files import DISK
from mis_mlx.types import Checkpoint, MisError
from tests import family_checks, tiny
from tests import stock as stock_models
from tests.conftest import mostly_thorough, near
from tests.distillation import students
from tests.family_checks import TOKENS

KIND = "gemma4_text"


@pytest.fixture(scope="module")
def gemma(models: Callable[[str], Checkpoint]) -> Checkpoint:
    return models(KIND)


def stock(folder: Path) -> nn.Module:
    return stock_models.opened(folder)


def stock_logits(model: Checkpoint) -> mx.array:
    """Of TOKENS, float32, by stock mlx_lm in the type that the policy gives: attention without a
    scale makes half precision look at other tokens.
    """
    theirs = stock(model.path)
    theirs.set_dtype(dtype_of(model))
    return theirs(TOKENS).astype(mx.float32)


def matrices_of(model: Checkpoint) -> set[str]:
    """Module paths of what is packed: all matrices."""
    return {
        name.removesuffix(".weight")
        for name, shape in arch.tensors_of(model.config).items()
        if len(shape) > 1
    }


def logits(model: Checkpoint, tokens: mx.array) -> mx.array:
    """(B, T, V) float32, block by block."""
    source = stream.Stream(model)
    return load.logits(source.head(), source.forward([tokens])[0]).astype(mx.float32)


def test_who_makes_keys_and_values() -> None:
    """The last block of each kind before those that share; E2B's by hand."""
    config = {**tiny.CONFIG, **tiny.FAMILIES[KIND]}
    assert key_owners(config) == (None, None, None, 1, 2, 1, 2)
    assert [ffn_of(config, i) for i in range(7)] == [768, 768, 768, 1536, 1536, 1536, 1536]
    e2b = arch.PUBLISHED["gemma-4-e2b"]
    assert key_owners(e2b)[:15] == (None,) * 15
    assert key_owners(e2b)[15:20] == (13, 13, 13, 13, 14)
    assert arch.fixed_blocks(e2b) == {13, 14, 34}


@pytest.mark.parametrize("beside", ["", "model."])
def test_of_a_model_that_sees_and_hears_the_text_part_is_opened(
    models: Callable[[str], Checkpoint],
    beside: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As published and as mlx_lm.convert writes it: towers are left out, and so are the keys and
    values that nobody uses, of blocks that share another's.
    """
    gemma = models(KIND)
    folder = tiny.hearing(tmp_path / "m", beside)
    opened = load.open_checkpoint(folder)
    assert "a gemma4_text, without 3 tensors that see or hear" in capsys.readouterr().err
    assert opened.tensors.keys() == gemma.tensors.keys()
    assert opened.config["model_type"] == KIND
    assert mx.array_equal(logits(opened, TOKENS), logits(gemma, TOKENS))
    assert mx.abs(logits(opened, TOKENS) - stock_logits(opened)).max().item() <= near(1e-5, 0.02)


def test_tables_go_through_memory_in_parts(
    gemma: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trimmed, cut in depth and rounded: never more rows of the table at once than a part has."""
    rows = 20
    largest = list[int]()
    monkeypatch.setattr(load, "TABLE_PART", rows * 7 * 32)
    read = load.Reader.rows

    def watched(self: Any, at: Any, ids: np.ndarray) -> mx.array:
        if at.shape[-1] >= 7 * 32 // 8 and at.shape[0] > 256:
            largest.append(len(ids))
        return read(self, at, ids)

    monkeypatch.setattr(load.Reader, "rows", watched)

    def refused(checkpoint: Checkpoint, name: str, *more: Any) -> mx.array:
        assert more or not name.startswith(arch.PER_LAYER), "the table was asked for whole"
        return dense(checkpoint, name, *more)

    dense = load.dense
    monkeypatch.setattr(load, "dense", refused)
    seen = vocabulary.write(gemma, range(0, 512, 2), tmp_path / "rows", DISK)
    packed_format.write_quantized(
        gemma, tmp_path / "four", packed_format.formats_of(gemma.config, 32), DISK
    )
    model_writer.by_block(gemma, tmp_path / "parts", DISK)
    monkeypatch.undo()
    name = f"{arch.PER_LAYER}weight"
    # the embedding's rows are shorter
    assert largest
    assert max(largest) <= max(rows, rows * 7 * 32 // 64)
    assert mx.array_equal(load.dense(seen, name), load.dense(gemma, name)[::2])
    assert mx.array_equal(
        load.dense(load.open_checkpoint(tmp_path / "parts"), name), load.dense(gemma, name)
    )


@pytest.mark.usefixtures("cpu_policy")
@pytest.mark.parametrize(
    ("each", "windows"),
    mostly_thorough([(7, 1), (7, 2), (3, 2), (2, 1)], (3, 2), of_several=True),
)
def test_gradients_block_by_block_are_the_whole_models(
    gemma: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, each: int, windows: int
) -> None:
    """What later blocks make of a block's keys and values comes back to it: of blocks in memory, of
    some of them while others stream past, with one window in a micro-batch and two side by side.
    """
    if windows == 2:
        monkeypatch.setattr(streams, "count", lambda: 2)
        monkeypatch.setattr(streams, "single_threaded_blas", lambda things: nullcontext())
    batches = list[tuple[mx.array, ...]]()
    for b in range(2):
        keys = mx.random.split(mx.random.key(b), 2)
        n = windows * 12
        tokens = mx.random.randint(0, 512, (windows, 12), key=keys[0])
        ids = mx.broadcast_to(mx.arange(512), (n, 512))
        shares = mx.softmax(mx.random.normal((n, 512), key=keys[1]), axis=1)
        batches.append((tokens, mx.ones(n), ids, shares))

    def plain(model: nn.Module) -> mx.array:
        total = mx.array(0.0)
        for tokens, _, _, p in batches:
            # One by one: a product of other sizes is rounded otherwise, of which gradients here
            # make a thousandth.
            z = nn.log_softmax(
                mx.concatenate([model(row[None]) for row in tokens]).reshape(-1, 512), axis=-1
            )
            total = total + (p * (mx.log(p) - z)).sum()
        return total

    model = stock(gemma.path)
    value, want = nn.value_and_grad(model, plain)(model)
    named = stock_models.ours(dict(tree_flatten(want)), gemma.config)
    parts = model_writer.by_block(gemma, tmp_path / "parts", DISK)
    student = BlockStudent(parts, "weights", at_once=each, steps_each=1)
    student.begin()
    loss = partial(students.LOSS, softcap=softcap(gemma.config))
    seen = set[str]()
    for visit in range(-(-7 // each)):
        student._enter(visit, {})
        found, gradients = students.gradients_of(student, batches, loss)
        assert found == pytest.approx(value.item() / (2 * windows * 12), rel=1e-5)
        for name, gradient in gradients.items():
            seen.add(name.split(".")[2])
            most = mx.abs(named[name]).max().item()
            assert mx.abs(gradient - named[name]).max().item() <= 2e-4 * most + 1e-7, name
    assert seen == {*map(str, range(7)), "weight"}  # blocks, and the final norm


@pytest.mark.usefixtures("cpu_policy")
def test_what_comes_back_to_the_first_block(
    models: Callable[[str], Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The streamed pass back against autodiff of stock mlx_lm: at the first block's input, and of
    what every block gets of the tables.
    """
    gemma = models(KIND)
    monkeypatch.setattr(mx.random, "categorical", lambda z, key: mx.argmax(z, axis=-1))
    channels = dict[int, mx.array]()

    visit = family_checks.block_gradients(gemma)
    (below,) = backward_pass.input_gradients(
        gemma, [TOKENS], visit, at_channels=lambda i, b, c: channels.update({i: c})
    )
    model = stock(gemma.path)
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
    assert found.keys() == matrices_of(gemma) - packed_format.wide_projections(gemma.config)


def test_depth_keeps_who_makes_keys(gemma: Checkpoint, tmp_path: Path, text_folder: Path) -> None:
    """Blocks 1, 2 and 6 stay whatever they are worth; the config says how many of those that are
    left share.
    """
    for layers in (3, 5):
        out = tmp_path / f"cut-{layers}"
        prune.run(
            prune.Settings(
                model=str(gemma.path),
                mlx_path=str(out),
                scenario="none",
                layers=layers,
                data=str(text_folder),
                num_samples=2,
                max_seq_length=24,
                dtype="float32",
            )
        )
        student = load.open_checkpoint(out)
        keep = model_writer.read_keep(out)
        assert keep
        assert {1, 2, 6} <= set(keep.layers)
        assert len(keep.layers) == layers
        assert student.config["num_kv_shared_layers"] == sum(i > 2 for i in keep.layers)
        table = load.dense(gemma, f"{arch.PER_LAYER}weight").reshape(512, 7, 32)
        mine = load.dense(student, f"{arch.PER_LAYER}weight").reshape(512, layers, 32)
        assert mx.array_equal(mine, table[:, mx.array(list(keep.layers))])
        assert mx.abs(logits(student, TOKENS) - stock_logits(student)).max().item() <= near(
            1e-5, 0.02
        )


def test_what_is_not_built_is_a_sentence(
    models: Callable[[str], Checkpoint], tmp_path: Path, text_folder: Path
) -> None:
    """Heads, a search in groups too large; each before any work."""
    gemma = models(KIND)
    with pytest.raises(MisError, match="2 layers of a gemma4_text are too few: 3 blocks must stay"):
        prune.run(
            prune.Settings(
                model=str(gemma.path), mlx_path=str(tmp_path / "x"), layers=2, scenario="none"
            )
        )
    asked: dict[str, Any] = {"teacher": str(gemma.path), "data": str(text_folder)}
    with pytest.raises(
        MisError, match=r"groups of 64 weights, which \w+ \(32\) does not divide by"
    ):
        search.run(search.Settings(bytes="1MB", **asked))


@pytest.mark.usefixtures("cpu_policy")
def test_log_probabilities_know_the_cap(gemma: Checkpoint) -> None:
    """Of preference pairs, and of options of a question, beside stock mlx_lm's logits."""
    z = nn.log_softmax(stock(gemma.path)(TOKENS), axis=-1)[0]
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


@pytest.mark.usefixtures("cpu_policy")
def test_what_is_not_capped_is_another_loss() -> None:
    """Gradients of log-probabilities with a cap, beside autodiff of the plain formula."""
    keys = mx.random.split(mx.random.key(4), 3)
    hidden = mx.random.normal((6, 16), key=keys[0])
    head = mx.random.normal((40, 16), key=keys[1])
    ids = mx.random.randint(0, 40, (6,), key=keys[2])

    def plain(h: mx.array, w: mx.array) -> mx.array:
        z = 3.0 * mx.tanh(h @ w.T / 3.0)
        return -mx.take_along_axis(nn.log_softmax(z / 0.7, axis=-1), ids[:, None], axis=-1).sum()

    def ours(h: mx.array, w: mx.array) -> mx.array:
        return -losses.token_logps(h, w, ids, 0.7, rows=4, softcap=3.0).sum()

    (a, (ah, aw)), (b, (bh, bw)) = (
        mx.value_and_grad(f, argnums=(0, 1))(hidden, head) for f in (ours, plain)
    )
    assert a.item() == pytest.approx(b.item(), rel=1e-5)
    assert mx.allclose(ah, bh, atol=1e-5)
    assert mx.allclose(aw, bw, atol=1e-5)


def test_a_token_reads_no_table(gemma: Checkpoint) -> None:
    """What a token moves is counted without the per-layer inputs of all others, and with the
    embedding, its head.
    """
    made = rounds.load_model(gemma)
    table = gemma.tensors[f"{arch.PER_LAYER}weight"]
    assert (
        made.nbytes - made.read_bytes == table.nbytes * (2 if dtype_of(gemma).size == 2 else 4) // 4
    )
