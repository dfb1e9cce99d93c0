"""The command `quantize`."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from mis_mlx import quantize
from mis_mlx.disk.files import DISK
from mis_mlx.machine import memory
from mis_mlx.model import load, pack, speak
from mis_mlx.training import phases, planning
from mis_mlx.types import GIB, Budget, Checkpoint, MisError
from tests import tiny
from tests.conftest import Done, sentence


def test_end_to_end(tmp_path: Path, llama: Checkpoint, command: Callable[..., Done]) -> None:
    """As a user runs it: JSON on the last line, and a folder that stock mlx-lm opens and speaks from."""
    done = command("quantize", "--model", llama.path, "--mlx-path", tmp_path / "q4", "--q-group-size", 32)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    packed = load.open_checkpoint(tmp_path / "q4")
    assert result["nbytes"] == packed.nbytes < llama.nbytes / 4
    assert result["group_size"] == 32 and 4 < result["bits_per_weight"] < 7
    model, tokenizer = speak.open_model(tmp_path / "q4")
    assert isinstance(speak.continuation(model, tokenizer, "The with statement", 4), str)


def test_refusals_write_nothing(tmp_path: Path, llama: Checkpoint) -> None:
    """A quantized input and a width that no group divides."""
    first, second = tmp_path / "q4", tmp_path / "q44"
    quantize.run(quantize.Settings(model=str(llama.path), mlx_path=str(first)))
    with pytest.raises(MisError, match="quantized already"):
        quantize.run(quantize.Settings(model=str(first), mlx_path=str(second)))
    odd = tiny.make(tmp_path / "odd", intermediate_size=760)
    with pytest.raises(MisError, match="rows of 760 weights"):
        quantize.run(quantize.Settings(model=str(odd), mlx_path=str(second)))
    assert not second.exists()


def test_a_budget_too_small_is_a_sentence(tmp_path: Path, llama: Checkpoint, command: Callable[..., Done]) -> None:
    """Refused before work starts, with both numbers and the budget that would do."""
    done = command("quantize", "--model", llama.path, "--mlx-path", tmp_path / "out", "--budget", "100KiB")
    assert done.returncode == 1 and "the budget is 100 KiB: give --budget" in done.stderr
    assert not list(tmp_path.iterdir())


GPTQ = ("--method", "gptq", "--num-samples", 4, "--max-seq-length", 32)


def test_gptq_end_to_end(tmp_path: Path, llama: Checkpoint, text_folder: Path, command: Callable[..., Done]) -> None:
    """Other weights in as many bytes; the same again from the same seed, others from other windows; it speaks."""
    weights = []
    for name, flags in (("plain", ()), ("a", GPTQ), ("b", GPTQ), ("c", (*GPTQ, "--seed", 1))):
        where = ("--model", llama.path, "--mlx-path", tmp_path / name, "--data", text_folder)
        done = command("quantize", *where, *flags)
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout.splitlines()[-1])
        assert result["method"] == ("gptq" if flags else "round")
        assert result["nbytes"] == load.open_checkpoint(tmp_path / name).nbytes
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    plain, a, b, c = weights
    assert a == b and len({plain, a, c}) == 3 and len(plain) == len(a)
    model, tokenizer = speak.open_model(tmp_path / "a")
    assert isinstance(speak.continuation(model, tokenizer, "The with statement", 4), str)


def test_gptq_on_fewer_windows_in_memory_gives_the_same_bits(tmp_path: Path, llama: Checkpoint) -> None:
    """Hidden states of one window in memory, of three in a file without a name."""
    batches = [mx.random.randint(0, 512, (1, 32), key=mx.random.key(k)) for k in range(4)]
    for name, held in (("all", 4), ("one", 1)):
        quantize.quantize(llama.path, tmp_path / name, 64, DISK, batches, held)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("all", "one")]
    assert files[0] == files[1] and len(list(tmp_path.iterdir())) == 2


def test_gptq_refusals_write_nothing(
    tmp_path: Path, llama: Checkpoint, text_folder: Path, command: Callable[..., Done]
) -> None:
    """No text to look at; a budget that gram matrices do not fit, though plain rounding would; quantized already."""
    flags = ("--data", text_folder, *GPTQ)
    out = ("--mlx-path", tmp_path / "out")
    assert "give 1 or more" in sentence(command("quantize", "--model", llama.path, *out, *flags, "--num-samples", 0))
    few = ("--budget", "10MiB")
    assert command("quantize", "--model", llama.path, "--mlx-path", tmp_path / "plain", *few).returncode == 0
    said = sentence(command("quantize", "--model", llama.path, *out, *flags, *few))
    assert "quantize needs" in said and "the budget is 10 MiB: give --budget" in said and "or --method round" in said
    said = sentence(command("quantize", "--model", tmp_path / "plain", *out, *flags))
    assert "quantized already" in said
    assert [p.name for p in tmp_path.iterdir()] == ["plain"]


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize(("ffn", "vocab"), [(1536, 512), (512, 8192)])
def test_gptq_stays_under_the_plan(tmp_path: Path, dtype: str, ffn: int, vocab: int) -> None:
    """MLX's peak and numpy's, each at its own time, together under the plan, and not by more than a factor of four."""
    sizes = {"hidden_size": 256, "head_dim": 64, "intermediate_size": ffn, "vocab_size": vocab}
    checkpoint = load.open_checkpoint(tiny.make(tmp_path / "m", dtype=dtype, **sizes))
    batches = [mx.random.randint(0, 512, (1, 64), key=mx.random.key(k)) for k in range(6)]
    planned = phases.quantize(planning.model_of(checkpoint), 6, 64, GIB)
    assert planned.held_tokens == 6 * 64 and planned.spooled_bytes == 0
    mx.eval(batches)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    tracemalloc.start()
    with memory.limited(Budget(before + planned.peak_bytes)):
        mx.set_cache_limit(0)
        quantize.quantize(checkpoint.path, tmp_path / "q4", 64, DISK, batches, 6)
    peak = mx.get_peak_memory() - before + tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert planned.peak_bytes / 4 < peak < planned.peak_bytes, (peak / 2**20, planned.peak_bytes / 2**20)
    assert pack.layout(checkpoint.config, 64)


def test_the_plan_of_gptq_by_pencil() -> None:
    """Two D x D, one Q x Q and one F x F sum in float64, five of the largest, 28 bytes a weight of gate and up."""
    m = planning.model_of(tiny.CONFIG, gpu=False)
    plain, planned = phases.quantize(m, 0, 32, GIB), phases.quantize(m, 4, 32, GIB)
    without = planning.streamed_pass("", m, 128, 32, 32, GIB, head=False)
    arrays = 8 * (3 * 64**2 + 768**2) + 40 * 768**2 + 28 * 64 * 2 * 768
    assert planned.peak_bytes == without.peak_bytes + arrays and planned.flops > 2 * without.flops
    assert plain.peak_bytes < planned.peak_bytes and (plain.flops, plain.held_tokens) == (0, 0)
    assert (planned.read_bytes, planned.written_bytes) == (plain.read_bytes, plain.written_bytes)
    poor = phases.quantize(m, 4, 32, 0)  # every hidden state spooled: written by each block, read twice
    assert poor.written_bytes - plain.written_bytes == 4 * 128 * 64 * 4
    assert poor.read_bytes - plain.read_bytes == 2 * 4 * 128 * 64 * 4


def test_distill_takes_the_method(tmp_path: Path, flags: tuple[object, ...], command: Callable[..., Done]) -> None:
    """`distill --q-method gptq`: its last stage is this one, on its own calibration windows, and is planned so."""
    done = command("distill", *flags, "--out", tmp_path / "run", "--iters", 2, "--q-method", "gptq")
    assert done.returncode == 0, done.stderr
    quantize.quantize(tmp_path / "run" / "distilled", tmp_path / "plain", 64, DISK)
    made, plain = load.open_checkpoint(tmp_path / "run" / "model"), load.open_checkpoint(tmp_path / "plain")
    assert made.config == plain.config
    name = "model.layers.0.mlp.up_proj.weight"
    assert not (load.dense(made, name) == load.dense(plain, name)).all()
    assert "q_method: gptq" in (tmp_path / "run" / "config.yaml").read_text()
    speak.open_model(tmp_path / "run" / "model")
