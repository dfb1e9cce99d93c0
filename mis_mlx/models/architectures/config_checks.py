"""Checks of a config.json's numbers, rotary positions and kinds of blocks, for `opening/config`.

Every check raises MisError with the key, the value found and the value expected;
`config.check_config` puts the file before them.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from mis_mlx.models.architectures.families import Config, family
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


def rotary_kind(rope: Any) -> Any:
    """The kind that rotary settings name, "default" where they name none; None: no settings."""
    if not isinstance(rope, Mapping):
        return None
    return rope.get("type") or rope.get("rope_type", "default")


def check_positions(config: Config) -> None:
    """Check how a model encodes the position of a token."""
    row = family(config)
    if row.proportional:
        _check_two_ropes(config)
        return
    channels = _rotated_channels(config)
    kinds = tuple(ROPE_NEEDS)
    if row.own_positions:
        kinds = ("default", "longrope")
    if row.versions or row.stateful:
        kinds = ("default",)
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
        if kind == "longrope":
            _check_long_rope(config, key, rope, pairs=channels // 2)
    if config.get("rope_theta") is not None:
        positive_number(config["rope_theta"], "rope_theta")


def _rotated_channels(config: Config) -> int:
    """The number of channels of each head that rotate with the position.

    MisError where the config states two shares of a head, or a share that the family cannot have.
    """
    row = family(config)
    stated = [config.get(SHARE)]
    for _, rope in rotary_settings(config):
        if isinstance(rope, Mapping):
            stated.append(rope.get(SHARE))
    stated = [value for value in stated if value is not None]
    share: Any = 1
    of_parts = row.own_positions or row.partial
    if of_parts and stated:
        share = stated[0]
    positive_number(share, SHARE)

    head_dim = config["hidden_size"] // config["num_attention_heads"]
    if row.partial:
        head_dim = config.get("head_dim") or head_dim
    rotated = int(head_dim * min(share, 1))
    others = [value for value in stated if value != share]
    impossible = share > 1 or rotated < 2 or rotated % 2
    if others or (of_parts and impossible):
        wrong = others[0] if others else share
        expected = "whole heads"
        if of_parts:
            expected = f"{share!r} of each head" if others else "an even part of each head"
        raise MisError(f"{SHARE} is {wrong!r}, but a {row.name} rotates {expected}")
    return rotated


def _check_long_rope(config: Config, key: str, rope: Mapping[str, Any], *, pairs: int) -> None:
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


def _check_two_ropes(config: Config) -> None:
    """Check rotary settings that differ by kind of attention.

    Blocks with a window have plain positions. Blocks that see all tokens rotate a part of each
    head.
    """
    name = family(config).name
    ropes = config.get("rope_parameters")
    if not isinstance(ropes, Mapping) or set(ropes) != ATTENTION:
        kinds = " and ".join(sorted(ATTENTION))
        raise MisError(
            f"rope_parameters must have {kinds}, as every {name} does: download the model again"
        )
    for attention, expected in (
        ("sliding_attention", "default"),
        ("full_attention", "proportional"),
    ):
        rope = ropes[attention]
        key = f"rope_parameters.{attention}"
        kind = rotary_kind(rope)
        if kind != expected:
            raise MisError(f"{key} is {kind!r}, but for a {name} it must be {expected!r}")
        positive_number(rope.get("rope_theta"), f"{key}.rope_theta")
        share = rope.get(SHARE, 1.0)
        positive_number(share, f"{key}.{SHARE}")
        if share > 1 or (share < 1 and expected == "default"):
            raise MisError(f"{key}.{SHARE} is {share}, but must be 1")
        if rope.get("factor", 1.0) != 1.0:
            raise MisError(f"{key}.factor is {rope['factor']!r}, but only 1 is supported")


def check_kinds(config: Config, complete: Config) -> None:
    """Check the kind of each block: with a window or without, with positions or without.

    complete: the same config with the family's defaults filled in (`config.spelled_out`).
    """
    row = family(config)
    layers = config["num_hidden_layers"]
    known = ATTENTION
    if row.stateful:
        known = {"full_attention", row.stateful}
    for key, allowed in ((row.kinds, {"0", "1"}), ("layer_types", known)):
        kinds = config.get(key)
        if kinds is None:
            continue
        if not isinstance(kinds, list) or len(kinds) != layers or set(map(str, kinds)) - allowed:
            raise MisError(
                f"{key} must be a list of {layers}, each of {' or '.join(sorted(allowed))}"
            )
    if row.stateful and set(config.get("layer_types") or known) != known:
        raise MisError(
            f"all blocks are {config['layer_types'][0]}, but mlx-lm's {row.name} needs some of "
            f"each of {' and '.join(sorted(known))}"
        )
    if row.period:
        whole_number(complete, row.period, 1000)
    if row.period and row.stateful:
        _check_delta(config)
    if "sliding_attention" in (config.get("layer_types") or ()):
        whole_number(config, "sliding_window", MOST_POSITIONS)


def _check_delta(config: Config) -> None:
    """Check the heads of a gated delta rule, and that blocks with attention come in periods."""
    sizes = {}
    for key in family(config).numbers:
        sizes[key] = whole_number(config, key, 65_536)
    keys = sizes["linear_num_key_heads"]
    values = sizes["linear_num_value_heads"]
    if values % keys:
        raise MisError(
            f"linear_num_value_heads is {values}, which {keys} key heads do not divide: this "
            f"config is not usable"
        )
    interval = config["full_attention_interval"]
    for i, kind in enumerate(config["layer_types"]):
        if (kind == "full_attention") != ((i + 1) % interval == 0):
            raise MisError(
                f"layer_types says {kind} for block {i}, but mlx-lm counts attention in every "
                f"{interval}th block: use another model"
            )


def check_sharing(config: Config) -> None:
    """Check blocks' further inputs: channels for every token, keys and values of another block."""
    row = family(config)
    for key in row.stated:
        if config.get(key) is None:
            why = f"{key} is missing, and mlx-lm and transformers then assume different things"
            raise MisError(f"{why}: use a model whose config.json has it")
    if row.per_layer:
        rows = config["vocab_size_per_layer_input"]
        vocab = config["vocab_size"]
        if rows > vocab or (rows != vocab and not row.versions):
            why = f"the table of per-layer inputs has {rows:,} rows, but the embedding {vocab:,}"
            raise MisError(f"{why}: only tables with equally many rows are supported")
    if not row.sharing:
        return
    # The last blocks must find keys and values of their own kind in the blocks before.
    layers = config["num_hidden_layers"]
    shared = config[row.sharing]
    if type(shared) is not int or not 0 <= shared < layers:
        raise MisError(f"{row.sharing} is {shared!r}, but should be 0 to {layers - 1}")
    own = layers - shared
    kinds = config["layer_types"]
    lost = set(kinds[own:]) - set(kinds[:own])
    if lost:
        why = (
            f"blocks of {min(lost)} share keys and values, but none of the first {own} blocks "
            f"makes any"
        )
        raise MisError(f"{why}: this config is not usable")
    if not row.global_head_dim:
        return
    head_dim = whole_number(config, row.global_head_dim, 4096)
    if head_dim % 2:
        raise MisError(
            f"{row.global_head_dim} is {head_dim}, but rotary positions need an even one"
        )


def check_versions(config: Config) -> None:
    """Check AltUp: how many versions there are, which one is computed, which neurons are silent."""
    row = family(config)
    if not row.versions:
        return
    count = whole_number(config, row.versions, 64)
    active = config.get("altup_active_idx")
    if type(active) is not int or not 0 <= active < count:
        raise MisError(f"altup_active_idx is {active!r}, but should be 0 to {count - 1}")
    whole_number(config, row.laurel, 65_536)
    layers = config["num_hidden_layers"]
    shares = config[row.sparsity]
    if not isinstance(shares, list) or len(shares) != layers:
        raise MisError(f"{row.sparsity} must be a list of {layers}, one number for each block")
    for share in shares:
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
            raise MisError(f"a number of {row.sparsity} is {share!r}, but must be 0 to 1")
