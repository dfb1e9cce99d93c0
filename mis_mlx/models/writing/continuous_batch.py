"""Texts of a whole model side by side: a new one begins as soon as others have ended.

A batch that waits for its longest text computes less and less with every token, although each
token still fetches all weights. mlx-lm's generator can take new texts between two tokens, so here
the batch stays nearly full.
"""

import math
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mis_mlx.hardware import memory
from mis_mlx.hardware.ledger import Ledger
from mis_mlx.hardware.stage_cost import StageCost
from mis_mlx.models.opening import load
from mis_mlx.models.opening.model_size import ModelSize
from mis_mlx.models.passing.pass_cost import forward_flops, texts_bytes, whole_bytes
from mis_mlx.models.passing.stream import evaluate_now
from mis_mlx.models.writing.draws import Draws

# New texts begin when this share of the places is free. Each beginning copies the keys and values
# of the whole batch, so single texts do not begin alone.
FREE_SHARE = 0.25
CACHE_STEP = 256  # tokens by which mlx-lm's caches grow
LOGIT_COPIES = 6  # logits in float32, log-probabilities, what drawing makes of them (measured)


class Completion(NamedTuple):
    """The token ids behind prompt `number`, with the stop token where the text ended with one."""

    number: int
    ids: list[int]


class Texts(NamedTuple):
    """What is to be written: so many texts behind prompts of at most so many tokens."""

    number: int
    prompt_tokens: int
    max_tokens: int

    @property
    def tokens(self) -> int:
        """Of a text at its end, its prompt included."""
        return self.prompt_tokens + self.max_tokens


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


class _Rows:
    """`Draws` for mlx-lm's generator, which asks for tokens of rows and does not say whose.

    It asks in a fixed order: for the texts that go on, in the order in which they began, then for
    those that begin; where none goes on it asks for these twice.
    """

    def __init__(self, draws: Draws):
        self._draws = draws
        self._coming = deque[list[int]]()

    def expect(self, going_on: Sequence[int], beginning: Sequence[int]) -> None:
        """Which texts, by number, the generator's next step is about."""
        orders = [list(going_on or beginning)]
        if beginning:
            orders.append(list(beginning))
        self._coming = deque(orders)

    def __call__(self, log_probs: mx.array) -> mx.array:
        texts = self._coming.popleft()
        assert len(texts) == len(log_probs), "mlx-lm's generator asks in another order"
        return self._draws(log_probs, texts)


def completions(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    stop: Collection[int],
    room: Room,
    draws: Draws,
) -> Iterator[Completion]:
    """The completion of every prompt, each as soon as it has ended.

    A text ends with its stop token, or after `max_tokens`. draws: of the texts by number.
    """
    waiting = Queue(prompts, max_tokens, room)
    begun: dict[int, Completion] = {}  # texts that have not ended, by the generator's own id
    rows = _Rows(draws)
    with batch_generator(model, max_tokens, stop, at_once=room.at_once, sampler=rows) as generator:
        while waiting or begun:
            going_on = [completion.number for completion in begun.values()]
            beginning = waiting.take(going_on, FREE_SHARE)
            if beginning:
                ids = _begin(model, generator, [prompts[number] for number in beginning])
                for generator_id, number in zip(ids, beginning, strict=True):
                    begun[generator_id] = Completion(number, [])
            rows.expect(going_on, beginning)
            for response in generator.next_generated():
                begun[response.uid].ids.append(response.token)
                if response.finish_reason is not None:
                    yield begun.pop(response.uid)


@contextmanager
def batch_generator(
    model: nn.Module,
    max_tokens: int,
    stop: Collection[int],
    *,
    at_once: int,
    sampler: Callable[[mx.array], mx.array],
) -> Iterator[Any]:
    """mlx-lm's generator of up to `at_once` texts side by side, closed at the end.

    sampler: log-probabilities (n, V) of any texts -> their tokens (n,).
    """
    with memory.nothing_wired():
        generator = load.mlx_lm("generate").BatchGenerator(
            model,
            max_tokens=max_tokens,
            stop_tokens=[[token] for token in sorted(stop)],
            completion_batch_size=at_once,
            prefill_batch_size=at_once,
            sampler=sampler,
        )
    try:
        yield generator
    finally:
        with memory.nothing_wired():
            generator.close()


def _begin(model: nn.Module, generator: Any, prompts: Sequence[Sequence[int]]) -> Any:
    """Have the generator continue these prompts; its own ids of them.

    A prompt that comes several times is read once: mlx-lm copies its cache for each text.
    """
    last_tokens = [list(prompt[-1:]) for prompt in prompts]
    keys = [tuple(prompt) for prompt in prompts]
    caches = {key: filled(model, key) for key in dict.fromkeys(keys)}
    return generator.insert(last_tokens, caches=[caches[key] for key in keys])


def filled(model: nn.Module, prompt: Sequence[int]) -> list[Any]:
    """mlx-lm's cache of a prompt without its last token, which the generator reads itself."""
    cache = load.mlx_lm("models.cache").make_prompt_cache(model)
    if len(prompt) > 1:
        model(mx.array([*prompt[:-1]])[None], cache=cache)
        evaluate_now([layer.state for layer in cache])
    return cache


def resident_bytes(m: ModelSize, at_once: int, tokens: int) -> int:
    """Memory of a model that writes, whole in memory: weights, keys and values, logits.

    tokens: of a text, its prompt included. mlx-lm holds keys and values up to three times.
    """
    ledger = Ledger()
    ledger.hold("weights", whole_bytes(m))
    ledger.hold("keys and values", texts_bytes(m, at_once, grown(tokens)), count=3)
    ledger.hold("logits", LOGIT_COPIES * 4 * m.shape.vocab, at_once)
    return ledger.peak_bytes


def writing_cost(m: ModelSize, texts: Texts, at_once: int) -> StageCost:
    """The cost of a model that is whole in memory: every step of a batch fetches all weights."""
    steps = texts.max_tokens * math.ceil(texts.number / at_once)
    met_bytes = int(m.active_share * m.shape.layers * m.block_work) + m.head_work
    return StageCost(
        name="write",
        read_bytes=m.nbytes,
        peak_bytes=resident_bytes(m, at_once, texts.tokens),
        flops=forward_flops(m, texts.number * texts.tokens, texts.tokens),
        touched_bytes=steps * met_bytes,
    )


def grown(tokens: int) -> int:
    """Places for so many tokens in mlx-lm's cache."""
    return CACHE_STEP * -(-tokens // CACHE_STEP)
