"""Generating as any user would: stock mlx-lm opens the folder, and every token is timed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mis_mlx.compute import precision
from mis_mlx.judge.speed import rounds
from mis_mlx.models.opening import compute_type, load
from mis_mlx.quantization import packed_format
from mis_mlx.types import Checkpoint
from tests import tiny


def test_continuation_is_the_argmax_chain(llama: Checkpoint) -> None:
    """Greedy text equals taking the most likely token of the whole model again and again."""
    model, tokenizer = rounds.open_model(compute_type.open_to_compute(llama.path))
    ids = tokenizer.encode("The for statement")
    said = list(rounds.greedy(model, ids, 6))
    want: list[int] = []
    while len(want) < 6:
        token = (
            load.resident_model(llama, mx.float32)(mx.array([[*ids, *want]]))[0, -1].argmax().item()
        )
        if token in tokenizer.eos_token_ids:
            break
        want.append(token)
    assert said[: len(want)] == want
    assert want


def test_a_prompt_of_exactly_so_many_tokens_is_timed(llama: Checkpoint) -> None:
    """Cut when too long, repeated when too short; one stamp a token, the end token does not end
    it.
    """
    model, tokenizer = rounds.open_model(compute_type.open_to_compute(llama.path))
    long = rounds.prompt(tokenizer, 100, (1, 2))
    assert rounds.prompt(tokenizer, 40, (1, 2)) == long[:40]
    assert len(long) == 100
    stamps, _ = rounds.token_times(rounds.greedy(model, long[:5], 7))
    assert len(stamps) == 7
    assert stamps[0] > 0
    assert stamps == sorted(stamps)


def test_floats_run_in_the_quick_type(
    tmp_path_factory: pytest.TempPathFactory, llama: Checkpoint
) -> None:
    """A bfloat16 folder and a 4-bit one run in float32 on a CPU, float16 on Metal; packed weights
    stay packed.
    """
    root = tmp_path_factory.mktemp("speak")
    quick = precision.usual_dtype()
    model, _ = rounds.open_model(
        compute_type.open_to_compute(tiny.make(root / "bf16", dtype="BF16"))
    )
    assert {p.dtype for _, p in tree_flatten(model.parameters())} == {quick}
    packed_format.write_quantized(llama, root / "q4", packed_format.formats_of(llama.config, 64))
    model, tokenizer = rounds.open_model(compute_type.open_to_compute(root / "q4"))
    assert {p.dtype for _, p in tree_flatten(model.parameters())} == {quick, mx.uint32}
    assert len(list(rounds.greedy(model, tokenizer.encode("The if statement"), 4))) == 4


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [(7, None, {7}), (7, [5, 9], {5, 9}), ([5, 7], 0, {5, 7}), (None, None, set())],
)
def test_answers_end_where_mlx_lm_ends_them(
    llama: Checkpoint, tmp_path: Path, config: object, generation: object, ends: set[int]
) -> None:
    """A chat model's settings may name other ends than its tokenizer: whoever opens the tokenizer
    has them, however often it was opened with others, and one open tokenizer serves all.
    """
    usual = set(load.tokenizer(llama.path).eos_token_ids)
    folder = shutil.copytree(llama.path, tmp_path / "chat")
    settings = json.loads((folder / "config.json").read_text("utf-8"))
    settings["eos_token_id"] = config
    (folder / "config.json").write_text(json.dumps(settings), "utf-8")
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": generation}), "utf-8"
    )
    found = set(load.tokenizer(folder).eos_token_ids)
    assert found == usual | ends
    _, stock = load.mlx_lm("utils").load(str(folder), lazy=True)
    assert found == set(stock.eos_token_ids)
    opened = load.opened_tokenizer.cache_info().misses
    _, tokenizer = rounds.open_model(compute_type.open_to_compute(folder))
    assert tokenizer is load.tokenizer(folder)
    assert load.opened_tokenizer.cache_info().misses == opened
