"""LFM2: short convolutions beside attention, its folders, cuts and refusals. Parity with stock
mlx_lm is in test_families.py, too; generation in test_streamed_decode.py, test_batch_sampling.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mis_mlx import plan, prune, search
from mis_mlx.judge.tasks import option_likelihood
from mis_mlx.models.architectures import arch, block_state, hybrid
from mis_mlx.models.architectures.sizes import attends, shape_of
from mis_mlx.models.opening import load
from mis_mlx.models.opening.config import check_config, read_config
from mis_mlx.models.passing import stream
from mis_mlx.models.writing import model_writer
from mis_mlx.pruning import slicing
from mis_mlx.quantization import packed_format
from mis_mlx.storage.files import DISK
from mis_mlx.types import Checkpoint, MisError
from tests import family_checks, stock, tiny
from tests.conftest import mostly_slow
from tests.family_checks import TOKENS, apart, streamed

KIND = "lfm2"
CONFIG = {**tiny.CONFIG, **tiny.FAMILIES[KIND]}
CONVOLUTIONS = [0, 1, 3, 5]  # blocks of the tiny model

SEARCH: dict[str, Any] = {
    "params": "0.6x",
    "max_seq_length": 32,
    "num_samples": 2,
    "reconstruct_samples": 0,
    "rank_windows": 2,
    "eval_windows": 2,
    "iters": 2,
    "evaluations": 2,
    "finalists": 1,
    "learning_rate": 2e-4,
}
SIZES: dict[str, Any] = {"scenario": "none", "layers": 5, "ffn": 512, "hidden": 32, "heads": 2}
FEW: dict[str, Any] = {"num_samples": 2, "max_seq_length": 24}


@pytest.fixture(scope="module")
def lfm(models: Callable[[str], Checkpoint]) -> Checkpoint:
    return models(KIND)


def published(name: str) -> dict[str, Any]:
    """A config as it was published, from the benchmarks' folder."""
    folder = Path(__file__).parents[2] / "benchmarks" / "model_configs"
    config = json.loads((folder / f"{name}.json").read_text())
    return {key: value for key, value in config.items() if key not in ("title", "source")}


@pytest.mark.parametrize(
    ("name", "params", "ffn"),
    [
        ("lfm2-350m", 354_483_968, 4608),
        ("lfm2-700m", 742_489_344, 6912),
        ("lfm2-1.2b", 1_170_340_608, 8192),
    ],
)
def test_the_published_shapes(name: str, params: int, ffn: int, tmp_path: Path) -> None:
    """As many parameters as the model cards say, and as mlx-lm's own modules have."""
    (tmp_path / "config.json").write_text(json.dumps(published(name)))
    config = read_config(tmp_path)
    assert arch.params(config) == params
    assert shape_of(config).ffn == ffn
    module = load.mlx_lm("models.lfm2")
    theirs = module.Model(module.ModelArgs.from_dict(published(name)))  # lazy: nothing is drawn
    assert params == sum(array.size for _, array in tree_flatten(theirs.parameters()))


@pytest.mark.usefixtures("cpu_policy")
def test_the_convolution_by_hand() -> None:
    """y_t = out(C_t * sum_k w_k (B x)_{t - 2 + k}) in float64."""
    layer = hybrid.ShortConv(16, 3)
    x = mx.random.normal((2, 7, 16), key=mx.random.key(1))
    inner = np.array(x, np.float64) @ np.array(layer.in_proj.weight, np.float64).T
    gate, gate_out, value = np.split(inner, 3, axis=-1)
    padded = np.pad(gate * value, [(0, 0), (2, 0), (0, 0)])
    kernel = np.array(layer.conv.weight[..., 0], np.float64)
    mixed = sum(padded[:, k : k + 7] * kernel[:, k] for k in range(3))
    want = (gate_out * mixed) @ np.array(layer.out_proj.weight, np.float64).T
    assert np.allclose(np.array(layer(x)), want, atol=1e-5)


