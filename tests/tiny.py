"""A tiny model folder made on the spot: real format, random weights, a real tokenizer trained on
Python's manual.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mis_mlx.models.architectures import arch
from mis_mlx.models.architectures.families import family
from mis_mlx.models.opening import load
from mis_mlx.models.writing import model_writer
from mis_mlx.quantization import packed_format
from mis_mlx.settings.recipe import TrainingConfig
from mis_mlx.storage.safetensors import index as safetensors_index
from mis_mlx.storage.safetensors import write_tensors
from mis_mlx.types import Checkpoint

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 768,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "torch_dtype": "float32",
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "untied": {"tie_word_embeddings": False},
    "mistral": {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "tie_word_embeddings": False,
    },
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]},
    "biased": {"attention_bias": True, "mlp_bias": True},
}
# Families beside these, seven blocks of each so that periods show.
FAMILIES: dict[str, dict[str, Any]] = {
    "smollm3": {"architectures": ["SmolLM3ForCausalLM"], "pad_token_id": 0},
    "ministral3": {
        "architectures": ["Ministral3ForCausalLM"],
        "sliding_window": 9,
        "layer_types": [*["sliding_attention"] * 3, *["full_attention"] * 4],
        "tie_word_embeddings": False,
        "rope_theta": None,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 8,
            "llama_4_scaling_beta": 0.1,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    },
    "granite": {
        "architectures": ["GraniteForCausalLM"],
        "embedding_multiplier": 12.0,
        "logits_scaling": 8.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.1,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "olmo2": {
        "architectures": ["Olmo2ForCausalLM"],
        "tie_word_embeddings": False,
        "attention_bias": False,
        "rope_theta": 5e5,
    },
    "phi3": {
        "architectures": ["Phi3ForCausalLM"],
        "pad_token_id": 0,
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 64,
        "rope_scaling": {
            "type": "longrope",
            "long_factor": [1.0, 1.5, 3.5, 8.25, 24.5, 32.0],
            "short_factor": [1.0, 1.1, 1.2, 2, 2, 2],
        },
    },
    "gemma3_text": {
        "architectures": ["Gemma3ForCausalLM"],
        "num_key_value_heads": 1,
        "rope_local_base_freq": 1e3,
        "query_pre_attn_scalar": 20,
        "sliding_window": 7,
        "sliding_window_pattern": 3,
    },
}
GEMMA4_ROPES = {
    "full_attention": {
        "rope_type": "proportional",
        "partial_rotary_factor": 0.25,
        "rope_theta": 1e6,
    },
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
FAMILIES["gemma4_text"] = {  # blocks 1 and 2 make keys and values for the last four
    "architectures": ["Gemma4ForCausalLM"],
    "num_key_value_heads": 1,
    "global_head_dim": 32,
    "sliding_window": 7,
    "layer_types": [
        "sliding_attention",
        *["sliding_attention", "full_attention"] * 3,
    ],
    "num_kv_shared_layers": 4,
    "use_double_wide_mlp": True,
    "final_logit_softcapping": 3.0,
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": 512,
    "rope_parameters": GEMMA4_ROPES,
    "attention_k_eq_v": False,
    "enable_moe_block": False,
    "rope_theta": None,
}
FAMILIES["lfm2"] = {
    "architectures": ["Lfm2ForCausalLM"],
    "layer_types": ["conv", *["conv", "full_attention"] * 3],
    "conv_L_cache": 3,
}
FAMILIES["qwen3_5_text"] = {
    "architectures": ["Qwen3_5ForCausalLM"],
    "full_attention_interval": 3,
    "layer_types": ["full_attention" if i % 3 == 2 else "linear_attention" for i in range(7)],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "linear_conv_kernel_dim": 4,
    "tie_word_embeddings": False,
    "rope_theta": None,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.25,
    },
}
MIXTURE: dict[str, Any] = {
    "num_experts_per_tok": 2,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
EIGHT = {
    "num_experts": 8,
    "moe_intermediate_size": 64,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
FAMILIES |= {
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        **MIXTURE,
        **EIGHT,
        "norm_topk_prob": True,
    },
    "qwen2_moe": {
        "architectures": ["Qwen2MoeForCausalLM"],
        **MIXTURE,
        **EIGHT,
        "shared_expert_intermediate_size": 96,
        "norm_topk_prob": False,
    },
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        **MIXTURE,
        "num_local_experts": 4,
        "intermediate_size": 64,
    },
    "gpt_oss": {
        "architectures": ["GptOssForCausalLM"],
        **MIXTURE,
        "num_local_experts": 8,
        "intermediate_size": 64,
        "attention_bias": True,
        "swiglu_limit": 7.0,
        "sliding_window": 7,
        "layer_types": [*["sliding_attention", "full_attention"] * 3, "sliding_attention"],
    },
    "olmoe": {
        "architectures": ["OlmoeForCausalLM"],
        **MIXTURE,
        "num_experts": 8,
        "intermediate_size": 64,
        "norm_topk_prob": False,
        "num_key_value_heads": 4,
    },
}
FAMILIES = {
    name: {"model_type": name, "num_hidden_layers": 7, **row} for name, row in FAMILIES.items()
}


def real(
    layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, vocab: int, **more: Any
) -> dict[str, Any]:
    """What config.json says of a model as it was published; a mistral unless `more` says another
    thing.
    """
    return {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        **more,
    }


LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
BIASED = {**LLAMA, "attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-6}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# a model of SpeakLeash with biases, and one of PLLuM with other positions
POLISH: dict[str, dict[str, Any]] = {
    "Bielik-4.5B-v3": real(60, 2048, ffn=11_008, heads=16, kv_heads=2, vocab=32_000, **BIASED),
    "Llama-PLLuM-8B": real(
        32,
        4096,
        ffn=14_336,
        heads=32,
        kv_heads=8,
        vocab=128_256,
        **LLAMA,
        attention_bias=False,
        mlp_bias=False,
        rope_theta=5e5,
        rope_scaling={**LLAMA3, "original_max_position_embeddings": 8192},
    ),
}


def _published_phi(heads: int, kv_heads: int, vocab: int, **more: Any) -> dict[str, Any]:
    """Microsoft's, but for the factors, which are as many."""
    return real(
        32,
        3072,
        ffn=8192,
        heads=heads,
        kv_heads=kv_heads,
        vocab=vocab,
        model_type="phi3",
        architectures=["Phi3ForCausalLM"],
        rope_theta=1e4,
        auto_map={"AutoConfig": "configuration_phi3.Phi3Config"},
        sliding_window=262_144,
        max_position_embeddings=131_072,
        original_max_position_embeddings=4096,
        rope_scaling={
            "type": "longrope",
            "long_factor": [1.0 + i for i in range(48)],
            "short_factor": [1.0] * 48,
        },
        **more,
    )


