"""Every family of the table: what stock mlx_lm computes, streamed and whole, forwards and
backwards, cut and rounded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mis_mlx import distill, prune
from mis_mlx.compute import precision, streams
from mis_mlx.data.token_windows import Windows
from mis_mlx.distillation.block_student import BlockStudent
from mis_mlx.maths import losses
from mis_mlx.models.architectures import arch, experts
from mis_mlx.models.architectures.families import (
    FAMILIES,
    OPENED_AS,
    family,
    mixture,
    shape_of,
)
from mis_mlx.models.architectures.mixture import Mixture
from mis_mlx.models.architectures.shape import ALL
from mis_mlx.models.architectures.stock import window
from mis_mlx.models.opening import load
from mis_mlx.models.opening.config import _opened_as, check_config, read_config
from mis_mlx.models.passing import stream
from mis_mlx.models.writing import model_writer
from mis_mlx.models.writing.text_writer import TextWriter
from mis_mlx.quantization import packed_format
from mis_mlx.settings.recipe import TrainingConfig
from mis_mlx.types import Checkpoint, MisError
from tests import family_checks, stock, tiny
from tests.conftest import mostly_slow, mostly_thorough
from tests.distillation import students
from tests.family_checks import TOKENS, apart, streamed

Models = Callable[[str], Checkpoint]
# Polish models are llamas and mistrals of other ratios: one with biases in the short run.
SHORT = (*tiny.FAMILIES, "Bielik-4.5B-v3")
DIFFERENT = ("gemma3_text", "gpt_oss", "lfm2", "qwen3_5_text", "Bielik-4.5B-v3")
FEWER = mostly_slow(tiny.MODELS, *DIFFERENT, thorough=SHORT)


def stock_of(folder: Path) -> nn.Module:
    """As mlx_lm opens it."""
    model = stock.opened(folder)
    if mixture(read_config(folder)):
        model.set_dtype(mx.float32)  # MLX's CPU gathers products of no other type
    return model


def one_by_one(named: Mapping[str, mx.array], config: Mapping[str, Any]) -> dict[str, mx.array]:
    """Experts that mlx_lm has stacked, by their own names."""
    found = dict[str, mx.array]()
    of = mixture(config)
    if of is None:
        # a matrix that holds several has one name here, too
        joined = any("qkv_proj" in name for name in named)
        return dict(named) if joined else stock.ours(named, config)
    for name, array in named.items():
        if stacked := experts.STACKED.fullmatch(name):
            matrix = of.matrices[("gate_proj", "up_proj", "down_proj").index(stacked[2])]
            found |= {
                f"{stacked[1]}experts.{e}.{matrix}.{stacked[3]}": one for e, one in enumerate(array)
            }
        else:
            found[name] = array
    return found


def narrower(config: Mapping[str, Any]) -> int:
    """Two thirds of a model's neurons, in whole groups of 32."""
    return int(config[family(config).ffn_key]) * 2 // 3 // 32 * 32


def test_every_row_has_a_tiny_model() -> None:
    """A row without a parity test is no row."""
    kinds = {
        config.get("model_type", "llama")
        for config in (*tiny.KINDS.values(), *tiny.MODELS.values())
    }
    assert kinds == set(FAMILIES)


@pytest.mark.usefixtures("cpu_policy")
@pytest.mark.parametrize("kind", [*tiny.KINDS, *tiny.MODELS])
def test_streamed_is_resident_is_stock(models: Models, batches: list[mx.array], kind: str) -> None:
    """Hidden states equal to the last bit; logits are stock mlx_lm's to 1e-5 of the largest."""
    ours = load.resident_model(models(kind), mx.float32)
    whole = stock_of(models(kind).path)
    source = stream.Stream(models(kind), mx.float32)
    for tokens, hidden in zip(batches, source.forward(batches), strict=True):
        assert mx.array_equal(hidden, ours.model(tokens))
        theirs = whole(tokens)
        by_hand = losses.apply_softcap(hidden @ load.head_weight(ours).T, load.logit_softcap(ours))
        for z in (load.logits(source.head(), hidden), ours(tokens), by_hand):
            assert mx.abs(z - theirs).max().item() <= 1e-5 * mx.abs(theirs).max().item()


