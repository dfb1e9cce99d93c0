"""What a smaller vocabulary costs in languages that its text perhaps lacks: three short texts of
our own, one story in each.

A vocabulary is safe only for what it was chosen on. Words of other languages fall into pieces, and
a model reads these worse.
"""

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from mis_mlx.data import token_windows
from mis_mlx.hardware.stage_cost import StageCost, in_turn
from mis_mlx.judge import score
from mis_mlx.judge.comparison import comparison_cost
from mis_mlx.models.opening import load
from mis_mlx.models.opening.model_size import ModelSize
from mis_mlx.models.passing.stream import Stream
from mis_mlx.types import Checkpoint

FOLDER = Path(__file__).parents[1] / "data" / "languages"
TOKENS = 400  # of a text, about: a token has two of its bytes where words fall into pieces


@cache
def texts() -> dict[str, str]:
    """{language: its text}; read once a process, for a plan asks many times."""
    return {path.stem: path.read_text("utf-8").strip() for path in sorted(FOLDER.glob("*.txt"))}


def bits_per_byte(model: Checkpoint) -> dict[str, float]:
    """{language: bits that a byte of its text costs a model}. One streamed pass.

    MisError where the tokenizer has neither a start nor an end token.
    """
    tokenizer = load.tokenizer(model.path)
    before = token_windows.start_tokens(tokenizer) or [token_windows.end_token(tokenizer)]
    spoken = texts()
    own = [tokenizer.encode(text, add_special_tokens=False) for text in spoken.values()]
    spoken_texts = [[*before, *ids] for ids in own]
    found = score.of_last_tokens(Stream(model), spoken_texts, [*map(len, own)])
    costs = {}
    for (language, text), values in zip(spoken.items(), found, strict=True):
        costs[language] = -float(values.sum()) / math.log(2) / len(text.encode())
    return costs


def excess(teacher: Checkpoint, student: Checkpoint) -> dict[str, float]:
    """{language: bits a byte that a student loses in it}."""
    before = bits_per_byte(teacher)
    after = bits_per_byte(student)
    return {language: round(after[language] - before[language], 4) for language in before}


def excess_cost(models: Sequence[ModelSize]) -> StageCost:
    """What `excess` takes: each model reads all texts in one pass, and its head comes in parts."""
    passes = [comparison_cost([m], windows=len(texts()), length=TOKENS) for m in models]
    return in_turn("languages", *passes)
