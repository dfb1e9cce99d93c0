"""A model, opened to write: whole in memory, or streamed from disk. Both write the same.

evaluation/writing_cost says what each takes, and which of them fits.
"""

import itertools
from collections.abc import Collection, Sequence
from typing import Any

import mlx.core as mx

from mis_mlx.compute import precision
from mis_mlx.models import load, mlx_generate, streamed_decode
from mis_mlx.models.mlx_generate import Sampler
from mis_mlx.models.stream import Stream, load_checked
from mis_mlx.types import Checkpoint


class TextWriter:
    """A model that is read once, or once for every token.

    headroom_bytes: memory for blocks of a streamed model that stay between passes; None: the model
    is whole in memory. direct: a streamed model is read past the page cache.
    """

    def __init__(self, checkpoint: Checkpoint, headroom_bytes: int | None, direct: bool = False):
        dtype = precision.dtype_of(checkpoint)
        self._resident: Any = None
        self._stream: Stream | None = None
        if headroom_bytes is None:
            self._resident = load_checked(
                load.resident_model(checkpoint, dtype), f"{checkpoint.path}: "
            )
        else:
            self._stream = Stream(checkpoint, dtype, headroom_bytes, direct)

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        stop: Collection[int],
        samplers: Sequence[Sampler] = (),
    ) -> list[list[int]]:
        """Token ids behind each prompt, all written side by side.

        Each ends with its stop token, or after `max_tokens`. samplers: one a prompt, so that a text
        does not depend on the others; none: greedily.
        """
        greedily = mlx_generate.sampler(0.0, 0)
        if self._stream is not None:
            draw = _side_by_side(samplers, prompts) if samplers else greedily
            return streamed_decode.sampled(
                self._stream, prompts, max_tokens=max_tokens, stop=stop, draw=draw
            )
        completions = mlx_generate.groups(
            self._resident,
            prompts,
            count=1,
            max_tokens=max_tokens,
            stop=stop,
            draw=samplers or greedily,
            at_once=len(prompts),
        )
        return [ids for (ids,) in completions]


def _side_by_side(samplers: Sequence[Sampler], prompts: Sequence[Sequence[int]]) -> Sampler:
    """One sampler for `streamed_decode.sampled`, which asks for a token of every text at a time.

    A text's own sampler is first asked at the end of its prompt, as for a model that is whole in
    memory.
    """
    positions = itertools.count()

    def draw(log_probs: mx.array) -> mx.array:
        position = next(positions)
        tokens = []
        for number, sampler in enumerate(samplers):
            in_answer = position >= len(prompts[number]) - 1
            if in_answer:
                tokens.append(sampler(log_probs[number : number + 1]))
            else:
                tokens.append(mx.zeros(1, mx.uint32))
        return mx.concatenate(tokens)

    return draw
