"""A config.json: read with suspicion, checked for plausibility, spelled out in full."""

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mis_mlx import cli
from mis_mlx.models.families import FAMILIES, OPENED_AS, family
from mis_mlx.storage import header_check, safetensors
from mis_mlx.types import MisError

MOST_BYTES = 10_000_000
KEYS = {  # of a `Shape`, as config.json calls them
    "layers": "num_hidden_layers", "hidden": "hidden_size", "ffn": "intermediate_size",
    "heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "head_dim": "head_dim",
    "vocab": "vocab_size", "tied": "tie_word_embeddings",
}  # fmt: skip
MOST_EXPERTS = 4096
SIZES = {  # that a config must have, and the most that is plausible
    "num_hidden_layers": 1000,
    "hidden_size": 65_536,
    "intermediate_size": 1_000_000,
    "vocab_size": 2_000_000,
    "num_attention_heads": 1024,
}
# kinds of rotary positions, and the numbers each cannot do without
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
say_once = cache(cli.say)
SHARED = re.compile(  # keys and modules that no family is told by
    r"architectures|.*_token_id|(torch_)?dtype|.*version|use_cache|initializer_range|.*dropout|.*pdrop|pretraining_tp|"
    r"quantization.*|model_type|max_position_.*|hidden_act.*|rms_norm_eps|rope_.*|(attention|mlp)_bias|layer_types|"
    r"sliding_window|(self_attn|mlp)\.([qkvo]|gate|up|down)_proj|embed_tokens|norm|lm_head|(input|post_attention)_layernorm"
)


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
        heads = f"{self.heads} heads, {self.kv_heads} kv heads"
        wide = f"{self.experts} experts of FFN {self.ffn}" if self.experts else f"FFN {self.ffn}"
        return f"{self.layers} layers, hidden {self.hidden}, {wide}, {heads}, {self.vocab:,} tokens"


def _whole(config: Mapping[str, Any], key: str, most: int, where: Path, default: Any = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if type(value) is not int or not 1 <= value <= most:
        raise MisError(
            f"{where}: {key} is {value!r}, plausible is 1 to {most}: this is not a usable config"
        )
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """config.json, checked for plausibility before anything is built from it. No foreign code,
    ever.
    """
    where = folder / "config.json"
    try:
        if not where.is_file():  # reading a named pipe would wait for ever
            raise OSError
        if where.stat().st_size > MOST_BYTES:
            raise header_check.Refused(
                f"is {where.stat().st_size} bytes long, plausible is under {MOST_BYTES:,}"
            )
        config = header_check.json_object(where.read_bytes())
    except OSError:
        raise MisError(
            f"{folder}: has no readable config.json: give a Hugging Face or MLX model folder"
        ) from None
    except header_check.Refused as why:
        raise MisError(f"{where}: {why}: download the model again") from None
    config = _opened_as(config, where)
    check_config(config, where)
    if config.pop("auto_map", None):
        say_once(
            f"{where}: names program code of the model's own, which is not run: it is a "
            f"{config['model_type']}"
        )
    for _, rope in _ropes(config):
        if family(config).own_positions and rope.get("short_factor") != rope.get("long_factor"):
            say_once(
                f"{where}: LongRoPE's long factors count at every length, as in mlx-lm, never its "
                f"short ones"
            )
            # so that whoever opens what is made of it computes the same
            rope["short_factor"] = rope["long_factor"]
    return config


def _opened_as(config: dict[str, Any], where: Path) -> dict[str, Any]:
    """The config of the family inside, of a model that also sees, or is joined and turns as it;
    another's as it is.
    """
    places = [config, *(rope for _, rope in _ropes(config) if isinstance(rope, Mapping))]
    own = any(
        p.get("partial_rotary_factor") not in (None, 1) or _rope_kind(p) in ("longrope", "su")
        for p in places
    )
    if (left_out := OPENED_AS.get(kind := str(config.get("model_type")))) is None or (
        own and kind in FAMILIES
    ):
        return config
    if not isinstance(text := config.get("text_config", {}), dict):
        raise MisError(
            f"{where}: text_config is {str(text)[:40]}, no JSON object: download the model again"
        )
    beside = {
        k: v
        for k, v in config.items()
        if not k.endswith("_config") and k not in ("model_type", "architectures")
    }
    if isinstance(packed := beside.get("quantization"), dict):
        beside["quantization"] = {
            new: how for name, how in packed.items() for new in inside_names(name)
        }
    return {**left_out, **text, **beside}


def inside_names(name: str) -> list[str]:
    """What a tensor or module of such a model is called in the family that is inside: one for each
    matrix in it.
    """
    name = re.sub(r"^(model\.)?language_model\.", r"\1", name)
    joined = re.search(r"\b(qkv|gate_up)_proj\b", name)
    own = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}[joined[1]] if joined else ()
    return [name.replace(f"{joined[1]}_proj", f"{each}_proj") for each in own] if joined else [name]


