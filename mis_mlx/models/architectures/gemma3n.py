"""Gemma 3n E2B and E4B: per-layer inputs, AltUp's versions, and neurons that are silent."""

from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mis_mlx.models.architectures import altup, stock, stored_form
from mis_mlx.models.architectures.config_checks import whole_number
from mis_mlx.models.architectures.described import FULL, SLIDING
from mis_mlx.models.architectures.gemma3 import LOCAL
from mis_mlx.models.architectures.per_layer import (
    ROWS,
    SHARING,
    SOFTCAP,
    USE_HF,
    WIDTH,
    PerLayer,
)
from mis_mlx.models.architectures.shape import Shape, Shapes
from mis_mlx.types import MisError

VERSIONS = "altup_num_inputs"
LAUREL = "laurel_rank"  # of a block's second way around attention
SPARSITY = "activation_sparsity_pattern"  # for every block, the share of neurons that are silent
# What llama.cpp's gemma3n has in its program: keys of config.json, and the value.
FIXED = {VERSIONS: 4, "altup_active_idx": 0, LAUREL: 64, WIDTH: 256, SOFTCAP: 30.0}
OWN_KEYS = 20  # its first blocks, which have keys and values of their own
SPARSE = 10  # its first blocks, which silence neurons
SILENT = 0.95  # of the neurons of these blocks


