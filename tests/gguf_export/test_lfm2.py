"""LFM2 in llama.cpp's form: names, shapes and numbers of every tensor, and the keys of a hybrid."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
from gguf.quants import dequantize

from mis_mlx import export
from mis_mlx.models.architectures import arch
from mis_mlx.models.opening import load
from mis_mlx.types import Checkpoint

PLACES = {  # our names within a block: llama.cpp's
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "conv.in_proj": "shortconv.in_proj",
    "conv.conv": "shortconv.conv",
    "conv.out_proj": "shortconv.out_proj",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
ENDS = {"model.embed_tokens": "token_embd", "model.norm": "token_embd_norm"}


def their_name(name: str) -> str:
    """llama.cpp's name of one of our tensors."""
    stem = name.removesuffix(".weight")
    if stem in ENDS:
        return f"{ENDS[stem]}.weight"
    _, _, number, inside = stem.split(".", 3)
    return f"blk.{number}.{PLACES[inside]}.weight"


def test_every_tensor_and_key(models: Callable[[str], Checkpoint], tmp_path: Path) -> None:
    """gguf-py reads the file: nothing is lost, kernels are float32 matrices, and blocks without
    attention have no key-value heads.
    """
    lfm = models("lfm2")
    export.run(export.Settings(model=str(lfm.path), out=str(tmp_path / "m"), out_type="f32"))
    (path,) = tmp_path.rglob("*.gguf")
    reader = gguf.GGUFReader(path)
    keys = {key: field.contents() for key, field in reader.fields.items()}
    assert keys["general.architecture"] == "lfm2"
    assert keys["lfm2.shortconv.l_cache"] == 3
    assert keys["lfm2.attention.head_count"] == 4
    assert keys["lfm2.attention.head_count_kv"] == [0, 0, 2, 0, 2, 0, 2]
    assert keys["lfm2.feed_forward_length"] == 768
    stored = {tensor.name: tensor for tensor in reader.tensors}
    expected = {their_name(name): name for name in arch.tensors_of(lfm.config)}
    assert stored.keys() == expected.keys()
    for theirs, name in expected.items():
        tensor = stored[theirs]
        values = dequantize(tensor.data, tensor.tensor_type)
        want = np.array(load.dense(lfm, name).astype(mx.float32))
        assert values.reshape(-1).tolist() == want.reshape(-1).tolist(), theirs
    kernel = stored["blk.0.shortconv.conv.weight"]
    assert kernel.shape.tolist() == [3, 64]  # innermost first
    assert kernel.tensor_type == gguf.GGMLQuantizationType.F32


def test_kernels_stay_float32(models: Callable[[str], Checkpoint], tmp_path: Path) -> None:
    """In a file of 8 bits, where all matrices are packed."""
    lfm = models("lfm2")
    export.run(export.Settings(model=str(lfm.path), out=str(tmp_path / "m"), out_type="q8_0"))
    (path,) = tmp_path.rglob("*.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert kinds["blk.0.shortconv.conv.weight"] == "F32"
    assert kinds["blk.0.shortconv.in_proj.weight"] == "Q8_0"
