"""The writer of texts: prompts in, texts out as they end, of a model whole in memory or streamed.

Both write the same, and so do many texts side by side and each alone: a text depends on its prompt
and its seed (`draws`). Only where two tokens are equally likely, to the last digits that a batch of
another shape rounds differently, may texts part.

A batch that waits for its longest text computes less and less with every token, although each
token still fetches all weights. So new texts begin when others have ended.
"""

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mis_mlx.compute import precision
from mis_mlx.models.architectures.families import family
from mis_mlx.models.opening import load
from mis_mlx.models.passing.resident import Resident
from mis_mlx.models.passing.stream import Stream, load_checked
from mis_mlx.models.writing.draws import Draws
from mis_mlx.models.writing.streamed_batch import Batch
from mis_mlx.types import Checkpoint, MisError

# In memory new texts begin when this share of the places is free: each beginning copies the keys
# and values of the whole batch. Where a pass reads the weights from disk, as soon as one is.
FREE_SHARE = 0.25


class Completion(NamedTuple):
    """The token ids behind prompt `number`, with the stop token where the text ended with one."""

    number: int
    ids: list[int]


@dataclass(frozen=True)
class Room:
    """The memory in which texts are written side by side.

    at_once: texts, at most. tokens: of each of them, its prompt included; None: however many. Of
    longer texts as many are written as have as many tokens together.
    """

    at_once: int
    tokens: int | None = None

    def texts(self, tokens: int) -> int:
        """How many texts fit where the longest one may have so many tokens; one always does."""
        if self.tokens is None or tokens <= self.tokens:
            return self.at_once
        return max(1, self.at_once * self.tokens // tokens)


class Queue:
    """Prompts that wait to be continued, the longest first.

    Texts that share a batch then have similar lengths, and memory is at its peak early.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], max_tokens: int, room: Room):
        self._tokens = [len(prompt) + max_tokens for prompt in prompts]
        numbers = range(len(prompts))
        self._waiting = deque(sorted(numbers, key=self._tokens.__getitem__, reverse=True))
        self._room = room

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def take(self, going_on: Collection[int], share: float = 0.0) -> list[int]:
        """The numbers of the prompts that begin now, beside the texts of these numbers.

        share: how much of the room has to be free, or nothing begins.
        """
        if not self._waiting:
            return []
        longest = max(self._tokens[number] for number in [*going_on, self._waiting[0]])
        places = self._room.texts(longest)
        free = places - len(going_on)
        if free <= 0 or free < share * places:
            return []
        return [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]


class TextWriter:
    """A model that writes: whole in memory, or read once for every token.

    room: for texts side by side; None: for all.
    """

    def __init__(self, model: Stream | Resident, room: Room | None = None):
        self.model = model
        self._room = room

    @property
    def read_bytes(self) -> int:
        """Bytes that a streamed model was read so far; 0 for one that is whole in memory."""
        return self.model.reader.nbytes if isinstance(self.model, Stream) else 0

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
        for text, ended in self._written(prompts, max_tokens, stop, draws or Draws()):
            if ended:
                yield text

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

    def settled(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        stop: Collection[int],
        *,
        draft: "TextWriter | None" = None,
        guessed: int = 0,
    ) -> Iterator[list[int]]:
        """The greedy text behind one prompt, as it is settled: what one pass of the model says.

        That is a token or, with a draft, the guesses that were right and one more: a small model
        with the same tokens guesses the next few, one pass of this model reads them all, and those
        are kept that it would have chosen itself (arXiv 2211.17192). guessed: tokens for a pass.
        Models and drafts are those that `check_draft` passes.
        """
        if draft is None:
            for written, _ in self._written([prompt], max_tokens, stop, Draws()):
                yield written.ids[-1:]
            return
        text = list(prompt)
        left = max_tokens
        model = _Chain(self.model)
        guesser = _Chain(draft.model)
        vocab = min(model.vocab, guesser.vocab)
        while left > 0:
            # 1. The draft guesses; near the end no further than the tokens that are left.
            guesses: list[int] = []
            while len(guesses) < min(guessed, left - 1):
                guesses += guesser.choices([*text, *guesses], 1, vocab)
                if guesses[-1] in stop:
                    break
            # 2. One pass over the new text and the guesses: the model's choice after each.
            choices = model.choices([*text, *guesses], len(guesses) + 1, model.vocab)
            # 3. Guesses that agree with the model are text now, and its own next token behind.
            right = 0
            while right < len(guesses) and guesses[right] == choices[right]:
                right += 1
            model.keep(len(text) + right)
            guesser.keep(len(text) + right)
            settled = choices[: right + 1]
            for place, token in enumerate(settled, 1):
                if token in stop:
                    yield settled[:place]
                    return
            yield settled
            text += settled
            left -= len(settled)

    def _written(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        stop: Collection[int],
        draws: Draws,
    ) -> Iterator[tuple[Completion, bool]]:
        """Every text with its next token, pass by pass, and whether it has ended."""
        room = self._room or Room(len(prompts))
        waiting = Queue(prompts, max_tokens, room)
        share = FREE_SHARE if self.model.resident else 0.0
        batch = Batch(self.model, room.tokens)
        texts = list[Completion]()
        while waiting or texts:
            numbers = [text.number for text in texts]
            begun = [Completion(number, []) for number in waiting.take(numbers, share)]
            last = [text.ids[-1:] for text in texts]
            log_probs = batch.read(last, [prompts[text.number] for text in begun])
            texts += begun
            tokens = np.array(draws(log_probs, [text.number for text in texts])).tolist()
            del log_probs
            going_on = list[int]()
            for place, (text, token) in enumerate(zip(texts, tokens, strict=True)):
                text.ids.append(token)
                ended = token in stop or len(text.ids) == max_tokens
                if not ended:
                    going_on.append(place)
                yield text, ended
            if len(going_on) < len(texts):
                batch.keep(going_on)
                texts = [texts[place] for place in going_on]


class _Chain:
    """One text that a model has read, whose last tokens can be taken back."""

    def __init__(self, model: Stream | Resident):
        self.vocab = family(model.config).shape.vocab
        self._batch = Batch(model, takes_back=True)
        self._length = 0  # tokens that were read

    def choices(self, text: Sequence[int], count: int, vocab: int) -> list[int]:
        """The likeliest of the first `vocab` tokens behind each of the last `count` of a text."""
        # A draft may have a larger vocabulary by padding; its surplus ids have no row here.
        new = [min(token, self.vocab - 1) for token in text[self._length :]]
        begins = not self._length
        log_probs = self._batch.read([] if begins else [new], [new] if begins else [], count)
        self._length = len(text)
        return np.array(mx.argmax(log_probs[:, :vocab], axis=-1)).tolist()

    def keep(self, length: int) -> None:
        """Forget what was read behind the first `length` tokens."""
        if length < self._length:
            self._batch.take_back(self._length - length)
            self._length = length


def check_draft(*models: Checkpoint) -> None:
    """MisError where a model, or its draft, cannot take back what it has read (delta rules)."""
    for model in models:
        if family(model.config).in_order:
            raise MisError(
                f"{model.path} reads one text after the other and cannot take back guesses that "
                f"were wrong: leave out --draft-model"
            )


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
    return TextWriter(Resident(model, str(checkpoint.path)), room)
