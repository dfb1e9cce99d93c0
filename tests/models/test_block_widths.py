"""Blocks of unequal FFN width: read, made by a cut, repaired, rounded and exported.

tests/models/test_families.py has the parity of the family with stock mlx_lm.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
from gguf.quants import dequantize

from mis_mlx import distill, export, prune
from mis_mlx.models.architectures import arch, block_widths
from mis_mlx.models.opening import load
from mis_mlx.models.opening.config import read_config
from mis_mlx.models.writing import model_writer
from mis_mlx.pruning import reconstruct
from mis_mlx.types import Checkpoint, MisError
from tests import family_checks, stock, tiny

KIND = "nemotron-nas"
IDS = mx.array(np.arange(48)[None] * 7 % 500)
WIDTHS = (768, 256, 512)


def settings(teacher: Path, out: Path, text: Path, **changes: Any) -> prune.Settings:
    """Flags of a prune of a tiny llama that takes a moment."""
    flags: dict[str, Any] = {"scenario": "none", "num_samples": 8, "max_seq_length": 32}
    return prune.Settings(
        model=str(teacher),
        mlx_path=str(out),
        data=str(text),
        dtype="float32",
        **{**flags, **changes},
    )


@pytest.fixture
def pruned(llama: Checkpoint, tmp_path: Path, text_folder: Path) -> Checkpoint:
    """The tiny llama cut to `WIDTHS`."""
    asked = settings(llama.path, tmp_path / "pruned", text_folder, ffn_widths="768,256,512")
    prune.run(asked)
    return load.open_checkpoint(tmp_path / "pruned")


def check_as_stock(model: Checkpoint) -> None:
    """Logits are stock mlx_lm's to 1e-4 of the largest, all computed in float32."""
    whole = stock.opened(model.path)
    whole.set_dtype(mx.float32)
    theirs = whole(IDS)
    ours = load.resident_model(model, mx.float32)(IDS)
    assert mx.abs(ours - theirs).max().item() <= 1e-4 * mx.abs(theirs).max().item()


def test_widths_are_those_that_mlx_lm_computes() -> None:
    """Every width is stated so that mlx-lm's own formula gives it back."""
    theirs = load.mlx_lm("models.nemotron-nas")
    for hidden in (64, 576, 2048, 4096):
        for width in range(256, 16_385, 256):
            multiple = block_widths.multiple_of(width, hidden)
            stated = theirs.FFNConfig(ffn_mult=multiple).ffn_mult
            assert theirs._ffn_mult_to_intermediate_size(stated, hidden) == width
            assert block_widths.width_of(multiple, hidden) == width


@pytest.mark.usefixtures("cpu_policy")
def test_a_cut_student_is_what_stock_opens(pruned: Checkpoint, llama: Checkpoint) -> None:
    """Each block keeps the teacher's rows of its most important neurons, and all parameters are
    counted.
    """
    config = read_config(pruned.path)
    assert config["model_type"] == KIND
    assert block_widths.widths(config) == WIDTHS
    stored = tiny.stored_weights(pruned.path)
    assert arch.params(config) == sum(array.size for array in stored.values())
    keep = model_writer.read_keep(pruned.path)
    assert keep is not None
    before = tiny.stored_weights(llama.path)
    for block, width in enumerate(WIDTHS):
        kept = list(keep.kept.get((block, "ffn"), range(768)))
        assert len(kept) == width
        name = f"model.layers.{block}.mlp.down_proj.weight"
        assert mx.array_equal(stored[name], before[name][:, mx.array(kept)])
    check_as_stock(pruned)


@pytest.mark.usefixtures("cpu_policy")
def test_a_cut_student_is_repaired(
    pruned: Checkpoint, llama: Checkpoint, batches: list[mx.array]
) -> None:
    """The repair gives matrices of each block's width, and some of the error goes."""
    keep = model_writer.read_keep(pruned.path)
    assert keep is not None
    repaired, left = reconstruct.reconstruct(llama, pruned, keep, [*batches, *batches])
    assert left[0] == 1.0  # nothing was cut in front of its end
    assert min(left) < 1.0
    for name, weight in repaired.items():
        assert weight.shape == arch.tensors_of(pruned.config)[name]


@pytest.mark.usefixtures("cpu_policy")
def test_a_cut_student_is_rounded(pruned: Checkpoint, tmp_path: Path) -> None:
    """Four bits, as stock mlx_lm computes them."""
    four = family_checks.quantized(pruned.path, tmp_path / "four", target_bpw=None)
    assert block_widths.widths(four.config) == WIDTHS
    check_as_stock(four)


