"""gpt-oss: experts with biases, attention sinks, and a window in every other block."""

from collections.abc import Sequence
from typing import Any

import mlx.nn as nn

from mis_mlx.models.architectures.described import SLIDING
from mis_mlx.models.architectures.mixture import Mixture
from mis_mlx.models.architectures.shape import Shapes
from mis_mlx.types import MisError


class GptOss(Mixture):
    """A number for each head takes part in the softmax over positions."""

    name = "gpt_oss"
    mlx = "gpt_oss"
    gguf = "gpt-oss"
    other_biases = True
    rope_theta = 150_000.0
    heads_fill_hidden = False
    float16 = False
    experts_key = "num_local_experts"
    router = "router"
    switch = "experts"
    stacked = True  # stock loaders open no other form
    expert_bias = True
    activation = "activations.SwigluOAI"
    gates_sum_to_1 = True
    only = (("attention_bias", True), ("swiglu_limit", 7.0), ("tie_word_embeddings", False))
    axes = ("ffn", "experts")

    def check_own(self) -> None:
        """Check experts, and that the kinds of blocks are stated."""
        super().check_own()
        if not self.config.get("layer_types"):
            raise MisError("layer_types is missing, which says which blocks see all tokens")

    def mixer_tensors(self, i: int) -> Shapes:
        """With a sink for each head."""
        return super().mixer_tensors(i) | {"self_attn.sinks": (self.shape.heads,)}

    def new_block(self, args: Any, i: int) -> nn.Module:
        """mlx-lm's, told its kind, which `stock.window` asks for."""
        block = super().new_block(args, i)
        block.use_sliding = args.layer_types[i] == SLIDING
        return block

    def new_model(self) -> nn.Module:
        """Its blocks are told their kinds, too."""
        model = super().new_model()
        for i, block in enumerate(model.model.layers):
            block.use_sliding = model.args.layer_types[i] == SLIDING
        return model

    def gguf_windows(self, slides: Sequence[bool]) -> bool:
        """In every other block, from the first."""
        return slides == [i % 2 == 0 for i in range(len(slides))]

    def gguf_words(self) -> dict[str, Any]:
        """The window, too."""
        return super().gguf_words() | {"sliding_window": self.model_args().sliding_window}
