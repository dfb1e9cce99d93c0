"""Checks of a config.json's numbers, rotary positions and kinds of blocks.

Every check raises MisError with the key, the value found and the value expected;
`opening/config.check_config` puts the file before them.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from mis_mlx.models.architectures.shape import Config
from mis_mlx.types import MisError

# kinds of rotary positions, and the numbers that each of them needs
ROPE_NEEDS: dict[Any, tuple[str, ...]] = {
    "default": (), "linear": ("factor",), "dynamic": ("factor",), "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}  # fmt: skip
LONG_KEYS = {
    "type",
    "rope_type",
    "rope_theta",
    "partial_rotary_factor",
    "original_max_position_embeddings",
}
ATTENTION = {"full_attention", "sliding_attention"}
SHARE = "partial_rotary_factor"
MOST_POSITIONS = 2**31 - 1

BITS = (2, 3, 4, 5, 6, 8)  # of a packed weight, as mx.quantize has them
GROUP_SIZES = (16, 32, 64, 128)  # weights that share a scale


def whole_number(config: Config, key: str, most: int, default: Any = None) -> int:
    """The whole number from 1 to `most` under `key`; `default` where the key is absent or null."""
    value = config.get(key)
    if value is None:
        value = default
    if type(value) is not int or not 1 <= value <= most:
        raise MisError(f"{key} is {value!r}, but should be 1 to {most}: this config is not usable")
    return value


def positive_number(value: Any, key: str) -> None:
    """MisError unless `value`, which config.json has under `key`, is a number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise MisError(f"{key} is {value!r}, but must be a number above 0")


def rotary_settings(config: Config) -> Iterator[tuple[str, Any]]:
    """(name, settings) of every group of rotary settings that a config has.

    A family with two kinds of attention has one group for each kind.
    """
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key)
        if isinstance(rope, Mapping) and set(rope) == ATTENTION:
            for kind in sorted(ATTENTION):
                yield f"{key}.{kind}", rope[kind]
        elif rope is not None:
            yield key, rope


def check_packing(config: Config) -> None:
    """MisError where the whole model, or a matrix of it, is packed in a way that MLX has not."""
    common = config.get("quantization")
    if not isinstance(common, Mapping):
        return
    for name, stated in (("quantization", common), *common.items()):
        if not isinstance(stated, Mapping) or not {"bits", "group_size"} & set(stated):
            continue
        for key, known in (("bits", BITS), ("group_size", GROUP_SIZES)):
            value = stated.get(key, common.get(key))
            if type(value) is not int or value not in known:
                raise MisError(
                    f"{name}: {key} is {value!r}, but MLX has {', '.join(map(str, known))}: "
                    f"download the model again"
                )


def rotary_kind(rope: Any) -> Any:
    """The kind that rotary settings name, "default" where they name none; None: no settings."""
    if not isinstance(rope, Mapping):
        return None
    return rope.get("type") or rope.get("rope_type", "default")


def check_heads(config: Config) -> None:
    """Check that heads form whole groups, and that each has an even number of channels."""
    heads = config["num_attention_heads"]
    kv_heads = whole_number(config, "num_key_value_heads", 1024, default=heads)
    if heads % kv_heads:
        raise MisError(f"{heads} attention heads do not divide into {kv_heads} key-value heads")
    usual = max(1, config["hidden_size"] // heads)
    head_dim = whole_number(config, "head_dim", 4096, default=usual)
    if head_dim % 2:
        raise MisError(
            f"head_dim is {head_dim}, but rotary positions need an even one: this config is "
            f"not usable"
        )


def check_ropes(config: Config, kinds: Collection[str]) -> None:
    """Check that rotary positions are of one of these kinds, and have the numbers it needs."""
    for key, rope in rotary_settings(config):
        kind = rotary_kind(rope)
        if kind not in kinds:
            value = rope if kind is None else kind
            raise MisError(f"{key} is {value!r}, supported: {', '.join(kinds)}")
        needed = ROPE_NEEDS.get(kind, ())
        if "rope_theta" in rope:
            needed += ("rope_theta",)
        for name in needed:
            positive_number(rope.get(name), f"{key}.{name}")
    if config.get("rope_theta") is not None:
        positive_number(config["rope_theta"], "rope_theta")


def _shares(config: Config) -> list[Any]:
    """The shares of each head that rotate, as a config states them in several places."""
    stated = [config.get(SHARE)]
    for _, rope in rotary_settings(config):
        if isinstance(rope, Mapping):
            stated.append(rope.get(SHARE))
    return [value for value in stated if value is not None]


def check_whole_heads(config: Config, name: str) -> None:
    """MisError where a part of each head rotates. name: the family's."""
    for share in _shares(config):
        if share != 1:
            raise MisError(f"{SHARE} is {share!r}, but a {name} rotates whole heads")


def rotated_channels(config: Config, name: str, head_dim: int) -> int:
    """The number of channels of each head that rotate with the position.

    MisError where the config states two shares of a head, or one that is no even number of
    channels. name: the family's.
    """
    stated = _shares(config)
    share: Any = stated[0] if stated else 1
    positive_number(share, SHARE)
    rotated = int(head_dim * min(share, 1))
    expected = ""
    wrong = share
    others = [value for value in stated if value != share]
    if others:
        wrong = others[0]
        expected = f"{share!r} of each head"
    elif share > 1 or rotated < 2 or rotated % 2:
        expected = "an even part of each head"
    if expected:
        raise MisError(f"{SHARE} is {wrong!r}, but a {name} rotates {expected}")
    return rotated


def check_list(config: Config, key: str, allowed: Collection[str]) -> None:
    """Check a list with a value for every block, where the config has it."""
    layers = config["num_hidden_layers"]
    kinds = config.get(key)
    if kinds is None:
        return
    if not isinstance(kinds, list) or len(kinds) != layers or set(map(str, kinds)) - set(allowed):
        raise MisError(f"{key} must be a list of {layers}, each of {' or '.join(sorted(allowed))}")


def check_long_rope(config: Config, key: str, rope: Mapping[str, Any], *, pairs: int) -> None:
    """Check LongRoPE's settings: one factor for each of `pairs` pairs of channels.

    MisError for keys that transformers reads and mlx-lm does not, and for values that neither
    can use.
    """
    unknown = sorted(rope.keys() - LONG_KEYS - {"long_factor", "short_factor"})
    if unknown:
        raise MisError(
            f"{key} has {', '.join(unknown)}, which mlx-lm's phi3 does not know: use another model"
        )
    for name in ("long_factor", "short_factor"):
        factors = rope.get(name)
        if not isinstance(factors, list) or len(factors) != pairs:
            raise MisError(
                f"{key}.{name} must be a list of {pairs} numbers, one for each pair of channels"
            )
        for factor in factors:
            positive_number(factor, f"a number of {key}.{name}")
    whole_number(config, "max_position_embeddings", MOST_POSITIONS)
    context_key = "original_max_position_embeddings"
    context = whole_number(config, context_key, MOST_POSITIONS, default=4096)
    # mlx-lm divides by the logarithm of the context, which is 0 for a context of 1
    positive_number(context - 1, f"{context_key} - 1")
