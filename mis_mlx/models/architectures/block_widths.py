"""FFN widths that differ from block to block, as the family nemotron-nas states them.

Its config.json has a list `block_configs`. Of each block it says how many query heads share a key
head, and a multiple of the hidden size from which the width follows: two thirds of it, rounded up
to a multiple of 256. mlx-lm (models/nemotron-nas.py), llama.cpp (deci) and the program code of
Nvidia's own models read it so. Blocks whose attention or MLP is left out or is one matrix are
refused.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mis_mlx.models.architectures.families import FAMILIES, Config, family, known_family, of_family
from mis_mlx.types import MisError

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
    blocks = config[family(config).blocks]
    return tuple(width_of(block["ffn"]["ffn_mult"], hidden) for block in blocks)


def settle(config: dict[str, Any], where: Path) -> None:
    """Give a config that was just read the sizes that its `block_configs` say.

    They are `intermediate_size`, of the widest block, and `num_key_value_heads`. MisError, which
    names the file, where a block has a form that is not supported.
    """
    row = known_family(config)
    if row is None or not row.blocks:
        return
    try:
        group = _checked_group(config, config.get(row.blocks))
        config["intermediate_size"] = max(widths(config))
    except MisError as error:
        raise MisError(f"{where}: {error}") from None
    config["num_key_value_heads"] = config["num_attention_heads"] // group


def _checked_group(config: Config, blocks: Any) -> int:
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


def unequal(config: Config, block_widths: Sequence[int]) -> dict[str, Any]:
    """A student's config, as `arch.student_config` gives it, with a width for each block.

    It is of the family that can say so. MisError where there is none.
    """
    row = family(config)
    require(config)
    edited = of_family(config, row.unequal)
    edited["architectures"] = ARCHITECTURES
    hidden = edited["hidden_size"]
    group = edited["num_attention_heads"] // edited["num_key_value_heads"]
    key = FAMILIES[row.unequal].blocks
    edited[key] = [block_config(width, hidden, group) for width in block_widths]
    edited["intermediate_size"] = max(block_widths)
    return edited


def require(config: Config) -> None:
    """MisError unless blocks of this model may differ in width and still be opened."""
    row = family(config)
    if not row.unequal:
        raise MisError(
            f"blocks of a {row.name} cannot differ in FFN width: only those of a llama can. Give "
            f"--ffn with one width for all"
        )
    hidden = config["hidden_size"]
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    if head_dim * heads != hidden:
        raise MisError(
            f"blocks of unequal width need heads that fill the hidden size, but {heads} heads of "
            f"{head_dim} are not {hidden}: give --ffn with one width for all"
        )
    if "sliding_attention" in (config.get("layer_types") or ()):
        raise MisError(
            "blocks of unequal width cannot have a sliding window: give --ffn with one width for "
            "all"
        )