@pytest.mark.usefixtures("cpu_policy")
def test_the_published_form_is_opened(lfm: Checkpoint, tmp_path: Path) -> None:
    """Attention by numbers of blocks, a larger FFN that is adjusted, kernels as torch has them or
    as mlx-lm has them: the same logits.
    """
    folder = tiny.make(tmp_path / "m", **tiny.FAMILIES[KIND])
    config = json.loads((folder / "config.json").read_text())
    assert config["full_attn_idxs"] == [2, 4, 6]
    stored: Any = mx.load(str(folder / "model.safetensors"))
    weights: dict[str, mx.array] = dict(stored)
    mx.eval(weights)
    kernel = "model.layers.0.conv.conv.weight"
    assert weights[kernel].shape == (64, 1, 3)
    want = streamed(lfm, TOKENS)
    # of 1,149 neurons two thirds are 766, and the next multiple of 256 is 768
    config |= {"block_auto_adjust_ff_dim": True, "block_ff_dim": 1149, "block_multiple_of": 256}
    for key in ("layer_types", "intermediate_size"):
        del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    assert mx.array_equal(streamed(load.open_checkpoint(folder), TOKENS), want)
    assert apart(stock.opened(folder)(TOKENS), want) <= 1e-5
    for name in list(weights):
        if name.endswith("conv.conv.weight"):
            weights[name] = mx.contiguous(weights[name].swapaxes(1, 2))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    again = load.open_checkpoint(folder)
    assert mx.array_equal(streamed(again, TOKENS), want)
    assert mx.array_equal(load.resident_model(again, mx.float32)(TOKENS), want)


def test_what_stands_before_a_row() -> None:
    """A prompt of two tokens with two answers: each answer's rows look back into the prompt."""
    branch = np.array([0, 0, 1, 1, 2])
    square = np.tri(5, dtype=bool) & ((branch == 0) | (branch[:, None] == branch))
    depth = square.sum(axis=1) - 1
    found = block_state.before(mx.array(square), mx.array(depth), mx.array(depth), 2)
    assert found.tolist() == [[-1, -1], [0, -1], [1, 0], [2, 1], [1, 0]]


