"""Turn the one GGUF we know by its hash into an ordinary Hugging Face folder.

Foreign GGUF is refused: every reader believes what the file states, and MLX's own crashes on a damaged one."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mis_mlx.storage.files import DISK
from mis_mlx.storage.header_check import DTYPES
from mis_mlx.storage.hub import sha256
from mis_mlx.storage.safetensors import write_tensors
from mis_mlx.types import MisError

SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK = {  # a llama's
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
CONTROL_TOKEN = 3  # GGUF's token types: 1 is an ordinary piece, 3 is <|im_start|> and the like


def convert(gguf: Path, folder: Path, dtype: str = "BF16", expected: str = SMOLLM2_SHA256) -> None:
    """Write config, tokenizer and model.safetensors in `dtype` ("BF16", "F16", "F32") into `folder`, inside
    `commit_folder`. expected: the file's sha256; MisError when it has another. Memory: the embedding in float32."""
    facts, tensors = opened(gguf, expected)
    theta = float(facts["llama.rope.freq_base"])
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", **sizes(facts, "llama"),
        "head_dim": facts["llama.rope.dimension_count"], "hidden_act": "silu", "vocab_size": facts["llama.vocab_size"],
        "attention_bias": False, "mlp_bias": False, "torch_dtype": DTYPES[dtype][0],
        "rope_theta": theta, "rope_parameters": {"rope_type": "default", "rope_theta": theta},  # mlx-lm, transformers 5
    }  # fmt: skip
    heads = {"q_proj": int(config["num_attention_heads"]), "k_proj": int(config["num_key_value_heads"])}

    def in_our_order(name: str, values: np.ndarray) -> np.ndarray:
        count = heads.get(name.split(".")[-2])
        return unpermute(values, count) if count else values

    write_weights(tensors, folder, dtype, BLOCK, in_our_order)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {key: config[key] for key in config if key.endswith("_token_id")})
    _write_tokenizer(facts, folder)


def opened(gguf: Path, expected: str) -> tuple[dict[str, Any], list[Any]]:
    """(facts by key, tensors) of the file with this sha256. MisError when it has another."""
    from gguf import GGUFReader

    if (got := sha256(gguf)) != expected:
        why = f"{gguf} has sha256 {got}, expected {expected}"
        raise MisError(f"{why}: GGUF from elsewhere is not read here, use the safetensors model it was made from")
    reader = GGUFReader(gguf)
    return {key: field.contents() for key, field in reader.fields.items()}, reader.tensors


def write_weights(
    tensors: Sequence[Any],
    folder: Path,
    dtype: str,
    block: Mapping[str, str],
    change: Callable[[str, np.ndarray], np.ndarray],
) -> None:
    """Write what `change(Hugging Face name, float32 values)` gives, one tensor at a time. block: as for `hf_name`."""
    from gguf.quants import dequantize

    # GGUF states shapes innermost first; reversed they are (out, in), as in the Hugging Face layout.
    specs = {hf_name(t.name, block): (dtype, tuple(int(n) for n in reversed(t.shape))) for t in tensors}

    def unpacked(name: str, tensor: Any) -> tuple[str, mx.array]:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        return name, mx.array(change(name, values)).astype(getattr(mx, DTYPES[dtype][0]))

    write_tensors(folder, specs, map(unpacked, specs, tensors), DISK)


def hf_name(name: str, block: Mapping[str, str] = BLOCK) -> str:
    """'blk.3.attn_q.weight' -> 'model.layers.3.self_attn.q_proj.weight'. KeyError for one that has no place there."""
    stem, _, kind = name.rpartition(".")
    if stem in TOP:
        return f"{TOP[stem]}.{kind}"
    _, number, part = stem.split(".")
    return f"model.layers.{number}.{block[part]}.{kind}"


def row_order(count: int, heads: int) -> np.ndarray:
    """Which Hugging Face row of q or k stands in each of llama.cpp's rows: the halves of every head interleaved.

    llama.cpp's llama turns neighbours (0,1), (2,3) ... by RoPE, Hugging Face i and i + d/2 (`LlamaModel.permute`
    of its converter). The trap: left out, the model runs without an error and talks nonsense."""
    return np.arange(count).reshape(heads, 2, count // heads // 2).swapaxes(1, 2).reshape(-1)


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Put llama.cpp's rows (heads * d, in) of q or k back into Hugging Face order."""
    return rows[np.argsort(row_order(len(rows), heads))]


def sizes(facts: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """What config.json has of every kind of model, "llama" or "gemma3"."""
    of = {key.removeprefix(f"{kind}."): value for key, value in facts.items()}
    return {
        "hidden_size": of["embedding_length"],
        "intermediate_size": of["feed_forward_length"],
        "num_hidden_layers": of["block_count"],
        "num_attention_heads": of["attention.head_count"],
        "num_key_value_heads": of["attention.head_count_kv"],
        # stored as float32, 9.99999975e-06: six digits give back what was meant
        "rms_norm_eps": float(f"{of['attention.layer_norm_rms_epsilon']:.6g}"),
        "max_position_embeddings": of["context_length"],
        "tie_word_embeddings": True,
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
        "pad_token_id": facts["tokenizer.ggml.padding_token_id"],
    }


def ends(facts: Mapping[str, Any]) -> dict[str, str]:
    """The tokens that tokenizer_config.json has by name."""
    named = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    pieces = facts["tokenizer.ggml.tokens"]
    return {key: pieces[facts[f"tokenizer.ggml.{name}_token_id"]] for key, name in named.items()}


def _write_tokenizer(facts: Mapping[str, Any], folder: Path) -> None:
    """SmolLM2's: every digit alone, GPT-2's pieces, bytes as letters."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    pieces, template = facts["tokenizer.ggml.tokens"], facts["tokenizer.chat_template"]
    types = facts["tokenizer.ggml.token_type"]
    control = [piece for piece, kind in zip(pieces, types, strict=True) if kind == CONTROL_TOKEN]
    merges: Any = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    # The stubs miss that these are properties that can be set.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    settings = {
        # Not GPT2Tokenizer: transformers 5 would rebuild the pre-tokenizer and lose the digits.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        **ends(facts),
        "additional_special_tokens": control,
        "model_max_length": facts["llama.context_length"],
        "chat_template": template,
    }
    write_json(folder / "tokenizer_config.json", settings)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Indented, in UTF-8."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