def test_its_gguf_has_a_width_for_each_block(pruned: Checkpoint, tmp_path: Path) -> None:
    """gguf-py reads a deci: widths as a list, and every tensor of the block's own shape."""
    export.run(export.Settings(model=str(pruned.path), out=str(tmp_path / "m"), out_type="f32"))
    (path,) = tmp_path.glob("m/**/*.gguf")
    reader = gguf.GGUFReader(path)
    keys = {key: field.contents() for key, field in reader.fields.items()}
    assert keys["general.architecture"] == "deci"
    assert keys["deci.feed_forward_length"] == list(WIDTHS)
    assert keys["deci.attention.head_count"] == [4, 4, 4]
    assert keys["deci.attention.head_count_kv"] == [2, 2, 2]
    stored = {tensor.name: tensor for tensor in reader.tensors}
    for block, width in enumerate(WIDTHS):
        down = stored[f"blk.{block}.ffn_down.weight"]
        assert down.shape.tolist() == [width, 64]  # innermost first
        values = dequantize(down.data, down.tensor_type)
        want = load.dense(pruned, f"model.layers.{block}.mlp.down_proj.weight")
        assert np.array_equal(values.reshape(-1), np.array(want).reshape(-1))


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ({"ffn_widths": "768,256"}, "--ffn-widths has 2 numbers, but 3 layers stay"),
        ({"ffn_widths": "768,256,1024"}, "--ffn-widths has 1024, which is outside 1 to 768"),
        ({"ffn_widths": "768,256,500"}, "an FFN of 500 neurons is not a multiple of 256"),
        ({"ffn_widths": "768,wide,512"}, "is not whole numbers separated by commas"),
        ({"ffn_widths": "768,256,512", "ffn": 512}, "both say how wide blocks are"),
    ],
)
def test_widths_that_do_not_fit_are_refused(
    llama: Checkpoint, tmp_path: Path, text_folder: Path, flags: dict[str, Any], why: str
) -> None:
    """One sentence, before anything is read or written."""
    with pytest.raises(MisError, match=why):
        prune.run(settings(llama.path, tmp_path / "p", text_folder, **flags))
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("qwen2", "blocks of a qwen2 cannot differ in FFN width"),
        (KIND, "blocks of a nemotron-nas cannot differ in FFN width"),
    ],
)
def test_other_families_refuse(
    models: Callable[[str], Checkpoint], tmp_path: Path, text_folder: Path, kind: str, why: str
) -> None:
    """They have no form that a stock program opens."""
    with pytest.raises(MisError, match=why):
        prune.run(settings(models(kind).path, tmp_path / "p", text_folder, ffn_widths="256"))


@pytest.mark.parametrize(
    ("block", "part", "change", "why"),
    [
        (1, "attention", {"no_op": True}, "block 1 has no_op for its attention"),
        (2, "ffn", {"replace_with_linear": True}, "block 2 has replace_with_linear for its ffn"),
        (0, "attention", {"n_heads_in_group": 4}, "n_heads_in_group is 2 in some blocks and 4"),
        (0, "ffn", {"ffn_mult": "2"}, "ffn_mult of block 0 is '2'"),
    ],
)
def test_forms_that_are_not_supported_are_refused(
    tmp_path: Path, block: int, part: str, change: dict[str, Any], why: str
) -> None:
    """A published config with other blocks says which one it is, and the file."""
    config = {**tiny.CONFIG, **tiny.FAMILIES[KIND]}
    blocks = json.loads(json.dumps(config["block_configs"]))
    blocks[block][part].update(change)
    (tmp_path / "config.json").write_text(json.dumps({**config, "block_configs": blocks}))
    with pytest.raises(MisError, match=f"config.json: .*{why}"):
        read_config(tmp_path)


@pytest.mark.usefixtures("cpu_policy")
def test_a_cut_student_is_distilled(
    pruned: Checkpoint, llama: Checkpoint, tmp_path: Path, text_folder: Path
) -> None:
    """`distill --student` repairs and trains it, and stock mlx_lm opens what comes out."""
    run = tmp_path / "run"
    flags: dict[str, Any] = {"max_seq_length": 32, "batch_size": 2, "reconstruct_samples": 8}
    flags |= {"iters": 2, "quantize": 0, "bench_tokens": 0, "eval_windows": 2}
    folders = {"teacher": llama.path, "student": pruned.path, "data": text_folder, "out": run}
    named = {name: str(folder) for name, folder in folders.items()}
    distill.run(distill.Settings(**named, **flags))
    model = load.open_checkpoint(run / "model")
    assert block_widths.widths(model.config) == WIDTHS
    check_as_stock(model)
