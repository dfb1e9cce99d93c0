"""A student in parts is an ordinary model at any moment, and a block of it is replaced whole or not
at all.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from mis_mlx.models.opening import load
from mis_mlx.models.writing import model_writer
from mis_mlx.types import Checkpoint, KeptUnits, MisError
from tests import stock, tiny
from tests.faults.broken import breaking
from tests.pruning.test_reconstruct import student_of
from tests.pruning.test_slice_weights import raw

TOKENS = mx.array([[1, 7, 300, 4, 42]])


def new_weights(parts_folder: Checkpoint, i: int) -> dict[str, mx.array]:
    """Block i's weights, a little larger."""
    prefix = f"model.layers.{i}."
    names = [n for n in parts_folder.tensors if n.startswith(prefix)]
    return {n.removeprefix(prefix): load.dense(parts_folder, n) * 1.5 for n in reversed(names)}


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_one_file_per_block_that_everybody_opens(
    tmp_path: Path, models: Callable[[str], Checkpoint], kind: str
) -> None:
    """All the weights, float32, the tokenizer; each block alone in its file; stock mlx_lm gives the
    same logits.
    """
    made = model_writer.by_block(models(kind), tmp_path / "s")
    assert raw(made) == raw(models(kind))
    blocks: dict[Path, set[str]] = {}
    for name, t in made.tensors.items():
        blocks.setdefault(t.file, set()).add(
            ".".join(name.split(".")[:3]) if ".layers." in name else ""
        )
    assert all(len(b) == 1 for b in blocks.values())
    assert len(blocks) == 5
    assert mx.array_equal(stock.opened(made.path)(TOKENS), stock.opened(models(kind).path)(TOKENS))
    assert (tmp_path / "s" / "tokenizer.json").read_bytes() == (
        models(kind).path / "tokenizer.json"
    ).read_bytes()


def test_half_precision_becomes_float32_and_the_cut_stays_known(
    tmp_path: Path, llama: Checkpoint
) -> None:
    """The values of a bfloat16 student, keep.json beside them, and the type in the config."""
    keep = KeptUnits((0, 2), {}, "by hand", {"a": 1})
    half = student_of(llama, keep, tmp_path / "b", "bfloat16")
    made = model_writer.by_block(half, tmp_path / "s")
    assert {t.dtype for t in made.tensors.values()} == {"F32"}
    assert all(
        mx.array_equal(load.dense(made, n), load.dense(half, n).astype(mx.float32))
        for n in half.tensors
    )
    assert model_writer.read_keep(made.path) == keep
    assert json.loads((made.path / "config.json").read_text())["torch_dtype"] == "float32"


def test_a_replaced_block_and_no_other(tmp_path: Path, llama: Checkpoint) -> None:
    """One file changes; our gate and stock mlx_lm see the new weights, in any order they were
    given.

    An array that was read lazily keeps the old values; a folder that exists is opened, not begun
    again.
    """
    made = model_writer.by_block(llama, tmp_path / "s")
    name = "model.layers.1.mlp.up_proj.weight"
    before = files_of(tmp_path / "s")
    wanted = new_weights(made, 1)
    lazy = load.dense(made, name)
    mx.eval(wanted)
    model_writer.replace_block(made, 1, wanted)
    after = files_of(tmp_path / "s")
    assert mx.array_equal(lazy, load.dense(llama, name))
    assert [n for n in after if after[n] != before.get(n)] == [made.tensors[name].file.name]
    again = model_writer.by_block(llama, tmp_path / "s")
    assert files_of(tmp_path / "s") == after
    assert again.tensors == made.tensors
    for name, value in wanted.items():
        assert mx.array_equal(load.dense(again, f"model.layers.1.{name}"), value)
    assert not mx.array_equal(stock.opened(again.path)(TOKENS), stock.opened(llama.path)(TOKENS))
    plain = load.resident_model(llama, mx.float32)
    plain.load_weights([(f"model.layers.1.{n}", v) for n, v in wanted.items()], strict=False)
    assert mx.array_equal(stock.opened(again.path)(TOKENS), plain(TOKENS))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_whichever_operation_fails_a_block_is_old_or_new(
    tmp_path: Path, llama: Checkpoint, number: int
) -> None:
    """Fail operation 1, 2, 3 ... until none is hit: one sentence, one whole block, no temporary
    file, and done again it is the new one.
    """
    refused = 0
    for at in itertools.count(1):
        made = model_writer.by_block(llama, tmp_path / str(at))
        old = raw(made)
        wanted = new_weights(made, 1)
        mx.eval(wanted)
        new = old | {f"model.layers.1.{n}": bytes(memoryview(v)) for n, v in wanted.items()}
        with breaking(at, number) as done:
            try:
                model_writer.replace_block(made, 1, wanted)
                acknowledged = True
            except MisError as error:
                assert "block 1 of the student" in str(error)
                acknowledged = False
                refused = refused + 1
        now = raw(load.open_checkpoint(made.path))
        assert now == new or (now == old and not acknowledged)
        assert not [n for n in os.listdir(made.path) if n.startswith(".tmp-")]
        model_writer.replace_block(made, 1, wanted)
        assert raw(load.open_checkpoint(made.path)) == new
        if len(done) < at:
            break
    assert acknowledged
    assert refused >= 12


def test_a_quantized_source_is_unpacked(tmp_path: Path, llama: Checkpoint) -> None:
    """Packed weights come back dense, in a folder that stock mlx_lm opens."""
    packed = tiny.packed(llama, tmp_path / "q4")
    made = model_writer.by_block(packed, tmp_path / "s")
    assert all(mx.array_equal(load.dense(made, n), load.dense(packed, n)) for n in made.tensors)
    assert stock.opened(made.path)(TOKENS).shape == (1, 5, 512)


@pytest.mark.parametrize("text", ["{", "{}", "[1]", '{"kept": {"x": [1]}}'])
def test_damaged_kept_units_are_refused(tmp_path: Path, text: str) -> None:
    """keep.json that is no JSON, or says too little."""
    (tmp_path / "keep.json").write_text(text)
    with pytest.raises(MisError, match="keep.json does not say"):
        model_writer.read_keep(tmp_path)


def test_what_is_written_says_nothing_of_where_it_was(tmp_path: Path, llama: Checkpoint) -> None:
    """Neither config.json nor tokenizer_config.json."""
    folder = shutil.copytree(llama.path, tmp_path / "private")
    for name in ("config.json", "tokenizer_config.json"):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**settings, "_name_or_path": "/home/me/secret"}))
    model_writer.by_block(load.open_checkpoint(folder), tmp_path / "s")
    assert not [path for path in (tmp_path / "s").glob("*.json") if "secret" in path.read_text()]
