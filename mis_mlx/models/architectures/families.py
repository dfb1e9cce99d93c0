"""All families: which class a config's model_type names.

A new family is a class in a file of this room, and a name in ARCHITECTURES.
"""

from typing import Any

from mis_mlx.models.architectures.base import Architecture
from mis_mlx.models.architectures.gemma3 import Gemma3
from mis_mlx.models.architectures.gemma4 import Gemma4
from mis_mlx.models.architectures.gpt_oss import GptOss
from mis_mlx.models.architectures.granite import Granite
from mis_mlx.models.architectures.lfm2 import Lfm2
from mis_mlx.models.architectures.llama import Llama, Mistral
from mis_mlx.models.architectures.ministral3 import Ministral3
from mis_mlx.models.architectures.mixture import Mixtral, Mixture, Olmoe, Qwen2Moe, Qwen3Moe
from mis_mlx.models.architectures.olmo2 import Olmo2
from mis_mlx.models.architectures.phi3 import Phi3
from mis_mlx.models.architectures.qwen import Qwen2, Qwen3
from mis_mlx.models.architectures.qwen35 import Qwen35
from mis_mlx.models.architectures.shape import Config, Shape
from mis_mlx.models.architectures.smollm3 import SmolLM3

ARCHITECTURES: tuple[type[Architecture], ...] = (
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
    SmolLM3,
    Ministral3,
    Granite,
    Olmo2,
    Phi3,
    Gemma3,
    Gemma4,
    Lfm2,
    Qwen35,
    Qwen3Moe,
    Qwen2Moe,
    Mixtral,
    GptOss,
    Olmoe,
)
FAMILIES = {kind.name: kind for kind in ARCHITECTURES}
# other types that contain one of these families: which one, and the values they may leave out
OPENED_AS: dict[str, dict[str, Any]] = {
    # its matrices are joined, but its heads rotate as a llama's
    "phi3": {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    "gemma3": {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "rms_norm_eps": 1e-6,
        "vocab_size": 262_208,
        "rope_theta": 1e6,
        "query_pre_attn_scalar": 256,
        "max_position_embeddings": 131_072,
    },
    "gemma4": {"model_type": "gemma4_text", "architectures": ["Gemma4ForCausalLM"]},
    "qwen3_5": {"model_type": "qwen3_5_text", "architectures": ["Qwen3_5ForCausalLM"]},
}


def family(config: Config) -> Architecture:
    """The architecture of a config that was checked (`config.check_config`)."""
    return FAMILIES[config["model_type"]](config)


def shape_of(config: Config) -> Shape:
    """The sizes in a config."""
    return family(config).shape


def mixture(config: Config) -> Mixture | None:
    """The same of a mixture of experts; None for any other model."""
    found = family(config)
    return found if isinstance(found, Mixture) else None
