"""Qwen 3.5: three blocks of four have a gated delta rule in place of attention.

The output of its attention has a gate, which stands in the rows of the queries. An error in a delta
rule stays in the state for all later tokens. A Qwen 3.5 27B in ParoQuant's 4 bits, its linear
attention with the rest, followed 40.3 % of IFEval's prompts where 57.8 % were followed before, as a
user measured (z-lab/paroquant, issue 45).
"""

from collections.abc import Mapping
from typing import Any

import mlx.nn as nn

from mis_mlx.models.architectures import config_checks, gated_delta, stored_form
from mis_mlx.models.architectures.config_checks import SHARE, whole_number
from mis_mlx.models.architectures.described import FULL
from mis_mlx.models.architectures.shape import Config, Shapes
from mis_mlx.models.architectures.stateful import Stateful
from mis_mlx.types import MisError

PERIOD = "full_attention_interval"
KEY_HEADS = "linear_num_key_heads"
VALUE_HEADS = "linear_num_value_heads"
KEY_DIM = "linear_key_head_dim"
VALUE_DIM = "linear_value_head_dim"
WIDTH = "linear_conv_kernel_dim"
DELTA_BITS = 5  # of the large matrices, at least


class Qwen35(Stateful):
    """The text part; its files have the form of the whole model."""

    name = "qwen3_5_text"
    mlx = "qwen3_5"
    gguf = ""
    whole = "qwen3_5"
    wrapper = "Qwen3_5ForConditionalGeneration"
    model_class = "TextModel"
    other_kind = "linear_attention"
    rope_theta = 1e5
    heads_fill_hidden = False
    numbers = (KEY_HEADS, VALUE_HEADS, KEY_DIM, VALUE_DIM, WIDTH)
    in_order = True
    only = (("rope_scaling", None), ("attention_bias", False), ("num_experts", 0))
    axes = ("layers", "ffn")
    why = "the heads of a gated delta rule and of gated attention are not ranked yet"
    renamed = (
        ("model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
    )

    @property
    def period(self) -> int:
        """The config's."""
        return int(self.config[PERIOD])

    def _values(self) -> int:
        """The channels of all value heads."""
        return int(self.config[VALUE_HEADS] * self.config[VALUE_DIM])

    def _joined(self) -> int:
        """The channels of queries, keys and values, which go through one convolution."""
        return int(2 * self.config[KEY_HEADS] * self.config[KEY_DIM]) + self._values()

    def check_positions(self) -> None:
        """A part of each head may rotate."""
        config = self.config
        usual = config["hidden_size"] // config["num_attention_heads"]
        config_checks.rotated_channels(config, self.name, config.get("head_dim") or usual)
        config_checks.check_ropes(config, self.rope_kinds)

    def check_kinds(self, complete: Config) -> None:
        """Check the heads of a delta rule, and that blocks with attention come in periods."""
        super().check_kinds(complete)
        config = self.config
        interval = whole_number(config, PERIOD, 1000)
        sizes = {key: whole_number(config, key, 65_536) for key in self.numbers}
        keys = sizes[KEY_HEADS]
        values = sizes[VALUE_HEADS]
        if values % keys:
            raise MisError(
                f"{VALUE_HEADS} is {values}, which {keys} key heads do not divide: this config is "
                f"not usable"
            )
        for i, kind in enumerate(config["layer_types"]):
            if (kind == FULL) != ((i + 1) % interval == 0):
                raise MisError(
                    f"layer_types says {kind} for block {i}, but mlx-lm counts attention in every "
                    f"{interval}th block: use another model"
                )

    def projections(self, i: int, *, has_keys: bool) -> dict[str, int]:
        """Queries have as many rows again, for a gate of attention's output."""
        rows = super().projections(i, has_keys=has_keys)
        return rows | {"q_proj": 2 * rows["q_proj"]}

    def mixer_tensors(self, i: int) -> Shapes:
        """z is the gate of a delta rule's output, a and b what each head forgets and learns."""
        if self.attends(i):
            return super().mixer_tensors(i)
        config = self.config
        hidden = config["hidden_size"]
        heads = config[VALUE_HEADS]
        values = self._values()
        joined = self._joined()
        return {
            "linear_attn.in_proj_qkv.weight": (joined, hidden),
            "linear_attn.in_proj_z.weight": (values, hidden),
            "linear_attn.in_proj_b.weight": (heads, hidden),
            "linear_attn.in_proj_a.weight": (heads, hidden),
            "linear_attn.conv1d.weight": (joined, config[WIDTH], 1),
            "linear_attn.dt_bias": (heads,),
            "linear_attn.A_log": (heads,),
            "linear_attn.norm.weight": (config[VALUE_DIM],),
            "linear_attn.out_proj.weight": (hidden, values),
        }

    def always_float32(self, name: str) -> bool:
        """How fast a state decays, as in mlx-lm."""
        return name.endswith(".A_log")

    def bit_floors(self) -> dict[str, int]:
        """Of the large matrices around delta rules."""
        paths = self._paths("in_proj_qkv", "in_proj_z", "out_proj")
        return dict.fromkeys(paths, DELTA_BITS)

    def state_gates(self) -> set[str]:
        """What says how much each head forgets and learns of a token."""
        return self._paths("in_proj_a", "in_proj_b")

    def _paths(self, *names: str) -> set[str]:
        """Module paths of these matrices in every block with a delta rule."""
        paths = set[str]()
        for i in range(self.layers):
            if not self.attends(i):
                paths.update(f"model.layers.{i}.linear_attn.{name}" for name in names)
        return paths

    def attention_numbers(self, length: int) -> int:
        """With the gate of queries."""
        s = self.widest
        return super().attention_numbers(length) + s.heads * s.head_dim

    def mixer_numbers(self) -> int:
        """Measured: benchmarks/hybrids.py."""
        return 3 * self._joined() + 4 * self._values()

    def state_bytes(self, item: int) -> int:
        """The last inputs of the convolution, and a matrix for each head, which is float32."""
        rows = (int(self.config[WIDTH]) - 1) * self._joined()
        return rows * item + 4 * self._values() * int(self.config[KEY_DIM])

    def model_args(self) -> Any:
        """Those of the text part, with the kind of each block."""
        full = self.normalised()
        full["rope_parameters"] = dict(full["rope_parameters"])  # it is changed in place
        args = self.module().TextModelArgs.from_dict(full)
        args.layer_types = list(self.config["layer_types"])
        return args

    def new_block(self, args: Any, i: int) -> nn.Module:
        """By its kind, which mlx-lm counts."""
        return gated_delta.block(self.module(), args, i)

    def own_config(self) -> dict[str, Any]:
        """With mlx-lm's defaults, and the kind of each block."""
        config = self.config
        own = dict(config)
        interval = whole_number(config, PERIOD, 1000, default=4)
        layers = whole_number(config, "num_hidden_layers", 1_000_000)
        own[PERIOD] = interval
        if config.get("layer_types") is None:
            attending = [(i + 1) % interval == 0 for i in range(layers)]
            own["layer_types"] = [FULL if yes else self.other_kind for yes in attending]
        rope = config.get("rope_parameters") or {}
        if isinstance(rope, Mapping):
            usual = {
                "rope_type": "default",
                "rope_theta": config.get("rope_theta") or self.rope_theta,
                SHARE: config.get(SHARE) or 0.25,
            }
            own["rope_parameters"] = {**usual, **rope}
        return own

    def stored_config(self) -> dict[str, Any]:
        """That of a whole model with this text part."""
        return stored_form.whole_config(self)