PHI: dict[str, dict[str, Any]] = {
    "Phi-3-mini-128k-instruct": _published_phi(32, 32, 32_064),
    "Phi-4-mini-instruct": _published_phi(24, 8, 200_064, partial_rotary_factor=0.75),
}
PHI["Phi-4-mini-instruct"]["tie_word_embeddings"] = True
LONG = {"type": "longrope", "long_factor": [1.0, 1, 2, 3, 5, 8, 13, 21], "short_factor": [1.0] * 8}
PHIS = {  # the tiny phi3 by other positions
    "phi3 of plain positions": {**FAMILIES["phi3"], "rope_scaling": None},
    "phi3 of whole heads": {
        k: v for k, v in FAMILIES["phi3"].items() if k != "partial_rotary_factor"
    },
}
PHIS["phi3 of whole heads"]["rope_scaling"] = LONG


def reduced(config: dict[str, Any]) -> dict[str, Any]:
    """Seven blocks of a model's own ratios and flags, 96 to 160 channels wide, with the tiny
    tokenizer.
    """
    heads = config["num_attention_heads"]
    by = 16 if config["hidden_size"] < 4096 else 32
    sizes = {key: config[key] // by for key in ("hidden_size", "intermediate_size")}
    head_dim = config.get("head_dim", config["hidden_size"] // heads) // by
    return {**config, **sizes, "head_dim": head_dim, "num_hidden_layers": 7, "vocab_size": 512}


MODELS = {**FAMILIES, **{name: reduced(config) for name, config in POLISH.items()}}


def bpe(texts: Iterable[str], size: int, special: Sequence[str], cut: Any = None) -> Tokenizer:
    """A byte-level BPE of `size` tokens, the special ones first. cut: another pre-tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = cut or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_tokenizer(folder: Path, size: int = 512) -> None:
    """Of Python's manual, with <|endoftext|> = 0."""
    from pydoc_data.topics import topics

    names = ["if", "for", "while"] if size == 512 else sorted(topics)
    made = bpe([topics[name] for name in names], size, ["<|endoftext|>"])
    made.save(str(folder / "tokenizer.json"))
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


def calm(folder: Path) -> Path:
    """A float32 model of one file whose attention looks everywhere alike; changed in place.

    With queries as they are drawn, a Gemma 4's attention is a choice of one token, and a
    difference of 1e-5 grows a thousandfold.
    """
    path = folder / "model.safetensors"
    for name, tensor in safetensors_index(folder).items():
        if name.endswith("q_norm.weight"):
            with path.open("r+b") as file:
                file.seek(tensor.offset)
                values = np.frombuffer(file.read(tensor.nbytes), np.float32)
                file.seek(tensor.offset)
                file.write((0.1 * values).astype(np.float32).tobytes())
    return folder


def make(folder: Path, seed: int = 0, dtype: str = "F32", **changes: Any) -> Path:
    """Write the model; `changes` go over CONFIG. Weights are N(0, 0.05), norms near 1, all from
    `seed`.
    """
    config = {**CONFIG, **changes}
    if config.get("vocab_size_per_layer_input") == CONFIG["vocab_size"]:
        config["vocab_size_per_layer_input"] = config["vocab_size"]
    folder.mkdir(parents=True)
    tensors = arch.tensors_of(config, stacked=family(config).stacked)
    kind = {"F32": mx.float32, "BF16": mx.bfloat16, "F16": mx.float16}[dtype]

    def drawn() -> Iterator[tuple[str, mx.array]]:
        for number, (name, shape) in enumerate(tensors.items()):
            noise = mx.random.normal(shape, key=mx.random.key(1000 * seed + number))
            value = (
                1.0 - family(config).gain_offset + 0.1 * noise if "norm" in name else 0.05 * noise
            )
            yield name, value.astype(kind)

    specs = {name: (dtype, shape) for name, shape in tensors.items()}
    written, kinds, named = model_writer.published(config, specs, drawn())
    write_tensors(folder, kinds, named)
    (folder / "config.json").write_text(json.dumps(written))
    write_tokenizer(folder)
    return folder


def stored_weights(folder: Path) -> dict[str, mx.array]:
    """The weights of a model of one file, by name."""
    weights: Any = mx.load(str(folder / "model.safetensors"))
    return dict(weights)


def _inside(folder: Path, beside: str, outer: dict[str, Any], towers: Sequence[str]) -> Path:
    """The model of `folder` as the text part of another: `outer` is what that one's config says,
    and `towers` are its other tensors. beside: what the names of all begin with.
    """
    text = json.loads((folder / "config.json").read_text())
    whole = {**outer, "vocab_size": 512, "text_config": text, "eos_token_id": [0]}
    (folder / "config.json").write_text(json.dumps(whole))
    weights = stored_weights(folder)
    mx.eval(weights)
    inside = {}
    for name, value in weights.items():
        inside[f"{beside}language_model.{name.removeprefix(beside)}"] = value
    inside |= {f"{beside}{name}.weight": mx.zeros((2, 2)) for name in towers}
    mx.save_safetensors(str(folder / "model.safetensors"), inside)
    return folder


def seeing(folder: Path, beside: str = "") -> Path:
    """A gemma3 with eyes: the tiny gemma3_text of seed 0 inside, two tensors of a vision tower.
    beside: what the names of all begin with; transformers 5 writes `model.` there.
    """
    make(folder, **FAMILIES["gemma3_text"])
    outer: dict[str, Any] = {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
    }
    outer |= {"vision_config": {"hidden_size": 8}}
    return _inside(folder, beside, outer, ("vision_tower.patch", "multi_modal_projector.norm"))


def hearing(folder: Path, beside: str = "") -> Path:
    """A gemma4 with eyes and ears: the tiny gemma4_text of seed 0 inside, three tensors of towers,
    and the keys and values that published models have in every block. beside: `model.` as
    published.
    """
    make(folder, **FAMILIES["gemma4_text"])
    names = [
        f"{i}.self_attn.{name}" for i in range(3, 7) for name in ("k_proj", "v_proj", "k_norm")
    ]
    change(folder, {f"model.layers.{name}.weight": mx.zeros((2, 2)) for name in names})
    outer: dict[str, Any] = {
        "model_type": "gemma4",
        "architectures": ["Gemma4ForConditionalGeneration"],
    }
    outer |= {"vision_config": {"hidden_size": 8}, "audio_config": {"hidden_size": 8}}
    towers = ("vision_tower.patch", "audio_tower.conv", "embed_vision.projection")
    return _inside(folder, beside, outer, towers)


CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}\n{{ m.content }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% endif %}"
)

