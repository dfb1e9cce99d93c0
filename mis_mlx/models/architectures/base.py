"""What the rest of the program asks of a model's architecture, answered for a plain decoder.

An `Architecture` belongs to one config.json. A block of a plain decoder is a norm, attention, a
norm and a gated MLP, each added to the stream of hidden states; all blocks are alike. A family is a
class in a file of this room that overrides what differs, and `families` lists them all. What it
does not override is said here and in `described`. No weights are read.
"""

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mis_mlx.models.architectures import stock
from mis_mlx.models.architectures.described import FULL, SLIDING, Described
from mis_mlx.models.architectures.shape import Config, Shape, Shapes
from mis_mlx.types import MisError


class Architecture(Described):
    """A plain decoder of one config, and the base of all families."""

    # Tensors

    def block_tensors(self, i: int, *, stacked: bool = False) -> Shapes:
        """Names (without `model.layers.N.`) and shapes of block i's tensors, in forward order.

        stacked: all experts' matrices in one (E, out, in), as mlx-lm has them.
        """
        tensors = self._norms(self.first_norms)
        tensors |= self.mixer_tensors(i)
        tensors |= self._norms(self.second_norms)
        return tensors | self.mlp_tensors(i, stacked=stacked)

    def _norms(self, names: Sequence[str]) -> Shapes:
        """Norms of hidden states."""
        return {f"{name}.weight": (self.config["hidden_size"],) for name in names}

    def mixer_tensors(self, i: int) -> Shapes:
        """The tensors of attention, or of what stands in its place."""
        s = self.shape
        has_keys = self.key_owners()[i] is None
        biased = bool(self.config.get("attention_bias"))
        qkv_bias = biased if self.qkv_bias is None else self.qkv_bias
        tensors: Shapes = {}
        for name, out in self.projections(i, has_keys=has_keys).items():
            tensors |= linear(f"self_attn.{name}", out, s.hidden, bias=qkv_bias)
        tensors |= self._head_norms(i, has_keys=has_keys)
        q_size = s.heads * self.head_size(i)
        o_bias = self.other_biases and biased
        return tensors | linear("self_attn.o_proj", s.hidden, q_size, bias=o_bias)

    def projections(self, i: int, *, has_keys: bool) -> dict[str, int]:
        """{matrix: its rows}, of those that make block i's queries, keys and values."""
        s = self.shape
        head_dim = self.head_size(i)
        rows = {"q_proj": s.heads * head_dim}
        if has_keys:
            rows["k_proj"] = s.kv_heads * head_dim
            rows["v_proj"] = s.kv_heads * head_dim
        return rows

    def _head_norms(self, i: int, *, has_keys: bool) -> Shapes:
        """The norms of queries and keys: over each head, or over all heads as one vector."""
        if not self.head_norms:
            return {}
        s = self.shape
        q_heads = 1
        k_heads = 1
        if self.head_norms == "all":
            q_heads = s.heads
            k_heads = s.kv_heads
        head_dim = self.head_size(i)
        norms: Shapes = {"self_attn.q_norm.weight": (q_heads * head_dim,)}
        if has_keys:
            norms["self_attn.k_norm.weight"] = (k_heads * head_dim,)
        return norms

    def mlp_tensors(self, i: int, *, stacked: bool) -> Shapes:
        """The tensors of the gated MLP, or of the experts in its place."""
        hidden = self.config["hidden_size"]
        ffn = self.ffn_size(i)
        bias = self.other_biases and bool(self.config.get("mlp_bias"))
        tensors: Shapes = {}
        for name in ("gate_proj", "up_proj"):
            tensors |= linear(f"mlp.{name}", ffn, hidden, bias=bias)
        return tensors | linear("mlp.down_proj", hidden, ffn, bias=bias)

    def side_tensors(self) -> Shapes:
        """The tensors that make the per-layer inputs, outside of blocks."""
        return {}

    def unused_shapes(self) -> Shapes:
        """Tensors that a published model has, and does not use."""
        return {}

    def gates(self) -> set[str]:
        """Module paths of the small matrices that always have 8 bits."""
        return set()

    def state_gates(self) -> set[str]:
        """The same of what says how much a state forgets and learns of a token."""
        return set()

    def bit_floors(self) -> dict[str, int]:
        """{module path: the fewest bits} of large matrices that are rounded more carefully."""
        return {}

    def always_float32(self, name: str) -> bool:
        """Whether a tensor is float32 in a model of any type. name: here, or on disk."""
        return False

    def further_widths(self) -> dict[str, int]:
        """{key of the config: width of some small matrices' rows}, beside those of a shape."""
        return {}

    def one_by_one(self, path: str) -> list[str]:
        """The paths of all experts' parts of a stacked matrix; of another path, itself alone."""
        return [path]

    def joined(self, path: str) -> str:
        """mlx-lm's path of the stacked matrix that an expert's is part of; of another, itself."""
        return path

    # Work and state of a block, as numbers

    def attention_numbers(self, length: int) -> int:
        """What attention in windows of this length keeps for each token on a way back.

        Queries, keys and values, and scores.
        """
        s = self.widest
        return 2 * (s.heads + s.kv_heads) * s.head_dim + s.heads * length

    def mixer_numbers(self) -> int:
        """The same of what stands in place of attention; 0 where all blocks have it."""
        return 0

    def state_bytes(self, item: int) -> int:
        """What a block without attention carries of one text. item: bytes of a number."""
        return 0

    def states_bytes(self, item: int) -> int:
        """What all blocks without attention carry of one text. item: bytes of a number.

        A gated delta rule's matrices are float32 all the same.
        """
        return (self.layers - self.attending) * self.state_bytes(item)

    def largest_numbers(self, length: int) -> int:
        """`attention_numbers` or `mixer_numbers`, of the block that holds most."""
        return max(self.attention_numbers(length), self.mixer_numbers())

    def all_numbers(self, length: int) -> int:
        """The same of all blocks together."""
        others = self.layers - self.attending
        return self.attending * self.attention_numbers(length) + others * self.mixer_numbers()

    # Modules

    def module(self) -> ModuleType:
        """mlx-lm's module that has the family's blocks."""
        return stock.mlx_lm(f"models.{self.block_module or self.mlx}")

    def model_args(self) -> Any:
        """mlx-lm's ModelArgs, or what it has in their place for the text part."""
        return stock.mlx_lm(f"models.{self.mlx}").ModelArgs.from_dict(self.normalised())

    def new_block(self, args: Any, i: int) -> nn.Module:
        """Block `i` as mlx-lm makes it, of random weights; called with (x, mask, cache)."""
        return stock.new_block(self.module(), args, i)

    def new_model(self) -> nn.Module:
        """A whole model of random weights; its `model` gives the head's input."""
        model: nn.Module = stock.mlx_lm(f"models.{self.mlx}").Model(self.model_args())
        return model

    def prepare(self, model: nn.Module) -> None:
        """Change a whole model that was just made, before it gets its weights."""

    def finish(self, model: nn.Module) -> None:
        """Change a whole model that has its weights."""

    def new_norm(self) -> nn.Module:
        """The last norm, of random weights."""
        return nn.RMSNorm(self.config["hidden_size"], eps=self.config["rms_norm_eps"])

    def embedding_scale(self, dtype: mx.Dtype) -> mx.array | None:
        """The factor of the embedding on its way into the first block, as in mlx-lm; None: 1."""
        return None

    def side_channels(self, model: nn.Module, tokens: mx.array, embedded: mx.array) -> mx.array:
        """Channels (B, T, L, P) of tokens (B, T) for all blocks of a whole model.

        embedded: (B, T, D). Asked where `side_width` is above 0.
        """
        raise NotImplementedError

    # Students

    def check_sizes(self, sizes: Mapping[str, int]) -> None:
        """MisError where transformers or mlx-lm builds no student of these sizes, by axis."""
        layers = sizes["layers"]
        fixed = len(self.fixed_blocks())
        if layers < fixed:
            raise MisError(
                f"{layers} layers of a {self.name} are too few: {fixed} blocks must stay "
                f"({self.why_fixed}): keep {fixed} or more"
            )
        if layers < self.period:
            raise MisError(
                f"{layers} layers of a {self.name} are fewer than {self.period}, which mlx-lm "
                f"needs: keep more"
            )
        hidden = sizes["hidden"]
        heads = sizes["heads"]
        if self.heads_fill_hidden and hidden % heads:
            why = f"is not a multiple of {heads} heads, as transformers requires for a {self.name}"
            raise MisError(f"hidden {hidden} {why}: choose --hidden as a multiple of {heads}")
        before = self.shape
        if self.head_dim_follows and hidden // heads != before.head_dim:
            why = (
                f"hidden ({before.hidden} to {hidden}) or heads alone, because its head size is "
                f"their quotient"
            )
            raise MisError(f"a {self.name} cannot change {why}: cut --layers and --ffn instead")

    def cut(self, edited: dict[str, Any], shape: Shape, kept: Sequence[int]) -> None:
        """Edit a student's config, which is normalised, to `shape`. kept: the blocks that stay."""
        for key in self.block_lists:
            if edited.get(key):
                edited[key] = [edited[key][i] for i in kept]
        for field, key in self.keys().items():
            edited[key] = getattr(shape, field)
        rope = edited.get("rope_parameters") or {}
        if FULL not in rope:
            scaling = edited.get("rope_scaling") or {}
            theta = {"rope_theta": edited["rope_theta"]}
            edited["rope_parameters"] = {"rope_type": "default", **rope, **scaling, **theta}

    # Files

    def own_config(self) -> dict[str, Any]:
        """A config as it is used here, of the one in the file, which was not checked yet."""
        return dict(self.config)

    def stored_config(self) -> dict[str, Any]:
        """The config as the family's files have it: what mlx-lm and transformers read."""
        return dict(self.config)

    def own_name(self, name: str) -> str:
        """The name here of a tensor or module that has this one on disk."""
        return renamed(name, [(stored, own) for own, stored in self.renamed])

    def stored_name(self, name: str) -> str:
        """The name on disk of a tensor or module that has this one here."""
        return renamed(name, self.renamed)

    # llama.cpp

    def check_gguf(self) -> None:
        """MisError where llama.cpp would compute another function than the model."""
        slides = [kind == SLIDING for kind in self.config.get("layer_types") or ()]
        if any(slides) and not self.gguf_windows(slides):
            raise MisError(
                f"llama.cpp's {self.gguf} has no sliding windows, but some layers here do: use "
                f"--format hf"
            )

    def query_gain(self) -> float:
        """What the weights of the queries' norm are multiplied by, for llama.cpp."""
        return 1.0

    def gguf_source(self, name: str) -> str:
        """The name by which gguf's own table knows one of our tensors."""
        return self.stored_name(name)

    def gguf_windows(self, slides: Sequence[bool]) -> bool:
        """Whether llama.cpp has windows in these blocks."""
        return False

    def gguf_yarn_keys(self, scaling: Config) -> set[str]:
        """Keys of YaRN's settings that llama.cpp reads for this family alone."""
        return set()

    def gguf_words(self) -> dict[str, Any]:
        """What llama.cpp is told beside the words of all families, by the `GGUFWriter`'s words."""
        return {}


def linear(name: str, out: int, into: int, *, bias: bool) -> Shapes:
    """The tensors of one linear layer."""
    tensors: Shapes = {f"{name}.weight": (out, into)}
    if bias:
        tensors[f"{name}.bias"] = (out,)
    return tensors


def renamed(name: str, parts: Sequence[tuple[str, str]]) -> str:
    """A tensor's or module's name with each first part replaced by the second one."""
    text = f"{name}."  # so that the name of a module ends as that of its tensors does
    for before, after in parts:
        text = text.replace(before, after)
    return text.removesuffix(".")
