"""What a config says of its model: pure functions, each answered by the model's architecture."""

from typing import Any

from mis_mlx.models.architectures.families import family
from mis_mlx.models.architectures.shape import Config, Shape


def shape_of(config: Config) -> Shape:
    """The sizes in a config."""
    return family(config).shape


def normalised(config: Config) -> dict[str, Any]:
    """`Architecture.normalised`: every value stands where mlx-lm reads it."""
    return family(config).normalised()


def key_owners(config: Config) -> tuple[int | None, ...]:
    """For each block the block whose keys and values it uses; None: its own."""
    return family(config).key_owners()


def ffn_size(config: Config, i: int) -> int:
    """The number of FFN neurons of block i, of one expert where it has several."""
    return family(config).ffn_size(i)


def head_size(config: Config, i: int) -> int:
    """The number of channels of each head of block i."""
    return family(config).head_size(i)


def attends(config: Config, i: int) -> bool:
    """Whether block i has keys and values; else it carries a state of one size."""
    return family(config).attends(i)


def attending(config: Config) -> int:
    """The number of blocks that have keys and values."""
    architecture = family(config)
    return sum(architecture.attends(i) for i in range(architecture.layers))


def softcap(config: Config) -> float:
    """c, where a model's logits are c tanh(z / c); 0 where they are z."""
    return family(config).softcap


def side_width(config: Config) -> int:
    """The number of channels that each block gets for every token from a table, or 0."""
    return family(config).side_width


def repairs(config: Config) -> bool:
    """Whether a part of each block can be refitted in closed form after a cut."""
    return family(config).repairs


def gguf_name(config: Config) -> str:
    """The architecture of llama.cpp; "": the family is not exported."""
    return family(config).gguf
