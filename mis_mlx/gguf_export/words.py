"""llama.cpp's words for our numbers, read from words.json.

rewrapped: MLX's mode and bits → ggml's type of the same numbers. freqs: kind of rotary positions →
tensors that divide the frequencies. yarn: keys of stretched positions → the `GGUFWriter`'s word for
each. file_types: names that are not MOSTLY_ and the type.
"""

import json
from pathlib import Path

WORDS = json.loads((Path(__file__).parent / "words.json").read_text("utf-8"))
REWRAPPED = WORDS["rewrapped"]
FREQS = WORDS["freqs"]
YARN = WORDS["yarn"]
FILE_TYPES = WORDS["file_types"]
