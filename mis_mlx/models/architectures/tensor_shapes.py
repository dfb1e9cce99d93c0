"""The names and shapes of the tensors that a config promises: pure functions of the config."""

from mis_mlx.models.architectures.families import family
from mis_mlx.models.architectures.shape import Config, Shapes


def layer_tensors(config: Config, stacked: bool = False, block: int | None = None) -> Shapes:
    """Names (without `model.layers.N.`) and shapes (out, in) of one block's tensors.

    They come in forward order. stacked: all experts' matrices in one (E, out, in), as mlx-lm has
    them. block: its number, where blocks differ; default: the largest block's.
    """
    architecture = family(config)
    if block is None:
        block = architecture.largest_block()
    return architecture.block_tensors(block, stacked=stacked)


def tensors_of(config: Config, stacked: bool = False) -> Shapes:
    """{Hugging Face name: shape} of an unquantized model of this config, in forward order.

    stacked: as in `layer_tensors`.
    """
    architecture = family(config)
    s = architecture.shape
    tensors: Shapes = {"model.embed_tokens.weight": (s.vocab, s.hidden)}
    tensors |= architecture.side_tensors()
    for i in range(s.layers):
        block = architecture.block_tensors(i, stacked=stacked)
        for name, shape in block.items():
            tensors[f"model.layers.{i}.{name}"] = shape
    tensors["model.norm.weight"] = (s.hidden,)
    if not s.tied:
        tensors["lm_head.weight"] = (s.vocab, s.hidden)
    return tensors


def unused_tensors(config: Config) -> set[str]:
    """Names of keys and values that a published model has, but does not use.

    Its blocks that use those of another block still have weights for their own.
    """
    names = set[str]()
    for name in family(config).unused_shapes():
        stem = name.removesuffix("weight")
        for kind in ("weight", "scales", "biases"):
            names.add(stem + kind)
    return names
