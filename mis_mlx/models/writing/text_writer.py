"""The writer of texts: prompts in, texts out as they end, of a model whole in memory or streamed.

Both write the same, and so do many texts side by side and each alone: a text depends on its prompt
and its seed (`draws`). Only where two tokens are equally likely, to the last digits that a batch of
another shape rounds differently, may texts part.

The two say what they take, and judge/write which of them fits.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import mlx.nn as nn

from mis_mlx.compute import precision
from mis_mlx.models.opening import load
from mis_mlx.models.passing.stream import Stream, load_checked
from mis_mlx.models.writing import continuous_batch, mlx_generate, streamed_batch, streamed_decode
from mis_mlx.models.writing.continuous_batch import Completion, Room
from mis_mlx.models.writing.draws import Draws
from mis_mlx.types import Checkpoint


class TextWriter:
    """A model that writes: whole in memory, as mlx-lm's, or read once for every token.

    room: for texts side by side; None: for all. where: what an error calls it.
    """

    def __init__(self, model: nn.Module | Stream, room: Room | None = None, where: str = ""):
        self._model = model
        self._room = room
        self._where = where

    @property
    def read_bytes(self) -> int:
        """Bytes that a streamed model was read so far; 0 for one that is whole in memory."""
        return self._model.reader.nbytes if isinstance(self._model, Stream) else 0

    def completions(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        stop: Collection[int],
        draws: Draws | None = None,
    ) -> Iterator[Completion]:
        """The token ids behind each prompt, each text as soon as it has ended.

        It ends with its stop token, or after `max_tokens`. draws: of the texts, by the number of
        their prompt; default: greedily.
        """
        if not prompts:
            return
        room = self._room or Room(len(prompts))
        draws = draws or Draws()
        batch: Any = streamed_batch if isinstance(self._model, Stream) else continuous_batch
        yield from batch.completions(
            self._model, prompts, max_tokens=max_tokens, stop=stop, room=room, draws=draws
        )

    def settled(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        stop: Collection[int],
        *,
        draft: Stream | None = None,
        guessed: int = 0,
    ) -> Iterator[list[int]]:
        """The greedy text behind one prompt, as it is settled: its tokens, some at a time.

        draft, guessed: as of `streamed_decode.decode`; for a streamed model.
        """
        if isinstance(self._model, Stream):
            yield from streamed_decode.decode(
                self._model, prompt, max_tokens, ends=stop, draft=draft, guessed=guessed
            )
            return
        for token in mlx_generate.greedy(self._model, prompt, max_tokens, where=self._where):
            yield [token]
            if token in stop:
                return

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        stop: Collection[int],
        draws: Draws | None = None,
    ) -> list[list[int]]:
        """`completions` in the order of the prompts."""
        ids = dict(self.completions(prompts, max_tokens, stop, draws))
        return [ids[number] for number in range(len(prompts))]


def opened(
    checkpoint: Checkpoint,
    headroom_bytes: int | None,
    *,
    direct: bool = False,
    room: Room | None = None,
) -> TextWriter:
    """A model's writer.

    headroom_bytes: memory for blocks of a streamed model that stay between passes; None: the model
    is whole in memory. direct: a streamed model is read past the page cache. room: as of
    TextWriter.
    """
    dtype = precision.dtype_of(checkpoint)
    if headroom_bytes is not None:
        return TextWriter(Stream(checkpoint, dtype, headroom_bytes, direct), room)
    model = load_checked(load.resident_model(checkpoint, dtype), f"{checkpoint.path}: ")
    return TextWriter(model, room, where=str(checkpoint.path))
