"""Generate with mlx-lm: open a folder as any user would, fill its cache, let it write."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mis_mlx.compute import precision
from mis_mlx.data import token_windows
from mis_mlx.models.architectures import mlx_modules, sizes
from mis_mlx.models.opening import load
from mis_mlx.models.passing.stream import NotNumbers, evaluate_now
from mis_mlx.types import Checkpoint


def open_model(checkpoint: Checkpoint) -> tuple[nn.Module, Any]:
    """(model, tokenizer) as stock `mlx_lm.load` opens a folder, which passed our gate.

    Floats are in the type that the checkpoint computes in. Weights are read and converted one after
    the other: together they would be held twice. A tokenizer that is open is not opened again.
    """
    tokenizer = load.tokenizer(checkpoint.path)
    model, _ = load.mlx_lm("utils").load_model(checkpoint.path, lazy=True, trust_remote_code=False)
    model = getattr(model, "language_model", model)  # of a model that also sees
    model.shape = sizes.shape_of(checkpoint.config)
    model._config = checkpoint.config
    mlx_modules.set_dtype(model, checkpoint.config, precision.dtype_of(checkpoint))
    arrays = dict[str, mx.array](tree_flatten(model.parameters()))
    for array in arrays.values():
        evaluate_now(array)
    return model, tokenizer


def encode(tokenizer: Any, prompt: str, plain: bool = False, *, today: bool = False) -> list[int]:
    """Token ids of a prompt, through the chat template if there is one.

    plain: without it. today: as in `chat_ids`.
    """
    if plain or not tokenizer.has_chat_template:
        return list(tokenizer.encode(prompt))
    return chat_ids(tokenizer, [{"role": "user", "content": prompt}], today=today)


def chat_ids(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    today: bool = False,
    tools: Sequence[Mapping[str, Any]] = (),
) -> list[int]:
    """Token ids of a conversation through the chat template, up to where the answer begins.

    tools: that the model may call. today: a template that asks for the date gets today's, for
    people who chat; otherwise it is the same on every day. Errors of the template pass through: it
    is a program that came with the model.
    """
    conversation = [dict(message) for message in messages]
    return token_windows.prompt_ids(conversation, tokenizer, today=today, tools=tools)


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
            if not sizes.attends(model._config, i):
                continue  # a state of one size, which begins at zeros
            head_size = sizes.head_size(model._config, i)
            zeros = mx.zeros((1, model.shape.kv_heads, cached, head_size), dtype)
            layer.update_and_fetch(zeros, zeros)
    return cache


def activation_dtype(model: nn.Module) -> mx.Dtype:
    """The type that an opened model computes in."""
    inner = model.model
    inner = getattr(inner, "language_model", inner)
    norm = inner.norm if "norm" in inner else inner.embedding_norm
    return norm.weight.dtype


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