def test_a_whole_models_blocks_have_the_windows_of_blocks_alone(
    models: Models,
) -> None:
    """In every family, whoever asks: as a part of mlx-lm's model or on its own."""
    for kind in tiny.FAMILIES:
        values = models(kind).config
        architecture = family(values)
        args = architecture.model_args()
        whole = architecture.new_model().model.layers
        windows = [window(args, block) for block in whole]
        for i, width in enumerate(windows):
            alone = architecture.new_block(args, i)
            assert window(args, alone) == width, (kind, i)
        kinds = values.get("layer_types") or []
        slides = [kind == "sliding_attention" for kind in kinds]
        if any(slides):
            assert [width is not None for width in windows] == slides


@pytest.mark.usefixtures("cpu_policy")
@pytest.mark.parametrize("kind", mostly_thorough(["qwen3_moe", "olmoe"], "olmoe"))
def test_a_mixture_writes_what_stock_writes(models: Models, kind: str) -> None:
    """Greedy tokens with nothing kept, with room for some experts, and for all; fewer bytes the
    more room there is.
    """
    checkpoint = models(kind)
    read = []
    model = load.resident_model(checkpoint, mx.float32)
    prompt = [5, 9, 300, 17]
    want = list[int]()
    for _ in range(8):
        want.append(int(mx.argmax(model(mx.array([[*prompt, *want]]))[0, -1])))
    s = shape_of(checkpoint.config)
    head = 4 * s.vocab * s.hidden
    for room in (0, head + checkpoint.nbytes // 2, None):
        source = stream.Stream(checkpoint, mx.float32, room)
        assert TextWriter(source).write([prompt], 8, ()) == [want]
        read.append(source.reader.nbytes)
    assert read[0] > 1.5 * read[1] > 1.5 * read[2]


# Matrices of other rows, where the tiny model's no group divides.
WIDER: dict[str, dict[str, Any]] = {"qwen3_5_text": {"linear_value_head_dim": 32}}
HYBRIDS = ("gemma4_text", "lfm2", "qwen3_5_text")
MIXTURES = [name for name, kind in FAMILIES.items() if issubclass(kind, Mixture)]


ROUNDED = [
    *product((*HYBRIDS, *MIXTURES), ("cpu",), ("round", "gptq")),
    *product(HYBRIDS, ("metal",), ("round", "gptq")),
]


@pytest.mark.parametrize(
    ("kind", "policy", "method"),
    mostly_slow(
        ROUNDED,
        ("gemma4_text", "cpu", "round"),
        ("qwen3_5_text", "cpu", "round"),
        ("qwen2_moe", "cpu", "round"),
        thorough=[*product((*HYBRIDS, *MIXTURES), ("cpu",), ("round",)), ("lfm2", "cpu", "gptq")],
        of_several=True,
    ),
)
def test_four_bits_are_stock(
    kind: str,
    policy: str,
    method: str,
    tmp_path: Path,
    text_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All matrices are packed, kernels are not; those that have 8 bits, or
    5 around a delta rule, have no fewer. By our reading stock mlx_lm's numbers: streamed, whole,
    and with weights kept packed.
    """
    monkeypatch.setenv(precision.POLICY, policy)
    monkeypatch.setattr(load, "TABLE_PART", 50 * 7 * 32)  # a table of per-layer inputs in parts
    folder = tiny.make(tmp_path / "m", **{**tiny.FAMILIES[kind], **WIDER.get(kind, {})})
    more: dict[str, Any] = {"data": str(text_folder), "num_samples": 2, "max_seq_length": 24}
    more["target_bpw"] = (6.5 if kind in WIDER else 5.0) if method == "gptq" else None
    four = family_checks.quantized(folder, tmp_path / "four", method, **more)
    formats = packed_format.formats(four)
    matrices = set[str]()
    for name, shape in arch.tensors_of(four.config).items():
        if len(shape) == 2:
            matrices.add(name.removesuffix(".weight"))
    assert formats.keys() <= matrices
    assert all(
        path.endswith(("gate", "router")) for path in matrices - formats.keys()
    )  # of experts
    assert all(formats[path].bits == 8 for path in packed_format.wide_projections(four.config))
    floors = family(four.config).bit_floors()
    assert all(formats[path].bits >= fewest for path, fewest in floors.items())
    theirs = stock.opened(four.path)
    theirs.set_dtype(mx.float32)
    wanted = theirs(TOKENS)
    near = (1e-4 if policy == "cpu" else 2e-2) * float(mx.abs(wanted).max())
    assert apart(load.resident_model(four, mx.float32)(TOKENS), wanted) <= near
    assert apart(streamed(four, TOKENS), wanted) <= near
    if mixture(four.config):
        monkeypatch.setenv(precision.POLICY, "metal")
        assert apart(streamed(four, TOKENS), wanted) <= 2e-2 * float(mx.abs(wanted).max())


@pytest.mark.usefixtures("cpu_policy")
@pytest.mark.parametrize("kind", mostly_thorough(MIXTURES, "gpt_oss"))
def test_experts_are_read_once_for_many_batches(
    models: Models, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits in groups of any size; a pass reads the routed experts of a group, and no
    others; those that there is room for are not read again.
    """
    monkeypatch.setattr("mis_mlx.storage.block_reader.GAP", 0)
    checkpoint = models(kind)
    s = shape_of(models(kind).config)
    tokens = [mx.random.randint(0, 512, (1, 3), key=mx.random.key(b)) for b in range(4)]
    whole = [load.resident_model(checkpoint, mx.float32).model(t) for t in tokens]
    expert = 3 * 4 * s.ffn * s.hidden
    sizes = [
        at.nbytes for name, at in checkpoint.tensors.items() if arch.block_of(name) is not None
    ]
    dense = sum(sizes) - expert * s.experts * s.layers
    read = {}
    for windows in (1, 2, 4):
        monkeypatch.setattr(stream, "GROUP_BYTES", windows * 3 * 2 * 4 * s.hidden)
        source = stream.Stream(checkpoint, mx.float32)
        hidden = source.embed(tokens)
        before = source.reader.nbytes
        for _, block in source.blocks():
            source.run_block(block, hidden)
        read[windows] = source.reader.nbytes - before
        assert all(mx.array_equal(a, b) for a, b in zip(source.norm(hidden), whole, strict=True))
    assert dense < read[4] < read[2] < read[1]
    assert read[4] <= sum(sizes) + 4096 * len(sizes)
    # 3 tokens x 2 experts each
    assert read[1] <= dense + 4 * s.layers * 6 * (expert + 3 * 8192) + 4096 * len(sizes)
    source = stream.Stream(checkpoint, mx.float32, None)
    source.forward(tokens)
    before = source.reader.nbytes
    source.forward(tokens)
    distinct = set[int]().union(*(np.array(batch).reshape(-1).tolist() for batch in tokens))
    rows = 4 * s.hidden * len(distinct)
    assert source.reader.nbytes - before <= 4 * rows


# Of a gemma4_text some blocks at a time, too: later ones send something back to their keys and
# values.
IN_TURN = [("gemma4_text", 3), ("gemma4_text", 2)]
AT_ONCE = [*((kind, 0) for kind in tiny.MODELS), *IN_TURN]


@pytest.mark.usefixtures("cpu_policy")
@pytest.mark.parametrize(
    ("kind", "each"),
    mostly_slow(
        AT_ONCE,
        *((kind, 0) for kind in DIFFERENT),
        ("gemma4_text", 3),
        thorough=[*((kind, 0) for kind in SHORT), *IN_TURN],
        of_several=True,
    ),
)
def test_gradients_are_those_of_the_whole_model(
    models: Models, kind: str, each: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The distillation step's, block by block, against autodiff of mlx_lm's own forward pass; of
    blocks in turn with two windows side by side.
    """
    seven = load.open_checkpoint(tiny.make(tmp_path / "teacher", seed=7, **tiny.MODELS[kind]))
    tokens = np.array(mx.random.randint(0, 512, (2, 12), key=mx.random.key(3)))
    data = Windows(tokens, np.ones((2, 12), np.float32))
    recipe = TrainingConfig(iters=1, batch_size=2, max_seq_length=12)
    source = students.kept(seven, data, recipe, tmp_path / "targets", top=512)
    (batch,) = source.micro_batches(data, recipe, 0)
    plainly = stock_of(models(kind).path)
    wise = nn.log_softmax(stock_of(seven.path)(batch[0]), axis=-1)

    def plain(model: nn.Module) -> mx.array:
        # a product of other sizes is rounded otherwise, of which a Gemma makes a thousandth
        passes = batch[0][:, None] if each else [batch[0]]
        z = mx.concatenate([model(tokens) for tokens in passes])
        return (mx.exp(wise) * (wise - nn.log_softmax(z, axis=-1))).sum()

    loss, want = nn.value_and_grad(plainly, plain)(plainly)
    named = one_by_one(dict(tree_flatten(want)), models(kind).config)
    ours = dict[str, mx.array]()
    if each:
        monkeypatch.setattr(streams, "count", lambda: 2)
        monkeypatch.setattr(streams, "single_threaded_blas", lambda _: nullcontext())
        parts = model_writer.by_block(models(kind), tmp_path / "parts")
        student = BlockStudent(parts, "weights", at_once=each, steps_each=1)
    else:
        student = BlockStudent(models(kind), "weights")
    student.begin()
    for visit in range(-(-7 // each) if each else 1):
        if each:
            student._enter(visit, {})
        value, found = students.gradients_of(student, [batch], source.loss)
        assert value == pytest.approx(loss.item() / 24, rel=1e-4)
        ours |= found
    inside = {name for name in named if name.startswith("model.layers.")}
    assert ours.keys() == inside | {"model.norm.weight"}
    for name, gradient in ours.items():
        most = mx.abs(named[name]).max().item()
        assert mx.abs(gradient - named[name]).max().item() <= 2e-4 * most + 1e-7, name


@pytest.mark.parametrize("kind", FEWER)
def test_cut_along_every_axis_it_opens_in_stock(
    models: Models, kind: str, tmp_path: Path, text_folder: Path
) -> None:
    """Blocks, neurons, heads, groups, channels, as far as the family offers them: kinds stay with
    their blocks, and streamed, resident and stock agree on the student.
    """
    of = family(models(kind).config)
    before = models(kind).config
    sizes: dict[str, Any] = {
        "layers": 4,
        "ffn": narrower(before),
        "hidden": 32,
        "heads": max(2, before.get("num_key_value_heads", 2)),
    }
    if of.head_dim_follows and "hidden" not in of.axes:
        sizes |= {"heads": None, "hidden": None}
    sizes["experts"] = "0.75x"
    asked = {axis: n for axis, n in sizes.items() if axis in of.axes}
    prune.run(
        prune.Settings(
            model=str(models(kind).path),
            mlx_path=str(tmp_path / "cut"),
            scenario="none",
            data=str(text_folder),
            num_samples=2,
            max_seq_length=16,
            dtype="float32",
            **asked,
        )
    )
    student = load.open_checkpoint(tmp_path / "cut")
    keep = model_writer.read_keep(student.path)
    assert keep
    kept = keep.layers
    assert len(kept) == (4 if "layers" in of.axes else 7)
    if (table := f"{arch.PER_LAYER}weight") in student.tensors:
        whole, own = (load.dense(m, table).reshape(512, -1, 32) for m in (models(kind), student))
        assert mx.array_equal(own, whole[:, mx.array(kept)])
    for number, i in enumerate(kept):
        if (i, "channels") in keep.kept:  # of a convolution: its kernel is not rotated
            kernel = load.dense(models(kind), f"model.layers.{i}.conv.conv.weight")
            own = load.dense(student, f"model.layers.{number}.conv.conv.weight")
            assert mx.array_equal(own, kernel[mx.array(keep.kept[i, "channels"])])
    assert [arch.layer_phase(before)[i] for i in kept] == list(arch.layer_phase(student.config))
    for key in ("layer_types", "no_rope_layers"):
        if family(before).normalised().get(key):
            assert student.config[key] == [family(before).normalised()[key][i] for i in kept]
    tokens = mx.random.randint(0, 512, (1, 20), key=mx.random.key(5))
    theirs = stock_of(student.path)(tokens)
    assert (
        mx.abs(streamed(student, tokens) - theirs).max().item()
        <= 1e-5 * mx.abs(theirs).max().item() + 1e-6
    )


@pytest.mark.parametrize("kind", mostly_slow(tiny.MODELS, thorough=["qwen2_moe"]))
def test_the_whole_way(models: Models, kind: str, tmp_path: Path, text_folder: Path) -> None:
    """Every family and every Polish model; in the short run a mixture, and further below joined
    matrices.
    """
    the_whole_way(models(kind).path, tmp_path, text_folder)


def the_whole_way(teacher: Path, tmp_path: Path, text_folder: Path, layers: int = 5) -> None:
    """`distill` with its defaults at a small size: every folder opens in stock mlx_lm, and training
    lowers the KL.
    """
    config = load.open_checkpoint(teacher).config
    sizes = {"layers": layers, "ffn": narrower(config), "experts": "0.75x"}
    asked: dict[str, Any] = {
        axis: size for axis, size in sizes.items() if axis in family(config).axes
    }
    result = distill.run(
        distill.Settings(
            teacher=str(teacher),
            data=str(text_folder),
            out=str(tmp_path / "run"),
            iters=8,
            num_samples=2,
            max_seq_length=32,
            eval_windows=2,
            reconstruct_samples=2,
            learning_rate=1e-4,
            q_iters=2,
            q_group_size=32,
            scenario="none",
            **asked,
        )
    )
    for name in ("pruned", "distilled", "model"):
        assert np.isfinite(
            np.array(stock_of(tmp_path / "run" / name)(mx.array([[1, 2, 3]])).astype(mx.float32))
        ).all()
    assert result["kl_student"] < result["kl_pruned"]
    assert result["nll_quantized"] is not None


@pytest.mark.parametrize("beside", ["", "model."])
@pytest.mark.parametrize(
    ("kind", "made", "left_out"),
    [
        ("gemma3_text", tiny.seeing, "2 tensors that see"),
        ("gemma4_text", tiny.hearing, "3 tensors that see or hear"),
    ],
)
def test_of_a_model_that_sees_the_text_part_is_opened(
    models: Models,
    kind: str,
    made: Callable[..., Path],
    left_out: str,
    beside: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its tensors by the text part's names, streamed and whole; what is left out is said once, and
    so are keys and values that nobody uses.
    """
    seen = made(tmp_path / "m", beside)
    opened = [load.open_checkpoint(seen) for _ in range(2)][1]
    said = f"the text part is opened, a {kind}, without {left_out}"
    assert capsys.readouterr().err.count(said) == 1
    plain = models(kind)
    tokens = mx.array([[5, 9, 300]])
    assert opened.tensors.keys() == plain.tensors.keys()
    assert (opened.config["model_type"], opened.config["eos_token_id"]) == (kind, [0])
    assert mx.array_equal(streamed(opened, tokens), streamed(plain, tokens))
    assert mx.array_equal(
        load.resident_model(opened, mx.float32)(tokens),
        load.resident_model(plain, mx.float32)(tokens),
    )
    if not (beside and kind == "gemma3_text"):
        theirs = stock_of(seen)(tokens)
        assert apart(streamed(opened, tokens), theirs) <= 1e-5 * float(mx.abs(theirs).max())


def test_what_a_opened_as_leaves_out_is_the_familys() -> None:
    """gemma-3-4b's own config.json, which is PLLuM-4B's too; packed matrices by their names."""
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10_240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    packed = {"bits": 4, "group_size": 64, "language_model.model.layers.0.mlp.up_proj": {"bits": 8}}
    whole = {
        "model_type": "gemma3",
        "text_config": text,
        "vision_config": {},
        "quantization": packed,
    }
    config = _opened_as(whole, Path("config.json"))
    check_config(config, Path("config.json"))
    assert config["quantization"]["model.layers.0.mlp.up_proj"] == {"bits": 8}
    assert "vision_config" not in config
    assert arch.params(config) == 3_880_263_168
    for broken, why in (
        ({"text_config": [1]}, r"text_config is \[1\]"),
        ({"model_file": "x.py"}, "model_file wants"),
    ):
        with pytest.raises(MisError, match=why):
            check_config(_opened_as({**whole, **broken}, Path("config.json")), Path("config.json"))


@pytest.mark.parametrize("kind", tiny.PHIS)
def test_positions_that_are_phis_own(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A part of each head by plain positions; whole heads by LongRoPE: as stock mlx_lm, which takes
    the long factors at every length, and that is said."""
    phi = load.open_checkpoint(tiny.make(tmp_path / "m", **tiny.PHIS[kind]))
    tokens = mx.arange(80)[None]
    assert ("long factors at every length" in capsys.readouterr().err) == (
        kind == "phi3 of whole heads"
    )
    theirs = stock_of(phi.path)(tokens)
    z = streamed(phi, tokens)
    assert mx.array_equal(z, load.resident_model(phi, mx.float32)(tokens))
    assert phi.config["model_type"] == "phi3"
    assert mx.abs(z - theirs).max().item() <= 1e-5 * mx.abs(theirs).max().item()


@pytest.mark.usefixtures("cpu_policy")
def test_the_published_form_of_lfm2_is_opened(models: Models, tmp_path: Path) -> None:
    """Attention by numbers of blocks, a larger FFN that is adjusted, kernels as torch has them or
    as mlx-lm has them: the same logits.
    """
    folder = tiny.make(tmp_path / "m", **tiny.FAMILIES["lfm2"])
    config = json.loads((folder / "config.json").read_text())
    assert config["full_attn_idxs"] == [2, 4, 6]
    stored: Any = mx.load(str(folder / "model.safetensors"))
    weights: dict[str, mx.array] = dict(stored)
    mx.eval(weights)
    kernel = "model.layers.0.conv.conv.weight"
    assert weights[kernel].shape == (64, 1, 3)
    want = streamed(models("lfm2"), TOKENS)
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


@pytest.mark.parametrize("bits", [None, 4])
def test_joined_matrices_are_opened_apart(models: Models, bits: int | None, tmp_path: Path) -> None:
    """A phi3 is a llama whose matrices lie on disk as rows of another; so do MLX's packed ones,
    some in other bits.
    """
    phi = tiny.joined(tmp_path / "phi3")
    if bits:
        utils = load.mlx_lm("utils")
        phi = tmp_path / "packed"
        model, config = utils.load_model(tmp_path / "phi3")

        def how(path: str, _: nn.Module) -> bool | dict[str, Any]:
            return (
                {"group_size": 64, "bits": 8, "mode": "affine"}
                if "layers.1.mlp.gate_up" in path
                else True
            )

        model, config = utils.quantize_model(model, config, 64, bits, quant_predicate=how)
        tokenizer = load.tokenizer(tmp_path / "phi3")
        utils.save(phi, tmp_path / "phi3", model=model, tokenizer=tokenizer, config=config)
    opened = load.open_checkpoint(phi)
    tokens = mx.array([[5, 9, 300, 17]])
    assert set(opened.tensors) >= set(models("untied").tensors)
    assert opened.config["model_type"] == "llama"
    theirs = stock_of(phi)(tokens)
    whole = load.resident_model(opened, mx.float32)(tokens)
    for z in (streamed(opened, tokens), whole):
        assert mx.abs(z - theirs).max().item() <= 1e-5 * mx.abs(theirs).max().item()
    if not bits:
        assert mx.array_equal(whole, load.resident_model(models("untied"), mx.float32)(tokens))


@pytest.mark.thorough
def test_the_whole_way_of_joined_matrices(tmp_path: Path, text_folder: Path) -> None:
    """Its students are llama folders."""
    the_whole_way(tiny.joined(tmp_path / "phi3"), tmp_path, text_folder, layers=2)
    assert (
        json.loads((tmp_path / "run" / "model" / "config.json").read_text())["model_type"]
        == "llama"
    )


@pytest.mark.parametrize(
    ("kind", "flags", "said"),
    [
        (
            "gemma3_text",
            {"hidden": 32},
            "hidden of a gemma3_text cannot be cut: its blocks have norms after",
        ),
        ("gemma3_text", {"scenario": "baca"}, "hidden of a gemma3_text cannot be cut"),
        (
            "gemma3_text",
            {"layers": 2, "scenario": "none"},
            "2 layers of a gemma3_text are fewer than 3",
        ),
        ("granite", {"heads": 2, "scenario": "none"}, "a granite cannot change hidden"),
        (
            "gemma4_text",
            {"layers": 2, "scenario": "none"},
            "2 layers of a gemma4_text are too few: 3 blocks must stay",
        ),
        (
            "lfm2",
            {"layers": 1, "scenario": "none"},
            "1 layers of a lfm2 are too few: 2 blocks must stay",
        ),
    ],
)
def test_an_axis_that_is_not_safe(
    models: Models, kind: str, flags: dict[str, Any], said: str, tmp_path: Path, text_folder: Path
) -> None:
    """One sentence that says why, before anything is read."""
    where = {
        "model": str(models(kind).path),
        "mlx_path": str(tmp_path / "x"),
        "data": str(text_folder),
    }
    with pytest.raises(MisError, match=said):
        prune.run(prune.Settings(**where, **flags))


def table() -> str:
    """That of docs/families.md, from the rows."""
    head = ["model_type", "can be cut", "on Metal in", "GGUF"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in FAMILIES.values():
        axes = ", ".join(axis for axis in ALL if axis in row.axes)
        # heads, their groups and the hidden size, by the quotient
        if row.head_dim_follows and "heads" in row.axes:
            axes = axes.replace("heads, kv_heads, hidden", "heads with hidden")
        assert row.repairs or "experts" in row.axes, "the page says that mixtures alone are not"
        metal = "float16" if row.float16 else "float32, bfloat16"
        lines.append("| " + " | ".join([row.name, axes, metal, row.gguf or "no"]) + " |")
    return "\n".join(lines)


def test_the_page_says_what_the_table_says() -> None:
    """docs/families.md."""
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
    assert table() in page, table()
    assert all(
        f"`{name}`" in page and into["model_type"] in FAMILIES for name, into in OPENED_AS.items()
    )
