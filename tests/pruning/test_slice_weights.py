"""Cutting: keep all is the identity; each cut gives what a hand-made teacher without those parts
gives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mis_mlx.models.architectures.sizes import shape_of
from mis_mlx.models.opening import load
from mis_mlx.models.writing import model_writer
from mis_mlx.pruning import slicing
from mis_mlx.storage.files import DISK
from mis_mlx.types import Checkpoint, KeptUnits
from tests import tiny

ALL = (0, 1, 2)


def raw(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Every tensor's bytes as they are on disk."""
    found = {}
    for name, at in checkpoint.tensors.items():
        with at.file.open("rb") as file:
            file.seek(at.offset)
            found[name] = file.read(at.nbytes)
    return found


def cut(
    teacher: Checkpoint,
    out: Path,
    layers: tuple[int, ...],
    kept: dict[tuple[int, str], tuple[int, ...]],
    **sizes: int,
) -> Checkpoint:
    """The student of a Keep written by hand, opened by our gate."""
    shape = replace(shape_of(teacher.config), layers=len(layers), **sizes)
    slicing.write_student(
        teacher,
        shape,
        keep=KeptUnits(layers, kept, "by hand"),
        out=out,
        dtype="float32",
        files=DISK,
    )
    return load.open_checkpoint(out)


def stock(checkpoint: Checkpoint, tokens: mx.array) -> mx.array:
    """Logits of stock mlx_lm.load."""
    model, _ = load.mlx_lm("utils").load(str(checkpoint.path))
    return model(tokens)


def edited(
    teacher: Checkpoint,
    tokens: mx.array,
    edit: Callable[[dict[str, mx.array]], None],
    **config: Any,
) -> mx.array:
    """Logits of the teacher after `edit(weights)` changed its weights in place; the reference of
    each cut.
    """
    model = load.resident_model(
        Checkpoint(teacher.path, {**teacher.config, **config}, teacher.tensors), mx.float32
    )
    weights = dict(tree_flatten(model.parameters()))
    edit(weights)
    model.load_weights(list(weights.items()))
    return model(tokens)


def close(a: mx.array, b: mx.array) -> bool:
    """Sums over zeros are the same sums in another order: float32 rounding, not more."""
    return mx.abs(a - b).max().item() <= 2e-5 * mx.abs(b).max().item()


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_keep_all_is_the_identity(
    tmp_path: Path, models: Callable[[str], Checkpoint], kind: str
) -> None:
    """The same bytes of every tensor, whether nothing is named or everything is."""
    teacher = models(kind)
    everything = {(i, "ffn"): tuple(range(768)) for i in ALL} | {
        (i, "heads"): tuple(range(4)) for i in ALL
    }
    everything[-1, "hidden"] = tuple(range(64))
    for name, kept in (("nothing", {}), ("everything", everything)):
        assert raw(cut(teacher, tmp_path / name, ALL, kept)) == raw(teacher)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_cut_layers_are_skipped(
    tmp_path: Path, models: Callable[[str], Checkpoint], batches: list[mx.array], kind: str
) -> None:
    """Without block 1: bit for bit the teacher whose list of layers lacks it."""
    student = cut(models(kind), tmp_path / "s", (0, 2), {})
    model = load.resident_model(models(kind), mx.float32)
    model.model.layers = [model.model.layers[0], model.model.layers[2]]
    assert mx.array_equal(stock(student, batches[0]), model(batches[0]))


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_cut_neurons_are_zeros(
    tmp_path: Path, models: Callable[[str], Checkpoint], batches: list[mx.array], kind: str
) -> None:
    """Keeping every third neuron equals the teacher with the other columns of down_proj zeroed."""
    kept = tuple(range(0, 768, 3))
    student = cut(models(kind), tmp_path / "s", ALL, {(i, "ffn"): kept for i in ALL}, ffn=256)

    def edit(w: dict[str, mx.array]) -> None:
        alive = mx.array([float(j in kept) for j in range(768)])
        for i in ALL:
            w[f"model.layers.{i}.mlp.down_proj.weight"] *= alive

    assert close(stock(student, batches[0]), edited(models(kind), batches[0], edit))