class Gemma3n(PerLayer):
    """Blocks pass several versions of the hidden states on: see models/architectures/altup."""

    name = "gemma3n_text"
    mlx = "gemma3n"
    gguf = "gemma3n"
    numbers = (WIDTH, ROWS, "sliding_window", LOCAL, SOFTCAP, SHARING, "altup_coef_clip")
    stated = ("layer_types", SPARSITY, "altup_correct_scale")
    own = (VERSIONS, LAUREL, SPARSITY)
    only = (("rope_scaling", None), ("tie_word_embeddings", True))
    block_lists = ("layer_types", SPARSITY)
    rope_kinds = ("default",)
    fewer_rows = True
    whole = "gemma3n"
    wrapper = "Gemma3nForConditionalGeneration"
    why = (
        "its blocks pass several versions of the hidden states on, and norms stand behind "
        "attention and MLP"
    )
    repairs = False
    silences = True
    lora_names_matrices = True

    def spelled_out(self) -> dict[str, Any]:
        """With the base of positions in blocks with a window."""
        full = super().spelled_out()
        full.setdefault(LOCAL, self.local_theta())
        return full

    @property
    def versions(self) -> int:
        """The config's."""
        return int(self.config[VERSIONS])

    def check_own(self) -> None:
        """Check how many versions there are, which one is computed, which neurons are silent."""
        super().check_own()
        config = self.config
        count = whole_number(config, VERSIONS, 64)
        active = config.get("altup_active_idx")
        if type(active) is not int or not 0 <= active < count:
            raise MisError(f"altup_active_idx is {active!r}, but should be 0 to {count - 1}")
        whole_number(config, LAUREL, 65_536)
        shares = config[SPARSITY]
        if not isinstance(shares, list) or len(shares) != self.layers:
            raise MisError(f"{SPARSITY} must be a list of {self.layers}, one number for each block")
        for share in shares:
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
                raise MisError(f"a number of {SPARSITY} is {share!r}, but must be 0 to 1")

    def block_tensors(self, i: int, *, stacked: bool = False) -> Shapes:
        """First what predicts and corrects a block's versions, and its second way."""
        hidden = self.config["hidden_size"]
        versions = self.versions
        rank = self.config[LAUREL]
        tensors: Shapes = {
            "altup.correct_output_scale": (hidden,),
            "altup.correction_coefs.weight": (versions, versions),
            "altup.prediction_coefs.weight": (versions**2, versions),
            "altup.modality_router.weight": (versions, hidden),
            "altup.router_norm.weight": (hidden,),
            "laurel.linear_left.weight": (rank, hidden),
            "laurel.linear_right.weight": (hidden, rank),
            "laurel.post_laurel_norm.weight": (hidden,),
        }
        return tensors | super().block_tensors(i, stacked=stacked)

    def end_tensors(self) -> Shapes:
        """One matrix at either end for all versions but the first."""
        hidden = self.config["hidden_size"]
        tensors: Shapes = {}
        for kind in ("altup_projections", "altup_unembed_projections"):
            for number in range(self.versions - 1):
                tensors[f"model.{kind}.{number}.weight"] = (hidden, hidden)
        return tensors

    def gates(self) -> set[str]:
        """Those at the ends, too."""
        return super().gates() | {name.removesuffix(".weight") for name in self.end_tensors()}

    def further_widths(self) -> dict[str, int]:
        """Of Laurel, too."""
        return super().further_widths() | {LAUREL: int(self.config[LAUREL])}

    def block_gates(self) -> tuple[str, ...]:
        """Those of Laurel, too."""
        return (*super().block_gates(), "laurel.linear_left", "laurel.linear_right")

    def model_args(self) -> Any:
        """Those of the text part."""
        return stock.mlx_lm(f"models.{self.mlx}").TextConfig.from_dict(self.normalised())

    def new_block(self, args: Any, i: int) -> nn.Module:
        """mlx-lm's, called as other blocks that share keys."""
        return altup.block(self.module(), args, i)

    def new_model(self) -> nn.Module:
        """Of these blocks."""
        return altup.Model(self.module(), self.model_args(), self.key_owners())

    def new_exit(self) -> nn.Module:
        """All versions become one before the last norm."""
        config = self.config
        return altup.Exit(config["hidden_size"], self.versions, config["rms_norm_eps"])

    def new_entrance(self) -> nn.Module:
        """The scaled embedding becomes all versions."""
        return altup.Entrance(self.config["hidden_size"], self.versions)

    def enter(self, model: nn.Module, embedded: mx.array) -> mx.array:
        """All versions, side by side."""
        return model.model.enter(embedded)  # type: ignore[no-any-return]

    def leave(self, model: nn.Module, hidden: mx.array) -> mx.array:
        """Of their mean."""
        return model.model.leave(hidden)  # type: ignore[no-any-return]

    def side_channels(
        self, model: nn.Module, tokens: mx.array, embedded: mx.array
    ) -> mx.array | None:
        """As our own model computes them."""
        return model.model.side_channels(tokens, embedded)  # type: ignore[no-any-return]

    def cut(self, edited: dict[str, Any], shape: Shape, kept: Sequence[int]) -> None:
        """Both bases of positions stand where transformers reads them."""
        super().cut(edited, shape, kept)
        edited["rope_parameters"] = {
            FULL: {"rope_type": "default", "rope_theta": edited["rope_theta"]},
            SLIDING: {"rope_type": "default", "rope_theta": edited[LOCAL]},
        }

    def stored_config(self) -> dict[str, Any]:
        """That of a whole model with this text part."""
        return stored_form.whole_config(self)

    def stored_name(self, name: str) -> str:
        """In the whole model."""
        return stored_form.outer_name(name)

    def written_zeros(self) -> Shapes:
        """The unused keys and values: mlx-lm wants them, and uses none."""
        return self.unused_shapes()

    def gguf_source(self, name: str) -> str:
        """The text part's own."""
        return name

    def check_gguf(self) -> None:
        """llama.cpp has most of its sizes in its program."""
        config = self.config
        for key, value in FIXED.items():
            if config[key] != value:
                raise MisError(
                    f"{key} is {config[key]}, but llama.cpp's gemma3n has {value} in its program: "
                    f"{USE_HF}"
                )
        layers = self.layers
        own = layers - config[SHARING]
        if own != min(OWN_KEYS, layers):
            raise MisError(
                f"{own} of {layers} blocks have keys of their own, but in llama.cpp's gemma3n the "
                f"first {OWN_KEYS} have: {USE_HF}"
            )
        silent = [SILENT if i < SPARSE else 0.0 for i in range(layers)]
        if config[SPARSITY] != silent:
            raise MisError(
                f"llama.cpp's gemma3n silences {SILENT:.0%} of the neurons of the first {SPARSE} "
                f"blocks and none elsewhere, unlike this model: {USE_HF}"
            )
        super().check_gguf()

    def gguf_words(self) -> dict[str, Any]:
        """Versions, and how far above the mean a neuron of each block must be."""
        return super().gguf_words() | {
            "rope_freq_base_swa": self.normalised()[LOCAL],
            "altup_num_inputs": self.versions,
            "altup_active_idx": self.config["altup_active_idx"],
            "activation_sparsity_scale": [_deviations(share) for share in self.config[SPARSITY]],
        }


def _deviations(share: float) -> float:
    """The standard deviations above the mean that this share of normal numbers stays below."""
    return NormalDist().inv_cdf(share) if share else float("-inf")
