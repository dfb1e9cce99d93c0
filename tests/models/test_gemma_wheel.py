"""gemma-3-270m's way from a GGUF to a folder, on a tiny one of the same kind; and that its terms
are asked about.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGUFWriter

from mis_mlx.models.opening import load, resolve, wheel_model
from mis_mlx.models.passing import stream
from mis_mlx.storage.files import file_sha256
from mis_mlx.types import MisError

# mlx_lm wants a whole period of blocks
WIDE = 32
LAYERS = 6
FFN = 64
HEADS = 2
HEAD = 16
PIECES = [
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    *(f"<0x{n:02X}>" for n in range(256)),
    *"abcdehilnorst",
]
PIECES += ["▁", "▁a", "an", "▁an"]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma of six blocks, float32, as llama.cpp's converter writes one: what norms multiply by,
    not 1 less.
    """
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = GGUFWriter(path, "gemma3")
    rng = np.random.default_rng(0)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDE)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_key_length(HEAD)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_sliding_window(8)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(PIECES)
    writer.add_token_scores([-1000.0] * len(PIECES))
    writer.add_token_types([3, 3, 3, 2, *[6] * 256, *[1] * (len(PIECES) - 260)])
    for word, number in (("bos", 2), ("eos", 1), ("unk", 3), ("pad", 0)):
        getattr(writer, f"add_{word}_token_id")(number)
    sizes = {
        "attn_norm": (WIDE,),
        "attn_q": (HEADS * HEAD, WIDE),
        "attn_k": (HEAD, WIDE),
        "attn_v": (HEAD, WIDE),
        "attn_output": (WIDE, HEADS * HEAD),
        "attn_q_norm": (HEAD,),
        "attn_k_norm": (HEAD,),
        "post_attention_norm": (WIDE,),
        "ffn_norm": (WIDE,),
        "ffn_gate": (FFN, WIDE),
        "ffn_up": (FFN, WIDE),
        "ffn_down": (WIDE, FFN),
        "post_ffw_norm": (WIDE,),
    }
    every = {"token_embd": (len(PIECES), WIDE), "output_norm": (WIDE,)}
    for i in range(LAYERS):
        every |= {f"blk.{i}.{name}": shape for name, shape in sizes.items()}
    for name, shape in every.items():
        values = np.full(shape, 1.25) if "norm" in name else 0.1 * rng.standard_normal(shape)
        writer.add_tensor(f"{name}.weight", values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_folder_opens_everywhere(gguf: Path, tmp_path: Path) -> None:
    """Names, 1 off every norm, <bos> before every text, unknown letters as bytes; streamed is stock
    mlx_lm's.
    """
    sizes = {
        "hidden_size": WIDE,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "head_dim": HEAD,
        "query_pre_attn_scalar": HEAD,
        "vocab_size": len(PIECES),
        "sliding_window": 8,
        "max_position_embeddings": 64,
    }
    files = wheel_model.GEMMA.files
    tiny = {**files, "config.json": {**files["config.json"], **sizes}}
    wheel_model.convert_gemma(
        replace(wheel_model.GEMMA, files=tiny, gguf_sha256=file_sha256(gguf)), gguf, tmp_path
    )
    checkpoint = load.open_checkpoint(tmp_path)
    norm = load.dense(checkpoint, "model.layers.1.post_feedforward_layernorm.weight")
    assert mx.array_equal(norm, mx.full(norm.shape, 0.25, mx.bfloat16))
    tokenizer = load.tokenizer(tmp_path)
    ids = tokenizer.encode("an żal")
    assert ids[0] == 2
    assert ids.count(2) == 1
    assert tokenizer.decode(ids[1:]) == "an żal"
    model, _ = load.mlx_lm("utils").load(str(tmp_path))
    model.set_dtype(mx.float32)
    source = stream.Stream(checkpoint, mx.float32)
    tokens = mx.array([ids])
    ours = load.logits(source.head(), source.forward([tokens])[0])
    theirs = model(tokens)
    assert mx.abs(ours - theirs).max().item() <= 1e-5 * mx.abs(theirs).max().item()


def test_the_terms_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is downloaded before somebody accepts them; the sentence says where they are and
    how.
    """
    monkeypatch.setenv("MIS_MLX_CACHE", str(tmp_path))
    monkeypatch.delenv("MIS_MLX_ACCEPT", raising=False)
    with pytest.raises(
        MisError, match="Gemma Terms of Use .* add --accept-gemma-terms if you accept"
    ):
        resolve.resolve_model("gemma-3-270m")