# Tells of tools, calls and results, as most templates do.
TOOL_TEMPLATE = (
    "{% if tools %}tools\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}{% endif %}"
    "{% for m in messages %}{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|endoftext|>\n"
    "{% endfor %}{% if add_generation_prompt %}assistant\n{% endif %}"
)


def talking(folder: Path, seed: int = 0, ending: float = 1.0, **changes: Any) -> Path:
    """A llama with a chat template whose answers end: after each token with a probability that
    `ending` raises. 1: most sampled answers end within 12 tokens, and are not empty.

    Every token's embedding begins with 1, and so does, nearly, what its head sees; there the end
    token has `ending`, others nothing.
    """
    make(folder, seed, tie_word_embeddings=False, **changes)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    weights = stored_weights(folder)
    first = mx.arange(CONFIG["hidden_size"]) == 0
    end = mx.arange(CONFIG["vocab_size"])[:, None] == CONFIG["eos_token_id"]
    embedding = weights["model.embed_tokens.weight"]
    head = mx.where(first & end, ending, mx.where(first, 0.0, weights["lm_head.weight"]))
    changed = {"model.embed_tokens.weight": mx.where(first, 1.0, embedding)}
    return change(folder, {**changed, "lm_head.weight": head})


def byte_level(special: Sequence[str]) -> Any:
    """A byte-level BPE tokenizer of transformers, trained on one sentence. special: begin, end, and
    other tokens.
    """
    from transformers import PreTrainedTokenizerFast

    raw = bpe(["Baca i juhas piją herbatę, a halny wieje."] * 3, 400, special)
    first, last, *others = special
    made = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=first, eos_token=last)
    made.add_special_tokens({"additional_special_tokens": others})
    return made


