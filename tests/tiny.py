"""A tiny model folder made on the spot: real format, random weights, a real tokenizer trained on Python's manual."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mis_mlx.models import arch
from mis_mlx.models.families import family
from mis_mlx.storage.files import DISK
from mis_mlx.storage.safetensors import Writer
from mis_mlx.types import Checkpoint

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 768,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5,
    "vocab_size": 512, "max_position_embeddings": 512, "rope_theta": 10000.0, "tie_word_embeddings": True,
    "bos_token_id": 0, "eos_token_id": 0, "torch_dtype": "float32",
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "untied": {"tie_word_embeddings": False},
    "mistral": {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "tie_word_embeddings": False},
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]},
    "biased": {"attention_bias": True, "mlp_bias": True},
}
# Families beside these, seven blocks of each so that periods show.
FAMILIES: dict[str, dict[str, Any]] = {
    "smollm3": {"architectures": ["SmolLM3ForCausalLM"]},
    "ministral3": {
        "architectures": ["Ministral3ForCausalLM"], "sliding_window": 9,
        "layer_types": [*["sliding_attention"] * 3, *["full_attention"] * 4],
        "tie_word_embeddings": False, "rope_theta": None,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8,
            "llama_4_scaling_beta": 0.1, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
        },
    },
    "granite": {
        "architectures": ["GraniteForCausalLM"], "embedding_multiplier": 12.0, "logits_scaling": 8.0,
        "residual_multiplier": 0.22, "attention_multiplier": 0.1, "attention_bias": False, "mlp_bias": False,
    },
    "gemma3_text": {
        "architectures": ["Gemma3ForCausalLM"], "num_key_value_heads": 1, "rope_local_base_freq": 1e3,
        "query_pre_attn_scalar": 20, "sliding_window": 7, "sliding_window_pattern": 3,
    },
}  # fmt: skip
FAMILIES = {name: {"model_type": name, "num_hidden_layers": 7, **row} for name, row in FAMILIES.items()}


def write_tokenizer(folder: Path, size: int = 512) -> None:
    """A byte-level BPE of `size` tokens with <|endoftext|> = 0."""
    from pydoc_data.topics import topics

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    names = ["if", "for", "while"] if size == 512 else sorted(topics)
    tokenizer.train_from_iterator([topics[name] for name in names], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def loud(model: Checkpoint, folder: Path) -> Path:
    """A copy of a float32 model whose losses float32 holds, and whose gradients it does not."""
    shutil.copytree(model.path, folder)
    norm = model.tensors["model.norm.weight"]
    with (folder / norm.file.name).open("r+b") as file:
        file.seek(norm.offset)
        file.write(np.full(norm.shape, 1e33, np.float32).tobytes())
    return folder


def make(folder: Path, seed: int = 0, dtype: str = "F32", **changes: Any) -> Path:
    """Write the model; `changes` go over CONFIG. Weights are N(0, 0.05), norms near 1, all from `seed`."""
    config = {**CONFIG, **changes}
    folder.mkdir(parents=True)
    tensors = arch.tensors_of(config)
    writer = Writer(folder, {name: (dtype, shape) for name, shape in tensors.items()}, DISK)
    kind = {"F32": mx.float32, "BF16": mx.bfloat16, "F16": mx.float16}[dtype]
    for number, (name, shape) in enumerate(tensors.items()):
        noise = mx.random.normal(shape, key=mx.random.key(1000 * seed + number))
        value = 1.0 - family(config).gain_offset + 0.1 * noise if "norm" in name else 0.05 * noise
        writer.add(name, value.astype(kind))
    writer.close()
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    return folder
