"""Plain decoders: Llama and Mistral."""

from collections.abc import Sequence
from typing import Any

from mis_mlx.models.architectures import block_widths
from mis_mlx.models.architectures.base import Architecture
from mis_mlx.models.architectures.described import SLIDING
from mis_mlx.types import MisError


class Llama(Architecture):
    """The base, and the one whose students may have blocks of unequal width."""

    name = "llama"
    mlx = "llama"
    gguf = "llama"
    gguf_ropes = ("default", "linear", "yarn", "llama3")
    interleaved = True
    unequal_widths = True

    def require_unequal(self) -> None:
        """MisError where heads do not fill the hidden size, or blocks have windows."""
        config = self.config
        hidden = config["hidden_size"]
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or hidden // heads
        if head_dim * heads != hidden:
            raise MisError(
                f"blocks of unequal width need heads that fill the hidden size, but {heads} heads "
                f"of {head_dim} are not {hidden}: give --ffn with one width for all"
            )
        if SLIDING in (config.get("layer_types") or ()):
            raise MisError(
                "blocks of unequal width cannot have a sliding window: give --ffn with one width "
                "for all"
            )

    def unequal(self, widths: Sequence[int]) -> dict[str, Any]:
        """As a nemotron-nas."""
        self.require_unequal()
        return block_widths.of_llama(self.config, widths)


class Mistral(Architecture):
    """A llama under another name."""

    name = "mistral"
    mlx = "llama"
    gguf = "llama"
    gguf_ropes = ("default", "linear", "yarn", "llama3")
    interleaved = True
