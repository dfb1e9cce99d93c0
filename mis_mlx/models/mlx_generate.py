"""Generate with mlx-lm: open a folder as any user would, fill its cache, let it write."""

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mis_mlx import cli
from mis_mlx.models import load, policy, tokenizer_check
from mis_mlx.models.config import shape_of

PROMPTS = {"English": "The for statement is used to", "Polish": "Baca wyszedł rano z owcami na halę i"}
METRICS = (
    ("ttft_ms", "time to first token, ms", ".0f"),
    ("decode_tps", "decode, tokens/s", ".1f"),
    ("bytes", "weights on disk, MB (10^6)", ".1f"),
)


def open_model(folder: Path) -> tuple[nn.Module, Any]:
    """(model, tokenizer) by stock `mlx_lm.load` of a folder that passed our gate; floats in the quick type."""
    checkpoint = load.open_checkpoint(folder)
    tokenizer_check.check_tokenizer(folder)
    trust: dict[str, Any] = {"tokenizer_config": {"trust_remote_code": False}, "trust_remote_code": False}
    model, tokenizer = load.mlx_lm("utils").load(str(folder), **trust)
    model = getattr(model, "language_model", model)  # of one that also sees
    model.shape = shape_of(checkpoint.config)
    model.set_dtype(policy.compute_dtype(checkpoint))
    return model, tokenizer


def encode(tokenizer: Any, prompt: str, plain: bool = False) -> list[int]:
    """Token ids of a prompt, through the chat template where there is one and it is not to be plain."""
    if plain or not tokenizer.has_chat_template:
        return list(tokenizer.encode(prompt))
    return list(tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True))


def prompt_ids(tokenizer: Any, text: str, count: int) -> mx.array:
    """The first `count` token ids of `text`, repeated if it is too short: (count,)."""
    ids = tokenizer.encode(text)
    return mx.array((ids * (count // len(ids) + 1))[:count])


def filled_cache(model: nn.Module, cached: int) -> list[Any]:
    """mlx-lm's KV cache of an opened model with `cached` tokens in it: zeros, which take as long as any others."""
    cache = load.mlx_lm("models.cache").make_prompt_cache(model)
    if cached:
        s = model.shape
        zeros = mx.zeros((1, s.kv_heads, cached, s.head_dim), model.model.norm.weight.dtype)
        for layer in cache:
            layer.update_and_fetch(zeros, zeros)
    return cache


def continuation(model: nn.Module, tokenizer: Any, prompt: str, count: int) -> str:
    """Greedy text after `prompt`, at most `count` tokens, stopping at the end token."""
    tokens = greedy(model, tokenizer.encode(prompt), count)
    return tokenizer.decode(list(itertools.takewhile(lambda token: token not in tokenizer.eos_token_ids, tokens)))


def greedy(model: nn.Module, ids: Any, count: int, cache: list[Any] | None = None) -> Iterator[int]:
    """The `count` tokens that mlx_lm's own loop puts after the token ids `ids`."""
    generate_step = load.mlx_lm("generate").generate_step
    return (int(token) for token, _ in generate_step(mx.array(ids), model, max_tokens=count, prompt_cache=cache))


def samples(folders: Mapping[str, Path], count: int) -> Iterator[dict[str, str]]:
    """What each model writes after the same words: {model, language, prompt, text}. One model in memory at a time."""
    for name, folder in cli.counted("samples of model", folders.items(), len(folders)):
        model, tokenizer = open_model(folder)
        for language, prompt in PROMPTS.items():
            text = continuation(model, tokenizer, prompt, count)
            yield {"model": name, "language": language, "prompt": prompt, "text": text}
        del model
        mx.clear_cache()