@pytest.mark.usefixtures("cpu_policy")
def test_options_share_their_question(lfm: Checkpoint) -> None:
    """Log-likelihoods of options side by side are those of stock mlx_lm, one by one."""
    ids = TOKENS[0].tolist()
    questions = [(ids[:5], [ids[5:], [9, 300], [44]]), (ids[:1], [[17], [44, 44]])]
    scores = option_likelihood.score(stream.Stream(lfm, mx.float32), questions)
    model = stock.opened(lfm.path)
    for (context, options), found in zip(questions, scores, strict=True):
        for option, value in zip(options, found, strict=True):
            z = nn.log_softmax(model(mx.array([[*context, *option]])), axis=-1)[0]
            rows = range(len(context) - 1, len(context) + len(option) - 1)
            want = sum(z[row, token].item() for row, token in zip(rows, option, strict=True))
            assert value == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize(
    ("policy", "method"),
    mostly_slow(
        product(("cpu", "metal"), ("round", "gptq")),
        thorough=[("cpu", "gptq")],
        of_several=True,
    ),
)
def test_four_bits_are_stock(
    lfm: Checkpoint,
    method: Any,
    policy: str,
    tmp_path: Path,
    text_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Kernels stay as they are, all matrices are packed; whole, streamed, and kept packed."""
    monkeypatch.setenv("MIS_MLX_POLICY", policy)
    bpw = 5.0 if method == "gptq" else None
    more = {"target_bpw": bpw, "data": str(text_folder), **FEW}
    four = family_checks.quantized(lfm.path, tmp_path / "four", method, **more)
    kernel = "model.layers.0.conv.conv.weight"
    assert four.tensors[kernel].dtype == lfm.tensors[kernel].dtype == "F32"
    matrices = {
        n.removesuffix(".weight") for n, s in arch.tensors_of(CONFIG).items() if len(s) == 2
    }
    assert packed_format.formats(four).keys() == matrices
    theirs = stock.opened(four.path)
    theirs.set_dtype(mx.float32)
    tolerance = 1e-5 if policy == "cpu" else 2e-2
    assert apart(streamed(four, TOKENS), theirs(TOKENS)) <= tolerance
    assert apart(load.resident_model(four, mx.float32)(TOKENS), theirs(TOKENS)) <= tolerance


@pytest.mark.parametrize("how", ["importance", "pca"])
def test_all_axes_are_cut_together(
    lfm: Checkpoint, how: Any, tmp_path: Path, text_folder: Path
) -> None:
    """Channels of the stream and of convolutions, heads, neurons, blocks: stock mlx_lm opens it."""
    out = str(tmp_path / "cut")
    asked = prune.Settings(
        model=str(lfm.path),
        mlx_path=out,
        hidden_by=how,
        data=str(text_folder),
        dtype="float32",
        **SIZES,
        **FEW,
    )
    prune.run(asked)
    student = load.open_checkpoint(tmp_path / "cut")
    keep = model_writer.read_keep(student.path)
    assert keep
    s = shape_of(student.config)
    assert (s.layers, s.hidden, s.heads, s.kv_heads, s.ffn) == (5, 32, 2, 1, 512)
    assert student.config["layer_types"] == [CONFIG["layer_types"][i] for i in keep.layers]
    for i in keep.layers:
        axis = "heads" if attends(CONFIG, i) else "channels"
        assert len(keep.kept[i, axis]) == (2 if axis == "heads" else 32)
    # a kept channel of a convolution is a row of each of three matrices, a kernel, a column
    first = CONVOLUTIONS[0]
    rows = list(keep.kept[first, "channels"])
    name = f"model.layers.{first}.conv.conv.weight"
    assert mx.array_equal(load.dense(student, name), load.dense(lfm, name)[mx.array(rows)])
    theirs = stock.opened(student.path)(TOKENS)
    assert apart(streamed(student, TOKENS), theirs) <= 1e-5


@pytest.mark.usefixtures("cpu_policy")
def test_a_rotation_changes_nothing(lfm: Checkpoint, tmp_path: Path) -> None:
    """With all directions kept, and the last norm's gain 1 (the head is tied), the logits stay."""
    config = lfm.config
    tensors = arch.tensors_of(config)
    basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(64, 64)))
    norms = [name for name in tensors if name.endswith("layernorm.weight")]
    energy = dict.fromkeys([*norms, slicing.FINAL], 1.0)
    plain = {name: load.dense(lfm, name) for name in tensors}
    plain[slicing.FINAL] = mx.ones(64)

    def written(folder: str, take: Callable[[str], mx.array]) -> Checkpoint:
        out = tmp_path / folder
        model_writer.write_model(
            config, take, source=lfm.path, out=out, dtype="float32", files=DISK
        )
        return load.open_checkpoint(out)

    before = written("plain", plain.__getitem__)
    turn = slicing.rotated_teacher(before, slicing.Rotation(basis, energy))
    after = written("turned", turn)
    assert apart(streamed(after, TOKENS), streamed(before, TOKENS)) <= 1e-4


@pytest.mark.parametrize("way", mostly_slow(family_checks.WAYS))
def test_every_way_of_training(tmp_path: Path, text_folder: Path, way: str) -> None:
    """Of a smaller student: see `check_training`."""
    teacher = tiny.FAMILIES[KIND]
    family_checks.check_training(tmp_path, text_folder, way, teacher=teacher, target_bpw=6.0)


