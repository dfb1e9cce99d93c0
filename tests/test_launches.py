"""How many kernels a GPU launches for a step of each kind, counted in MLX's graph before it is
evaluated.

A limit here may fall; where it must rise, say why in the commit. Without a GPU norms, rotations and
attention of mlx.fast are chains of operations: Metal has a kernel for each, so it launches fewer.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx import nn

from mis_mlx.judge.speed import rounds
from mis_mlx.maths import losses
from mis_mlx.maths.optimizer import GuardedAdamW, global_norm
from mis_mlx.models.opening import compute_type, load
from mis_mlx.quantization import packed_format
from mis_mlx.types import UNDECIDED, Checkpoint
from tests import launches
from tests.quantization.test_grid import trainable

pytestmark = pytest.mark.usefixtures("metal")
TEXT = mx.random.randint(0, 512, (2, 32), key=mx.random.key(3))


@pytest.fixture
def packed(llama: Checkpoint, tmp_path: Path) -> Checkpoint:
    """The tiny llama, three blocks, in 4 bits."""
    plan = packed_format.formats_of(llama.config, 64)
    packed_format.write_quantized(llama, tmp_path / "q4", plan)
    return compute_type.open_to_compute(tmp_path / "q4", UNDECIDED)


def step_launches(student: object, optimizer: GuardedAdamW) -> Counter[str]:
    """Of a training step in one graph: loss, gradients, their norm, the update."""

    def loss(student: Any) -> mx.array:
        hidden = student.model(TEXT)
        head = load.head_weight(student)
        return -losses.token_logps(hidden.reshape(-1, 64), head, TEXT.reshape(-1)).sum()

    found = Counter[str]()
    for _ in range(2):  # the first one makes the moments
        value, grads = nn.value_and_grad(student, loss)(student)
        norm = global_norm(grads)
        optimizer.update(student, grads, loss=1.0, norm=1.0, learning_rate=1e-4)
        made = value, norm, student.trainable_parameters(), optimizer.adamw.state
        found = launches.counted(*made)
        mx.eval(made)
    return found


def test_a_tuning_step(packed: Checkpoint) -> None:
    """Scales, biases and norms of three blocks learn: 49 tensors, of which the norm of gradients
    takes 4 launches each, and the update 8. Integers are unpacked on the way there and back, which
    is one kernel of a GPU and a chain of shifts without one.
    """
    model = trainable(packed).train()
    optimizer = GuardedAdamW(weight_decay=0.0, relative=True)
    found = step_launches(model, optimizer)
    shifts = found["LeftShift"] + found["RightShift"]
    assert found.total() - shifts <= 1594


def test_a_decoded_token(packed: Checkpoint) -> None:
    """Three blocks, packed, with a cache of 16 tokens: 21 products, and the head's."""
    model, _ = rounds.open_model(packed)
    cache = load.mlx_lm("models.cache").make_prompt_cache(model)
    mx.eval(model.parameters(), model(TEXT[:1, :16], cache=cache))
    mx.eval([layer.state for layer in cache])
    found = launches.counted(model(mx.array([[5]]), cache=cache))
    assert found["QuantizedMatmul"] == 22
    assert found.total() <= 241
