"""Which model families there are: a row says what a block of one holds and how it may be cut.

A new family is a new row of families.json; nothing else asks for a model's type. Does not read configs (models/config)
or weights."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

ALL = ("layers", "ffn", "experts", "heads", "kv_heads", "hidden")
TABLE = json.loads((Path(__file__).parent / "families.json").read_text("utf-8"))
DENSE = tuple(axis for axis in ALL if axis != "experts")
GATED = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Family:
    """One `model_type` of config.json, as mlx-lm and transformers read it."""

    name: str  # the model_type
    mlx: str  # the module of mlx_lm.models
    gguf: str  # the architecture of llama.cpp
    block: str = ""  # the module that has its TransformerBlock, where that is another one
    qkv_bias: bool | None = None  # None: as the config's attention_bias says
    other_biases: bool = True  # o_proj by attention_bias, the MLP by mlp_bias: those of other families have none
    head_norms: Literal["", "each", "all"] = ""  # RMSNorm of every query and key head, or of all of them as one vector
    sandwich: bool = False  # RMSNorm behind attention and MLP too, so that no output is linear in down_proj
    gain_offset: float = 0.0  # norms multiply by their weights and this much more
    tied: bool = False  # where the config does not say
    rope_theta: float = 10_000.0  # where the config has none
    heads_fill_hidden: bool = True  # transformers demands that heads divide the hidden size
    head_dim_follows: bool = False  # head_dim is hidden / heads, whatever the config says: neither is cut alone
    float16: bool = True  # holds its activations, as far as is known
    joined: bool = False  # q, k and v are rows of one matrix, gate and up of another
    own_positions: bool = False  # in a part of each head, or LongRoPE's
    scaled_queries: bool = False  # by their positions: its blocks take one argument more
    kinds: str = ""  # the config's key with a kind for every block, beside layer_types: cut along with the blocks
    period: str = ""  # the config's key of the period in which blocks differ by their place, which mlx-lm counts
    embedding_scale: str = ""  # the config's key, or "sqrt": of the hidden size
    logit_divisor: str = ""  # the config's key of what logits are divided by
    numbers: tuple[str, ...] = ()  # further keys that the config must have, numbers above 0
    mlp: str = "mlp"  # the part of a block behind attention
    experts: str = ""  # the config's key of how many experts are in there, of which a router (`gate`) chooses some
    ffn: str = "intermediate_size"  # the config's key of FFN neurons, of one expert where there are several
    matrices: tuple[str, str, str] = GATED  # of an expert: gate, up, down
    router: str = "gate"  # what chooses among them
    switch: str = "switch_mlp"  # what mlx-lm calls all of them, stacked
    stacked: bool = False  # so they lie on disk, too: stock loaders open no other form
    expert_bias: bool = False  # theirs and the router's; their activation is gpt_oss's then
    interleaved: bool = False  # llama.cpp turns neighbours in a row of q and k by positions
    sinks: bool = False  # a number for each head, in the softmax over positions; kinds of attention by layer_types
    gates_sum_to_1: bool = False  # over the experts that a token meets, in llama.cpp
    shared_expert: str = ""  # the config's key of the width of one more, which every token meets
    only: Mapping[str, Any] = field(default_factory=dict, hash=False)  # keys of which mlx-lm computes this value alone
    axes: tuple[str, ...] = DENSE
    why: str = "it has none"  # the others are not offered

    @property
    def own(self) -> set[str]:
        """The keys of config.json that it is told by."""
        keys = {self.kinds, self.period, self.embedding_scale, self.logit_divisor, self.experts, self.shared_expert}
        return {*keys, *self.numbers} - {"", "sqrt"}


def _row(name: str, facts: Mapping[str, Any]) -> Family:
    given: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in facts.items()}
    return Family(name, **given)


FAMILIES = {name: _row(name, facts) for name, facts in TABLE["families"].items()}
# Other types that hold one of these: which, and what they may leave out. phi3: joined, but turning as a llama does.
OPENED_AS: dict[str, dict[str, Any]] = TABLE["opened_as"]


def family(config: Mapping[str, Any]) -> Family:
    """The row of a config that was checked (`config.check_config`)."""
    return FAMILIES[config["model_type"]]
