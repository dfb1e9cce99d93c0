"""Generate with mlx-lm: open a folder as any user would, fill its cache, let it write."""

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mis_mlx import cli
from mis_mlx.hardware import memory
from mis_mlx.models import config, load, policy, tokenizer_check
from mis_mlx.models.stream import NotNumbers, evaluate_now

Sampler = Callable[[mx.array], mx.array]  # log-probabilities (B, V) -> tokens (B,)
LIKELIEST = 1024  # tokens among which a nucleus is looked for first
PROMPTS = {
    "English": "The for statement is used to",
    "Polish": "Baca wyszedł rano z owcami na halę i",
}


def open_model(folder: Path) -> tuple[nn.Module, Any]:
    """(model, tokenizer) by stock `mlx_lm.load` of a folder that passed our gate; floats in the
    quick type.
    """
    checkpoint = load.open_checkpoint(folder)
    tokenizer_check.check_tokenizer(folder)
    trust: dict[str, Any] = {
        "tokenizer_config": {"trust_remote_code": False},
        "trust_remote_code": False,
    }
    model, tokenizer = load.mlx_lm("utils").load(str(folder), **trust)
    model = getattr(model, "language_model", model)  # of one that also sees
    model.shape = config.shape_of(checkpoint.config)
    model._config = checkpoint.config
    model.set_dtype(policy.compute_dtype(checkpoint))
    return model, tokenizer


def encode(tokenizer: Any, prompt: str, plain: bool = False) -> list[int]:
    """Token ids of a prompt, through the chat template where there is one and it is not to be
    plain.
    """
    if plain or not tokenizer.has_chat_template:
        return list(tokenizer.encode(prompt))
    return chat_ids(tokenizer, [{"role": "user", "content": prompt}])


