"""Text that a model writes itself: what it knows comes back in a student, where no corpus shows it.

Half of the texts begin with nothing, half with an opening. They are drawn from the model's own probabilities, so they
are the text that it expects; loops, repeats and what is hardly words are left out."""

import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mis_mlx.models import mlx_generate
from mis_mlx.planner.estimates import ModelSize, keys_bytes
from mis_mlx.types import MisError

OPENINGS = Path(__file__).parents[1] / "data" / "openings"
DOCUMENT = "<|endoftext|>"  # what stands between documents, where a vocabulary has it
AT_ONCE = 48  # texts; a token of all of them reads the weights once
TRIES = 4  # batches for each one that would do if every text were usable
SHORT, LEAST, WORDLIKE = 120, 0.28, 0.6  # characters; share left by compression; share of letters and blanks


class Written(NamedTuple):
    """A text, and the batch that it came in, counted from 0."""

    text: str
    batch: int


def openings(languages: Sequence[str], file: str | None = None) -> list[str]:
    """Lines of a file, or ours in these languages. MisError where there are none."""
    known = {path.stem: path for path in sorted(OPENINGS.glob("*.txt"))}
    if unknown := [name for name in languages if name not in known]:
        raise MisError(f"there are no openings in {', '.join(unknown)}: take {', '.join(known)}, or --openings FILE")
    try:
        paths = [Path(file)] if file else [known[name] for name in languages]
        lines = [line.strip() for path in paths for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise MisError(f"--openings {file} cannot be read ({error}): give a text file, one opening a line") from None
    if file and not lines:
        raise MisError(f"--openings {file} has 0 lines with text: write one opening a line")
    return lines


def usable(text: str) -> bool:
    """Whether a text is long enough, no loop, and made of words."""
    words = sum(char.isalpha() or char.isspace() for char in text)
    packed, nbytes = len(zlib.compress(text.encode())), len(text.encode())
    return len(text) >= SHORT and packed >= LEAST * nbytes and words >= WORDLIKE * len(text)


def need_bytes(m: ModelSize, at_once: int, tokens: int) -> int:
    """Memory of the model whole, of keys and values, and of logits and their copies."""
    weights = m.nbytes + m.item * (m.shape.layers * m.block_params + m.head_params)
    return weights + at_once * (2 * keys_bytes(m, tokens) + 4 * 4 * m.shape.vocab)


def write(
    model: Any, tokenizer: Any, begun: Sequence[str], batches: range, length: int, temperature: float, seed: int,
    at_once: int,
) -> Iterator[Written]:  # fmt: skip
    """The usable texts of these batches, of up to `length` tokens each. Every batch has its own random numbers."""
    named = tokenizer.get_vocab().get(DOCUMENT, tokenizer.bos_token_id)
    start, stop = [tokenizer.eos_token_id if named is None else named], set(tokenizer.eos_token_ids)
    for batch in batches:
        rng = np.random.default_rng([seed, batch])
        texts = [str(rng.choice(begun)) if begun and i % 2 else "" for i in range(at_once)]
        prompts = [start + list(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
        draw = mlx_generate.sampler(temperature, int(rng.integers(2**31)))
        completions = mlx_generate.groups(model, prompts, 1, length, stop, draw, at_once)
        for opening, (ids,) in zip(texts, completions, strict=True):
            text = (opening + tokenizer.decode([token for token in ids if token not in stop])).strip()
            if usable(text):
                yield Written(text, batch)
        mx.clear_cache()
