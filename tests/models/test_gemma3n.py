"""Gemma 3n alone: AltUp's versions of the hidden states, its folders. What it shares with Gemma 4
is in test_gemma4.py, parity and bits in test_families.py, configs in test_contract.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mis_mlx import prune
from mis_mlx.models.architectures import altup
from mis_mlx.models.opening import load
from mis_mlx.models.opening.model_size import model_of
from mis_mlx.models.passing import backward_pass
from mis_mlx.models.writing import model_writer
from mis_mlx.planner.distillation_spec import spec_of
from mis_mlx.pruning import calibrate, vocabulary
from mis_mlx.settings.recipe import DistillationConfig
from mis_mlx.storage.files import DISK
from mis_mlx.storage.hidden_spool import Spool
from mis_mlx.types import Checkpoint, MisError
from tests import family_checks, stock, tiny
from tests.family_checks import TOKENS, apart, streamed

KIND = "gemma3n_text"
CONFIG = {**tiny.CONFIG, **tiny.FAMILIES[KIND]}


@pytest.fixture(scope="module")
def gemma(models: Callable[[str], Checkpoint]) -> Checkpoint:
    return models(KIND)


@pytest.mark.usefixtures("cpu_policy")
def test_ends_are_mlx_lms() -> None:
    """The first block's input and the last norm's, by the formulas written out in float64."""
    entrance = altup.Entrance(16, 4)
    last = altup.Exit(16, 4, 1e-6)
    x = mx.random.normal((2, 3, 16), key=mx.random.key(1))
    stacked = mx.random.normal((2, 3, 64), key=mx.random.key(2))

    def evened(versions: Sequence[np.ndarray]) -> np.ndarray:
        sizes = [np.sqrt(np.square(v).mean(axis=-1, keepdims=True)) for v in versions]
        return np.stack([v * sizes[0] / size for v, size in zip(versions, sizes, strict=True)])

    def projected(v: Sequence[np.ndarray], matrices: Sequence[nn.Module]) -> list[np.ndarray]:
        weights = [np.array(matrix.weight, np.float64) for matrix in matrices]
        return [v[0], *(part @ w.T for part, w in zip(v[1:], weights, strict=True))]

    wide = np.array(x, np.float64)
    want = evened(projected([wide] * 4, entrance.altup_projections))
    got = np.array(entrance(x)).reshape(2, 3, 4, 16)
    assert np.allclose(np.moveaxis(got, 2, 0), want, atol=1e-5)

    versions = list(np.moveaxis(np.array(stacked, np.float64).reshape(2, 3, 4, 16), 2, 0))
    mean = evened(projected(versions, last.altup_unembed_projections)).mean(axis=0)
    size = np.sqrt(np.square(mean).mean(axis=-1, keepdims=True) + 1e-6)
    assert np.allclose(np.array(last(stacked)), mean / size, atol=1e-5)


@pytest.mark.usefixtures("cpu_policy")
def test_weights_are_not_changed_by_a_pass(gemma: Checkpoint) -> None:
    """mlx-lm's AltUp clips its coefficients in place, so a pass would train them; ours does not."""
    model = load.resident_model(gemma, mx.float32)
    name = "model.layers.0.altup.prediction_coefs.weight"
    before = dict(tree_flatten(model.parameters()))[name]
    assert mx.abs(before).max() > CONFIG["altup_coef_clip"]
    mx.eval(model(TOKENS))
    after = dict(tree_flatten(model.parameters()))[name]
    assert mx.array_equal(after, before)


@pytest.mark.usefixtures("cpu_policy")
@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_tokens_behind_the_end_of_the_table(tmp_path: Path, packed: bool) -> None:
    """The published table of per-layer inputs has fewer rows than the embedding: token 0's count
    for the others, also in a teacher of some of the tokens.
    """
    sizes = {**tiny.FAMILIES[KIND], "vocab_size_per_layer_input": 256}
    model = load.open_checkpoint(tiny.make(tmp_path / "m", **sizes))
    if packed:
        model = family_checks.quantized(model.path, tmp_path / "four", target_bpw=None)
    # stock de-quantizes by scales of half precision, unless it is told
    theirs = stock.opened(model.path)
    theirs.set_dtype(mx.float32)
    want = theirs(TOKENS)
    assert TOKENS.max() > 256
    assert apart(streamed(model, TOKENS), want) <= 1e-5
    assert apart(load.resident_model(model, mx.float32)(TOKENS), want) <= 1e-5

    kept = [*range(0, 512, 3), 5, 17, 44, 8, 77, 511]
    kept = sorted(set(kept) | set(TOKENS[0].tolist()))
    seen = vocabulary.write(model, kept, tmp_path / "rows", DISK)
    places = [[kept.index(token) for token in TOKENS[0].tolist()]]
    assert seen.config["vocab_size_per_layer_input"] == len(kept)
    less = streamed(seen, mx.array(places))
    assert apart(less, want[..., mx.array(kept)]) <= 1e-5


