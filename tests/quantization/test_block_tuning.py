"""Blocks whose scales learn to give what they gave before they were rounded."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
import pytest

from mis_mlx import quantize
from mis_mlx.hardware import memory
from mis_mlx.maths import gptq, rounding
from mis_mlx.models import arch, load, pass_cost, stream
from mis_mlx.models.model_size import model_of
from mis_mlx.quantization import (
    block_tuning,
    learned_scales,
    packed_format,
    rounding_cost,
    stage,
)
from mis_mlx.settings.recipe import QuantizationConfig
from mis_mlx.settings.workloads import LEARNED_AT_ONCE
from mis_mlx.storage.files import DISK
from mis_mlx.storage.hidden_spool import Spool
from mis_mlx.storage.safetensors import write_tensors
from mis_mlx.types import Budget, Checkpoint, MisError, Precision
from tests import peaks, tiny
from tests.peaks import allocated

GIB = 2**30
BLOCKS = QuantizationConfig(target_bpw=None, q_method="blocks")
Blocks = list[packed_format.RoundedBlock]


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A tiny model with many tokens for each weight, whose tokens have a direction in common, as
    those of trained models have: there is something to learn.
    """
    folder = tmp_path_factory.mktemp("narrow")
    plain = load.open_checkpoint(tiny.make(folder / "plain", intermediate_size=128))
    tensors = {name: load.dense(plain, name) for name in arch.tensors_of(plain.config)}
    table = tensors["model.embed_tokens.weight"]
    common = 2 * table.std() * mx.random.normal((1, table.shape[1]), key=mx.random.key(9))
    tensors["model.embed_tokens.weight"] = table + common
    weights = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(folder / "plain", folder / "common", ignore=weights)
    specs = {name: ("F32", tuple(array.shape)) for name, array in tensors.items()}
    write_tensors(folder / "common", specs, tensors.items(), DISK)
    return load.open_checkpoint(folder / "common")


def windows_of(count: int, length: int = 64) -> list[mx.array]:
    """Windows (1, T) of text that means nothing."""
    return [mx.random.randint(0, 512, (1, length), key=mx.random.key(k)) for k in range(count)]


def three_bits(checkpoint: Checkpoint) -> dict[str, packed_format.Format]:
    """3 bits in the blocks, 8 in the embedding."""
    plan = packed_format.formats_of(checkpoint.config, 64)
    for path in plan:
        if path.startswith("model.layers"):
            plan[path] = packed_format.Format(3, 64)
    return plan


def rounded(
    checkpoint: Checkpoint,
    batches: list[mx.array],
    tuning: block_tuning.BlockTuning | None,
    hidden: stream.Hidden | None = None,
) -> Blocks:
    """All blocks of a model in 3 bits."""
    plan = three_bits(checkpoint)
    return list(stage.rounded_blocks(checkpoint, batches, plan, hidden, tuning=tuning))


