"""Generate with mlx-lm: open a folder as any user would, fill its cache, let it write."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mis_mlx import cli
from mis_mlx.compute import precision
from mis_mlx.data import token_windows
from mis_mlx.models import config, continuous_batch, load, tokenizer_check
from mis_mlx.models.stream import NotNumbers
from mis_mlx.types import Checkpoint

Sampler = Callable[[mx.array], mx.array]  # log-probabilities (B, V) -> tokens (B,)
LIKELIEST = 1024  # tokens among which a nucleus is looked for first
PROMPTS = {
    "English": "The for statement is used to",
    "Polish": "Baca wyszedł rano z owcami na halę i",
}


def open_model(checkpoint: Checkpoint) -> tuple[nn.Module, Any]:
    """(model, tokenizer) by stock `mlx_lm.load` of a folder that passed our gate.

    Floats are in the type that the checkpoint computes in.
    """
    tokenizer_check.check_tokenizer(checkpoint.path)
    model, tokenizer = load.mlx_lm("utils").load(
        str(checkpoint.path),
        tokenizer_config={"trust_remote_code": False},
        trust_remote_code=False,
    )
    model = getattr(model, "language_model", model)  # of a model that also sees
    model.shape = config.shape_of(checkpoint.config)
    model._config = checkpoint.config
    model.set_dtype(precision.dtype_of(checkpoint))
    return model, tokenizer


def encode(tokenizer: Any, prompt: str, plain: bool = False, *, today: bool = False) -> list[int]:
    """Token ids of a prompt, through the chat template if there is one.

    plain: without it. today: as in `chat_ids`.
    """
    if plain or not tokenizer.has_chat_template:
        return list(tokenizer.encode(prompt))
    return chat_ids(tokenizer, [{"role": "user", "content": prompt}], today=today)


def chat_ids(
    tokenizer: Any, messages: Sequence[Mapping[str, str]], *, today: bool = False
) -> list[int]:
    """Token ids of a conversation through the chat template, up to where the answer begins.

    today: a template that asks for the date gets today's, for people who chat; otherwise it is the
    same on every day. Errors of the template pass through: it is a program that came with the
    model.
    """
    conversation = [dict(message) for message in messages]
    return token_windows.prompt_ids(conversation, tokenizer, today=today)


def prompt_ids(tokenizer: Any, text: str, count: int) -> mx.array:
    """The first `count` token ids of `text`, repeated if it is too short: (count,)."""
    ids = tokenizer.encode(text)
    repeats = count // len(ids) + 1
    return mx.array((ids * repeats)[:count])


def filled_cache(model: nn.Module, cached: int) -> list[Any]:
    """mlx-lm's KV cache of an opened model with `cached` tokens in it.

    They are zeros, which take as long as any other values.
    """
    cache = load.mlx_lm("models.cache").make_prompt_cache(model)
    if cached:
        dtype = activation_dtype(model)
        # Blocks that use another block's keys come last, and have no cache.
        for i, layer in enumerate(cache):
            if not config.attends(model._config, i):
                continue  # a state of one size, which begins at zeros
            head_size = config.head_size(model._config, i)
            zeros = mx.zeros((1, model.shape.kv_heads, cached, head_size), dtype)
            layer.update_and_fetch(zeros, zeros)
    return cache


def activation_dtype(model: nn.Module) -> mx.Dtype:
    """The type that an opened model computes in."""
    inner = model.model
    inner = getattr(inner, "language_model", inner)
    norm = inner.norm if "norm" in inner else inner.embedding_norm
    return norm.weight.dtype


def continuation(model: nn.Module, tokenizer: Any, prompt: str, count: int) -> str:
    """Greedy text after `prompt`, at most `count` tokens, stopping at the end token."""
    tokens = []
    for token in greedy(model, tokenizer.encode(prompt), count):
        if token in tokenizer.eos_token_ids:
            break
        tokens.append(token)
    return tokenizer.decode(tokens)


def greedy(
    model: nn.Module, ids: Any, count: int, cache: list[Any] | None = None, where: str = ""
) -> Iterator[int]:
    """The `count` tokens that mlx_lm's own loop puts after the token ids `ids`.

    where: the model's name. If it is given, every token's logits are checked, and NaN raises
    NotNumbers.
    """
    step = load.mlx_lm("generate").generate_step
    for token, log_probs in step(mx.array(ids), model, max_tokens=count, prompt_cache=cache):
        if where and mx.isnan(log_probs).any().item():
            message = f"{where}: the model gives values that are not numbers"
            raise NotNumbers(message, activation_dtype(model))
        yield int(token)


def samples(models: Mapping[str, Checkpoint], count: int) -> Iterator[dict[str, str]]:
    """What each model writes after the same words: {model, language, prompt, text}.

    One model is in memory at a time.
    """
    for name, checkpoint in cli.show_progress("samples of model", models.items(), len(models)):
        model, tokenizer = open_model(checkpoint)
        for language, prompt in PROMPTS.items():
            text = continuation(model, tokenizer, prompt, count)
            yield {"model": name, "language": language, "prompt": prompt, "text": text}
        del model
        mx.clear_cache()


def sampler(temperature: float, seed: int, top_p: float = 1.0) -> Sampler:
    """Draws from softmax(logits / temperature) with random numbers of its own; 0: greedily.

    top_p: only from the `nucleus`; 1: from all tokens.
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
    """Log-probabilities (B, V) of the smallest set of tokens with `top_p` together, else -inf.

    The same as mlx-lm's sampler (Holtzman et al., arXiv 1904.09751), before any temperature. Only
    the `LIKELIEST` tokens are sorted, or all if these have less than `top_p`: sorting a whole
    vocabulary takes as long as a pass of a small model.
    """
    vocab = logps.shape[-1]
    for count in (min(LIKELIEST, vocab), vocab):
        likeliest = mx.sort(mx.topk(logps, count, axis=-1), axis=-1)
        probabilities = mx.exp(likeliest.astype(mx.float32))
        # The probability of all likelier tokens together.
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
    """`count` completions of each prompt as token ids.

    Each completion ends with its stop token, or after `max_tokens`. draw: for all prompts, or one
    for each prompt, so that its draws do not depend on the other texts of its batch. at_once:
    completions generated together; a prompt's come in one batch, so that it is read once.
    """
    completions = []
    prompts_at_once = max(1, at_once // count)
    for start in range(0, len(prompts), prompts_at_once):
        batch_prompts = prompts[start : start + prompts_at_once]
        if callable(draw):
            samplers = [draw] * len(batch_prompts)
        else:
            samplers = list(draw[start : start + len(batch_prompts)])
        batch = _completed(
            model, batch_prompts, count, max_tokens=max_tokens, stop=stop, samplers=samplers
        )
        for i in range(0, len(batch), count):
            completions.append(batch[i : i + count])
    return completions


def _completed(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    count: int,
    *,
    max_tokens: int,
    stop: Collection[int],
    samplers: Sequence[Sampler],
) -> list[list[int]]:
    """`groups` of one batch, the completions of all prompts in one list. samplers: one a prompt."""
    last_tokens = []
    caches = []
    for prompt in prompts:
        cache = continuous_batch.filled(model, prompt)
        last_tokens.extend([list(prompt[-1:])] * count)
        caches.extend([cache] * count)  # read only: mlx-lm merges them into a new one
    sampler_of_each = [sampler for sampler in samplers for _ in range(count)]
    opened = continuous_batch.batch_generator(model, max_tokens, stop, at_once=len(caches))
    with opened as generator:
        uids = generator.insert(last_tokens, caches=caches, samplers=sampler_of_each)
        del cache, caches  # the generator has copies, once it has begun
        tokens: dict[int, list[int]] = {uid: [] for uid in uids}
        while responses := generator.next_generated():
            for response in responses:
                tokens[response.uid].append(response.token)
    return list(tokens.values())