def chat_ids(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of a conversation through the chat template, up to where the model's answer begins.

    Whatever the template raises passes: it is a program that came with the model."""
    conversation = [dict(message) for message in messages]
    return list(tokenizer.apply_chat_template(conversation, add_generation_prompt=True))


def prompt_ids(tokenizer: Any, text: str, count: int) -> mx.array:
    """The first `count` token ids of `text`, repeated if it is too short: (count,)."""
    ids = tokenizer.encode(text)
    return mx.array((ids * (count // len(ids) + 1))[:count])


def filled_cache(model: nn.Module, cached: int) -> list[Any]:
    """mlx-lm's KV cache of an opened model with `cached` tokens in it: zeros, which take as long as
    any others.
    """
    cache = load.mlx_lm("models.cache").make_prompt_cache(model)
    if cached:
        # blocks that share another's keys come last, and have none
        for i, layer in enumerate(cache):
            size = config.head_size(model._config, i)
            zeros = mx.zeros((1, model.shape.kv_heads, cached, size), model.model.norm.weight.dtype)
            layer.update_and_fetch(zeros, zeros)
    return cache


def continuation(model: nn.Module, tokenizer: Any, prompt: str, count: int) -> str:
    """Greedy text after `prompt`, at most `count` tokens, stopping at the end token."""
    tokens = greedy(model, tokenizer.encode(prompt), count)
    return tokenizer.decode(
        list(itertools.takewhile(lambda token: token not in tokenizer.eos_token_ids, tokens))
    )


def greedy(
    model: nn.Module, ids: Any, count: int, cache: list[Any] | None = None, where: str = ""
) -> Iterator[int]:
    """The `count` tokens that mlx_lm's own loop puts after the token ids `ids`. where: looks at all
    logits, and names the model in a NotNumbers.
    """
    step = load.mlx_lm("generate").generate_step
    for token, logps in step(mx.array(ids), model, max_tokens=count, prompt_cache=cache):
        if where and mx.isnan(logps).any().item():
            raise NotNumbers(
                f"{where}: the model gives values that are not numbers",
                model.model.norm.weight.dtype,
            )
        yield int(token)


def samples(folders: Mapping[str, Path], count: int) -> Iterator[dict[str, str]]:
    """What each model writes after the same words: {model, language, prompt, text}. One model in
    memory at a time.
    """
    for name, folder in cli.counted("samples of model", folders.items(), len(folders)):
        model, tokenizer = open_model(folder)
        for language, prompt in PROMPTS.items():
            text = continuation(model, tokenizer, prompt, count)
            yield {"model": name, "language": language, "prompt": prompt, "text": text}
        del model
        mx.clear_cache()


def sampler(temperature: float, seed: int, top_p: float = 1.0) -> Sampler:
    """Draws from softmax(logits / temperature) with random numbers of its own; greedy at
    temperature 0.

    top_p: of the `nucleus` only; 1: of all tokens.
    """
    state = [mx.random.key(seed)]

    def draw(logps: mx.array) -> mx.array:
        if temperature == 0:
            return mx.argmax(logps, axis=-1)
        if top_p < 1.0:
            logps = nucleus(logps, top_p)
        key, state[0] = mx.random.split(state[0])
        return mx.random.categorical(logps / temperature, key=key)

    return draw


def nucleus(logps: mx.array, top_p: float) -> mx.array:
    """Log-probabilities (B, V) of the fewest likeliest tokens that have `top_p` together; -inf for
    all others.

    As mlx-lm's sampler (Holtzman et al., arXiv 1904.09751), before any temperature. Only the
    likeliest tokens are sorted, or all where these have less: sorting a whole vocabulary takes as
    long as a pass of a small model.
    """
    vocab = logps.shape[-1]
    for count in (min(LIKELIEST, vocab), vocab):
        likeliest = mx.sort(mx.topk(logps, count, axis=-1), axis=-1)
        probabilities = mx.exp(likeliest.astype(mx.float32))
        # of all likelier tokens together
        above = mx.cumsum(probabilities, axis=-1, reverse=True, inclusive=False)
        if count == vocab or (probabilities.sum(axis=-1) >= top_p).all().item():
            break
    least = mx.where(above < top_p, likeliest, mx.inf).min(axis=-1, keepdims=True)
    return mx.where(logps < least, -mx.inf, logps)


def groups(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    count: int,
    max_tokens: int,
    stop: Collection[int],
    draw: Sampler | Sequence[Sampler],
    at_once: int,
) -> list[list[list[int]]]:
    """`count` completions of each prompt as token ids; each ends with its stop token, or after
    `max_tokens`.

    draw: for all, or one for each prompt, so that its draws do not depend on what is written beside
    it. at_once: completions generated together; a prompt's come in one batch, so that it is read
    once.
    """
    completions = list[list[list[int]]]()
    each = max(1, at_once // count)
    for start in range(0, len(prompts), each):
        last_tokens = list[list[int]]()
        caches = list[Any]()
        samplers = list[Sampler]()
        for number, prompt in enumerate(prompts[start : start + each], start):
            cache = load.mlx_lm("models.cache").make_prompt_cache(model)
            if len(prompt) > 1:
                model(mx.array([*prompt[:-1]])[None], cache=cache)
                evaluate_now([layer.state for layer in cache])
            last_tokens += [list(prompt[-1:])] * count
            caches += [cache] * count  # read only: mlx-lm merges them into a new one
            samplers += [draw if callable(draw) else draw[number]] * count
        generator = load.mlx_lm("generate").BatchGenerator(
            model,
            max_tokens=max_tokens,
            stop_tokens=[[t] for t in sorted(stop)],
            completion_batch_size=len(caches),
            prefill_batch_size=len(caches),
        )
        memory.undo_foreign_wiring()
        try:
            tokens: dict[int, list[int]] = {
                uid: [] for uid in generator.insert(last_tokens, caches=caches, samplers=samplers)
            }
            del cache, caches  # the generator has copies, once it has begun
            while responses := generator.next_generated():
                for response in responses:
                    tokens[response.uid].append(response.token)
        finally:
            generator.close()
        batch = list(tokens.values())
        completions += [batch[i : i + count] for i in range(0, len(batch), count)]
    return completions
