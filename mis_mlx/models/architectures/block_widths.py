"""FFN widths that differ from block to block, as the family nemotron-nas states them.

Its config.json has a list `block_configs`. Of each block it says how many query heads share a key
head, and a multiple of the hidden size from which the width follows: two thirds of it, rounded up
to a multiple of 256. mlx-lm (models/nemotron-nas.py), llama.cpp (deci) and the program code of
Nvidia's own models read it so. Blocks whose attention or MLP is left out or is one matrix are
refused.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from mis_mlx.models.architectures.shape import Config
from mis_mlx.types import MisError

KEY = "block_configs"
STEP = 256  # FFN neurons
ARCHITECTURES = ["DeciLMForCausalLM"]


def width_of(multiple: float, hidden: int) -> int:
    """The FFN neurons of a block whose `ffn_mult` is `multiple`."""
    neurons = int(2 * multiple * hidden / 3)
    return -(-neurons // STEP) * STEP


def multiple_of(width: int, hidden: int) -> float:
    """The `ffn_mult` of a block of `width` FFN neurons. MisError where there is none."""
    if width % STEP or width < STEP:
        raise MisError(
            f"an FFN of {width} neurons is not a multiple of {STEP}, to which loaders of unequal "
            f"blocks round: choose one"
        )
    # mlx-lm rounds it to six digits; half a neuron less still rounds up to the width.
    return round(3 * (width - 0.5) / (2 * hidden), 6)


def widths(config: Config) -> tuple[int, ...]:
    """The FFN neurons of every block of a config with `block_configs`."""
    hidden = config["hidden_size"]
    blocks = config[KEY]
    return tuple(width_of(block["ffn"]["ffn_mult"], hidden) for block in blocks)


def checked_group(config: Config, blocks: Any) -> int:
    """The query heads that share a key head, the same in every block; MisError otherwise."""
    layers = config.get("num_hidden_layers")
    if type(layers) is not int or not isinstance(blocks, list) or len(blocks) != layers:
        raise MisError(f"block_configs must be a list of {layers}, one object for each block")
    for key in ("hidden_size", "num_attention_heads"):
        if type(config.get(key)) is not int:
            raise MisError(f"{key} is {config.get(key)!r}, but should be a whole number")
    groups = []
    for number, block in enumerate(blocks):
        attention = _checked_part(block, "attention", number)
        groups.append(_positive(attention, "n_heads_in_group", number, kinds=(int,)))
        _positive(_checked_part(block, "ffn", number), "ffn_mult", number, kinds=(int, float))
    group: int = groups[0]
    if any(other != group for other in groups):
        raise MisError(
            f"n_heads_in_group is {min(groups)} in some blocks and {max(groups)} in others: only "
            f"blocks with equally many key heads are supported"
        )
    if config["num_attention_heads"] % group:
        heads = config["num_attention_heads"]
        raise MisError(f"{heads} attention heads do not divide into groups of {group}")
    return group


def _checked_part(block: Any, name: str, number: int) -> Config:
    """What a block's config says of its attention or MLP; MisError where it has none."""
    part = block.get(name) if isinstance(block, Mapping) else None
    if not isinstance(part, Mapping):
        raise MisError(f"block {number} of block_configs does not say its {name}")
    for form in ("no_op", "replace_with_linear"):
        if part.get(form):
            why = f"block {number} has {form} for its {name}"
            raise MisError(f"{why}: only blocks with attention and MLP are supported")
    return part


def _positive(part: Config, key: str, number: int, *, kinds: tuple[type, ...]) -> Any:
    """The number above 0 under a block's key; MisError otherwise."""
    value: Any = part.get(key)
    if type(value) not in kinds or float(value) <= 0:
        raise MisError(f"{key} of block {number} is {value!r}, but must be a number above 0")
    return value


def block_config(width: int, hidden: int, group: int) -> dict[str, Any]:
    """A block of `width` FFN neurons, with attention whose key heads `group` heads share."""
    return {
        "attention": {"no_op": False, "replace_with_linear": False, "n_heads_in_group": group},
        "ffn": {
            "no_op": False,
            "replace_with_linear": False,
            "ffn_mult": multiple_of(width, hidden),
        },
    }


def of_llama(config: Config, block_widths: Sequence[int]) -> dict[str, Any]:
    """The config of a llama, with a width for each block, as a nemotron-nas."""
    hidden = config["hidden_size"]
    group = config["num_attention_heads"] // config["num_key_value_heads"]
    return {
        **config,
        "model_type": "nemotron-nas",
        "architectures": ARCHITECTURES,
        KEY: [block_config(width, hidden, group) for width in block_widths],
        "intermediate_size": max(block_widths),
    }