def check_config(config: Mapping[str, Any], where: Path) -> None:
    """Refuse foreign code, unknown model types and sizes no real model has, one sentence each."""
    kind = config.get("model_type")
    known = isinstance(kind, str) and kind in FAMILIES
    # nobody needs the code of a known type
    for key in ("model_file", *(() if known else ("auto_map",))):
        if config.get(key):
            why = f"{key} wants to run the model's own program code; mis_mlx never does that"
            raise MisError(f"{where}: {why}: use a model of type {', '.join(FAMILIES)}")
    if not known:
        why = (
            f"model_type {kind!r} is not "
            f"supported{_nearest(kind, config, where) if isinstance(kind, str) else ''}"
        )
        raise MisError(f"{where}: {why}; supported are {', '.join(FAMILIES)}")
    for key, most in SIZES.items():
        _whole(config, key, most, where)
    hidden = config["hidden_size"]
    heads = config["num_attention_heads"]
    if heads % (kv_heads := _whole(config, "num_key_value_heads", 1024, where, heads)):
        raise MisError(
            f"{where}: {heads} attention heads do not divide into {kv_heads} key-value heads"
        )
    if (head_dim := _whole(config, "head_dim", 4096, where, max(1, hidden // heads))) % 2:
        raise MisError(
            f"{where}: head_dim is {head_dim}, rotary positions need an even one: this is no "
            f"usable config"
        )
    of = family(config)
    for key in (
        "rms_norm_eps",
        *of.numbers,
        *filter(config.get, (of.embedding_scale, of.logit_divisor)),
    ):
        _positive(spelled_out(config).get(key), key, where)
    _check_positions(config, where)
    _check_kinds(config, where)
    _check_sharing(config, where)
    _check_experts(config, where)
    for key in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        if config.get(key) not in (None, True, False):
            raise MisError(f"{where}: {key} is {config[key]!r}, true or false was expected")


def _nearest(kind: str, config: Mapping[str, Any], where: Path) -> str:
    """The known family whose own keys or name this one shares, and what else its config and its
    tensors have.
    """
    shares = {
        f: [f.name[:n] == kind[:n] for n in range(2, len(kind) + 1)] for f in FAMILIES.values()
    }
    of = max(shares, key=lambda f: (len(f.own & config.keys()), sum(shares[f])))
    modules = set[str]()
    with contextlib.suppress(MisError):  # a config alone is enough to say something
        names = safetensors.index(where.parent)
        modules = {re.sub(r"^model\.(layers\.)?|\b\d+\.|\.\w+$", "", name) for name in names}
    new = [
        k
        for k in sorted(config.keys() - of.own - {*KEYS.values()}) + sorted(modules)
        if not SHARED.fullmatch(k)
    ]
    new[8:] = [f"{len(new) - 8} more"] if len(new) > 8 else []
    return f", the nearest is {of.name}" + (
        f", which knows nothing of {', '.join(new)}" if new else ""
    )


def _positive(value: Any, key: str, where: Path) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise MisError(f"{where}: {key} is {value!r}, a number above 0 was expected")


def _ropes(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name, rotary settings) of all that a config has: by kind of attention, where a family has
    two.
    """
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key)
        if isinstance(rope, Mapping) and set(rope) == ATTENTION:
            yield from ((f"{key}.{kind}", rope[kind]) for kind in sorted(ATTENTION))
        elif rope is not None:
            yield key, rope


def _rope_kind(rope: Any) -> Any:
    return (
        rope.get("type") or rope.get("rope_type", "default") if isinstance(rope, Mapping) else None
    )


def _check_positions(config: Mapping[str, Any], where: Path) -> None:
    """What says where a token stands."""
    of = family(config)
    if of.proportional:
        return _check_two_ropes(config, where)
    ropes = [rope for _, rope in _ropes(config) if isinstance(rope, Mapping)]
    shares = [place.get("partial_rotary_factor") for place in (config, *ropes)]
    share = next((value for value in shares if value is not None), 1) if of.own_positions else 1
    _positive(share, "partial_rotary_factor", where)
    turned = int(config["hidden_size"] // config["num_attention_heads"] * min(share, 1))
    odd = [value for value in shares if value not in (None, share)]
    if odd or (of.own_positions and (share > 1 or turned < 2 or turned % 2)):
        what = (
            f"an even part of each head, {share!r} or another"
            if of.own_positions
            else "whole heads"
        )
        raise MisError(
            f"{where}: partial_rotary_factor is {[*odd, share][0]!r}, a {of.name} turns {what}"
        )
    kinds = ("default", "longrope") if of.own_positions else tuple(ROPE_NEEDS)
    for key, rope in _ropes(config):
        if (kind := _rope_kind(rope)) not in kinds:
            raise MisError(
                f"{where}: {key} is {rope if kind is None else kind!r}, supported are "
                f"{', '.join(kinds)}"
            )
        for needed in ROPE_NEEDS.get(kind, ()) + (("rope_theta",) if "rope_theta" in rope else ()):
            _positive(rope.get(needed), f"{key}.{needed}", where)
        if kind == "longrope":
            _check_long(config, key, rope, turned // 2, where)
    if config.get("rope_theta") is not None:
        _positive(config["rope_theta"], "rope_theta", where)


def _check_long(
    config: Mapping[str, Any], key: str, rope: Mapping[str, Any], pairs: int, where: Path
) -> None:
    """LongRoPE's positions: MisError for what transformers reads and mlx-lm does not, or neither
    can.
    """
    if odd := sorted(rope.keys() - LONG_KEYS - {"long_factor", "short_factor"}):
        raise MisError(
            f"{where}: {key} has {', '.join(odd)}, of which mlx-lm's phi3 knows nothing: use "
            f"another model"
        )
    for name in ("long_factor", "short_factor"):
        if not isinstance(factors := rope.get(name), list) or len(factors) != pairs:
            raise MisError(
                f"{where}: {key}.{name} must be a list of {pairs} numbers, one for each pair of "
                f"channels"
            )
        for factor in factors:
            _positive(factor, f"a number of {key}.{name}", where)
    _whole(config, "max_position_embeddings", 2**31 - 1, where)
    context = _whole(config, "original_max_position_embeddings", 2**31 - 1, where, 4096)
    _positive(context - 1, "original_max_position_embeddings - 1", where)


def _check_two_ropes(config: Mapping[str, Any], where: Path) -> None:
    """Positions by kind of attention: plain ones within a window, a part of each head where all
    tokens are seen.
    """
    name = family(config).name
    ropes = config.get("rope_parameters")
    if not isinstance(ropes, Mapping) or set(ropes) != ATTENTION:
        kinds = " and ".join(sorted(ATTENTION))
        raise MisError(
            f"{where}: rope_parameters must have {kinds}, as every {name} does: download the model "
            f"again"
        )
    for kind, expected in (("sliding_attention", "default"), ("full_attention", "proportional")):
        rope = ropes[kind]
        if (found := _rope_kind(rope)) != expected:
            raise MisError(
                f"{where}: rope_parameters.{kind} is {found!r}, of a {name} it is {expected!r}"
            )
        _positive(rope.get("rope_theta"), f"rope_parameters.{kind}.rope_theta", where)
        share = rope.get("partial_rotary_factor", 1.0)
        _positive(share, f"rope_parameters.{kind}.partial_rotary_factor", where)
        if share > 1 or (share < 1 and expected == "default"):
            raise MisError(
                f"{where}: rope_parameters.{kind}.partial_rotary_factor is {share}, 1 was expected"
            )
        if rope.get("factor", 1.0) != 1.0:
            raise MisError(
                f"{where}: rope_parameters.{kind}.factor is {rope['factor']!r}, only 1 can be "
                f"computed here"
            )


def _check_sharing(config: Mapping[str, Any], where: Path) -> None:
    """What blocks get beside hidden states: channels of their own for every token, keys and values
    of another block.
    """
    of = family(config)
    layers = config["num_hidden_layers"]
    for key in of.stated:
        if config.get(key) is None:
            why = f"{key} is missing, which mlx-lm and transformers take for different things then"
            raise MisError(f"{where}: {why}: use a model whose config.json has it")
    if of.per_layer and (rows := config["vocab_size_per_layer_input"]) != config["vocab_size"]:
        why = (
            f"the table of per-layer inputs has {rows:,} rows, the embedding "
            f"{config['vocab_size']:,}"
        )
        raise MisError(f"{where}: {why}: only tables of as many rows can be computed here")
    if not of.sharing:
        return
    if type(config[of.sharing]) is not int or not 0 <= config[of.sharing] < layers:
        raise MisError(
            f"{where}: {of.sharing} is {config[of.sharing]!r}, plausible is 0 to {layers - 1}"
        )
    own = layers - config[of.sharing]
    kinds = config["layer_types"]
    if lost := set(kinds[own:]) - set(kinds[:own]):
        why = (
            f"blocks of {min(lost)} share keys and values, none of the first {own} blocks makes any"
        )
        raise MisError(f"{where}: {why}: this is no usable config")
    if _whole(config, of.global_head_dim, 4096, where) % 2:
        raise MisError(
            f"{where}: {of.global_head_dim} is {config[of.global_head_dim]}, rotary positions need "
            f"an even one"
        )


def key_owners(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """For each block the one whose keys and values it uses: the last of its kind that has its own;
    None: it has.
    """
    layers = config["num_hidden_layers"]
    of = family(config)
    shared = config[of.sharing] if of.sharing else 0
    if not shared:
        return (None,) * layers
    kinds = config["layer_types"]
    last = {kind: i for i, kind in enumerate(kinds[: layers - shared])}
    return (*[None] * (layers - shared), *(last[kind] for kind in kinds[layers - shared :]))


def ffn_size(config: Mapping[str, Any], i: int, ffn: int | None = None) -> int:
    """FFN neurons of block i, of one expert where there are several. ffn: of a model of so many;
    default: its own.
    """
    of = family(config)
    size = int(config[of.ffn]) if ffn is None else ffn
    wide = bool(of.double_wide and config[of.double_wide] and key_owners(config)[i] is not None)
    return 2 * size if wide else size


def head_size(config: Mapping[str, Any], i: int) -> int:
    """Channels of each head of block i."""
    of = family(config)
    if of.global_head_dim and config["layer_types"][i] == "full_attention":
        return int(config[of.global_head_dim])
    return shape_of(config).head_dim


def softcap(config: Mapping[str, Any]) -> float:
    """c, where a model's logits are c tanh(z / c); 0 where they are z."""
    key = family(config).softcap
    return float(config[key]) if key else 0.0


def _check_kinds(config: Mapping[str, Any], where: Path) -> None:
    """What kind each block is of: windowed or not, with positions or not."""
    layers = config["num_hidden_layers"]
    of = family(config)
    for key, allowed in ((of.kinds, {"0", "1"}), ("layer_types", ATTENTION)):
        kinds = config.get(key)
        if kinds is None:
            continue
        if not isinstance(kinds, list) or len(kinds) != layers or set(map(str, kinds)) - allowed:
            raise MisError(
                f"{where}: {key} must be a list of {layers}, each of {' or '.join(sorted(allowed))}"
            )
    if of.period:
        _whole(spelled_out(config), of.period, 1000, where)
    if "sliding_attention" in (config.get("layer_types") or ()):
        _whole(config, "sliding_window", 2**31 - 1, where)


def _check_experts(config: Mapping[str, Any], where: Path) -> None:
    """What a family takes one value of; how many experts there are, and how many of them a token
    meets.
    """
    of = family(config)
    for key, value in of.only:
        if (found := config.get(key)) not in (None, value):
            raise MisError(
                f"{where}: {key} is {found!r}, of a {of.name} only {value!r} can be computed here"
            )
    if of.sinks and not config.get("layer_types"):
        raise MisError(f"{where}: layer_types is missing, which says which blocks see all tokens")
    if of.experts:
        experts, met = (
            _whole(config, key, MOST_EXPERTS, where) for key in (of.experts, "num_experts_per_tok")
        )
        if met > experts:
            raise MisError(
                f"{where}: a token meets {met} experts (num_experts_per_tok), there are {experts}"
            )
        for key in filter(None, (of.ffn, of.shared_expert)):
            _whole(config, key, SIZES["intermediate_size"], where)


def spelled_out(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with what a family's own keys are where the file leaves them out, or has them in
    another place.
    """
    c = dict(config)
    if family(c).kinds == "no_rope_layers" and c.get("no_rope_layers") is None:
        interval = c.get("no_rope_layer_interval") or 4
        c["no_rope_layers"] = [int((i + 1) % interval != 0) for i in range(c["num_hidden_layers"])]
    if family(c).period:
        ropes = c.get("rope_parameters") or {}
        c.setdefault(
            "rope_local_base_freq", ropes.get("sliding_attention", {}).get("rope_theta", 10_000.0)
        )
        c.setdefault("sliding_window_pattern", c.get("_sliding_window_pattern", 6))
    return c


def normalised(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with rope_theta, rope_scaling, head_dim, kv heads and tying spelled out.

    transformers >= 5 writes only `rope_parameters`, mlx-lm's llama reads only the top-level keys
    and takes theta 10000 without them. An absent `tie_word_embeddings` is read as transformers
    reads it.
    """
    c = spelled_out(config)
    rope = c.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    plain = rope.get("rope_type", "default") == "default" or family(c).proportional
    usual = {
        "rope_theta": rope.get("rope_theta", family(c).rope_theta),
        "rope_scaling": None if plain else {k: v for k, v in rope.items() if k != "rope_theta"},
        "num_key_value_heads": c["num_attention_heads"],
        "head_dim": c["hidden_size"] // c["num_attention_heads"],
    }
    c |= {key: value for key, value in usual.items() if value is not None and c.get(key) is None}
    if family(c).own_positions:
        c["partial_rotary_factor"] = (
            c.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or 1.0
        )
        c["original_max_position_embeddings"] = c.get("original_max_position_embeddings") or 4096
        scaling = c.get("rope_scaling") if _rope_kind(c.get("rope_scaling")) == "longrope" else None
        c["rope_scaling"] = scaling and {**scaling, "type": "longrope", "rope_type": "longrope"}
    c["tie_word_embeddings"] = bool(c.get("tie_word_embeddings", family(c).tied))
    return c


def keys_of(config: Mapping[str, Any]) -> dict[str, str]:
    """KEYS of this config's family."""
    of = family(config)
    return KEYS | {"ffn": of.ffn} | ({"experts": of.experts} if of.experts else {})


def shape_of(config: Mapping[str, Any]) -> Shape:
    """The sizes in a config."""
    c = normalised(config)
    return Shape(**{field: c[key] for field, key in keys_of(config).items()})
