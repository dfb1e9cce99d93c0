"""The main job end to end on a tiny model, as a user runs it: results and refusals."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import mlx.core as mx
import pytest

from mis_mlx import distill
from mis_mlx.distillation import conversations, pipeline, teacher_answers
from mis_mlx.judge import answers
from mis_mlx.judge.speed import rounds
from mis_mlx.models.architectures import arch
from mis_mlx.models.architectures.families import shape_of
from mis_mlx.models.opening import load
from mis_mlx.quantization import packed_format
from mis_mlx.storage import run_folder, safetensors
from mis_mlx.types import Checkpoint
from tests import tiny
from tests.conftest import (
    ITERS,
    ROOT,
    SMALL,
    Done,
    last_line,
    losses,
    settings_of,
    weights,
)


def test_the_last_line_is_the_result(finished: tuple[Path, Done], llama: Checkpoint) -> None:
    """The same in result.json; numbers that fit each other; every step logged once; the last two
    checkpoints, which were asked for.
    """
    out, done = finished
    result = last_line(done)
    assert json.loads((out / "result.json").read_text()) == result
    student = load.open_checkpoint(out / "distilled")
    assert result["params_teacher"] == arch.params(llama.config)
    assert result["params_student"] == arch.params(student.config)
    assert result["kl_student"] >= 0
    assert 0 <= result["top1_student"] <= 1
    assert 0 < result["peak_bytes"] < result["budget_bytes"]
    assert result["tokens"] == ITERS * 2 * 31
    assert result["tokens_per_s"] > 0
    assert (out / "table.md").read_text().splitlines()[0] in done.stdout
    # this teacher has no chat template
    assert not [key for key in result if "answers" in key or "loops" in key]
    assert [number for number, _, _ in losses(out)] == list(range(1, ITERS + 1))
    assert sorted(p.name for p in (out / "steps").iterdir()) == ["step-00000016", "step-00000018"]


def test_all_four_folders_open_and_speak(finished: tuple[Path, Done], llama: Checkpoint) -> None:
    """Stock mlx_lm.load opens teacher, pruned, distilled and 4-bit, and each generates text."""
    out, _ = finished
    for folder in (llama.path, out / "pruned", out / "distilled", out / "model"):
        model, tokenizer = load.mlx_lm("utils").load(str(folder))
        assert mx.isfinite(model(mx.array([[1, 2, 3]]))).all()
        ids = tokenizer.encode("The for statement")
        assert len(list(rounds.greedy(model, ids, 5))) == 5
    packed = load.open_checkpoint(out / "model")
    assert shape_of(packed.config) == shape_of(load.open_checkpoint(out / "pruned").config)
    assert arch.is_quantized(packed.tensors)


@pytest.mark.thorough
def test_its_config_gives_the_same_run_again(
    tmp_path: Path, finished: tuple[Path, Done], command: Callable[..., Done]
) -> None:
    """`-c RUN/config.yaml` elsewhere: the same weights, bit for bit."""
    out, _ = finished
    done = command("distill", "-c", out / "config.yaml", "--out", tmp_path / "again")
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "again") == weights(out)
    assert losses(tmp_path / "again") == losses(out)


@pytest.fixture
def brief_talk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs and a cache of this test's own, few prompts, short answers, and a table of two of
    them.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MIS_MLX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(conversations, "FEWEST", 24)
    monkeypatch.setattr(conversations, "FEW", 2)
    monkeypatch.setattr(
        teacher_answers, "WritingSettings", partial(teacher_answers.WritingSettings, max_tokens=12)
    )
    monkeypatch.setattr(answers, "ANSWER_TOKENS", 10)
    monkeypatch.setattr(answers, "GREEDY_TOKENS", 6)


@pytest.mark.usefixtures("brief_talk")
def test_a_teacher_that_talks_has_a_student_that_is_asked(
    tmp_path: Path,
    text_folder: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a chat template: the teacher answers first; half of every draw is its answers; at the
    end some answers stand before the table, all of them in the folder, and their figures in the
    result. Resumed, nothing is asked again.
    """
    teacher = tiny.talking(tmp_path / "teacher")
    given = ("--teacher", teacher, "--data", text_folder, *SMALL)
    brief = ("--iters", 3, "--q-iters", 2, "--eval-prompts", 4)
    s = settings_of(distill, (*given, *brief), tmp_path / "run")

    result = distill.run(s)

    out = capfd.readouterr()
    (file,) = Path("runs/answers").glob("*/answers.jsonl")
    assert "56% --data 1, 44% conversations" in out.err
    asked = [prompt.messages[-1]["content"] for prompt in answers.prompts(4)]
    shown = [line for line in out.out.splitlines() if line.startswith(">")]
    assert shown == [f"> {asked[0]}", f"> {asked[1]}"]
    page = (tmp_path / "run" / "table.md").read_text("utf-8")
    assert not [line for line in page.splitlines() if line.startswith(">")]  # for the screen

    rows = run_folder.records(tmp_path / "run" / "answers.jsonl")
    wanted = list(product(asked, ("teacher", "4-bit")))
    assert [(row["prompt"], row["model"]) for row in rows] == wanted
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result
    assert result["answers_prompts"] == 4
    assert result["nll_teacher"] < result["nll_pruned"]
    figures = {f"{metric}_4-bit" for metric in ("loops", "empty", "endless")}
    assert result.keys() >= figures | {"answers_distilled", "answers_excess_distilled"}
    assert not {"loops_pruned", "answers_pruned", "loops_distilled"} & result.keys()
    above = result["answers_4-bit"] - result["answers_teacher"]
    assert above == pytest.approx(result["answers_excess_4-bit"], abs=2e-4)

    monkeypatch.setattr(
        teacher_answers, "write", lambda *_: pytest.fail("the teacher answers again")
    )
    again = distill.run(distill.Settings(out=str(tmp_path / "run"), resume=True, eval_prompts=4))
    same = [key for key in result if "answers" in key or "loops" in key or "nll" in key]
    assert {key: again[key] for key in same} == {key: result[key] for key in same}
    assert file.exists()


