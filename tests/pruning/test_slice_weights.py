"""Cutting: keep all is the identity; each cut gives what a hand-made teacher without those parts
gives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from mis_mlx.models.opening import load
from mis_mlx.models.writing import model_writer
from mis_mlx.types import Checkpoint, KeptUnits
from tests import stock, tiny
from tests.pruning.test_reconstruct import student_of

ALL = (0, 1, 2)


def raw(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Every tensor's bytes as they are on disk."""
    found = {}
    for name, at in checkpoint.tensors.items():
        with at.file.open("rb") as file:
            file.seek(at.offset)
            found[name] = file.read(at.nbytes)
    return found


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
        assert raw(student_of(teacher, KeptUnits(ALL, kept, "by hand"), tmp_path / name)) == raw(
            teacher
        )


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_what_is_cut_is_zeros(
    tmp_path: Path, models: Callable[[str], Checkpoint], batches: list[mx.array], kind: str
) -> None:
    """Block 1, other neurons in each block, and one head of each group, another one in each block:
    the teacher without that block, with the other columns of down_proj and o_proj zeroed.
    """
    kept: dict[tuple[int, str], tuple[int, ...]] = {}
    kept |= {(i, "ffn"): tuple(range(i, 768, 3)) for i in (0, 2)}
    sizes = {"ffn": 256}
    heads = {0: (0, 2), 2: (1, 2)}
    if kind == "qwen2":  # which keeps its heads
        heads = dict.fromkeys(heads, (0, 1, 2, 3))
    else:
        kept |= {(i, "heads"): some for i, some in heads.items()}
        sizes["heads"] = 2
    student = student_of(models(kind), KeptUnits((0, 2), kept, ""), tmp_path / "s", **sizes)
    model = load.resident_model(models(kind), mx.float32)
    for i in (0, 2):
        block = model.model.layers[i]
        neurons = mx.array([float(j in kept[i, "ffn"]) for j in range(768)])
        said = mx.array([float(j // 16 in heads[i]) for j in range(64)])
        block.mlp.down_proj.weight *= neurons
        block.self_attn.o_proj.weight *= said
    model.model.layers = [model.model.layers[0], model.model.layers[2]]
    assert close(stock.opened(student.path)(batches[0]), model(batches[0]))


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
    keep = KeptUnits(ALL, {(-1, "hidden"): kept}, "")
    student = student_of(models(kind), keep, tmp_path / "s", hidden=48)
    teacher = models(kind)
    eps = {"rms_norm_eps": teacher.config["rms_norm_eps"] * 48 / 64}
    model = load.resident_model(replace(teacher, config={**teacher.config, **eps}), mx.float32)
    alive = mx.array([float(j in kept) for j in range(64)])
    model.model.embed_tokens.weight *= alive
    model.model.norm.weight *= (48 / 64) ** 0.5
    for block in model.model.layers:
        block.self_attn.o_proj.weight *= alive[:, None]
        block.mlp.down_proj.weight *= alive[:, None]
        block.input_layernorm.weight *= (48 / 64) ** 0.5
        block.post_attention_layernorm.weight *= (48 / 64) ** 0.5
    if kind != "qwen3":  # its q_norm and k_norm have the same eps but keep their 16 numbers
        assert close(stock.opened(student.path)(batches[0]), model(batches[0]))
    else:
        assert (
            mx.abs(stock.opened(student.path)(batches[0]) - model(batches[0])).max().item() < 1e-3
        )


def test_keep_survives_on_disk(tmp_path: Path, llama: Checkpoint) -> None:
    """keep.json gives back the Keep; a folder without one gives None; tokenizer files came along;
    of bfloat16, weights have half the bytes, and config.json says so.
    """
    keep = KeptUnits(
        (0, 2),
        {(0, "ffn"): tuple(range(512)), (2, "ffn"): tuple(range(256, 768))},
        "why",
        {"a": 1.5},
    )
    student = student_of(llama, keep, tmp_path / "s", "bfloat16", ffn=512)
    assert student.config["torch_dtype"] == "bfloat16"
    assert {at.dtype for at in student.tensors.values()} == {"BF16"}
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
    )
    own = {"config.json", "model.safetensors"}
    assert {p.name for p in (tmp_path / "to").iterdir()} - own == {
        "chat_template.jinja",
        "tokenizer.json",
    }
