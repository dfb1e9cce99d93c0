"""Other programs that quantize: mlx_lm's gptq, awq, dwq and dynamic_quant, and llama.cpp.

Each function writes a folder that opens as a model. mlx_lm's functions run as they are, in float32,
on windows of our text. llama.cpp's file is read back by gguf-py.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from gguf import GGUFReader, dequantize
from mlx.utils import tree_unflatten

from mis_mlx import export
from mis_mlx.data.token_windows import Windows
from mis_mlx.gguf_export import tensors
from mis_mlx.models.architectures import arch
from mis_mlx.models.opening import load
from mis_mlx.models.opening.wheel_model import row_order
from mis_mlx.models.writing import model_writer
from mis_mlx.types import Checkpoint

GROUP = 64  # weights that share a scale
AWQ_SHARE = 4  # one in so many windows: its search passes over them 40 times a block
DWQ_RATE = 1e-6  # of mlx_lm.dwq
DWQ_WINDOWS = 2  # of a step
DWQ_HELD_OUT = 4  # windows
Importance = dict[str, np.ndarray]  # {llama.cpp's name of a matrix: mean square of every input}

# In a process of its own, as llama.cpp may abort. An empty name ends the list of matrices.
LLAMA_CPP = """
import ctypes, sys
import llama_cpp, numpy
source, target, kind, importance = sys.argv[1:]
parameters = llama_cpp.llama_model_quantize_default_params()
parameters.ftype = getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + kind)
parameters.nthread = 1
values = dict(numpy.load(importance))
listed = (llama_cpp.llama_model_imatrix_data * (len(values) + 1))()
for place, (name, of_matrix) in zip(listed, values.items()):
    place.name = name.encode()
    place.data = of_matrix.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    place.size = of_matrix.size
if values:
    parameters.imatrix = listed
pointer = ctypes.byref(parameters)
sys.exit(llama_cpp.llama_model_quantize(source.encode(), target.encode(), pointer))"""


def opened(folder: Path) -> tuple[Any, Any, dict[str, Any]]:
    """As mlx_lm opens it, in float32: (model, tokenizer, config)."""
    model, tokenizer, config = load.mlx_lm("utils").load(str(folder), return_config=True)
    model.set_dtype(mx.float32)
    return model, tokenizer, config


def _save(folder: Path, out: Path, *, model: Any, tokenizer: Any, config: dict[str, Any]) -> None:
    load.mlx_lm("utils").save(out, str(folder), model=model, tokenizer=tokenizer, config=config)


def gptq(folder: Path, out: Path, batches: Sequence[mx.array], *, embedding_bits: int = 6) -> None:
    """mlx_lm.gptq's function: 4 bits, and its own 6 for the embedding."""
    model, tokenizer, config = opened(folder)
    model, how = load.mlx_lm("quant.gptq").gptq_quantize(
        model,
        mx.concatenate(list(batches)),
        bits=4,
        group_size=GROUP,
        fallback_bits=embedding_bits,
        fallback_group_size=GROUP,
    )
    config = {**config, "quantization": how}
    _save(folder, out, model=model, tokenizer=tokenizer, config=config)