def test_adapters_open_in_stock(lfm: Checkpoint, tmp_path: Path) -> None:
    """mlx_lm takes what LoRA gives as --adapter-path."""
    out = family_checks.adapted(lfm, tmp_path)
    stored: Any = mx.load(str(out / "adapters" / "adapters.safetensors"))
    assert any(".feed_forward.w1." in name for name in dict(stored))
    assert any(".conv.in_proj." in name for name in dict(stored))
    theirs = load.mlx_lm("utils").load(str(lfm.path), adapter_path=str(out / "adapters"))[0]
    theirs.set_dtype(mx.float32)
    want = theirs(TOKENS)
    fused = load.open_checkpoint(out / "model")
    # the folder has bfloat16 numbers
    assert apart(streamed(fused, TOKENS), want) < 0.1 * apart(want, streamed(lfm, TOKENS))


@pytest.mark.slow
def test_a_search_finds_one(lfm: Checkpoint, tmp_path: Path, text_folder: Path) -> None:
    """The command, with a limit of size: what it recommends fits and opens in stock mlx_lm."""
    result = search.run(
        search.Settings(
            teacher=str(lfm.path),
            data=str(text_folder),
            out=str(tmp_path / "run"),
            **SEARCH,
        )
    )
    (found,) = result["finalists"]
    assert found["params"] <= 0.6 * arch.params(lfm.config)
    assert found["hidden"] == 64 and found["heads"] == 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"layer_types": ["conv"] * 7},
            "all blocks are conv, but mlx-lm's lfm2 needs some of each",
        ),
        ({"layer_types": ["sliding_attention"] * 7}, "each of conv or full_attention"),
        ({"model_type": "lfm2_moe", "num_experts": 32}, "nearest is lfm2, which does not know"),
    ],
)
def test_what_of_a_config_is_refused(change: dict[str, Any], said: str) -> None:
    """Values that nobody's LFM2 has, and that mlx-lm computes otherwise or not at all."""
    with pytest.raises(MisError, match=said):
        check_config({**CONFIG, **change}, Path("config.json"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"conv_dim": 128}, "conv_dim is 128, but hidden_size 64"),
        ({"layer_types": ["conv"] * 6 + ["full_attention"]}, "layer_types has another order"),
        ({"block_ff_dim": "x"}, "block_ff_dim is 'x'"),
        ({"norm_eps": None}, "rms_norm_eps is None"),
    ],
)
def test_what_of_a_file_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    """Sizes that contradict each other."""
    folder = tiny.make(tmp_path / "m", **tiny.FAMILIES[KIND])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(MisError, match=said):
        read_config(folder)


@pytest.mark.thorough
def test_both_kinds_stay(lfm: Checkpoint, tmp_path: Path, text_folder: Path) -> None:
    """The first block of each kind; one block alone is refused before any work."""
    asked = {"model": str(lfm.path), "scenario": "none", "data": str(text_folder)}
    with pytest.raises(MisError, match="1 layers of a lfm2 are too few: 2 blocks must stay"):
        prune.run(prune.Settings(mlx_path=str(tmp_path / "x"), layers=1, **asked))
    prune.run(prune.Settings(mlx_path=str(tmp_path / "two"), layers=2, **asked))
    student = load.open_checkpoint(tmp_path / "two")
    assert student.config["layer_types"] == ["conv", "full_attention"]
    assert mx.isfinite(stock.opened(student.path)(TOKENS).astype(mx.float32)).all().item()


def test_the_plan_of_a_published_one(tmp_path: Path) -> None:
    """From its shape alone: half of the tokens."""
    (tmp_path / "config.json").write_text(json.dumps(published("lfm2-1.2b")))
    asked = plan.Settings(
        teacher=str(tmp_path), budget="5GiB", machine="m1-air", scenario="none", vocab="0.5x"
    )
    made = plan.run(asked)
    assert made["params_teacher"] == 1_170_340_608
    assert made["params_student"] == 1_170_340_608 - 2048 * 32_768
    assert not made["check_failed"]
