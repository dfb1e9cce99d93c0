"""LFM2: two blocks of three have a short causal convolution in place of attention.

Its attention blocks are those of mlx-lm's qwen3, which compute the same thing under the names that
all families have here.
"""

from typing import Any

import mlx.nn as nn

from mis_mlx.models.architectures import hybrid, stored_form
from mis_mlx.models.architectures.config_checks import whole_number
from mis_mlx.models.architectures.described import FULL
from mis_mlx.models.architectures.shape import Config, Shapes
from mis_mlx.models.architectures.stateful import Stateful
from mis_mlx.types import MisError

WIDTH = "conv_L_cache"  # of the convolution
MOST = 1_000_000
# keys that say what other keys say, too
DERIVED = (
    "block_auto_adjust_ff_dim",
    "block_dim",
    "block_ff_dim",
    "block_ffn_dim_multiplier",
    "block_multiple_of",
    "block_norm_eps",
    "conv_dim",
    "conv_dim_out",
    "full_attn_idxs",
    "norm_eps",
    "num_heads",
    "theta",
    "tie_embedding",
)


class Lfm2(Stateful):
    """Its files have other names for tensors and sizes."""

    name = "lfm2"
    mlx = "lfm2"
    block_module = "qwen3"
    gguf = "lfm2"
    other_kind = "conv"
    tied = True
    rope_theta = 1e6
    head_dim_follows = True
    numbers = (WIDTH,)
    stated = ("layer_types",)
    only = (("conv_bias", False), ("rope_scaling", None), ("tie_word_embeddings", True))
    why_fixed = "the first of each kind"
    renamed = (
        (".mlp.gate_proj.", ".feed_forward.w1."),
        (".mlp.up_proj.", ".feed_forward.w3."),
        (".mlp.down_proj.", ".feed_forward.w2."),
        (".self_attn.o_proj.", ".self_attn.out_proj."),
        (".self_attn.q_norm.", ".self_attn.q_layernorm."),
        (".self_attn.k_norm.", ".self_attn.k_layernorm."),
        (".input_layernorm.", ".operator_norm."),
        (".post_attention_layernorm.", ".ffn_norm."),
        ("model.norm.", "model.embedding_norm."),
    )

    def fixed_blocks(self) -> set[int]:
        """The first of each kind, at which mlx-lm makes its masks."""
        kinds = self.config["layer_types"]
        return {kinds.index(kind) for kind in set(kinds)}

    def mixer_tensors(self, i: int) -> Shapes:
        """Of a convolution, the kernel is (D, width, 1): one for each channel."""
        if self.attends(i):
            return super().mixer_tensors(i)
        hidden = self.config["hidden_size"]
        return {
            "conv.in_proj.weight": (3 * hidden, hidden),
            "conv.conv.weight": (hidden, self.config[WIDTH], 1),
            "conv.out_proj.weight": (hidden, hidden),
        }

    def mixer_numbers(self) -> int:
        """Measured: benchmarks/hybrids.py."""
        return 6 * int(self.config["hidden_size"])

    def state_bytes(self, item: int) -> int:
        """The last inputs."""
        reach = int(self.config[WIDTH]) - 1
        return reach * int(self.config["hidden_size"]) * item

    def model_args(self) -> Any:
        """Those of the attention blocks, with the kind of each block."""
        full = self.normalised()
        full.pop("rope_parameters", None)  # their theta stands in the config itself
        args = self.module().ModelArgs.from_dict(full)
        args.conv_L_cache = self.config[WIDTH]
        args.layer_types = list(self.config["layer_types"])
        return args

    def new_block(self, args: Any, i: int) -> nn.Module:
        """By its kind."""
        module = self.module()
        if not self.attends(i):
            return hybrid.ConvBlock(module, args)
        block: nn.Module = module.TransformerBlock(args)
        return block

    def own_config(self) -> dict[str, Any]:
        """Sizes by the names that all families have here."""
        config = self.config
        if "rms_norm_eps" in config:
            return dict(config)
        own = {key: value for key, value in config.items() if key not in DERIVED}
        hidden = config.get("hidden_size")
        for key in ("block_dim", "conv_dim", "conv_dim_out"):
            size = config.get(key)
            if size not in (None, hidden):
                raise MisError(
                    f"{key} is {size!r}, but hidden_size {hidden!r}: only blocks of that width are "
                    f"supported"
                )
        own["intermediate_size"] = _ffn_size(config)
        own["rms_norm_eps"] = config.get("norm_eps")
        # either name may say that the head has weights of its own, which is refused
        tied = [config.get(key) for key in ("tie_word_embeddings", "tie_embedding")]
        own["tie_word_embeddings"] = False not in tied
        own["layer_types"] = _kinds(config)
        packed = own.get("quantization")
        if isinstance(packed, dict):
            own["quantization"] = {self.own_name(key): value for key, value in packed.items()}
        return own

    def stored_config(self) -> dict[str, Any]:
        """The number of neurons is said as it is: it is not adjusted when the file is read."""
        config = self.config
        outer = {
            key: value for key, value in config.items() if key not in ("rms_norm_eps", "head_dim")
        }
        outer |= stored_form.renamed_packing(self)
        hidden = config["hidden_size"]
        theta = config.get("rope_theta") or self.rope_theta
        return {
            **outer,
            "norm_eps": config["rms_norm_eps"],
            "block_norm_eps": config["rms_norm_eps"],
            "block_auto_adjust_ff_dim": False,
            "block_dim": hidden,
            "block_ff_dim": config["intermediate_size"],
            "block_ffn_dim_multiplier": 1.0,
            "block_multiple_of": 1,
            "conv_bias": False,
            "conv_dim": hidden,
            "conv_dim_out": hidden,
            "full_attn_idxs": [i for i in range(self.layers) if self.attends(i)],
            "num_heads": config["num_attention_heads"],
            "rope_theta": theta,
            "theta": theta,
            "tie_embedding": True,
        }

    def gguf_words(self) -> dict[str, Any]:
        """Which blocks have keys, and the convolution's width."""
        kv_heads = self.shape.kv_heads
        return {
            "head_count_kv": [kv_heads if self.attends(i) else 0 for i in range(self.layers)],
            "shortconv_l_cache": self.config[WIDTH],
        }


def _ffn_size(config: Config) -> int:
    """The number of neurons, as mlx-lm and transformers count them.

    Published files give a larger size, of which two thirds are used, in whole multiples.
    """
    key = "intermediate_size"
    if config.get("block_ff_dim") is not None:
        key = "block_ff_dim"
    size = whole_number(config, key, MOST)
    if not config.get("block_auto_adjust_ff_dim", True):
        return size
    size = int(2 * size / 3)
    factor = config.get("block_ffn_dim_multiplier")
    if factor is not None:
        size = int(factor * size)
    multiple = whole_number(config, "block_multiple_of", MOST, default=256)
    return multiple * -(-size // multiple)


def _kinds(config: Config) -> Any:
    """The kind of each block, which older files tell by the numbers of those with attention."""
    numbers = config.get("full_attn_idxs")
    layers = whole_number(config, "num_hidden_layers", MOST)
    if not isinstance(numbers, list):
        return config.get("layer_types")
    kinds = [FULL if i in numbers else Lfm2.other_kind for i in range(layers)]
    stated = config.get("layer_types")
    if stated not in (None, kinds):
        raise MisError(
            f"full_attn_idxs is {numbers}, but layer_types has another order: use another model"
        )
    return kinds
