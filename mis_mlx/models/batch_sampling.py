"""Many completions at once through mlx-lm's batched generation: a prompt is read once, its keys serve all of them.

What is drawn depends on the weights, the prompt and the seed alone."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mis_mlx.models import load
from mis_mlx.models.stream import evaluate_now

Sampler = Callable[[mx.array], mx.array]  # log-probabilities (B, V) -> tokens (B,)


def sampler(temperature: float, seed: int) -> Sampler:
    """Draws from softmax(logits / temperature) with random numbers of its own; greedy at temperature 0."""
    state = [mx.random.key(seed)]

    def draw(logps: mx.array) -> mx.array:
        if temperature == 0:
            return mx.argmax(logps, axis=-1)
        key, state[0] = mx.random.split(state[0])
        return mx.random.categorical(logps / temperature, key=key)

    return draw


def groups(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    count: int,
    max_tokens: int,
    stop: Collection[int],
    draw: Sampler,
    at_once: int,
) -> list[list[list[int]]]:
    """`count` completions of each prompt as token ids; each ends with its stop token, or after `max_tokens`.

    at_once: completions generated together; a prompt's come in one batch, so that it is read once."""
    completions, each = list[list[list[int]]](), max(1, at_once // count)
    for start in range(0, len(prompts), each):
        last_tokens, caches = list[list[int]](), list[Any]()
        for prompt in prompts[start : start + each]:
            cache = load.mlx_lm("models.cache").make_prompt_cache(model)
            if len(prompt) > 1:
                model(mx.array([*prompt[:-1]])[None], cache=cache)
                evaluate_now([layer.state for layer in cache])
            last_tokens += [list(prompt[-1:])] * count
            caches += [cache] * count  # read only: mlx-lm merges them into a new one
        generator = load.mlx_lm("generate").BatchGenerator(
            model, max_tokens=max_tokens, stop_tokens=[[t] for t in sorted(stop)], sampler=draw,
            completion_batch_size=len(caches), prefill_batch_size=len(caches),
        )  # fmt: skip
        try:
            tokens: dict[int, list[int]] = {uid: [] for uid in generator.insert(last_tokens, caches=caches)}
            while responses := generator.next_generated():
                for response in responses:
                    tokens[response.uid].append(response.token)
        finally:
            generator.close()
        batch = list(tokens.values())
        completions += [batch[i : i + count] for i in range(0, len(batch), count)]
    return completions
