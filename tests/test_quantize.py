"""The command `quantize`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx.data.token_windows import Windows
from mis_mlx.distillation.block_student import BlockStudent, scales_cost
from mis_mlx.hardware import memory
from mis_mlx.hardware.stage_cost import INTEGERS, WINDOWS
from mis_mlx.maths import gptq
from mis_mlx.models.opening import compute_type, load
from mis_mlx.models.opening.model_size import model_of
from mis_mlx.models.writing import mlx_generate
from mis_mlx.planner.distillation_spec import DistillationSpec
from mis_mlx.quantization import packed_format, stage
from mis_mlx.settings.recipe import DistillationConfig, QuantizationConfig
from mis_mlx.storage.files import DISK
from mis_mlx.types import GIB, Budget, Checkpoint
from tests import peaks, tiny
from tests.conftest import Done, mostly_slow
from tests.distillation import students
from tests.peaks import allocated

ROOT = Path(__file__).parents[1]


def test_end_to_end(tmp_path: Path, llama: Checkpoint, command: Callable[..., Done]) -> None:
    """As a user runs it: JSON on the last line, and a folder that stock mlx-lm opens and speaks
    from.
    """
    brief = ("--num-samples", 4, "--max-seq-length", 64)
    done = command(
        "quantize",
        "--model",
        llama.path,
        "--mlx-path",
        tmp_path / "q4",
        "--q-group-size",
        32,
        *brief,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    packed = load.open_checkpoint(tmp_path / "q4")
    assert result["nbytes"] == packed.nbytes < llama.nbytes / 4
    assert result["group_size"] == 32
    *_, size, _, write, judge = done.stderr.splitlines()
    assert size.startswith(f"{tmp_path / 'q4'}: {packed.nbytes / 1e6:.1f} MB, ")
    assert f"mlx_lm generate --model {tmp_path / 'q4'} " in write
    assert f"evaluate --teacher {llama.path} --students {tmp_path / 'q4'} " in judge
    assert 4 < result["bits_per_weight"] < 7
    model, tokenizer = mlx_generate.open_model(compute_type.open_to_compute(tmp_path / "q4"))
    assert len(list(mlx_generate.greedy(model, tokenizer.encode("The with statement"), 4))) == 4


@pytest.mark.parametrize(
    "asked",
    [("quantize", "--max-seq-length", 32), ("prune", "--scenario", "half-ffn")],
    ids=lambda asked: asked[0],
)
def test_no_phase_holds_the_tokenizer(
    tmp_path: Path,
    llama: Checkpoint,
    text_folder: Path,
    in_process: Callable[..., Done],
    asked: tuple[object, ...],
) -> None:
    """With 152 thousand tokens it takes 200 MiB of a budget, and no plan counts it."""
    name, *flags = asked
    paths = ("--model", llama.path, "--data", text_folder, "--mlx-path", tmp_path / "made")
    done = in_process(name, *paths, *flags, "--num-samples", 2)
    assert done.returncode == 0, done.stderr
    assert not load.opened_tokenizer.cache_info().currsize


FOUR = QuantizationConfig(target_bpw=None)
PLAIN = ("--q-method", "round", "--target-bpw", "None")
GPTQ = ("--target-bpw", "None", "--num-samples", 4, "--max-seq-length", 32)


@pytest.mark.thorough
def test_gptq_end_to_end(
    tmp_path: Path, llama: Checkpoint, text_folder: Path, command: Callable[..., Done]
) -> None:
    """Other weights in as many bytes; the same again from the same seed, others from other windows;
    it speaks.
    """
    weights = []
    for name, flags in (("plain", PLAIN), ("a", GPTQ), ("b", GPTQ), ("c", (*GPTQ, "--seed", 1))):
        where = ("--model", llama.path, "--mlx-path", tmp_path / name, "--data", text_folder)
        done = command("quantize", *where, *flags)
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout.splitlines()[-1])
        assert result["method"] == ("round" if name == "plain" else "gptq")
        assert result["nbytes"] == load.open_checkpoint(tmp_path / name).nbytes
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    plain, a, b, c = weights
    assert a == b
    assert len({plain, a, c}) == 3
    assert len(plain) == len(a)
    model, tokenizer = mlx_generate.open_model(compute_type.open_to_compute(tmp_path / "a"))
    assert len(list(mlx_generate.greedy(model, tokenizer.encode("The with statement"), 4))) == 4


@pytest.mark.thorough
def test_gptq_on_fewer_windows_in_memory_gives_the_same_bits(
    tmp_path: Path, llama: Checkpoint
) -> None:
    """Hidden states of one window in memory, of three in a file without a name."""
    batches = [mx.random.randint(0, 512, (1, 32), key=mx.random.key(k)) for k in range(4)]
    for name, held in (("all", 4), ("one", 1)):
        stage.quantize(
            llama, tmp_path / name, rounding=FOUR, files=DISK, batches=batches, held=held
        )
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("all", "one")]
    assert files[0] == files[1]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "kind",
    mostly_slow(product((1024, 512), ("F32", "BF16")), (512, "BF16"), thorough=[(1024, "F32")]),
)
def test_gptq_stays_under_the_plan(
    tmp_path: Path, kind: tuple[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What MLX and numpy hold together is under the plan, and not by more than a factor of four."""
    ffn, dtype = kind
    sizes = {
        "hidden_size": 256,
        "head_dim": 64,
        "intermediate_size": ffn,
        "vocab_size": 8192 if ffn == 512 else 512,
    }
    checkpoint = load.open_checkpoint(tiny.make(tmp_path / "m", dtype=dtype, **sizes))
    batches = [mx.random.randint(0, 512, (1, 64), key=mx.random.key(k)) for k in range(6)]
    planned = stage.quantizing_cost(model_of(checkpoint), FOUR, windows=6, length=64, limit=GIB)
    assert planned.stays[WINDOWS] == 6
    assert planned.scratch_bytes == 0
    mx.eval(batches)
    before = mx.get_active_memory()
    parts = (gptq, "factorize"), (gptq, "rounded")
    with (
        memory.limited(Budget(before + planned.peak_bytes)),
        peaks.counted(monkeypatch, *parts) as peak,
    ):
        mx.set_cache_limit(0)
        stage.quantize(
            checkpoint, tmp_path / "q4", rounding=FOUR, files=DISK, batches=batches, held=6
        )
    assert planned.peak_bytes / 4 < peak.nbytes < allocated(planned.peak_bytes)
    assert packed_format.formats_of(checkpoint.config, 64)