@pytest.mark.usefixtures("cpu_policy")
def test_the_published_form_is_opened(
    gemma: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Towers and unused keys are left out, a width for each block becomes one; the same logits."""
    folder = tiny.make(tmp_path / "m", **tiny.FAMILIES[KIND])
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] = [768] * 7
    config["text_config"]["rope_scaling"] = None
    config |= {"vision_config": {"hidden_size": 8}, "audio_config": {"hidden_size": 8}}
    (folder / "config.json").write_text(json.dumps(config))
    stored: Any = mx.load(str(folder / "model.safetensors"))
    weights: dict[str, mx.array] = dict(stored)
    mx.eval(weights)
    assert not mx.any(weights["model.language_model.layers.6.self_attn.k_proj.weight"])
    for name in ("vision_tower.patch", "audio_tower.conv", "embed_vision.embedding"):
        weights[f"model.{name}.weight"] = mx.zeros((2, 2))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    opened = load.open_checkpoint(folder)
    assert "a gemma3n_text, without 3 tensors that see or hear" in capsys.readouterr().err
    assert opened.tensors.keys() == gemma.tensors.keys()
    assert mx.array_equal(streamed(opened, TOKENS), streamed(gemma, TOKENS))
    assert apart(streamed(opened, TOKENS), stock.opened(folder)(TOKENS)) <= 1e-5


def test_a_cut_carries_the_sparsity_of_its_blocks(
    gemma: Checkpoint, tmp_path: Path, text_folder: Path
) -> None:
    """A block keeps its kind and its share of silent neurons; mlx_lm opens it."""
    out = tmp_path / "cut"
    prune.run(
        prune.Settings(
            model=str(gemma.path),
            mlx_path=str(out),
            scenario="none",
            layers=5,
            ffn=512,
            data=str(text_folder),
            num_samples=2,
            max_seq_length=24,
            dtype="float32",
        )
    )
    keep = model_writer.read_keep(out)
    assert keep
    student = load.open_checkpoint(out)
    for key in ("activation_sparsity_pattern", "layer_types"):
        assert student.config[key] == [CONFIG[key][i] for i in keep.layers]
    written = json.loads((out / "config.json").read_text())
    assert written["model_type"] == "gemma3n"
    ropes = written["text_config"]["rope_parameters"]
    assert ropes["sliding_attention"]["rope_theta"] == 1e3
    assert apart(streamed(student, TOKENS), stock.opened(out)(TOKENS)) <= 1e-5


@pytest.mark.usefixtures("cpu_policy")
def test_what_comes_back_to_the_embedding(
    gemma: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The streamed pass back, through blocks and entrance, against autodiff of stock mlx_lm."""
    monkeypatch.setattr(mx.random, "categorical", lambda z, key: mx.argmax(z, axis=-1))
    channels = dict[int, mx.array]()
    visit = family_checks.block_gradients(gemma)

    (below,) = backward_pass.input_gradients(
        gemma, [TOKENS], visit, at_channels=lambda i, b, c: channels.update({i: c})
    )
    model = load.mlx_lm("utils").load(str(gemma.path))[0]
    inner = model.model.language_model
    drawn = mx.argmax(model(TOKENS, cache=model.make_cache()), axis=-1)
    rows = inner.get_per_layer_inputs(TOKENS)
    embedded = inner.embed_tokens(TOKENS) * 8.0
    project = inner.project_per_layer_inputs

    def likely(hidden: mx.array, rows: mx.array) -> mx.array:
        # `hidden` reaches the blocks alone: what is projected from it is another path
        made = project(mx.stop_gradient(hidden), rows)
        object.__setattr__(inner, "project_per_layer_inputs", lambda *_: made)
        z = model(TOKENS, cache=model.make_cache(), input_embeddings=hidden)
        return mx.take_along_axis(nn.log_softmax(z, axis=-1), drawn[..., None], axis=-1).sum()

    at_hidden, at_rows = mx.grad(likely, argnums=(0, 1))(embedded, rows)
    assert below.shape == (1, 12, 64)
    assert apart(below, at_hidden) <= 1e-4 * float(mx.abs(at_hidden).max())
    ours = mx.stack([channels[i] for i in range(7)], axis=2) * 2.0**-0.5
    assert apart(ours, at_rows) <= 1e-4 * float(mx.abs(at_rows).max())


@pytest.mark.usefixtures("cpu_policy")
def test_hidden_states_on_disk_are_as_wide(
    gemma: Checkpoint, batches: list[mx.array], tmp_path: Path
) -> None:
    """All versions go through a spool, and what the last norm makes of them comes out of it."""
    plain, states = calibrate.calibrate(gemma, batches)
    spooled, again = calibrate.calibrate(gemma, batches, hidden=Spool(tmp_path, 1, DISK))
    assert plain.block == spooled.block
    for b, state in enumerate(states):
        assert state.shape == (1, 24, 64)
        assert mx.array_equal(state, again[b])


def test_nothing_is_fitted_in_closed_form(gemma: Checkpoint) -> None:
    """No output of a block is linear in down_proj: training begins at the pruned student."""
    m = model_of(gemma, gpu=False, dtype=mx.float32)
    job = spec_of(m, m, DistillationConfig(reconstruct_samples=8))
    assert job.reconstruct_samples == 0 and "none" not in job.modes


def test_blocks_of_several_widths_are_refused(tmp_path: Path) -> None:
    """Sizes between E2B and E4B, mixed out of both."""
    folder = tiny.make(tmp_path / "m", **tiny.FAMILIES[KIND])
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] = [512] * 3 + [768] * 4
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(MisError, match="intermediate_size is 512 in some blocks and 768 in others"):
        load.open_checkpoint(folder)
