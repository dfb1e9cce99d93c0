"""One block, measured on this device: what a pass through it, forward and back, really holds.

The formulas of models/passing/residency count arrays as MLX's CPU back end keeps them. Which arrays
the kernels of another device keep, only that device knows. So one block of random weights goes
forward and back here, and the formulas are corrected by what that took. A large block is measured
in small: widths, heads and tokens divided by one number, so that weights and activations shrink
alike. What was measured is kept, for this device and version of MLX.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mis_mlx.compute import precision, streams
from mis_mlx.hardware import memory, rates
from mis_mlx.models.architectures import (
    arch,
    block_inputs,
    families,
    side_inputs,
    stock,
)
from mis_mlx.models.architectures.block_inputs import BlockInputs
from mis_mlx.models.architectures.families import family, shape_of
from mis_mlx.models.architectures.shape import Shape
from mis_mlx.models.opening.model_size import BlockFactors, ModelSize, model_of
from mis_mlx.models.passing import residency
from mis_mlx.models.passing.stream import evaluate_now
from mis_mlx.planner.distillation_spec import DistillationSpec
from mis_mlx.storage import hub
from mis_mlx.storage.files import DISK
from mis_mlx.types import MisError

MOST_PARAMS = 2**23  # of the block that is measured
MOST_TOKENS = 2**10
LEAST_HIDDEN = 64  # of a block that is measured in small
REPEATS = 3  # the highest peak counts: MLX frees arrays a little earlier or later
MARGIN = 1.05  # for what three repeats did not see


@dataclass(frozen=True)
class _Sample:
    """What is measured: the one block of this config, on `batch` windows of `length` tokens.

    dtype: of the forward pass; a training step is measured in float32.
    """

    config: dict[str, Any]
    batch: int
    length: int
    dtype: mx.Dtype

    @property
    def key(self) -> str:
        """Names the measurement: another device, version or block is another one."""
        shape = asdict(shape_of(self.config))
        known = {
            "device": rates.device_name(),
            "mlx": version("mlx"),
            "policy": precision.policy(),
            "streams": streams.count(),
            "family": families.family(self.config).name,
            "windows": [self.batch, self.length],
            "dtype": precision.name_of(self.dtype),
        }
        for axis in ("hidden", "ffn", "heads", "kv_heads", "head_dim"):
            known[axis] = shape[axis]
        return json.dumps(known)


def with_factors(m: ModelSize, batch: int, length: int, limit_bytes: int) -> ModelSize:
    """The model with its formulas corrected for steps of `batch` windows of `length` tokens.

    limit_bytes: a budget, of which the measurement takes half at the most. Where a model's blocks
    differ from each other, or take more than hidden states, the formulas stay as they are.
    """
    sample = _sample(m, batch, length, limit_bytes)
    if sample is None:
        return m
    path = kept_file()
    key = sample.key
    factors = _kept(path).get(key)
    if factors is None:
        factors = asdict(_measured(sample))
        # Without a lock: what two processes lose to each other is measured again. Nor is a cache
        # that cannot be written a reason to stop.
        with suppress(OSError, MisError):
            DISK.make_folder(path.parent)
            kept = _kept(path) | {key: factors}
            DISK.replace_text(path, json.dumps(kept, indent=1) + "\n")
    return replace(m, block_factors=BlockFactors(**factors))


def kept_file() -> Path:
    """Where measurements are kept, in the cache."""
    return hub.cache_root() / "blocks.json"


def of_job(job: DistillationSpec, limit_bytes: int) -> DistillationSpec:
    """The job with the formulas of its models corrected, as in `with_factors`."""
    corrected = partial(
        with_factors, batch=job.batch_size, length=job.max_seq_length, limit_bytes=limit_bytes
    )
    shown = job.shown
    if shown is not None:
        shown = corrected(shown)
    return replace(job, teacher=corrected(job.teacher), student=corrected(job.student), shown=shown)


def _kept(path: Path) -> dict[str, dict[str, float]]:
    """Earlier measurements, by their keys; {} where there is no file, or a damaged one."""
    try:
        stored = json.loads(path.read_text("utf-8"))
        return {key: asdict(BlockFactors(**factors)) for key, factors in stored.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _sample(m: ModelSize, batch: int, length: int, limit_bytes: int) -> _Sample | None:
    """The block to measure in place of the model's, as large as half of the budget allows."""
    architecture = families.family(m.config)
    alike = len(architecture.unlike_blocks()) == 1 and not m.shape.experts
    if not (alike and side_inputs.plain(m.config) and architecture.measurable):
        return None
    half = m.item == 2 and rates.on_gpu()  # a CPU only emulates it
    divisor = 1
    while True:
        shape = _divided(m.shape, divisor)
        if shape is None or length < divisor:
            return None
        sample = _Sample(
            config=arch.student_config(m.config, shape, [0], dtype="float32"),
            batch=batch,
            length=length // divisor,
            dtype=mx.float16 if half else mx.float32,
        )
        if _is_small(sample, limit_bytes):
            return sample
        divisor *= 2


