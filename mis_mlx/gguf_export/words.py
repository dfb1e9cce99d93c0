"""llama.cpp's words for our numbers, read from words.json.

rewrapped: MLX's mode and bits → ggml's type of the same numbers. freqs: kind of rotary positions →
tensors that divide the frequencies. yarn: keys of stretched positions → the `GGUFWriter`'s word for
each. own: a family's own keys → the same. file_types: names that are not MOSTLY_ and the type.
"""

import json
from pathlib import Path

from mis_mlx.models.architectures import block_widths
from mis_mlx.models.architectures.families import Config, family
from mis_mlx.models.architectures.sizes import shape_of

WORDS = json.loads((Path(__file__).parent / "words.json").read_text("utf-8"))
REWRAPPED = WORDS["rewrapped"]
FREQS = WORDS["freqs"]
YARN = WORDS["yarn"]
OWN = WORDS["own"]
FILE_TYPES = WORDS["file_types"]


def of_unequal_blocks(config: Config) -> dict[str, list[int]]:
    """What llama.cpp is told of blocks that differ in FFN width; nothing of other families.

    Its deci reads a number for each block, of heads too.
    """
    if not family(config).blocks:
        return {}
    shape = shape_of(config)
    return {
        "feed_forward_length": list(block_widths.widths(config)),
        "head_count": [shape.heads] * shape.layers,
        "head_count_kv": [shape.kv_heads] * shape.layers,
    }