def awq(
    folder: Path,
    out: Path,
    batches: Sequence[mx.array],
    *,
    embedding_bits: int = 4,
    embedding_group: int = 32,
    steps: int = 20,
) -> None:
    """mlx_lm.awq's function on a share of the windows: 4 bits.

    steps: of its search for a scale. These and the embedding's bits are its own defaults.
    """
    program = load.mlx_lm("quant.awq")
    model, tokenizer, config = opened(folder)
    inputs = mx.concatenate(list(batches[: len(batches) // AWQ_SHARE]))
    how = program.AWQ_MODEL_CONFIGS[config["model_type"]]
    program.awq_quantize(
        model,
        inputs=inputs,
        awq_config=how,
        group_size=GROUP,
        bits=4,
        embed_group_size=embedding_group,
        embed_bits=embedding_bits,
        n_grid=steps,
    )
    program.update_config(model, config)
    _save(folder, out, model=model, tokenizer=tokenizer, config=config)


class Unpacked(nn.Module):
    """A quantized layer or embedding that multiplies by its de-quantized weights.

    MLX's kernels for few bits take minutes a window on a CPU. It has what mlx_lm.dwq looks for, and
    the gradients of its scales and biases are those of the packed layer.
    """

    def __init__(self, packed: nn.Module):
        super().__init__()
        self.bits = packed.bits
        self.group_size = packed.group_size
        self.mode = packed.mode
        self.scales = packed.scales
        self.biases = packed.biases
        self.freeze()
        if "bias" in packed:  # which mlx_lm leaves trainable
            self.bias = packed.bias
        ones = mx.ones_like(packed.scales)
        zeros = mx.zeros_like(packed.biases)
        whole = mx.dequantize(
            packed.weight, ones, zeros, group_size=self.group_size, bits=self.bits
        )
        # The underscore keeps them out of the parameters.
        self._integers = mx.round(whole).astype(mx.uint8)
        self._packed = packed.weight
        self._looks_up = isinstance(packed, nn.QuantizedEmbedding)
        mx.eval(self._integers)

    @property
    def weight(self) -> mx.array:
        """The packed integers, whose number mlx_lm counts."""
        return self._packed

    def weight_of(self, rows: mx.array | None = None) -> mx.array:
        """(out, in) float weights, or those of some rows."""
        integers, scales, biases = self._integers, self.scales, self.biases
        if rows is not None:
            integers, scales, biases = integers[rows], scales[rows], biases[rows]
        grouped = mx.unflatten(integers.astype(scales.dtype), -1, (-1, self.group_size))
        return mx.flatten(grouped * scales[..., None] + biases[..., None], -2, -1)

    def __call__(self, x: mx.array) -> mx.array:
        """As the packed one."""
        if self._looks_up:
            return self.weight_of(x)
        product = self.as_linear(x)
        return product + self.bias if "bias" in self else product

    def as_linear(self, x: mx.array) -> mx.array:
        """x times the weights, as the head of a tied embedding."""
        return x @ self.weight_of().T


def unpack(model: nn.Module) -> dict[str, tuple[nn.Module, Unpacked]]:
    """Put an `Unpacked` in the place of every quantized layer; {path: (packed, unpacked)}."""
    pairs = dict[str, tuple[nn.Module, Unpacked]]()
    for path, module in model.named_modules():
        if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
            pairs[path] = (module, Unpacked(module))
    model.update_modules(tree_unflatten([(path, wide) for path, (_, wide) in pairs.items()]))
    return pairs


def pack_again(model: nn.Module, pairs: dict[str, tuple[nn.Module, Unpacked]]) -> None:
    """Undo `unpack`: the packed layers, with what the others have learned."""
    for packed, wide in pairs.values():
        packed.scales = wide.scales
        packed.biases = wide.biases
        if "bias" in wide:
            packed.bias = wide.bias
    model.update_modules(tree_unflatten([(path, packed) for path, (packed, _) in pairs.items()]))


def dwq(folder: Path, out: Path, windows: Windows, iters: int, bits: int = 4) -> None:
    """mlx_lm.dwq's function at its own learning rate, from its rounded model.

    Its products are those of de-quantized weights. windows: of training text; the first few judge,
    and every step reads two of the others.
    """
    program = load.mlx_lm("quant.dwq")
    model, tokenizer, config = opened(folder)
    utils = load.mlx_lm("utils")
    small, config = utils.quantize_model(copy.deepcopy(model), config, group_size=GROUP, bits=bits)
    count = DWQ_WINDOWS * iters + DWQ_HELD_OUT
    rows = [(windows.tokens[i].tolist(), 0) for i in range(count)]
    learns = rows[DWQ_HELD_OUT:]
    judges = rows[:DWQ_HELD_OUT]
    adam = program.optimizers.Adam(learning_rate=DWQ_RATE, bias_correction=True)
    pairs = unpack(small)

    def targets(batch: mx.array, i: int, split: str) -> mx.array:
        return model(batch)

    program.dwq_quantize(
        small,
        target_fn=targets,
        opt=adam,
        train_data=learns,
        valid_data=judges,
        batch_size=DWQ_WINDOWS,
        max_seq_length=windows.tokens.shape[1],
        seed=0,
        dtype=mx.float32,
    )
    pack_again(small, pairs)
    _save(folder, out, model=small, tokenizer=tokenizer, config=config)


def dynamic_quant(
    folder: Path,
    out: Path,
    batches: Sequence[mx.array],
    target_bpw: float,
    low_bits: int = 4,
    high_bits: int = 5,
) -> None:
    """mlx_lm.dynamic_quant's functions and defaults, but for the bits."""
    program = load.mlx_lm("quant.dynamic_quant")
    model, tokenizer, config = opened(folder)
    formats = {
        "low_bits": low_bits,
        "low_group_size": GROUP,
        "high_bits": high_bits,
        "high_group_size": GROUP,
    }
    costs = dict(program.estimate_sensitivities(model, mx.concatenate(list(batches)), **formats))
    # The scales have the type of the weights, and theirs are 16 bits.
    model.set_dtype(mx.float16)
    threshold = program.estimate_threshold(model, costs, target_bpw, **formats)

    def choose(name: str, part: Any) -> Any:
        if not hasattr(part, "to_quantized"):
            return False
        if costs[name] <= threshold:
            return True
        return {"bits": high_bits, "group_size": GROUP}

    utils = load.mlx_lm("utils")
    model, config = utils.quantize_model(
        model,
        config,
        group_size=GROUP,
        bits=low_bits,
        quant_predicate=choose,
    )
    _save(folder, out, model=model, tokenizer=tokenizer, config=config)


class _Recording(nn.Module):
    """A linear layer that adds up the squares of its inputs."""

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.linear = linear
        self.squares = mx.zeros((linear.weight.shape[1],))  # (in,)

    def __call__(self, x: mx.array) -> mx.array:
        """What the layer gives."""
        self.squares += mx.square(x).reshape(-1, x.shape[-1]).sum(axis=0)
        return self.linear(x)


def importance(dense: Checkpoint, batches: Sequence[mx.array]) -> Importance:
    """What `llama-imatrix` counts on these windows, for the matrices of all blocks."""
    model, _, _ = opened(dense.path)
    recorders = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and arch.block_of(path) is not None:
            recorders[path] = _Recording(module)
    model.update_modules(tree_unflatten(list(recorders.items())))
    tokens = 0
    for batch in batches:
        tokens += batch.size
        mx.eval(model(batch), [recorder.squares for recorder in recorders.values()])
    found = {}
    for part in tensors.parts(dense, "f16"):
        recorder = recorders.get(part.source.removesuffix(".weight"))
        if recorder is not None:
            found[part.name] = np.array(recorder.squares / tokens, dtype=np.float32)
    return found


def llama_cpp(dense: Checkpoint, out: Path, kind: str, importance: Importance) -> int:
    """llama.cpp's own program on `export`'s float16 file; its matrices, read back, into `out`.

    kind: such as "Q3_K_M". Norms and biases are those of `dense`. Returns the bytes of all tensors
    in llama.cpp's file.
    """
    made = export.run(
        export.Settings(model=str(dense.path), out=str(out.parent / "gguf"), out_type="f16")
    )
    source = Path(made["out"]) / made["file"]
    target = source.with_name(f"{kind}.gguf")
    values = source.with_name("importance.npz")
    mx.savez(str(values), **{name: mx.array(of_part) for name, of_part in importance.items()})
    arguments = [str(source), str(target), kind, str(values)]
    subprocess.run(
        [sys.executable, "-P", "-c", LLAMA_CPP, *arguments], check=True, capture_output=True
    )
    stored = {tensor.name: tensor for tensor in GGUFReader(target).tensors}
    found = {}
    for part in tensors.parts(dense, "f16"):
        if len(part.shape) < 2:
            continue
        tensor = stored[part.name]
        values_of_part = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        values_of_part = values_of_part.reshape(part.shape)
        if part.heads:
            values_of_part = values_of_part[np.argsort(row_order(part.shape[0], part.heads))]
        found[part.source] = values_of_part

    def value(name: str) -> mx.array:
        if name in found:
            return mx.array(found[name])
        return load.dense(dense, name)

    model_writer.write_model(
        dense.config,
        value,
        source=dense.path,
        out=out,
        dtype="float32",
    )
    return sum(int(tensor.n_bytes) for tensor in stored.values())
