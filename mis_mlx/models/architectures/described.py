"""What a config.json says of a plain decoder: names, defaults, sizes, and what is refused.

This is the first half of `base.Architecture`.
"""

from dataclasses import replace
from typing import Any, Literal

from mis_mlx.models.architectures import config_checks
from mis_mlx.models.architectures.config_checks import positive_number, whole_number
from mis_mlx.models.architectures.shape import DENSE, KEYS, Config, Shape
from mis_mlx.types import MisError

SIZES = {  # keys that a config must have, and the largest plausible value of each
    "num_hidden_layers": 1000,
    "hidden_size": 65_536,
    "intermediate_size": 1_000_000,
    "vocab_size": 2_000_000,
    "num_attention_heads": 1024,
}
FULL = "full_attention"
SLIDING = "sliding_attention"


class Described:
    """What a family's config says. `Architecture` goes on where this ends."""

    # Names
    name = ""  # the model_type of config.json
    mlx = ""  # the module of mlx_lm.models
    block_module = ""  # the one that has its blocks, where it is not `mlx`
    gguf = ""  # the architecture of llama.cpp; "": the family is not exported
    # kinds of rotary positions that llama.cpp knows there
    gguf_ropes: tuple[str, ...] = ("default", "linear", "yarn")
    # the type and architecture of a model that contains this one; stock mlx_lm opens no other form
    whole = ""
    wrapper = ""
    # (part of a tensor's name here, the same part of its name on disk)
    renamed: tuple[tuple[str, str], ...] = ()

    # What config.json leaves out or must have
    tied = False
    rope_theta = 10_000.0
    ffn_key = KEYS["ffn"]
    numbers: tuple[str, ...] = ()  # keys that it must have, numbers above 0
    # keys that it must have, because mlx-lm and transformers differ without them
    stated: tuple[str, ...] = ()
    # keys of which mlx-lm computes one value alone, and that value
    only: tuple[tuple[str, Any], ...] = ()
    block_lists: tuple[str, ...] = ("layer_types",)  # keys with a value for every block
    # kinds of rotary positions that it may have
    rope_kinds: tuple[str, ...] = tuple(config_checks.ROPE_NEEDS)

    # A block
    first_norms: tuple[str, ...] = ("input_layernorm",)  # before attention
    second_norms: tuple[str, ...] = ("post_attention_layernorm",)  # and behind it
    qkv_bias: bool | None = None  # None: as the config's attention_bias says
    # whether attention_bias gives o_proj a bias, and mlp_bias the MLP
    other_biases = True
    # RMSNorm of every query and key head, or of all of them as one vector
    head_norms: Literal["", "each", "all"] = ""
    mlp = "mlp"  # the part of a block behind attention
    gain_offset = 0.0  # norms multiply by their weights plus this
    interleaved = False  # llama.cpp rotates neighbouring rows of q and k

    in_order = False  # whether a model reads a sequence as one text; else several may share one

    # Cuts and training
    axes: tuple[str, ...] = DENSE  # that can be cut
    why = "it has none"  # the other axes cannot be cut; the end of a sentence
    heads_fill_hidden = True  # transformers demands that heads divide hidden
    # head_dim is hidden / heads, whatever the config says: neither is cut alone
    head_dim_follows = False
    float16 = True  # whether it holds the activations, as far as is known
    steps = 1  # factor of the default's steps: a repair does less for the family
    # which blocks are `fixed_blocks`
    why_fixed = "those that make keys and values for others, and the last one"
    measurable = True  # whether one block alone tells what any of them holds
    stacked = False  # whether experts are stacked on disk
    repairs = True  # whether a part of a block can be refitted in closed form

    def __init__(self, config: Config):
        self.config = config

    # Sizes

    def spelled_out(self) -> dict[str, Any]:
        """A copy of the config in which the family's own keys have their defaults.

        Keys that the file has in another place are copied to where mlx-lm reads them.
        """
        return dict(self.config)

    def normalised(self) -> dict[str, Any]:
        """A copy with rope_theta, rope_scaling, head_dim, kv heads and tying spelled out.

        transformers >= 5 writes only `rope_parameters`, mlx-lm's llama reads only the top-level
        keys and takes theta 10000 without them. An absent `tie_word_embeddings` is read as
        transformers reads it.
        """
        full = self.spelled_out()
        rope = full.get("rope_parameters") or {}
        rope = rope.get(FULL, rope)
        usual = {
            "rope_theta": rope.get("rope_theta", self.rope_theta),
            "rope_scaling": self.rope_scaling(rope),
            "num_key_value_heads": full["num_attention_heads"],
            "head_dim": full["hidden_size"] // full["num_attention_heads"],
        }
        for key, value in usual.items():
            if value is not None and full.get(key) is None:
                full[key] = value
        full["tie_word_embeddings"] = bool(full.get("tie_word_embeddings", self.tied))
        return full

    def rope_scaling(self, rope: Config) -> dict[str, Any] | None:
        """How positions are stretched, in mlx-lm's words, by the config's `rope_parameters`."""
        if rope.get("rope_type", "default") == "default":
            return None
        return {key: value for key, value in rope.items() if key != "rope_theta"}

    def keys(self) -> dict[str, str]:
        """{field of a `Shape`: key in config.json}."""
        return KEYS | {"ffn": self.ffn_key}

    @property
    def shape(self) -> Shape:
        """The sizes in the config."""
        full = self.normalised()
        return Shape(**{field: full[key] for field, key in self.keys().items()})

    @property
    def layers(self) -> int:
        """The number of blocks."""
        return int(self.config["num_hidden_layers"])

    @property
    def period(self) -> int:
        """How often the kinds of blocks repeat, where mlx-lm counts blocks; else 1."""
        return 1

    @property
    def side_width(self) -> int:
        """The number of channels that each block gets for every token from a table, or 0."""
        return 0

    @property
    def softcap(self) -> float:
        """c, where logits are c tanh(z / c); 0 where they are z."""
        return 0.0

    @property
    def norms_outputs(self) -> bool:
        """Whether norms stand behind attention and MLP: no output is linear in down_proj then."""
        return "post_feedforward_layernorm" in self.second_norms

    # Blocks that differ

    def attends(self, i: int) -> bool:
        """Whether block i has keys and values; else it carries a state of one size."""
        return True

    @property
    def attending(self) -> int:
        """The number of blocks that have keys and values."""
        return sum(self.attends(i) for i in range(self.layers))

    def key_owners(self) -> tuple[int | None, ...]:
        """For each block the block whose keys and values it uses; None: its own."""
        return (None,) * self.layers

    def ffn_size(self, i: int) -> int:
        """The FFN neurons of block i, of one expert in a mixture."""
        return int(self.config[self.ffn_key])

    def head_size(self, i: int) -> int:
        """The number of channels of each head of block i."""
        return self.shape.head_dim

    @property
    def widest(self) -> Shape:
        """The shape, with FFN and heads as large as they are in any block."""
        unlike = self.unlike_blocks()
        ffn = max(self.ffn_size(i) for i in unlike)
        head_dim = max(self.head_size(i) for i in unlike)
        return replace(self.shape, ffn=ffn, head_dim=head_dim)

    def active_ffn_size(self) -> int:
        """The FFN neurons that a token goes through in the widest block."""
        return self.widest.ffn

    def unlike_blocks(self) -> list[int]:
        """The first block of every size."""
        return [0]

    def largest_block(self) -> int:
        """The number of a block that has as many parameters as any other."""
        return max(self.unlike_blocks(), key=lambda i: (self.ffn_size(i), self.head_size(i)))

    def fixed_blocks(self) -> set[int]:
        """The blocks that no cut in depth may take."""
        return set()

    # Refusals: each is a MisError of one sentence, without the file

    def check(self) -> None:
        """Check every value of a config whose family is known."""
        config = self.config
        for key, most in SIZES.items():
            whole_number(config, key, most)
        config_checks.check_heads(config)
        complete = self.spelled_out()
        for key in ("rms_norm_eps", *self.numbers):
            positive_number(complete.get(key), key)
        self.check_positions()
        self.check_kinds(complete)
        for key in self.stated:
            if config.get(key) is None:
                why = f"{key} is missing, and mlx-lm and transformers then assume different things"
                raise MisError(f"{why}: use a model whose config.json has it")
        self.check_own()
        for key, only in self.only:
            if config.get(key) not in (None, only):
                raise MisError(
                    f"{key} is {config[key]!r}, but for a {self.name} only {only!r} is supported"
                )
        for key in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
            if config.get(key) not in (None, True, False):
                raise MisError(f"{key} is {config[key]!r}, but must be true or false")

    def check_positions(self) -> None:
        """Check how a model encodes the position of a token."""
        config_checks.check_whole_heads(self.config, self.name)
        config_checks.check_ropes(self.config, self.rope_kinds)

    def check_kinds(self, complete: Config) -> None:
        """Check the kind of each block. complete: `spelled_out`."""
        config_checks.check_list(self.config, "layer_types", {FULL, SLIDING})
        if SLIDING in (self.config.get("layer_types") or ()):
            whole_number(self.config, "sliding_window", config_checks.MOST_POSITIONS)

    def check_own(self) -> None:
        """Check what the family alone has."""
