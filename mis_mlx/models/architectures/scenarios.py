"""Named cuts: which share of each axis of a model stays.

Every scenario has a plain name, which says what it does, and the mountain name that the paper (or
we in its manner) gave it. Both are accepted wherever a scenario is named. Files have the plain one.
"""

from typing import Annotated, Literal

from mis_mlx.types import Shown

# A ratio per axis, kept / before. half-vocab and half-ffn: what was measured best at the size of
# balanced on SmolLM2-135M, with half of its tokens (benchmarks/vocabulary.py) and with all of them
# (28 of 30 layers, half of the FFN, benchmarks/recovery.py). The others: table 1 of the paper, on
# its 96-layer 8192/28672 teacher.
RATIOS: dict[str, dict[str, float]] = {
    "fewer-experts": {"experts": 3 / 4},
    "half-vocab": {"layers": 29 / 30, "ffn": 2 / 3, "vocab": 1 / 2},
    "half-ffn": {"layers": 28 / 30, "ffn": 1 / 2},
    "balanced": {"layers": 64 / 96, "ffn": 22528 / 28672},
    "narrow": {"hidden": 6144 / 8192},
    "ffn-only": {"ffn": 16384 / 28672},
    "shallow": {"layers": 64 / 96},
    "smallest": {"layers": 48 / 96, "ffn": 12288 / 28672},
}
# The mountain names, without Polish letters.
MOUNTAIN_NAMES = {
    "fewer-experts": "stado",
    "half-vocab": "redyk",
    "half-ffn": "gazda",
    "balanced": "goral",
    "narrow": "baca",
    "ffn-only": "halny",
    "shallow": "juhas",
    "smallest": "zbojnik",
}
NONE = "none"  # keeps every axis whole, unless another flag cuts it
PLAIN_NAMES = (*RATIOS, NONE)
Scenario = Annotated[
    Literal[
        "fewer-experts",
        "half-vocab",
        "half-ffn",
        "balanced",
        "narrow",
        "ffn-only",
        "shallow",
        "smallest",
        "none",
        "stado",
        "redyk",
        "gazda",
        "goral",
        "baca",
        "halny",
        "juhas",
        "zbojnik",
    ],
    Shown(PLAIN_NAMES),
]


def plain(name: str | None) -> str | None:
    """The plain name of a scenario in either spelling; what names no scenario, as it is."""
    for plain_name, mountain_name in MOUNTAIN_NAMES.items():
        if name == mountain_name:
            return plain_name
    return name
