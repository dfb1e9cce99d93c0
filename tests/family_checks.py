"""What tests ask of several families of models alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mis_mlx import distill, quantize, sft
from mis_mlx.models.architectures import block_inputs
from mis_mlx.models.architectures.block_inputs import BlockInputs, BlockOutputs
from mis_mlx.models.architectures.sizes import shape_of
from mis_mlx.models.opening import load
from mis_mlx.models.passing import backward_pass, stream
from mis_mlx.types import Checkpoint
from tests import stock, tiny

TOKENS = mx.array([[5, 9, 300, 17, 44, 44, 8, 120, 3, 77, 201, 9]])
WAYS = ["blocks", "sharded", "none"]  # of training
# a short run of `distill`
RUN: dict[str, Any] = {
    "iters": 6,
    "num_samples": 2,
    "max_seq_length": 32,
    "eval_windows": 2,
    "reconstruct_samples": 4,
    "learning_rate": 1e-4,
    "q_iters": 2,
    "q_group_size": 32,
    "vocab": "0.5x",
    "layers": 6,
    "ffn": 512,
    "scenario": "none",
    "save_every": 3,
}
LORA: dict[str, Any] = {
    "iters": 2,
    "batch_size": 1,
    "max_seq_length": 32,
    "fine_tune_type": "lora",
    "num_layers": 3,
    "learning_rate": 1e-2,
}


def streamed(model: Checkpoint, tokens: mx.array) -> mx.array:
    """Logits (B, T, V) in float32, block by block."""
    source = stream.Stream(model, mx.float32)
    return load.logits(source.head(), source.forward([tokens])[0])


def apart(a: mx.array, b: mx.array) -> float:
    """The largest difference."""
    return float(mx.abs(a.astype(mx.float32) - b.astype(mx.float32)).max())


def quantized(model: Path, out: Path, method: Any = "round", **more: Any) -> Checkpoint:
    """The model in groups of 32, as `quantize` leaves it in the folder `out`."""
    asked = quantize.Settings(
        model=str(model), mlx_path=str(out), q_group_size=32, q_method=method, **more
    )
    quantize.run(asked)
    return load.open_checkpoint(out)


def block_gradients(model: Checkpoint) -> Callable[[int, nn.Module], backward_pass.BlockBackward]:
    """`visit` of `backward_pass.input_gradients`: autodiff of one block and batch at a time."""
    args = load.model_args(model.config)

    def visit(i: int, block: nn.Module) -> backward_pass.BlockBackward:
        def each(inputs: BlockInputs, above: BlockOutputs) -> BlockInputs:
            def run(*arrays: mx.array) -> list[mx.array]:
                given = inputs.like(arrays)
                mask = load.mask(args, block, given.hidden)
                return block_inputs.run(block, given, mask).arrays(above)

            _, below = mx.vjp(run, inputs.arrays, above.arrays(above))
            mx.eval(below)
            return inputs.like(below)

        return lambda inputs, above: [each(*pair) for pair in zip(inputs, above, strict=True)]

    return visit


def check_training(
    folder: Path, text_folder: Path, way: str, *, teacher: dict[str, Any], **more: Any
) -> None:
    """Half of the tokens, fewer neurons and blocks: stock mlx_lm opens what comes out; training
    brings it nearer to its teacher.

    teacher: the changes of `tiny.make`. more: flags beside those of RUN.
    """
    path = tiny.make(folder / "teacher", **{**teacher, "vocab_size": 1024})
    tiny.write_tokenizer(path, 1024)
    how: dict[str, Any] = {"train": way}
    run = folder / "run"
    asked = distill.Settings(
        teacher=str(path), data=str(text_folder), out=str(run), **RUN, **how, **more
    )
    result = distill.run(asked)
    assert result["mode"] == way
    for name in ("pruned", "distilled", "model"):
        student = load.open_checkpoint(run / name)
        s = shape_of(student.config)
        assert (s.vocab, s.layers, s.ffn) == (512, 6, 512)
        theirs = stock.opened(run / name)(TOKENS).astype(mx.float32)
        assert mx.isfinite(theirs).all().item()
    if way != "none":
        assert result["kl_student"] < result["kl_pruned"]


def adapted(model: Checkpoint, folder: Path) -> Path:
    """The run folder of `sft` with two steps of LoRA."""
    row = json.dumps({"prompt": "The for statement", "completion": " is used to iterate"})
    data = folder / "data"
    data.mkdir()
    for split in ("train", "valid"):
        (data / f"{split}.jsonl").write_text(f"{row}\n" * 4)
    out = folder / "run"
    sft.run(sft.Settings(model=str(model.path), data=str(data), out=str(out), **LORA))
    return out