def chatting(model: Path, folder: Path, template: str = CHAT_TEMPLATE) -> Path:
    """A copy of a model with a chat template, whose turns end with the end token."""
    shutil.copytree(model, folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def calling(folder: Path) -> Path:
    """`talking`, with a template that tells of tools; it babbles, and calls none."""
    talking(folder, max_position_embeddings=4096)
    (folder / "chat_template.jinja").write_text(TOOL_TEMPLATE)
    return folder


def change(folder: Path, changed: dict[str, mx.array]) -> Path:
    """The model of one file in a folder, with these weights in the place of its own."""
    weights = {**stored_weights(folder), **changed}
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


def packed(model: Checkpoint, out: Path, group: int = 64) -> Checkpoint:
    """The model in 4 bits, each weight at its nearest value."""
    plan = packed_format.formats_of(model.config, group)
    packed_format.write_quantized(model, out, plan)
    return load.open_checkpoint(out)


def in_fp4(model: Checkpoint, out: Path, mode: str) -> dict[str, Any]:
    """Write `model` with its blocks in mxfp4 or nvfp4, as others publish them, and the embedding in
    8 affine bits; returns the figures.
    """
    group = {"mxfp4": 32, "nvfp4": 16}[mode]
    plan = packed_format.formats_of(model.config, 64)
    for path in plan:
        if arch.block_of(path) is not None:
            plan[path] = packed_format.Format(4, group, mode)  # type: ignore[arg-type]
    return packed_format.write_quantized(model, out, plan)


def joined(folder: Path) -> Path:
    """A phi3: the tiny untied llama of seed 0, its q, k and v in one matrix and its gate and up in
    another.
    """
    make(folder, **KINDS["untied"])
    config = json.loads((folder / "config.json").read_text())
    phi = {
        "model_type": "phi3",
        "architectures": ["Phi3ForCausalLM"],
        "pad_token_id": 0,
        "partial_rotary_factor": 1.0,
    }
    (folder / "config.json").write_text(json.dumps({**config, **phi}))
    weights = stored_weights(folder)
    mx.eval(weights)
    for i in range(config["num_hidden_layers"]):
        for whole, parts in (("self_attn.qkv", ("q", "k", "v")), ("mlp.gate_up", ("gate", "up"))):
            stem = f"model.layers.{i}.{whole}_proj.weight"
            rows = [
                weights.pop(f"model.layers.{i}.{whole.split('.')[0]}.{part}_proj.weight")
                for part in parts
            ]
            weights[stem] = mx.concatenate(rows)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


def schedule(iters: int, peak: float, warmup: int) -> TrainingConfig:
    """So many steps, with this learning rate at the end of the warm-up."""
    return type("Schedule", (TrainingConfig,), {"WARMUP": warmup})(iters=iters, learning_rate=peak)


def run_flags(teacher: Path, text: Path) -> tuple[object, ...]:
    """Flags of a `distill` of a tiny teacher that takes seconds and does everything once."""
    sizes = ("--max-seq-length", 32, "--num-samples", 4, "--reconstruct-samples", 2)
    steps = ("--iters", 4, "--q-iters", 1, "--eval-windows", 2)
    return ("--teacher", teacher, "--data", text, *sizes, *steps)
