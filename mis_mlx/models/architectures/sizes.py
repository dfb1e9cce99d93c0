"""The sizes in a config.json, with its defaults spelled out: pure functions of the config."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mis_mlx.models.architectures import block_widths, config_checks
from mis_mlx.models.architectures.config_checks import rotary_kind
from mis_mlx.models.architectures.families import Config, family

KEYS = {  # of a `Shape`, as config.json calls them
    "layers": "num_hidden_layers", "hidden": "hidden_size", "ffn": "intermediate_size",
    "heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "head_dim": "head_dim",
    "vocab": "vocab_size", "tied": "tie_word_embeddings",
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """The sizes that define a uniform model."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    experts: int = 0  # of a block; `ffn` is the width of one

    def __str__(self) -> str:
        ffn = f"FFN {self.ffn}"
        if self.experts:
            ffn = f"{self.experts} experts of {ffn}"
        heads = f"{self.heads} heads, {self.kv_heads} kv heads"
        return f"{self.layers} layers, hidden {self.hidden}, {ffn}, {heads}, {self.vocab:,} tokens"


def key_owners(config: Config) -> tuple[int | None, ...]:
    """For each block the block whose keys and values it uses; None: its own.

    The owner is the last block of the same kind that has keys and values of its own.
    """
    layers = config["num_hidden_layers"]
    row = family(config)
    if not row.sharing or not config[row.sharing]:
        return (None,) * layers
    own = layers - config[row.sharing]
    kinds = config["layer_types"]
    last = {kind: i for i, kind in enumerate(kinds[:own])}
    shared = [last[kind] for kind in kinds[own:]]
    return (*[None] * own, *shared)


def ffn_size(config: Config, i: int, ffn: int | None = None) -> int:
    """The number of FFN neurons of block i, of one expert where it has several.

    ffn: of the model, in place of the config's own.
    """
    row = family(config)
    if row.blocks and ffn is None:
        return block_widths.widths(config)[i]
    size = int(config[row.ffn]) if ffn is None else ffn
    if row.double_wide and config[row.double_wide] and key_owners(config)[i] is not None:
        return 2 * size
    return size


def head_size(config: Config, i: int) -> int:
    """The number of channels of each head of block i."""
    row = family(config)
    if row.global_head_dim and config["layer_types"][i] == "full_attention":
        return int(config[row.global_head_dim])
    return shape_of(config).head_dim


def attends(config: Config, i: int) -> bool:
    """Whether block i has keys and values; else it carries a state of one size."""
    kind = family(config).stateful
    return not kind or config["layer_types"][i] != kind


def attending(config: Config) -> int:
    """The number of blocks that have keys and values."""
    return sum(attends(config, i) for i in range(config["num_hidden_layers"]))


def reads_in_order(config: Config) -> bool:
    """Whether a model reads a sequence as one text: blocks with a gated delta rule do.

    Others take several texts in one sequence, and guesses that form a tree.
    """
    return family(config).stateful == "linear_attention"


def softcap(config: Config) -> float:
    """c, where a model's logits are c tanh(z / c); 0 where they are z."""
    key = family(config).softcap
    return float(config[key]) if key else 0.0


def versions(config: Config) -> int:
    """The number of versions of the hidden states that blocks pass on: 1, or AltUp's."""
    key = family(config).versions
    return int(config[key]) if key else 1


def spelled_out(config: Config) -> dict[str, Any]:
    """A copy in which a family's own keys have their defaults where the file has no value.

    Keys that the file has in another place are copied to where mlx-lm reads them.
    """
    full = dict(config)
    row = family(full)
    if row.kinds == "no_rope_layers" and full.get("no_rope_layers") is None:
        interval = full.get("no_rope_layer_interval") or 4
        layers = full["num_hidden_layers"]
        full["no_rope_layers"] = [int((i + 1) % interval != 0) for i in range(layers)]
    if row.period or row.versions:
        ropes = full.get("rope_parameters") or {}
        local = ropes.get("sliding_attention", {})
        full.setdefault("rope_local_base_freq", local.get("rope_theta", 10_000.0))
    if row.period:
        full.setdefault("sliding_window_pattern", full.get("_sliding_window_pattern", 6))
    return full


def normalised(config: Config) -> dict[str, Any]:
    """A copy with rope_theta, rope_scaling, head_dim, kv heads and tying spelled out.

    transformers >= 5 writes only `rope_parameters`, mlx-lm's llama reads only the top-level keys
    and takes theta 10000 without them. An absent `tie_word_embeddings` is read as transformers
    reads it.
    """
    full = spelled_out(config)
    row = family(full)
    rope = full.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    scaling = None
    if not row.proportional and rope.get("rope_type", "default") != "default":
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    usual = {
        "rope_theta": rope.get("rope_theta", row.rope_theta),
        "rope_scaling": scaling,
        "num_key_value_heads": full["num_attention_heads"],
        "head_dim": full["hidden_size"] // full["num_attention_heads"],
    }
    for key, value in usual.items():
        if value is not None and full.get(key) is None:
            full[key] = value
    if row.own_positions:
        _spell_out_own_positions(full, rope)
    full["tie_word_embeddings"] = bool(full.get("tie_word_embeddings", row.tied))
    return full


def _spell_out_own_positions(config: dict[str, Any], rope: Mapping[str, Any]) -> None:
    """Write the share of each head that rotates, and LongRoPE's settings, where mlx-lm reads them.

    rope: the config's `rope_parameters`.
    """
    share = config_checks.SHARE
    config[share] = config.get(share) or rope.get(share) or 1.0
    context = "original_max_position_embeddings"
    config[context] = config.get(context) or 4096
    scaling: Any = config.get("rope_scaling")
    if rotary_kind(scaling) == "longrope":
        config["rope_scaling"] = {**scaling, "type": "longrope", "rope_type": "longrope"}
    else:
        config["rope_scaling"] = None


def keys_of(config: Config) -> dict[str, str]:
    """KEYS of this config's family: {field of a `Shape`: key in config.json}."""
    row = family(config)
    keys = KEYS | {"ffn": row.ffn}
    if row.experts:
        keys["experts"] = row.experts
    return keys


def shape_of(config: Config) -> Shape:
    """The sizes in a config."""
    full = normalised(config)
    sizes = {field: full[key] for field, key in keys_of(config).items()}
    return Shape(**sizes)