@pytest.mark.parametrize("kind", ["llama", "untied", "mistral", "qwen3"])
def test_cut_heads_are_zeros(
    tmp_path: Path, models: Callable[[str], Checkpoint], batches: list[mx.array], kind: str
) -> None:
    """One head of each group, another one in each layer: the teacher with the other columns of
    o_proj zeroed.
    """
    kept = {(0, "heads"): (0, 2), (1, "heads"): (1, 3), (2, "heads"): (1, 2)}
    student = cut(models(kind), tmp_path / "s", ALL, kept, heads=2)

    def edit(w: dict[str, mx.array]) -> None:
        for i in ALL:
            alive = mx.array([float(j // 16 in kept[i, "heads"]) for j in range(64)])
            w[f"model.layers.{i}.self_attn.o_proj.weight"] *= alive

    assert close(stock(student, batches[0]), edited(models(kind), batches[0], edit))


@pytest.mark.parametrize("kind", ["llama", "untied", "mistral", "qwen3"])
def test_cut_channels_leave_the_stream(
    tmp_path: Path, models: Callable[[str], Checkpoint], batches: list[mx.array], kind: str
) -> None:
    """48 of 64 channels: the teacher that never writes the other 16.

    Its norms divide by the root mean square over 64 numbers, 16 of them zeros; the student's over
    48. So the reference has norm weights times sqrt(48/64) and eps times 48/64, which is the same
    function exactly.
    """
    kept = tuple(j for j in range(64) if j % 4)
    student = cut(models(kind), tmp_path / "s", ALL, {(-1, "hidden"): kept}, hidden=48)

    def edit(w: dict[str, mx.array]) -> None:
        alive = mx.array([float(j in kept) for j in range(64)])
        w["model.embed_tokens.weight"] *= alive
        w["model.norm.weight"] *= (48 / 64) ** 0.5
        for i in ALL:
            for name in ("self_attn.o_proj", "mlp.down_proj"):
                w[f"model.layers.{i}.{name}.weight"] *= alive[:, None]
            for name in ("input_layernorm", "post_attention_layernorm"):
                w[f"model.layers.{i}.{name}.weight"] *= (48 / 64) ** 0.5

    eps = {"rms_norm_eps": models(kind).config["rms_norm_eps"] * 48 / 64}
    reference = edited(models(kind), batches[0], edit, **eps)
    if kind != "qwen3":  # its q_norm and k_norm have the same eps but keep their 16 numbers
        assert close(stock(student, batches[0]), reference)
    else:
        assert mx.abs(stock(student, batches[0]) - reference).max().item() < 1e-3


def test_all_cuts_at_once_and_biases(tmp_path: Path, batches: list[mx.array]) -> None:
    """A llama with every bias, cut along all four axes, opens in stock mlx-lm with finite
    logits.
    """
    teacher = load.open_checkpoint(tiny.make(tmp_path / "t", attention_bias=True, mlp_bias=True))
    kept: dict[tuple[int, str], tuple[int, ...]] = {(-1, "hidden"): tuple(range(0, 64, 2))}
    kept |= {(i, "ffn"): tuple(range(i, 256 + i)) for i in (0, 2)}
    kept |= {(i, "heads"): (1, 2) for i in (0, 2)}
    student = cut(teacher, tmp_path / "s", (0, 2), kept, ffn=256, heads=2, hidden=32)
    assert mx.isfinite(stock(student, batches[0])).all()
    bias = load.dense(teacher, "model.layers.2.self_attn.q_proj.bias")
    assert mx.array_equal(load.dense(student, "model.layers.1.self_attn.q_proj.bias"), bias[16:48])


def test_types_are_cast_and_said(tmp_path: Path, llama: Checkpoint) -> None:
    """bfloat16: half the bytes, and config.json says so."""
    slicing.write_student(
        llama,
        shape_of(llama.config),
        keep=KeptUnits(ALL, {}, ""),
        out=tmp_path / "s",
        dtype="bfloat16",
        files=DISK,
    )
    student = load.open_checkpoint(tmp_path / "s")
    assert 2 * student.nbytes == llama.nbytes
    assert student.config["torch_dtype"] == "bfloat16"
    assert {at.dtype for at in student.tensors.values()} == {"BF16"}


def test_keep_survives_on_disk(tmp_path: Path, llama: Checkpoint) -> None:
    """keep.json gives back the Keep; a folder without one gives None; tokenizer files came
    along.
    """
    keep = KeptUnits(
        (0, 2),
        {(0, "ffn"): tuple(range(512)), (2, "ffn"): tuple(range(256, 768))},
        "why",
        {"a": 1.5},
    )
    slicing.write_student(
        llama,
        replace(shape_of(llama.config), layers=2, ffn=512),
        keep=keep,
        out=tmp_path / "s",
        dtype="float32",
        files=DISK,
    )
    assert model_writer.read_keep(tmp_path / "s") == keep
    assert model_writer.read_keep(llama.path) is None
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "s" / name).read_bytes() == (llama.path / name).read_bytes()


def test_foreign_code_and_weights_are_not_copied(tmp_path: Path) -> None:
    """Only what makes a folder speak comes along."""
    (tmp_path / "from").mkdir()
    for name in (
        "tokenizer.json",
        "evil.py",
        "pytorch_model.bin",
        "source.json",
        "chat_template.jinja",
    ):
        (tmp_path / "from" / name).write_text("x")
    model_writer.write_folder(
        {"model_type": "llama"},
        {},
        tensors=[],
        source=tmp_path / "from",
        out=tmp_path / "to",
        files=DISK,
    )
    own = {"config.json", "model.safetensors"}
    assert {p.name for p in (tmp_path / "to").iterdir()} - own == {
        "chat_template.jinja",
        "tokenizer.json",
    }
