"""The command `quantize`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path

import mlx.core as mx
import pytest

from mis_mlx import quantize
from mis_mlx.distillation import conversations, teacher_answers
from mis_mlx.hardware import memory
from mis_mlx.hardware.stage_cost import WINDOWS
from mis_mlx.judge.speed import rounds
from mis_mlx.maths import gptq
from mis_mlx.models.opening import compute_type, load
from mis_mlx.models.opening.model_size import model_of
from mis_mlx.quantization import stage
from mis_mlx.settings.recipe import QuantizationConfig
from mis_mlx.storage import run_folder
from mis_mlx.types import GIB, Budget, Checkpoint, MisError
from tests import peaks, tiny
from tests.conftest import Done, last_line, mostly_slow, sentence
from tests.peaks import allocated


def test_end_to_end(tmp_path: Path, llama: Checkpoint, command: Callable[..., Done]) -> None:
    """As a user runs it: JSON on the last line, and a folder that stock mlx-lm opens and speaks
    from.
    """
    out = tmp_path / "q4"
    brief = ("--num-samples", 4, "--max-seq-length", 64, "--q-group-size", 32)
    done = command("quantize", "--model", llama.path, "--mlx-path", out, *brief)
    assert done.returncode == 0, done.stderr
    result = last_line(done)
    packed = load.open_checkpoint(out)
    assert result["nbytes"] == packed.nbytes < llama.nbytes / 4
    assert result["group_size"] == 32
    assert f"{packed.nbytes / 1e6:.1f} MB" in done.stderr
    assert 4 < result["bits_per_weight"] < 7
    model, tokenizer = rounds.open_model(compute_type.open_to_compute(out))
    assert len(list(rounds.greedy(model, tokenizer.encode("The with statement"), 4))) == 4


def test_the_model_is_shown_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers our prompts first, which the plan counts, unless nobody wants that."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(conversations, "FEWEST", 6)
    model = str(tiny.talking(tmp_path / "model"))
    asked = quantize.Settings(model=model, num_samples=2, max_seq_length=32, target_bpw=6.0)
    plans = asked.with_values(dry_run=True)
    without = plans.with_values(conversations=0.0)
    assert teacher_answers.PHASE not in quantize.run(without)["phases"]
    assert teacher_answers.PHASE in quantize.run(plans)["phases"]
    quantize.run(asked.with_values(mlx_path="first"))
    assert teacher_answers.PHASE not in quantize.run(plans)["phases"]


@pytest.mark.parametrize(
    "asked",
    [("quantize", "--max-seq-length", 32), ("prune", "--scenario", "half-ffn")],
    ids=lambda asked: asked[0],
)
def test_no_phase_holds_the_tokenizer(
    tmp_path: Path,
    llama: Checkpoint,
    text_folder: Path,
    command: Callable[..., Done],
    asked: tuple[object, ...],
) -> None:
    """With 152 thousand tokens it takes 200 MiB of a budget, and no plan counts it."""
    name, *flags = asked
    paths = ("--model", llama.path, "--data", text_folder, "--mlx-path", tmp_path / "made")
    done = command(name, *paths, *flags, "--num-samples", 2)
    assert done.returncode == 0, done.stderr
    assert not load.opened_tokenizer.cache_info().currsize


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"intermediate_size": 760}, "down_proj.weight .* 760 .* 64"),
        ({"intermediate_size": 736}, " 736 .* 64: .*--q-group-size 32"),
        (None, "four"),
    ],
    ids=["no group divides it", "a smaller group divides it", "quantized already"],
)
def test_what_cannot_be_rounded_is_a_sentence(
    changes: dict[str, int] | None, why: str, tmp_path: Path, text_folder: Path
) -> None:
    """By either method; the folder that the result would lie in stays empty."""
    few = {"num_samples": 2, "max_seq_length": 32, "data": str(text_folder), "target_bpw": None}
    asked = quantize.Settings(model=str(tiny.make(tmp_path / "model", **(changes or {}))), **few)
    if changes is None:
        four = asked.with_values(mlx_path=str(tmp_path / "four"), q_method="round")
        quantize.run(four)
        asked = asked.with_values(model=four.mlx_path)
    place = tmp_path / "place"
    place.mkdir()
    for method in ("round", "gptq"):
        with pytest.raises(MisError, match=why):
            quantize.run(asked.with_values(mlx_path=str(place / "out"), q_method=method))
    assert not list(place.iterdir())


def test_a_result_that_was_not_put_in_its_place(tmp_path: Path, llama: Checkpoint) -> None:
    """Killed between the end of the work and the move: --resume only moves it, elsewhere too, and
    onto nothing.
    """
    out = tmp_path / "out"
    work = tmp_path / "out-unfinished"
    plain = {"q_method": "round", "target_bpw": None}
    settings = quantize.Settings(model=str(llama.path), mlx_path=str(out), **plain)
    first = quantize.run(settings)
    work.mkdir()
    run_folder.begin(work, settings.given)
    (work / run_folder.RESULT).write_text(json.dumps(first))
    out.rename(work / quantize.MODEL)
    out.mkdir()
    with pytest.raises(MisError, match="exists already"):
        quantize.run(quantize.Settings(mlx_path=str(out), resume=True))
    out.rmdir()
    elsewhere = tmp_path / "elsewhere"
    moved = quantize.Settings(out=str(work), mlx_path=str(elsewhere), resume=True)
    assert quantize.run(moved) == {**first, "mlx_path": str(elsewhere)}
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


def test_a_budget_without_room_for_a_block_names_one_that_has(
    tmp_path: Path, text_folder: Path, command: Callable[..., Done]
) -> None:
    """The budget of the sentence is enough, for every phase; what the teacher says goes to disk."""
    sizes = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 2048}
    deep = tiny.make(tmp_path / "deep", num_hidden_layers=6)
    wide = tiny.make(tmp_path / "wide", num_hidden_layers=6, **sizes)
    flags = ("--model", deep, "--teacher", wide, "--data", text_folder, "--num-samples", 8)
    flags += ("--max-seq-length", 32, "--q-iters", 12, "--mlx-path", tmp_path / "out")
    said = sentence(command("quantize", *flags, "--budget", "6MiB"))
    enough = re.findall(r"--budget (\w+)", said)[-1]
    plan = last_line(command("quantize", *flags, "--budget", enough, "--dry-run"))
    assert list(plan["phases"]) == ["quantize", "logit store", "distil scales"]
    assert 0 < plan["peak_bytes"] <= plan["budget_bytes"]
    assert plan["disk_bytes"] > 0


FOUR = QuantizationConfig(target_bpw=None)
MEASURED = QuantizationConfig(q_method="round", target_bpw=4.6)


@pytest.mark.parametrize(
    ("ffn", "dtype", "how"),
    mostly_slow(
        [*product((1024, 512), ("F32", "BF16"), (FOUR,)), (1536, "F32", MEASURED)],
        (512, "BF16", FOUR),
        thorough=[(1024, "F32", FOUR), (1536, "F32", MEASURED)],
        of_several=True,
    ),
)
def test_rounding_stays_under_the_plan(
    tmp_path: Path,
    ffn: int,
    dtype: str,
    how: QuantizationConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By GPTQ, or in measured bits: what MLX and numpy hold together is under the plan, and not by
    more than a factor of four. (Scales that learn: tests/distillation/test_scale_plans.py.)
    """
    sizes = {
        "hidden_size": 256,
        "head_dim": 64,
        "intermediate_size": ffn,
        "vocab_size": {512: 8192, 1024: 512, 1536: 4096}[ffn],
    }
    checkpoint = load.open_checkpoint(tiny.make(tmp_path / "m", dtype=dtype, **sizes))
    batches = [mx.random.randint(0, 512, (1, 64), key=mx.random.key(k)) for k in range(6)]
    planned = stage.quantizing_cost(model_of(checkpoint), how, windows=6, length=64, limit=GIB)
    assert planned.stays[WINDOWS] == 6
    assert planned.scratch_bytes == 0
    mx.eval(batches)
    before = mx.get_active_memory()
    parts = (gptq, "factorize"), (gptq, "rounded")
    with (
        memory.limited(Budget(before + planned.peak_bytes)),
        peaks.counted(monkeypatch, *parts) as peak,
    ):
        mx.set_cache_limit(0)
        stage.quantize(checkpoint, tmp_path / "q4", rounding=how, batches=batches, held=6)
    assert planned.peak_bytes / 4 < peak.nbytes < allocated(planned.peak_bytes)
