"""Check the engine on this device, on a model made on the spot.

Passes, decoding, training, statistics, memory. A witness is the same work done another way (bit for
bit), the CPU in float32, mlx_lm, or the plan. Every check returns (error, the largest error that
passes).
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mis_mlx.alignment.whole_model import WholeModel
from mis_mlx.checks.kernels import Found, on_cpu, random_normal, relative_error, to_float64
from mis_mlx.compute import precision
from mis_mlx.distillation import train_loop
from mis_mlx.maths import losses
from mis_mlx.maths.optimizer import GuardedAdamW
from mis_mlx.models.architectures import arch
from mis_mlx.models.opening import load
from mis_mlx.models.opening.model_size import model_of
from mis_mlx.models.passing import pass_cost, stream
from mis_mlx.models.writing.text_writer import TextWriter
from mis_mlx.pruning.calibrate import calibrate
from mis_mlx.quantization import packed_format
from mis_mlx.settings import recipe
from mis_mlx.storage import safetensors
from mis_mlx.types import Checkpoint, Precision

CONFIG = json.loads((Path(__file__).parent / "model.json").read_text("utf-8"))
TOKENS = mx.array(np.random.default_rng(0).integers(0, 16, (1, 16)))  # most of them several times
Models = dict[str, Checkpoint]
Trained = tuple[list[float], dict[str, np.ndarray]]


def write_random(folder: Path, config: Mapping[str, Any], scale: float) -> Path:
    """Write a random model in bfloat16 into the new `folder` and return the folder.

    Matrices are normal with standard deviation `scale`, norms 1 ± 0.1."""
    folder.mkdir()
    shapes = arch.tensors_of(config)

    def tensors() -> Iterator[tuple[str, mx.array]]:
        for seed, (name, shape) in enumerate(shapes.items()):
            noise = random_normal(seed, *shape)
            tensor = 1 + 0.1 * noise if "norm" in name else scale * noise
            yield name, tensor.astype(mx.bfloat16)

    specs = {name: ("BF16", shape) for name, shape in shapes.items()}
    safetensors.write_tensors(folder, specs, tensors())
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make(folder: Path) -> Models:
    """Write the same tiny random model in two formats into the empty `folder`.

    Returns {"bf16", "4-bit": checkpoint}."""
    dense = load.open_checkpoint(write_random(folder / "bf16", CONFIG, scale=0.08))
    plan = packed_format.formats_of(CONFIG, 64)
    packed_format.write_quantized(dense, folder / "4-bit", plan)
    return {"bf16": dense, "4-bit": load.open_checkpoint(folder / "4-bit")}


def passes(kind: str, models: Models) -> Found:
    """Check that streamed and resident passes end in the same states, bit for bit.

    One stream reads every block again; the other keeps its blocks and passes twice."""
    checkpoint = models[kind]
    dtype = precision.dtype_of(checkpoint)
    expected = to_float64(load.resident_model(checkpoint, dtype).model(TOKENS))
    reading = stream.Stream(checkpoint, dtype, headroom_bytes=0)
    keeping = stream.Stream(checkpoint, dtype, headroom_bytes=None)
    outputs = [to_float64(source.forward([TOKENS])[0]) for source in (reading, keeping, keeping)]
    return relative_error(outputs, [expected] * 3), 0.0


def beside_cpu(work: Callable[[Models], Any], float32: float, half: float, models: Models) -> Found:
    """Compare what `work` gives on this device with the CPU's result in float32.

    float32, half: the largest error that passes in float32, in float16."""
    in_float32 = {}
    for kind, checkpoint in models.items():
        in_float32[kind] = replace(checkpoint, precision=Precision(asked="float32"))
    here = work(models)
    with on_cpu():
        expected = work(in_float32)
    return relative_error(here, expected), _bound(models["bf16"], float32, half)


def _bound(checkpoint: Checkpoint, float32: float, half: float) -> float:
    """The bound for the type of a model; bfloat16 has three bits less than float16."""
    bounds = {mx.float32: float32, mx.float16: half, mx.bfloat16: 8 * half}
    return bounds[precision.dtype_of(checkpoint)]


def states(kind: str, models: Models) -> np.ndarray:
    """Compute the final states of a streamed pass."""
    return to_float64(stream.Stream(models[kind]).forward([TOKENS])[0])


def greedy(models: Models) -> Found:
    """Check 12 greedy tokens against mlx_lm's.

    The error is how far mlx_lm's logits see our first different token below the best one; 0 where
    all tokens are the same."""
    checkpoint = models["4-bit"]
    prompt = [int(token) for token in np.array(TOKENS[0, :8])]
    count = 12
    dtype = precision.dtype_of(checkpoint)
    source = stream.Stream(checkpoint, dtype, None)
    (ours,) = TextWriter(source).write([prompt], count, ())
    del source  # before the resident model comes
    model = load.resident_model(checkpoint, dtype)
    steps = load.mlx_lm("generate").generate_step(mx.array(prompt), model, max_tokens=count)
    theirs = [int(token) for token, _ in steps]
    bound = _bound(checkpoint, 1e-4, 0.02)
    for same in range(count):
        if ours[same] != theirs[same]:
            context = mx.array([prompt + theirs[:same]])
            logits = to_float64(model(context)[0, -1])
            return float(logits.max() - logits[ours[same]]), bound
    return 0.0, bound


def _loss(model: nn.Module, tokens: mx.array) -> tuple[mx.array, mx.array]:
    """(minus log-probabilities of the next tokens, summed, and their count)."""
    hidden = model.model(tokens)[0]
    logps = losses.token_logps(hidden[:-1], load.head_weight(model), tokens[0, 1:])
    return -logps.sum(), mx.array(float(len(logps)))


def _trained(model: nn.Module) -> Trained:
    """Train three steps: ([loss, gradient's norm, fall of the loss in two steps], tensors).

    The tensors are weights and moments after the steps. AdamW does not see how long a gradient is,
    so the norm stands for that; moments keep its last bits."""
    optimizer = GuardedAdamW()
    settings = recipe.TrainingConfig(iters=3, learning_rate=1e-3)
    student = WholeModel(model, optimizer)
    steps = list(train_loop.steps(student, lambda step: [(TOKENS,)], _loss, settings))
    tensors = dict(tree_flatten(model.trainable_parameters())) | optimizer.arrays()
    first = steps[0]
    measured = [first.loss, first.grad_norm, first.loss - steps[-1].loss]
    return measured, {name: to_float64(array) for name, array in tensors.items()}


def _trained_whole(models: Models) -> Trained:
    """Train all weights of the dense model in float32, as `_trained` says."""
    return _trained(load.resident_model(models["bf16"], mx.float32))


def repeated(models: Models) -> Found:
    """Count the tensors that differ when the same training steps are done twice.

    Tokens occur several times in a batch, so sums in a random order would show."""
    _, first = _trained_whole(models)
    _, second = _trained_whole(models)
    differs = [not np.array_equal(first[name], second[name]) for name in first]
    return float(sum(differs)), 0.0


def statistics(models: Models) -> list[np.ndarray]:
    """Collect calibration's sums over neurons and heads, and its block distances."""
    sums, _ = calibrate(models["bf16"], [TOKENS])
    by_block = chain(sums.ffn.values(), sums.heads.values())
    squares = [block.square for block in by_block]
    return [*squares, np.array([*sums.block.values()])]


def peak(models: Models) -> Found:
    """Check MLX's peak of a streamed pass with logits, as a share of the plan's."""
    tokens = mx.tile(TOKENS, (1, 5))
    size = model_of(models["4-bit"])
    count = 5 * TOKENS.size
    phase = pass_cost.streamed_pass(
        "pass", size, tokens=count, micro_tokens=count, length=count, spool=False
    )
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    source = stream.Stream(models["4-bit"])
    mx.eval(load.logits(source.head(), source.forward([tokens])[0]))
    return (mx.get_peak_memory() - before) / phase.peak_bytes, 1.0


def steps(models: Models) -> list[float]:
    """Measure training steps of the whole model, in float32 on all devices."""
    measured, _ = _trained_whole(models)
    return measured


KINDS = ("bf16", "4-bit")
CHECKS: dict[str, Callable[[Models], Found]] = {
    **{f"streamed = resident = again, {kind}": partial(passes, kind) for kind in KINDS},
    **{
        f"states, {kind}, against the CPU": partial(beside_cpu, partial(states, kind), 2e-4, 0.02)
        for kind in KINDS
    },
    "training steps, against the CPU": partial(beside_cpu, steps, 1e-3, 1e-3),
    "calibration, against the CPU": partial(beside_cpu, statistics, 2e-4, 0.02),
    "generate, 4-bit, against mlx_lm": greedy,
    "training again, different tensors": repeated,
    "peak of a streamed pass / plan": peak,
}
