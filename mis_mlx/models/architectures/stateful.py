"""Models of which some blocks carry a state of one size in place of keys and values."""

import mlx.nn as nn

from mis_mlx.models.architectures import config_checks
from mis_mlx.models.architectures.base import Architecture
from mis_mlx.models.architectures.described import FULL
from mis_mlx.models.architectures.shape import Config, weight_count
from mis_mlx.types import MisError


class Stateful(Architecture):
    """Blocks of two kinds, which `layer_types` lists."""

    model_class = "Model"  # of mlx-lm's module
    other_kind = ""  # in layer_types, of blocks without attention
    qkv_bias = False
    other_biases = False
    head_norms = "each"
    rope_kinds = ("default",)

    def attends(self, i: int) -> bool:
        """By its kind."""
        return bool(self.config["layer_types"][i] != self.other_kind)

    def unlike_blocks(self) -> list[int]:
        """The first block of each kind."""
        kinds = self.config["layer_types"]
        return [kinds.index(kind) for kind in dict.fromkeys(kinds)]

    def largest_block(self) -> int:
        """By what it has, for FFNs and heads are alike."""
        return max(self.unlike_blocks(), key=lambda i: weight_count(self.block_tensors(i)))

    def check_kinds(self, complete: Config) -> None:
        """Some blocks of each kind."""
        known = {FULL, self.other_kind}
        config_checks.check_list(self.config, "layer_types", known)
        if set(self.config.get("layer_types") or known) != known:
            raise MisError(
                f"all blocks are {self.config['layer_types'][0]}, but mlx-lm's {self.name} needs "
                f"some of each of {' and '.join(sorted(known))}"
            )

    def new_model(self) -> nn.Module:
        """mlx-lm's, of these blocks."""
        args = self.model_args()
        model: nn.Module = getattr(self.module(), self.model_class)(args)
        model.model.layers = [self.new_block(args, i) for i in range(self.layers)]
        return model
