"""What writing takes, planned and measured."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx.judge.write import WritingPlan
from mis_mlx.models.architectures import block_state
from mis_mlx.models.opening import load
from mis_mlx.models.opening.model_size import model_of
from mis_mlx.models.passing import pass_cost
from mis_mlx.models.passing.stream import Stream
from mis_mlx.models.writing import streamed_batch
from mis_mlx.models.writing.draws import Draws, Sampling
from mis_mlx.models.writing.streamed_batch import Texts
from mis_mlx.types import Checkpoint
from tests import tiny
from tests.conftest import mostly_slow, mostly_thorough

Models = Callable[[str], Checkpoint]
MIB = 2**20
COUNT = 20  # texts
ANSWER = 40  # tokens of each
LONGEST = 70  # of a prompt
KINDS = ("llama", "gemma3_text", "gemma4_text", "lfm2", "qwen3_5_text", "gpt_oss")
QUICK = [("llama", 20), ("lfm2", 20)]
# One behind another takes long: of a llama, and of one whose blocks are of two kinds.
MORE = [("llama", 3), ("lfm2", 3), *((kind, 20) for kind in KINDS if kind != "gpt_oss")]


def written(
    checkpoint: Checkpoint,
    at_once: int,
    answer: int = ANSWER,
    room_bytes: int = 0,
    endless: bool = False,
) -> tuple[WritingPlan, int, int, int]:
    """(plan of a streamed model with so many bytes more than it needs; the peak and the bytes read
    of its writer; tokens). Texts of all lengths, which end at different tokens, beside each other
    and behind.
    """
    m = model_of(checkpoint)
    texts = Texts(COUNT, LONGEST, ANSWER)
    need = streamed_batch.writing_cost(m, texts, at_once).peak_bytes
    plan = WritingPlan(
        at_once=at_once,
        peak_bytes=need + room_bytes,
        cost=streamed_batch.writing_cost(m, texts, at_once, room_bytes),
        headroom_bytes=room_bytes,
        tokens=texts.tokens,
    )
    rng = np.random.default_rng(0)
    lengths = np.linspace(1, LONGEST, COUNT).astype(int)
    prompts = [rng.integers(1, 500, length).tolist() for length in lengths]
    ends = () if endless else (5, 6, 7, 8, 9)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    writer = plan.open(checkpoint)
    found = writer.write(prompts, answer, ends, Draws(Sampling(1.0, 0.95), range(COUNT)))
    peak = mx.get_peak_memory() - before
    assert isinstance(writer.model, Stream)
    tokens = sum(map(len, found)) + sum(map(len, prompts))
    return plan, peak, writer.model.reader.nbytes, tokens


@pytest.mark.usefixtures("cpu_policy")
@pytest.mark.parametrize(
    ("kind", "at_once"),
    mostly_slow(product(KINDS, (3, 20)), *QUICK, thorough=MORE, of_several=True),
)
def test_a_streamed_writer_takes_what_the_plan_says(
    models: Models, kind: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more memory, and the stream itself reads no more bytes."""
    monkeypatch.setattr(pass_cost, "SMALL_BYTES", 0)
    monkeypatch.setattr(streamed_batch, "SMALL_BYTES", 0)
    plan, peak, read, tokens = written(models(kind), at_once)
    assert peak <= plan.cost.peak_bytes
    assert read <= plan.cost.read_bytes + tokens * 64 * 1024


@pytest.mark.usefixtures("cpu_policy")
@pytest.mark.parametrize(
    "shape",
    [
        {"hidden_size": 512, "num_key_value_heads": 4, "intermediate_size": 1024},
        {"vocab_size": 49152},
    ],
)
@pytest.mark.parametrize("at_once", mostly_thorough([3, 20], 20))
def test_a_wide_model_and_many_tokens_are_planned_closely(
    tmp_path: Path, shape: dict[str, int], at_once: int
) -> None:
    """Where weights, or logits, are most of it: no more than planned, and not much less."""
    wide = load.open_checkpoint(tiny.make(tmp_path / "one", num_hidden_layers=3, **shape))
    plan, peak, *_ = written(wide, at_once, answer=3, endless=True)
    assert 0.6 * plan.cost.peak_bytes <= peak <= plan.cost.peak_bytes


@pytest.mark.thorough
@pytest.mark.usefixtures("cpu_policy")
def test_room_saves_reading(tmp_path: Path) -> None:
    """With room for the head and some blocks a plan has fewer bytes, and so has the writer."""
    deep = load.open_checkpoint(tiny.make(tmp_path / "deep", num_hidden_layers=12))
    m = model_of(deep)
    reads = []
    for room_bytes in (0, m.head_work + 6 * m.block_work):
        plan, _, read, _ = written(deep, 20, room_bytes=room_bytes, endless=True)
        assert 0.7 * plan.cost.read_bytes < read < 1.05 * plan.cost.read_bytes
        reads.append(read)
    assert reads[1] < 0.6 * reads[0]


@pytest.mark.usefixtures("cpu_policy")
def test_a_prompt_is_one_pass(tmp_path: Path) -> None:
    """Bytes are those of a pass for each token of the answers, however long the prompts are; room
    is for the tokens that will be, not for twice as many.
    """
    deep = load.open_checkpoint(tiny.make(tmp_path / "deep", num_hidden_layers=24))
    m = model_of(deep)
    costs = {}
    for prompt_tokens in (8, 200):
        texts = Texts(24, prompt_tokens, 48)
        costs[prompt_tokens] = streamed_batch.writing_cost(m, texts, 24)
    assert costs[8].read_bytes == costs[200].read_bytes == 48 * (m.head_bytes + 24 * m.block_bytes)
    kept = pass_cost.texts_bytes(m, 24, 248 + block_state.STEP)
    assert kept < costs[200].peak_bytes < 1.7 * kept