def differing(blocks: Blocks, others: Blocks, part: int) -> list[str]:
    """Module paths whose words (0), scales (1) or biases (2) differ."""
    paths = []
    for block, other in zip(blocks, others, strict=True):
        for path in block:
            if not (block[path][part] == other[path][part]).all().item():
                paths.append(path)
    return paths


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("gemma3_text", "float16"), ("qwen3_5_text", "float16"), ("qwen3_5_text", "bfloat16")],
)
def test_blocks_learn_in_half_precision(
    kind: str, dtype: str, models: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    """As under Metal's policy. Some families' blocks cast what they pass on, so a gradient has to
    come back in the type that its input had.
    """
    half = replace(models(kind), precision=Precision(asked=dtype, dtype=dtype))
    wide = kind == "qwen3_5_text"  # whose values' channels no group of 64 divides
    plan = packed_format.formats_of(half.config, 32 if wide else 64)
    tuning = block_tuning.BlockTuning([])
    blocks = list(stage.rounded_blocks(half, windows_of(8, 16), plan, tuning=tuning))
    for block in blocks:
        for _, scales, biases in block.values():
            assert mx.isfinite(scales).all()
            assert mx.isfinite(biases).all()


@pytest.mark.usefixtures("cpu_policy")
def test_the_model_is_nearer_to_itself_than_by_gptq(narrow: Checkpoint, tmp_path: Path) -> None:
    """Final hidden states on windows that no step has seen: less than nine tenths of the squared
    distance that GPTQ leaves, in as many bytes.
    """
    windows = windows_of(40)
    plan = three_bits(narrow)
    want = stream.Stream(narrow, mx.float32).forward(windows[32:])
    errors = {}
    sizes = set()
    for name in ("gptq", "blocks"):
        tuning = block_tuning.BlockTuning([]) if name == "blocks" else None
        blocks = stage.rounded_blocks(narrow, windows[:32], plan, tuning=tuning)
        out = tmp_path / name
        packed_format.write_quantized(narrow, out, plan, DISK, rounded=blocks, fit=True)
        made = load.open_checkpoint(out)
        sizes.add(made.nbytes)
        found = stream.Stream(made, mx.float32).forward(windows[32:])
        squares = [mx.square(a - b).sum().item() for a, b in zip(found, want, strict=True)]
        errors[name] = sum(squares)
    assert len(sizes) == 1
    assert errors["blocks"] < 0.9 * errors["gptq"], errors


@pytest.mark.usefixtures("cpu_policy")
def test_integers_stay_in_the_first_block(narrow: Checkpoint) -> None:
    """It sees the same hidden states as by GPTQ, so only scales and biases differ; and they are
    stored in float16.
    """
    windows = windows_of(16)
    tuning = block_tuning.BlockTuning([])
    plain = rounded(narrow, windows, None)
    learned = rounded(narrow, windows, tuning)
    assert tuning.kept == 3
    first = "model.layers.0."
    words = differing(plain, learned, 0)
    assert not [path for path in words if path.startswith(first)]
    for part in (1, 2):
        changed = differing(plain, learned, part)
        assert len([path for path in changed if path.startswith(first)]) == 7
    for packed in learned[0].values():
        assert packed[1].dtype == packed[2].dtype == mx.float16


def test_a_block_that_is_worse_keeps_what_gptq_made(
    narrow: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of a thousand times the scales' size: no block is better, and all have GPTQ's bits."""
    windows = windows_of(8)
    plain = rounded(narrow, windows, None)
    monkeypatch.setattr(block_tuning, "RATE", 8e3)
    tuning = block_tuning.BlockTuning([])
    learned = rounded(narrow, windows, tuning)
    assert tuning.kept == 0
    for part in range(3):
        assert differing(plain, learned, part) == []


def test_places_of_states_and_targets_change_nothing(narrow: Checkpoint, tmp_path: Path) -> None:
    """In memory or in files the same bits; another seed takes other windows."""
    windows = windows_of(8)
    in_memory = rounded(narrow, windows, block_tuning.BlockTuning([]))
    targets = Spool(tmp_path, 0, DISK)
    states = Spool(tmp_path, 2, DISK)
    in_files = rounded(narrow, windows, block_tuning.BlockTuning(targets), states)
    for part in range(3):
        assert differing(in_memory, in_files, part) == []
    other = rounded(narrow, windows, block_tuning.BlockTuning([], seed=1))
    assert differing(in_memory, other, 1)


@pytest.mark.usefixtures("cpu_policy")
def test_the_error_is_that_of_the_blocks_output(narrow: Checkpoint) -> None:
    """Of block 0 in GPTQ's values, against mlx-lm's block on the held-out windows, by numpy."""
    windows = windows_of(8)
    plan = three_bits(narrow)
    source = stream.Stream(narrow, mx.float32)
    hidden = source.embed(windows)
    tuning = block_tuning.BlockTuning([])
    for _, block in source.blocks([0]):
        tuning.look(source, block, hidden)
        stage._rounded_block(source, 0, block, plan=plan, hidden=hidden)
        found = tuning._error(source, block, hidden)
    model = load.resident_model(narrow, mx.float32).model.layers[0]
    changed = load.resident_model(narrow, mx.float32).model.layers[0]
    packed = rounded(narrow, windows, None)[0]
    for path, parts in packed.items():
        _, _, _, part, name = path.split(".")
        changed[part][name].weight = rounding.values(parts, 64, 3)
    squares = 0.0
    norm = 0.0
    for b in (3, 7):
        before = np.array(model(hidden[b], "causal"), np.float64)
        after = np.array(changed(hidden[b], "causal"), np.float64)
        squares += np.square(after - before).sum()
        norm += np.square(before - np.array(hidden[b], np.float64)).sum()
    assert found == pytest.approx(squares / norm, rel=1e-3)


@pytest.mark.parametrize("at_once", [LEARNED_AT_ONCE, 20 * 128])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_the_gradients_of_a_grid(
    dtype: mx.Dtype, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of input, scales and biases, against the same product by plain operations, in their types;
    the matrix at once, and in slabs of 20, 20 and 8 rows.
    """
    monkeypatch.setattr(learned_scales, "LEARNED_AT_ONCE", at_once)
    weight = mx.random.normal((48, 128), key=mx.random.key(1))
    packed = rounding.fitted(weight, 32, 3)
    grid = learned_scales.TrainableQuantizedLinear(packed, packed_format.Format(3, 32))
    x = mx.random.normal((2, 5, 128), key=mx.random.key(2)).astype(dtype)
    pull = mx.random.normal((2, 5, 48), key=mx.random.key(3))

    def plain(x: mx.array, scales: mx.array, biases: mx.array) -> list[mx.array]:
        values = grid.levels() * scales[..., None] + biases[..., None]
        return [x @ values.reshape(48, 128).T]

    def ours(x: mx.array, scales: mx.array, biases: mx.array) -> list[mx.array]:
        grid.scales = scales
        grid.biases = biases
        return [grid(x)]

    primals = [x, grid.scales, grid.biases]
    wanted_outputs, wanted = mx.vjp(plain, primals, [pull])
    outputs, found = mx.vjp(ours, primals, [pull])
    for a, b in zip([*outputs, *found], [*wanted_outputs, *wanted], strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert mx.allclose(a, b, rtol=1e-5, atol=1e-4 if a.dtype == mx.float32 else 1e-2)


def test_a_wide_matrix_is_never_there_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its product and its gradients take eight arrays of a slab at the most, where it has 32
    slabs.
    """
    monkeypatch.setattr(learned_scales, "LEARNED_AT_ONCE", 2**16)
    weight = mx.random.normal((4096, 512), key=mx.random.key(1))
    packed = rounding.nearest(weight, 64, 4)
    grid = learned_scales.TrainableQuantizedLinear(packed, packed_format.Format(4, 64))
    x = mx.random.normal((4, 512), key=mx.random.key(2))
    pull = mx.random.normal((4, 4096), key=mx.random.key(3))

    def ours(x: mx.array, scales: mx.array, biases: mx.array) -> list[mx.array]:
        grid.scales = scales
        grid.biases = biases
        return [grid(x)]

    primals = [x, grid.scales, grid.biases]
    mx.eval(primals, pull, grid._stored)
    del weight, packed
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(mx.vjp(ours, primals, [pull]))
    results = 4 * (2 * 4096 * 512 // 64 + 4 * 4096 + 4 * 512)
    # gradients of scales twice: slab by slab, and joined
    assert mx.get_peak_memory() - before < 2 * results + 8 * 4 * 2**16


def test_a_step_is_adams(narrow: Checkpoint) -> None:
    """Five steps with given gradients, against MLX's own Adam at the rate that is a share of the
    tensor's size (1e-5, float32).
    """
    weight = mx.random.normal((8, 64), key=mx.random.key(1))
    kind = packed_format.Format(4, 64)
    grid = learned_scales.TrainableQuantizedLinear(rounding.fitted(weight, 64, 4), kind)
    learner = block_tuning._Learner(
        "mlp",
        "up_proj",
        path="path",
        kind=kind,
        grid=grid,
        linear=nn.Linear(64, 8),
        dtype=mx.float32,
    )
    first = {key: mx.array(grid[key]) for key in block_tuning.GRIDS}
    gradients = []
    for k in range(5):
        gradient = {}
        for key, start in first.items():
            gradient[key] = mx.random.normal(start.shape, key=mx.random.key(k))
        gradients.append(gradient)
    adam = block_tuning._Adam(learner)
    for gradient in gradients:
        adam.step(gradient, 1.0)
    for key, start in first.items():
        size = np.sqrt(np.square(np.array(start)).mean())
        reference = optimizers.Adam(
            float(size) * block_tuning.RATE / 16,
            betas=list(block_tuning.DECAYS),
            eps=block_tuning.TINY,
            bias_correction=True,
        )
        wanted = {"a": start}
        for gradient in gradients:
            wanted = reference.apply_gradients({"a": gradient[key]}, wanted)
        assert mx.allclose(grid[key], wanted["a"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["qwen2", "biased", "phi3"])
def test_other_kinds_open_in_stock_mlx_lm(
    kind: str, models: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    """With biases and with joined matrices; the biases are the model's own."""
    checkpoint = models(kind)
    windows = windows_of(8, 24)
    plan = three_bits(checkpoint)
    tuning = block_tuning.BlockTuning([])
    blocks = stage.rounded_blocks(checkpoint, windows, plan, tuning=tuning)
    packed_format.write_quantized(checkpoint, tmp_path / "q", plan, DISK, rounded=blocks, fit=True)
    made = load.open_checkpoint(tmp_path / "q")
    for name in made.tensors:
        if name.endswith(".bias"):
            assert (load.dense(made, name) == load.dense(checkpoint, name)).all()
    model, _ = load.mlx_lm("utils").load(str(tmp_path / "q"))
    ours = load.resident_model(made, mx.float32)
    # it computes in float16
    assert mx.allclose(model(windows[0]).astype(mx.float32), ours(windows[0]), atol=5e-3)


def test_what_cannot_learn_is_refused_before_work(
    llama: Checkpoint, models: Callable[[str], Checkpoint], text_folder: Path, tmp_path: Path
) -> None:
    """Too few windows to judge by; blocks that take more than hidden states."""
    with pytest.raises(MisError, match="needs 8 windows .* --num-samples is 4: give 8 or more"):
        quantize.run(
            quantize.Settings(
                model=str(llama.path),
                mlx_path=str(tmp_path / "q"),
                data=str(text_folder),
                q_method="blocks",
                num_samples=4,
            )
        )
    gemma = models("gemma4_text").config
    with pytest.raises(MisError, match="does not know gemma4_text, .* use --q-method gptq"):
        stage.check(gemma, QuantizationConfig(q_method="blocks", q_group_size=32), 32)
    assert not list(tmp_path.iterdir())


def test_the_command(narrow: Checkpoint, text_folder: Path, tmp_path: Path) -> None:
    """`quantize --q-method blocks`: twice the same bits, other ones than by GPTQ, as many bytes."""
    weights = []
    methods = {"a": "blocks", "b": "blocks", "c": "gptq"}
    common = quantize.Settings(
        model=str(narrow.path),
        data=str(text_folder),
        target_bpw=3.5,
        num_samples=16,
        max_seq_length=32,
    )
    for name, method in methods.items():
        settings = replace(common, mlx_path=str(tmp_path / name), q_method=method)
        done = quantize.run(settings)
        assert done["method"] == method
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]
    assert len(weights[0]) == len(weights[2])
    linear = load.open_checkpoint(tmp_path / "a").config["quantization"]
    assert linear["bits"] in (2, 3, 4)


@pytest.mark.parametrize("held", [12, 5])
def test_it_stays_under_the_plan(
    tmp_path: Path, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What MLX and numpy hold together is under the plan, and not by more than a factor of four;
    with all hidden states in memory and with some of them.
    """
    sizes = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512, "vocab_size": 512}
    checkpoint = load.open_checkpoint(tiny.make(tmp_path / "m", **sizes))
    batches = windows_of(12)
    mx.eval(batches)
    planned = rounding_cost.quantizing_cost(
        model_of(checkpoint), BLOCKS, windows=12, length=64, limit=GIB
    )
    assert planned.held_tokens == 12 * 64
    before = mx.get_active_memory()
    parts = (gptq, "factorize"), (gptq, "rounded"), (block_tuning.BlockTuning, "tuned")
    with (
        memory.limited(Budget(before + planned.peak_bytes)),
        peaks.counted(monkeypatch, *parts) as peak,
    ):
        mx.set_cache_limit(0)
        stage.quantize(
            checkpoint, tmp_path / "q", rounding=BLOCKS, files=DISK, batches=batches, held=held
        )
    assert planned.peak_bytes / 4 < peak.nbytes < allocated(planned.peak_bytes)


def test_the_plan_counts_the_steps() -> None:
    """More operations than GPTQ alone; on a small budget targets go through a file."""
    m = model_of(tiny.CONFIG, gpu=False)
    gptq = QuantizationConfig(target_bpw=None)
    plain = rounding_cost.quantizing_cost(m, gptq, windows=16, length=32, limit=GIB)
    tuned = rounding_cost.quantizing_cost(m, BLOCKS, windows=16, length=32, limit=GIB)
    # 16 windows for targets, four that judge twice, and three passes over 24 times two windows
    more = pass_cost.forward_flops(m, (16 + 8 + 144) * 32, 32)
    assert tuned.flops - plain.flops == pytest.approx(more)
    assert tuned.written_bytes == plain.written_bytes
    least = rounding_cost.quantizing_cost(m, BLOCKS, windows=16, length=32, limit=1)
    assert least.held_tokens < 16 * 32
    assert least.written_bytes > tuned.written_bytes + m.shape.layers * 16 * 32 * m.hidden_bytes
