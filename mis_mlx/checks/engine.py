"""The engine on this device, on a model made on the spot: passes, decoding, training, statistics,
memory, rates.

A witness is the same work done another way (bit for bit), the CPU in float32, mlx_lm, or the plan.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mis_mlx.checks.kernels import Found, drawn, off, on_cpu, wide
from mis_mlx.distillation.train_loop import train
from mis_mlx.maths import losses
from mis_mlx.maths.optimizer import GuardedAdamW
from mis_mlx.models import arch, load, lora, mlx_generate, policy, stream, streamed_decode
from mis_mlx.planner import estimates, recipe
from mis_mlx.pruning.calibrate import calibrate
from mis_mlx.quantization import packed_format
from mis_mlx.storage import files, safetensors
from mis_mlx.types import Checkpoint

CONFIG = json.loads((Path(__file__).parent / "model.json").read_text("utf-8"))
MODES = {"4-bit": "affine", "mxfp4": "mxfp4", "nvfp4": "nvfp4"}
TOKENS = mx.array(np.random.default_rng(0).integers(0, 16, (1, 16)))  # most of them several times
Models = dict[str, Checkpoint]


def make(folder: Path) -> Models:
    """{"bf16", "4-bit", "mxfp4", "nvfp4": the same tiny model}, random, norms in bfloat16, in the
    empty `folder`.
    """
    (dense := folder / "bf16").mkdir()
    shapes = arch.tensors_of(CONFIG)
    noise = ((name, drawn(seed, *shape)) for seed, (name, shape) in enumerate(shapes.items()))
    tensors = (
        (name, (1 + 0.1 * x if "norm" in name else 0.08 * x).astype(mx.bfloat16))
        for name, x in noise
    )
    safetensors.write_tensors(
        dense, {name: ("BF16", shape) for name, shape in shapes.items()}, tensors, files.DISK
    )
    (dense / "config.json").write_text(json.dumps(CONFIG))
    models = {"bf16": load.open_checkpoint(dense)}
    for kind, mode in MODES.items():
        plan = packed_format.layout(CONFIG, 64, (), mode)  # type: ignore[arg-type]
        packed_format.write_quantized(models["bf16"], folder / kind, plan, files.DISK)
        models[kind] = load.open_checkpoint(folder / kind)
    return models


def passes(kind: str, models: Models) -> Found:
    """Final states of a streamed pass, and of two that keep the blocks, beside the resident
    model's: equal bits.
    """
    checkpoint = models[kind]
    dtype = policy.compute_dtype(checkpoint)
    want = wide(load.resident(checkpoint, dtype).model(TOKENS))
    streamed, kept = (stream.Stream(checkpoint, dtype, room) for room in (0, None))
    return off([wide(s.forward([TOKENS])[0]) for s in (streamed, kept, kept)], [want] * 3), 0.0


def beside_cpu(work: Callable[[Models], Any], float32: float, half: float, models: Models) -> Found:
    """What `work` gives as this device computes, beside the CPU's in float32. Bounds: of float32,
    of float16.
    """
    here = work(models)
    with on_cpu():
        want = work(models)
    return off(here, want), _bound(float32, half)


def _bound(float32: float, half: float) -> float:
    """Of what this device computes in; bfloat16 has three bits less than float16."""
    return {mx.float32: float32, mx.float16: half, mx.bfloat16: 8 * half}[policy.usual_dtype()]


def states(kind: str, models: Models) -> np.ndarray:
    """Final states of a streamed pass."""
    return wide(stream.Stream(models[kind]).forward([TOKENS])[0])


def greedy(models: Models) -> Found:
    """How far below the best mlx_lm's logits see our first token that is not mlx_lm's; 0: 12 tokens
    are the same.
    """
    checkpoint = models["4-bit"]
    prompt = [*map(int, np.array(TOKENS[0, :8]))]
    count = 12
    dtype = policy.compute_dtype(checkpoint)
    ours = [
        t
        for new in streamed_decode.decode(stream.Stream(checkpoint, dtype, None), prompt, count)
        for t in new
    ]
    model = load.resident(checkpoint, dtype)
    theirs = list(mlx_generate.greedy(model, prompt, count))
    same = next((i for i in range(count) if ours[i] != theirs[i]), count)
    logits = wide(model(mx.array([prompt + theirs[:same]]))[0, -1])
    return float(logits.max() - logits[ours[same]]) if same < count else 0.0, _bound(1e-4, 0.02)


def _loss(model: nn.Module, tokens: mx.array) -> tuple[mx.array, mx.array]:
    """KL from a teacher of random states, and the log-probabilities of the next tokens: (sum,
    count).
    """
    hidden = model.model(tokens)[0]
    head = load.head_weight(model)
    target = drawn(7, len(hidden), 128)
    theirs = drawn(8, 256, 128) / 12
    ones = mx.ones(len(hidden))
    kl = losses.kl_sum(hidden, head, target, lambda x: x @ theirs.T, ones)
    return kl - losses.token_logps(hidden[:-1], head, tokens[0, 1:]).sum(), ones.sum()


def _trained(model: nn.Module) -> tuple[list[float], dict[str, np.ndarray]]:
    """([loss, gradient's norm, fall of the loss in two steps], weights and moments after three).
    AdamW does not see how long a gradient is, so the norm stands for that; moments keep its last
    bits.
    """
    optimizer = GuardedAdamW()
    how = recipe.TrainingConfig(iters=3, learning_rate=1e-3, warmup=0)
    steps = list(train(model, lambda step: [(TOKENS,)], _loss, optimizer, how))
    after = dict(tree_flatten(model.trainable_parameters())) | optimizer.arrays()
    first = steps[0]
    fall = steps[0].loss - steps[-1].loss
    return [first.loss, first.grad_norm, fall], {name: wide(array) for name, array in after.items()}


def repeated(models: Models) -> Found:
    """How many tensors differ after the same training steps, done twice; tokens occur several times
    in a batch.
    """
    (_, one), (_, two) = (_trained(load.resident(models["bf16"], mx.float32)) for _ in range(2))
    return float(sum(not np.array_equal(one[name], two[name]) for name in one)), 0.0


def statistics(models: Models) -> list[np.ndarray]:
    """Calibration's sums over neurons and heads, and its block distances."""
    found, _ = calibrate(models["bf16"], [TOKENS])
    return [
        *(of[i].square for of in (found.ffn, found.heads) for i in of),
        np.array([*found.block.values()]),
    ]


def peak(models: Models) -> Found:
    """MLX's peak of a streamed pass with logits, as a share of the plan's."""
    tokens = mx.tile(TOKENS, (1, 5))
    sizes = (5 * TOKENS.size,) * 3
    phase = estimates.streamed_pass(
        "pass", estimates.model_of(models["4-bit"]), *sizes, spool=False
    )
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    source = stream.Stream(models["4-bit"])
    mx.eval(load.logits(source.head(), source.forward([tokens])[0]))
    return (mx.get_peak_memory() - before) / phase.peak_bytes, 1.0


def steps(models: Models) -> list[float]:
    """What is measured of training steps, on the whole model; in float32 on all devices."""
    return _trained(load.resident(models["bf16"], mx.float32))[0]


def lora_steps(models: Models) -> list[float]:
    """The same of adapters on the 4-bit model."""
    model = load.resident(models["4-bit"], policy.compute_dtype(models["4-bit"]))
    lora.insert(model, lora.Lora(-1, 4, 10.0), 0)
    return _trained(model)[0]


CHECKS: dict[str, Callable[[Models], Found]] = {
    **{f"streamed = resident = again, {kind}": partial(passes, kind) for kind in ("bf16", *MODES)},
    **{
        f"states, {kind}, beside the CPU": partial(beside_cpu, partial(states, kind), 2e-4, 0.02)
        for kind in ("bf16", *MODES)
    },
    "training steps, beside the CPU": partial(beside_cpu, steps, 1e-3, 1e-3),
    "LoRA steps, 4-bit, beside the CPU": partial(beside_cpu, lora_steps, 1e-3, 0.05),
    "calibration, beside the CPU": partial(beside_cpu, statistics, 2e-4, 0.02),
    "generate, 4-bit, beside mlx_lm": greedy,
    "training again, tensors unlike": repeated,
    "peak of a streamed pass / plan": peak,
}
