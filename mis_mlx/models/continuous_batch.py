"""Greedy texts side by side: a new one begins as soon as others have ended.

A batch that waits for its longest text computes less and less with every token, although each
token still fetches all weights. mlx-lm's generator can take new texts between two tokens, so here
the batch stays nearly full.
"""

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mis_mlx.hardware import memory
from mis_mlx.models import load
from mis_mlx.models.stream import evaluate_now

# New texts begin when this share of the places is free. Each beginning copies the keys and values
# of the whole batch, so single texts do not begin alone.
FREE_SHARE = 0.25


class Completion(NamedTuple):
    """The token ids behind prompt `number`, with the stop token where the text ended with one."""

    number: int
    ids: list[int]


def completions(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    stop: Collection[int],
    at_once: int,
) -> Iterator[Completion]:
    """The greedy completion of every prompt, each as soon as it has ended.

    A text ends with its stop token, or after `max_tokens`. The longest prompts begin first: texts
    that share a batch then have similar lengths, and memory is at its peak early. at_once: texts
    that are written side by side, at most.
    """
    longest_first = sorted(range(len(prompts)), key=lambda n: len(prompts[n]), reverse=True)
    waiting = deque(longest_first)
    begun: dict[int, Completion] = {}  # texts that have not ended, by the generator's own id
    with batch_generator(model, max_tokens, stop, at_once=at_once) as generator:
        while waiting or begun:
            free = at_once - len(begun)
            if waiting and free >= FREE_SHARE * at_once:
                beginning = [waiting.popleft() for _ in range(min(free, len(waiting)))]
                ids = _begin(model, generator, [prompts[number] for number in beginning])
                for generator_id, number in zip(ids, beginning, strict=True):
                    begun[generator_id] = Completion(number, [])
            for response in generator.next_generated():
                begun[response.uid].ids.append(response.token)
                if response.finish_reason is not None:
                    yield begun.pop(response.uid)


@contextmanager
def batch_generator(
    model: nn.Module, max_tokens: int, stop: Collection[int], *, at_once: int
) -> Iterator[Any]:
    """mlx-lm's generator of up to `at_once` texts side by side, closed at the end."""
    with memory.nothing_wired():
        generator = load.mlx_lm("generate").BatchGenerator(
            model,
            max_tokens=max_tokens,
            stop_tokens=[[token] for token in sorted(stop)],
            completion_batch_size=at_once,
            prefill_batch_size=at_once,
        )
    try:
        yield generator
    finally:
        with memory.nothing_wired():
            generator.close()


def _begin(model: nn.Module, generator: Any, prompts: Sequence[Sequence[int]]) -> list[int]:
    """Have the generator continue these prompts; its own ids of them."""
    last_tokens = [list(prompt[-1:]) for prompt in prompts]
    caches = [filled(model, prompt) for prompt in prompts]
    return generator.insert(last_tokens, caches=caches)


def filled(model: nn.Module, prompt: Sequence[int]) -> list[Any]:
    """mlx-lm's cache of a prompt without its last token, which the generator reads itself."""
    cache = load.mlx_lm("models.cache").make_prompt_cache(model)
    if len(prompt) > 1:
        model(mx.array([*prompt[:-1]])[None], cache=cache)
        evaluate_now([layer.state for layer in cache])
    return cache
