"""Mixtures of experts: a router chooses some gated MLPs for each token, and may have company.

An expert's tensors are called one by one, as on the hub and here, or stacked, as mlx-lm writes
them.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import mlx.nn as nn

from mis_mlx.models.architectures import stock
from mis_mlx.models.architectures.base import Architecture
from mis_mlx.models.architectures.config_checks import whole_number
from mis_mlx.models.architectures.described import SIZES
from mis_mlx.models.architectures.experts import Expert, Experts, ReadExperts
from mis_mlx.models.architectures.shape import GATED, Shapes
from mis_mlx.types import MisError, TensorAt

MOST_EXPERTS = 4096
ACTIVE = "num_experts_per_tok"


class Mixture(Architecture):
    """A decoder whose blocks have experts in the place of the MLP."""

    experts_key = "num_experts"  # the config's key of their number in a block
    # the config's key of the width of an expert that every token uses
    shared_key = ""
    matrices: tuple[str, str, str] = GATED  # of an expert: gate, up, down
    router = "gate"  # the matrix that chooses among experts
    switch = "switch_mlp"  # mlx-lm's name of all experts, stacked
    expert_bias = False  # of experts and router
    activation = "switch_layers.SwiGLU"  # mlx-lm's
    gates_sum_to_1 = False  # over the experts that a token uses, in llama.cpp

    other_biases = False
    repairs = False
    numbers = (ACTIVE,)
    axes: tuple[str, ...] = ("layers", "ffn", "experts")
    why = "this is not implemented for mixtures of experts"

    def keys(self) -> dict[str, str]:
        """With the number of experts."""
        return super().keys() | {"experts": self.experts_key}

    def check_own(self) -> None:
        """Check how many experts there are, how many each token uses, and how wide they are."""
        config = self.config
        experts = whole_number(config, self.experts_key, MOST_EXPERTS)
        active = whole_number(config, ACTIVE, MOST_EXPERTS)
        if active > experts:
            raise MisError(
                f"a token uses {active} experts ({ACTIVE}), but there are only {experts}"
            )
        for key in (self.ffn_key, self.shared_key):
            if key:
                whole_number(config, key, SIZES["intermediate_size"])

    def check_sizes(self, sizes: Mapping[str, int]) -> None:
        """Enough experts for every token, too."""
        left = sizes["experts"]
        active = self.config[ACTIVE]
        if left < active:
            raise MisError(
                f"--experts leaves {left}, but a token uses {active} of them: keep {active} or more"
            )
        super().check_sizes(sizes)

    @property
    def shared_width(self) -> int:
        """The width of an expert that every token uses, or 0."""
        return int(self.config.get(self.shared_key) or 0)

    def active_ffn_size(self) -> int:
        """Of the experts that a token uses, and of the shared one."""
        return int(super().active_ffn_size() * self.config[ACTIVE] + self.shared_width)

    def mlp_tensors(self, i: int, *, stacked: bool) -> Shapes:
        """A router, the experts one by one or stacked, and perhaps one that every token uses."""
        s = self.shape
        hidden = s.hidden
        ffn = s.ffn
        tensors: Shapes = {}

        def add(name: str, *shape: int) -> None:
            stem = f"{self.mlp}.{name}"
            tensors[f"{stem}.weight"] = shape
            if self.expert_bias:
                tensors[f"{stem}.bias"] = shape[:-1]

        add(self.router, s.experts, hidden)
        places = [f"experts.{e}" for e in range(s.experts)]
        names = self.matrices
        stack: tuple[int, ...] = ()
        if stacked:
            places = [self.switch]
            names = GATED
            stack = (s.experts,)
        gate, up, down = names
        for place in places:
            add(f"{place}.{gate}", *stack, ffn, hidden)
            add(f"{place}.{up}", *stack, ffn, hidden)
            add(f"{place}.{down}", *stack, hidden, ffn)

        shared = self.shared_width
        if shared:
            stem = f"{self.mlp}.shared_expert"
            tensors[f"{stem}.gate_proj.weight"] = (shared, hidden)
            tensors[f"{stem}.up_proj.weight"] = (shared, hidden)
            tensors[f"{stem}.down_proj.weight"] = (hidden, shared)
            tensors[f"{stem}_gate.weight"] = (1, hidden)
        return tensors

    # Names

    def one_by_one(self, path: str) -> list[str]:
        """The paths of all experts' parts of a stacked matrix; this is the inverse of `joined`."""
        stem, _, name = path.partition(f"{self.switch}.")
        kind = name.split(".")[0]
        if kind not in GATED:
            return [path]
        own = name.replace(kind, self.matrices[GATED.index(kind)])
        return [f"{stem}experts.{e}.{own}" for e in range(self.shape.experts)]

    def joined(self, path: str) -> str:
        """mlx-lm's path of the stacked matrix that an expert's matrix is part of."""
        match = re.fullmatch(r"(.*\.)experts\.\d+\.(\w+)", path)
        if not match:
            return path
        kind = GATED[self.matrices.index(match[2])]
        return f"{match[1]}{self.switch}.{kind}"

    def apart(
        self, stacked: re.Match[str], name: str, tensor_at: TensorAt
    ) -> Iterator[tuple[str, TensorAt]]:
        """Every expert's part of a tensor (E, out, in), with its name here."""
        count = self.shape.experts
        stored_count = tensor_at.shape[0] if tensor_at.shape else 0
        if stored_count != count:
            raise MisError(
                f"{tensor_at.file}: {name} has {stored_count} experts, but config.json says "
                f"{count}: download it again"
            )
        stem, kind, tensor = stacked.groups()
        matrix = self.matrices[GATED.index(kind)]
        size = tensor_at.nbytes // count
        for e in range(count):
            part = replace(
                tensor_at,
                shape=tensor_at.shape[1:],
                offset=tensor_at.offset + e * size,
                nbytes=size,
                stored=(name, tensor_at),
            )
            yield f"{stem}experts.{e}.{matrix}.{tensor}", part

    # Modules

    def new_expert(self) -> Expert:
        """One expert of random weights."""
        s = self.shape
        module, _, kind = self.activation.partition(".")
        activation = getattr(stock.mlx_lm(f"models.{module}"), kind)()
        return Expert(self.matrices, s.hidden, s.ffn, activation, bias=self.expert_bias)

    def separate_experts(self, block: nn.Module, read_experts: ReadExperts | None = None) -> None:
        """Replace the stacked experts of one of mlx-lm's blocks by `Experts`.

        read_experts: as of `Experts`; default: the experts are modules of this block, of random
        weights.
        """
        part = block[self.mlp]
        part.pop(self.switch)
        parts = []
        if not read_experts:
            parts = [self.new_expert() for _ in range(self.shape.experts)]
        part.experts = Experts(parts, read_experts)
        if self.switch != "experts":
            # mlx-lm's code reads this attribute. It stays outside the module's tree, which has the
            # experts once, under the name that their tensors have on disk.
            object.__setattr__(part, self.switch, part.experts)

    def prepare(self, model: nn.Module) -> None:
        """Experts one by one in every block."""
        for block in model.model.layers:
            self.separate_experts(block)

    # llama.cpp

    def gguf_source(self, name: str) -> str:
        """Of a stacked matrix without the number of an expert."""
        stem, found, kind = name.partition("switch_mlp.")
        if not found:
            return super().gguf_source(name)
        matrix, _, end = kind.partition(".")
        return f"{stem}experts.{self.matrices[GATED.index(matrix)]}.{end}"

    def check_gguf(self) -> None:
        """llama.cpp has in its program whether gates sum to 1."""
        super().check_gguf()
        sum_to_1 = self.gates_sum_to_1
        if self.config.get("norm_topk_prob", sum_to_1) != sum_to_1:
            raise MisError(
                f"norm_topk_prob is {not sum_to_1}, but llama.cpp's {self.gguf} only knows the "
                f"opposite: use --format hf"
            )

    def gguf_words(self) -> dict[str, Any]:
        """How many experts there are, and their width."""
        s = self.shape
        words = {
            "expert_count": s.experts,
            "expert_used_count": self.config[ACTIVE],
            "expert_feed_forward_length": s.ffn,
        }
        if self.shared_key:
            words["expert_shared_feed_forward_length"] = self.config[self.shared_key]
        return super().gguf_words() | words