@pytest.mark.usefixtures("brief_talk")
@pytest.mark.parametrize(
    ("flag", "trains", "asks"), [("--conversations", False, True), ("--eval-prompts", True, False)]
)
def test_without_conversations_or_questions(
    tmp_path: Path,
    text_folder: Path,
    capfd: pytest.CaptureFixture[str],
    flag: str,
    trains: bool,
    asks: bool,
) -> None:
    """--conversations 0 trains on --data alone, and the student is asked all the same;
    --eval-prompts 0 asks nobody. Nothing temporary is kept that nobody asked for.
    """
    teacher = tiny.talking(tmp_path / "teacher")
    given = ("--teacher", teacher, "--data", text_folder, *SMALL)
    brief = ("--iters", 1, "--quantize", 0, "--eval-prompts", 2, flag, 0)
    result = distill.run(settings_of(distill, (*given, *brief), tmp_path / "run"))
    assert ("% conversations" in capfd.readouterr().err) == trains
    assert (tmp_path / "run" / "answers.jsonl").exists() == asks
    assert ("answers_prompts" in result) == asks
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert not left & set(pipeline.TEMPORARY)
    assert left >= {"pruned", "model", "result.json"}


def same_of(one: Path, other: Path) -> tuple[set[str], set[str]]:
    """Names of tensors that two models share, and of those that are equal in both."""
    before, after = (load.open_checkpoint(folder).tensors for folder in (one, other))
    arrays = [safetensors.lazy(tensors, list(tensors)) for tensors in (before, after)]
    names = before.keys() & after.keys()
    return names, {name for name in names if (arrays[0][name] == arrays[1][name]).all()}


def test_a_frozen_vocabulary_stays_as_it_is(finished: tuple[Path, Done]) -> None:
    """Every matrix of the blocks is another than the pruned student's; the embedding is not."""
    _, same = same_of(finished[0] / "pruned", finished[0] / "distilled")
    assert "model.embed_tokens.weight" in same
    assert not [name for name in same if "proj" in name]


def test_scales_learn_what_rounding_cost(finished: tuple[Path, Done]) -> None:
    """Between `rounded` and `model` only scales, biases and norms differ, in steps of
    their own.
    """
    out = finished[0]
    logged = run_folder.records(out / pipeline.TUNE_LOG)
    assert [r["number"] for r in logged] == [1, 2, 3, 4, 5, 6]
    assert (out / "model" / packed_format.SENSITIVITY).is_file()
    rounded, model = (load.open_checkpoint(out / name) for name in ("rounded", "model"))
    assert rounded.config == model.config
    names, same = same_of(out / "rounded", out / "model")
    assert all(n.endswith(("scales", "biases")) or "norm" in n for n in names - same)
    assert not [n for n in same if n.endswith("scales") and "layers" in n]
    assert "model.embed_tokens.scales" in same


@pytest.mark.slow
def test_a_model_eight_times_the_budget(tmp_path: Path) -> None:
    """4 bits, more than 8 x 280 MiB: calibrated, its logits stored, repaired, a shard trained; peak
    under it.
    """
    program = runpy.run_path(str(ROOT / "benchmarks" / "streaming.py"))
    sizes = {
        "num_hidden_layers": 760,
        "hidden_size": 1024,
        "intermediate_size": 1024,
        "vocab_size": 1024,
    }
    folder = program["synthetic"](tmp_path / "big", sizes, 4)
    limit = 280 * 2**20
    assert load.open_checkpoint(folder).nbytes > 8 * limit
    found = program["budget"](folder, tmp_path / "run", "280MiB")
    assert found["mode"] == "sharded"
    assert found["peak_bytes"] < limit == found["budget_bytes"]


@pytest.mark.thorough
def test_threads_of_matrix_products_stay(
    tmp_path: Path, finished: tuple[Path, Done], own_home: dict[str, str]
) -> None:
    """Their number is chosen by what else is busy, and another one adds up in another order. A run
    goes on with that of its beginning.
    """
    assert run_folder.stored_settings(finished[0], run_folder.ORIGIN)["blas_threads"] == "1"
    out = shutil.copytree(finished[0], tmp_path / "run")
    for name in ("distilled", "model", "steps/step-00000018"):
        shutil.rmtree(out / name)
    (out / "result.json").unlink()
    line = [sys.executable, "-m", "mis_mlx.distill", "--resume", "--out", str(out)]
    env = {**own_home, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "2"}
    done = subprocess.run(line, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "OPENBLAS_NUM_THREADS=1, as when the run began, not 2" in done.stderr
    assert weights(out) == weights(finished[0])
    assert losses(out) == losses(finished[0])