def _divided(shape: Shape, divisor: int) -> Shape | None:
    """The shape of one block with widths and heads divided; None where they do not divide."""
    for size in (shape.hidden, shape.ffn, shape.heads):
        if size % divisor:
            return None
    small = replace(
        shape,
        layers=1,
        hidden=shape.hidden // divisor,
        ffn=shape.ffn // divisor,
        heads=shape.heads // divisor,
        kv_heads=max(1, shape.kv_heads // divisor),
    )
    if small.heads % small.kv_heads or (divisor > 1 and small.hidden < LEAST_HIDDEN):
        return None
    return small


def _is_small(sample: _Sample, limit_bytes: int) -> bool:
    """Whether the sample is quick to measure, in half of the budget."""
    m = model_of(sample.config, dtype=mx.float32)
    needed = 3 * 4 * m.largest_block_params  # weights, gradients, and those of a second stream
    needed += 2 * residency.backward_bytes(m, sample.batch, sample.length)
    needed += memory.PROCESS_BYTES
    short = sample.batch * sample.length <= MOST_TOKENS
    return short and m.largest_block_params <= MOST_PARAMS and needed <= limit_bytes // 2


def _measured(sample: _Sample) -> BlockFactors:
    """What the sample holds, as parts of what the formulas say of it."""
    args = family(sample.config).model_args()
    block = families.family(sample.config).new_block(args, 0)
    block.eval()
    mask = partial(stock.mask, args, block)
    size = sample.batch, sample.length, sample.config["hidden_size"]
    hidden = mx.random.normal(size, key=mx.random.key(0))
    evaluate_now(hidden, block.parameters())
    cache_limit = mx.set_cache_limit(0)
    try:
        kept, backward = _training_bytes(block, mask, hidden)
        block.set_dtype(sample.dtype)
        forward = _forward_bytes(block, mask, hidden.astype(sample.dtype))
    finally:
        mx.set_cache_limit(cache_limit)
    m = model_of(sample.config, dtype=mx.float32)
    tokens = sample.batch * sample.length
    return BlockFactors(
        forward=forward / residency.pass_bytes(m.config, tokens, sample.length),
        kept=kept / residency.activation_bytes(m, sample.batch, sample.length),
        backward=MARGIN * backward / residency.backward_bytes(m, sample.batch, sample.length),
    )


def _forward_bytes(block: nn.Module, mask: Any, hidden: mx.array) -> int:
    """The most that the block's forward pass holds besides its weights and its input (B, T, D)."""
    evaluate_now(hidden, block.parameters())
    peaks = []
    for _ in range(REPEATS):
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        output = block_inputs.run(block, BlockInputs(hidden), mask(hidden))
        evaluate_now(output.hidden)
        peaks.append(mx.get_peak_memory() - before)
        del output
    return max(peaks)


def _training_bytes(block: nn.Module, mask: Any, hidden: mx.array) -> tuple[int, int]:
    """(bytes kept for the backward pass, the most that pass holds besides gradients).

    As distillation/block_student does it, windows side by side. hidden: (B, T, D), float32.
    """
    weights = dict(tree_flatten(block.trainable_parameters()))

    def run(inputs: mx.array, *values: mx.array) -> Sequence[mx.array]:
        block.update(tree_unflatten(list(zip(weights, values, strict=True))))
        return [block_inputs.by_windows(block, BlockInputs(inputs), mask).hidden]

    primals = [hidden, *weights.values()]
    cotangents = [mx.ones_like(hidden)]
    evaluate_now(primals, cotangents)
    gradients = sum(weight.nbytes for weight in weights.values())
    kept = 0
    peak = 0
    for _ in range(REPEATS):
        before = mx.get_active_memory()
        outputs, grads = mx.vjp(run, primals, cotangents)
        evaluate_now(outputs)
        kept = max(kept, mx.get_active_memory() - before)
        del outputs, grads
        mx.reset_peak_memory()
        _, grads = mx.vjp(run, primals, cotangents)
        evaluate_now(grads)
        peak = max(peak, mx.get_peak_memory() - before)
        del grads
    block.update(tree_unflatten(list(weights.items())))  # `run` left tracers there
    in_streams = min(streams.count(), len(hidden)) * gradients
    return kept, max(kept, peak - in_streams)
