"""4 bits: every matrix or a sentence; stock mlx-lm opens the result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from mis_mlx.maths import rounding
from mis_mlx.models.architectures import arch
from mis_mlx.models.architectures.families import shape_of
from mis_mlx.models.opening import load
from mis_mlx.models.opening.model_size import model_of
from mis_mlx.quantization import packed_format, stage
from mis_mlx.settings import recipe
from mis_mlx.types import Checkpoint, MisError
from tests import peaks, stock, tiny


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_every_matrix_is_packed(
    tmp_path: Path, models: Callable[[str], Checkpoint], batches: list[mx.array], kind: str
) -> None:
    """All 2-D weights are U32 with scales and biases, the rest is as it was; stock mlx_lm.load
    opens it.
    """
    plan = packed_format.formats_of(models(kind).config, 64)
    done = packed_format.write_quantized(models(kind), tmp_path / "q4", plan)
    packed = load.open_checkpoint(tmp_path / "q4")
    found = {name: tensor.dtype for name, tensor in packed.tensors.items()}
    wanted = {}
    for name, shape in arch.tensors_of(models(kind).config).items():
        wanted[name] = "U32" if len(shape) == 2 else "F32"
        if len(shape) == 2:
            stem = name.removesuffix(".weight")
            wanted |= {f"{stem}.scales": "F16", f"{stem}.biases": "F16"}
    assert found == wanted
    assert mx.isfinite(stock.opened(tmp_path / "q4")(batches[0])).all()
    settings = packed.config["quantization"]
    assert settings == packed.config["quantization_config"]
    assert (settings["bits"], settings["group_size"]) == (4, 64)
    assert settings["model.embed_tokens"]["bits"] == 8  # it makes the logits too
    assert done["nbytes"] == packed.nbytes
    params = arch.params(models(kind).config)
    assert done["bits_per_weight"] == pytest.approx(8 * packed.nbytes / params)


def test_a_large_matrix_is_rounded_in_parts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, llama: Checkpoint
) -> None:
    """A few rows at a time: the same file."""
    plan = packed_format.formats_of(llama.config, 64)
    packed_format.write_quantized(llama, tmp_path / "whole", plan)
    monkeypatch.setattr(rounding, "PART", 7 * shape_of(llama.config).hidden)
    packed_format.write_quantized(llama, tmp_path / "parts", plan)
    whole, parts = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts")
    )
    assert parts == whole


def test_experts_are_rounded_one_at_a_time(tmp_path: Path) -> None:
    """Those of a mixture are not all in memory before they are packed; the plan knows what they
    take then.
    """
    sizes = {
        "num_experts": 32,
        "hidden_size": 256,
        "moe_intermediate_size": 512,
        "num_hidden_layers": 1,
    }
    folder = tiny.make(
        tmp_path / "mixture", dtype="BF16", **{**tiny.FAMILIES["qwen3_moe"], **sizes}
    )
    mixture = load.open_checkpoint(folder)
    plan = packed_format.formats_of(mixture.config, 64)
    with peaks.of_mlx() as peak:
        packed_format.write_quantized(mixture, tmp_path / "q4", plan)
    planned = stage.quantizing_cost(
        model_of(mixture), recipe.ROUND_TO_NEAREST, windows=1, length=32, limit=0
    )
    assert peak.nbytes <= peaks.allocated(planned.peak_bytes)


def test_group_32_when_asked(tmp_path: Path, batches: list[mx.array]) -> None:
    """Hidden 96 is no multiple of 64: the sentence names 32, and 32 works."""
    teacher = load.open_checkpoint(tiny.make(tmp_path / "t", hidden_size=96, head_dim=24))
    with pytest.raises(MisError, match=r" 96 .* 64: .*--q-group-size 32"):
        packed_format.formats_of(teacher.config, 64)
    plan = packed_format.formats_of(teacher.config, 32)
    packed_format.write_quantized(teacher, tmp_path / "q4", plan)
    assert mx.isfinite(stock.opened(tmp_path / "q4")(batches[0])).all()


def test_a_weight_is_made_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some rows at a time, in another type: what all at once are."""
    weight = mx.random.normal((48, 128), key=mx.random.key(6))
    packed = rounding.nearest(weight, 64, 4)
    wanted = rounding.values(packed, 64, 4).astype(mx.float16)
    monkeypatch.setattr(rounding, "OPENED", 5 * 128)
    made = packed_format.weight_of(packed, packed_format.Format(4, 64), mx.float16)
    assert made.dtype == mx.float16
    assert (made == wanted).all()
