"""What a config says of its model: pure functions, each answered by the model's architecture."""

from typing import Any

import mlx.core as mx

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


def ffn_size(config: Config, i: int, ffn: int | None = None) -> int:
    """The number of FFN neurons of block i, of one expert where it has several.

    ffn: of the model, in place of the config's own.
    """
    return family(config).ffn_size(i, ffn)


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


def reads_in_order(config: Config) -> bool:
    """Whether a model cannot take back guesses that were wrong: one with a gated delta rule."""
    return family(config).in_order


def softcap(config: Config) -> float:
    """c, where a model's logits are c tanh(z / c); 0 where they are z."""
    return family(config).softcap


def side_width(config: Config) -> int:
    """The number of channels that each block gets for every token from a table, or 0."""
    return family(config).side_width


def repairs(config: Config) -> bool:
    """Whether a part of each block can be refitted in closed form after a cut."""
    return family(config).repairs


def norms_outputs(config: Config) -> bool:
    """Whether norms stand behind attention and MLP: no output is linear in down_proj then."""
    return family(config).norms_outputs


def holds_float16(config: Config) -> bool:
    """Whether float16 holds the activations, as far as is known."""
    return family(config).float16


def embedding_scale(config: Config, dtype: mx.Dtype) -> mx.array | None:
    """The factor of the embedding on its way into the first block, as mlx-lm has it; None: 1."""
    return family(config).embedding_scale(dtype)


def step_factor(config: Config, *, repaired: bool) -> int:
    """The factor of the usual number of steps; repaired: whether a repair was asked for."""
    architecture = family(config)
    return architecture.steps if repaired and architecture.repairs else 2


def gguf_name(config: Config) -> str:
    """The architecture of llama.cpp; "": the family is not exported."""
    return family(config).gguf