class Qwen3Moe(Mixture):
    """Qwen 3 with experts in every block."""

    name = "qwen3_moe"
    mlx = "qwen3_moe"
    gguf = "qwen3moe"
    qkv_bias = False
    head_norms = "each"
    heads_fill_hidden = False
    rope_theta = 1e6
    ffn_key = "moe_intermediate_size"
    gates_sum_to_1 = True
    only = (("mlp_only_layers", []), ("decoder_sparse_step", 1))


class Qwen2Moe(Mixture):
    """Qwen 2 with experts, and one that every token uses."""

    name = "qwen2_moe"
    mlx = "qwen2_moe"
    gguf = "qwen2moe"
    qkv_bias = True
    head_dim_follows = True
    rope_theta = 1e6
    ffn_key = "moe_intermediate_size"
    shared_key = "shared_expert_intermediate_size"
    only = (
        ("norm_topk_prob", False),
        ("mlp_only_layers", []),
        ("decoder_sparse_step", 1),
        ("tie_word_embeddings", False),
    )


class Mixtral(Mixture):
    """A mistral with experts, under other names."""

    name = "mixtral"
    mlx = "mixtral"
    gguf = "llama"
    gguf_ropes = ("default", "linear", "yarn", "llama3")
    qkv_bias = False
    head_dim_follows = True
    interleaved = True
    rope_theta = 1e6
    experts_key = "num_local_experts"
    mlp = "block_sparse_moe"
    matrices = ("w1", "w3", "w2")
    gates_sum_to_1 = True
    only = (("sliding_window", None),)


class Olmoe(Mixture):
    """Queries and keys are normed over all heads."""

    name = "olmoe"
    mlx = "olmoe"
    gguf = "olmoe"
    head_norms = "all"
    head_dim_follows = True
    only = (("clip_qkv", None), ("attention_bias", False))

    def check_gguf(self) -> None:
        """llama.cpp norms as many key heads as query heads."""
        s = self.shape
        if s.kv_heads != s.heads:
            raise MisError(
                f"llama.cpp's {self.gguf} has a key-value head for every head, but this model has "
                f"fewer: use --format hf"
            )
        super().check_gguf()