@pytest.mark.slow
def test_mixed_bits_and_steps_end_to_end(
    tmp_path: Path, llama: Checkpoint, text_folder: Path, command: Callable[..., Done]
) -> None:
    """Under the target, sensitivities beside it; steps change scales only, and a teacher may be
    another model.
    """
    flags = ("--model", llama.path, "--data", text_folder, *GPTQ, "--target-bpw", 4.6)
    steps = ("--q-iters", 12)  # fewer hardly leave the place of a scale in float16
    for name, more in (
        ("plain", ()),
        ("own", steps),
        ("taught", (*steps, "--teacher", llama.path)),
    ):
        done = command("quantize", *flags, *more, "--mlx-path", tmp_path / name)
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout.splitlines()[-1])
        assert 4.4 < result["bits_per_weight"] <= 4.7  # norms are in 16 bits
    plain, own = (load.open_checkpoint(tmp_path / name) for name in ("plain", "own"))
    path = "model.layers.0.mlp.up_proj"
    assert plain.config == own.config
    assert (load.dense(own, "model.norm.weight") != load.dense(plain, "model.norm.weight")).any()
    assert not (load.dense(own, f"{path}.weight") == load.dense(plain, f"{path}.weight")).all()
    assert (tmp_path / "own" / "model.safetensors").read_bytes() == (
        tmp_path / "taught" / "model.safetensors"
    ).read_bytes()
    nats = json.loads((tmp_path / "own" / packed_format.SENSITIVITY).read_text())["nats"]
    assert set(nats) == set(packed_format.formats(own))
    assert set(nats[path]) == {"3/64", "4/64", "5/64", "6/64", "8/64"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["own", "plain", "taught"]
    mlx_generate.open_model(compute_type.open_to_compute(tmp_path / "own"))


@pytest.mark.thorough
def test_sensitivity_and_steps_stay_under_the_plan(tmp_path: Path) -> None:
    """MLX's peak of either, under what the plan says, and not by more than a factor of four."""
    sizes = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 1536, "vocab_size": 2048}
    checkpoint = load.open_checkpoint(tiny.make(tmp_path / "m", dtype="F32", **sizes))
    m = model_of(checkpoint)
    how = QuantizationConfig(q_method="round", target_bpw=4.6, q_iters=2)
    batches = [mx.random.randint(0, 512, (1, 64), key=mx.random.key(k)) for k in range(6)]
    job = DistillationSpec(
        teacher=m,
        student=m,
        iters=2,
        batch_size=1,
        max_seq_length=64,
        num_samples=6,
        save_every=2,
        rounding=how,
    )
    planned = (
        stage.quantizing_cost(m, how, windows=6, length=64, limit=GIB),
        scales_cost(job, 1, GIB, 2),
    )
    text = Windows(np.concatenate([np.array(b) for b in batches]), np.ones((6, 64), np.float32))

    recipe = DistillationConfig(iters=2, batch_size=1, learning_rate=1e-4)
    source = students.kept(checkpoint, text, recipe, tmp_path / "targets")

    def tune() -> None:
        packed = load.open_checkpoint(tmp_path / "q4")
        student = BlockStudent(packed, "scales", kept=planned[1].stays[INTEGERS])
        student.begin()
        for _ in source.steps(student, text, recipe):
            memory.give_back(cache=False)

    for phase, work in zip(
        planned,
        (
            lambda: stage.quantize(
                checkpoint, tmp_path / "q4", rounding=how, files=DISK, batches=batches, held=6
            ),
            tune,
        ),
        strict=True,
    ):
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        with memory.limited(Budget(before + phase.peak_bytes)):
            mx.set_cache_limit(0)
            work()
        peak = mx.get_peak_memory() - before
        assert phase.peak_bytes / 4 < peak < allocated(phase.peak_bytes), (
            phase.name,
            peak / 2**20,
            phase.peak_bytes / 2**20,
        )


@pytest.mark.slow
def test_forty_blocks_with_256_open_files(
    tmp_path: Path, text_folder: Path, own_home: dict[str, str]
) -> None:
    """macOS allows no more at first: a deep model is rounded and tuned within it, and so are all
    files closed again.
    """
    tiny.make(tmp_path / "deep", num_hidden_layers=40, intermediate_size=64)
    line = [
        sys.executable,
        "-m",
        "mis_mlx.quantize",
        "--model",
        tmp_path / "deep",
        "--mlx-path",
        tmp_path / "q",
    ]
    line += ["--data", text_folder, "--q-method", "round", "--target-bpw", None, "--q-iters", 1]
    line += ["--max-seq-length", 16, "--batch-size", 1]
    done = subprocess.run(
        ["sh", "-c", 'ulimit -n 256; exec "$@"', "sh", *map(str, line)],
        env={**own_home, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-500:]
    assert load.open_checkpoint(tmp_path / "q").config["quantization"]["bits"] == 4
