"""The main job end to end on a tiny model, as a user runs it: results and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import mlx.core as mx
import pytest

from mis_mlx import distill
from mis_mlx.distillation import conversations, pipeline, teacher_answers
from mis_mlx.judge import answers
from mis_mlx.models.architectures import arch
from mis_mlx.models.architectures.sizes import shape_of
from mis_mlx.models.opening import load
from mis_mlx.models.writing import mlx_generate
from mis_mlx.storage import run_folder
from mis_mlx.types import Checkpoint
from tests import tiny
from tests.conftest import (
    ITERS,
    SMALL,
    Done,
    last_line,
    losses,
    settings_of,
    weights,
)

KEYS = {
    "teacher",
    "student",
    "params_teacher",
    "params_student",
    "nll_teacher",
    "nll_pruned",
    "nll_student",
}
KEYS |= {
    "nll_quantized",
    "kl_student",
    "top1_student",
    "peak_bytes",
    "budget_bytes",
    "seconds",
    "tokens_per_s",
}


def test_the_last_line_is_the_result(finished: tuple[Path, Done], llama: Checkpoint) -> None:
    """JSON with the promised keys; the same in result.json; losses in a sane order; numbers that
    fit each other.
    """
    out, done = finished
    result = last_line(done)
    assert result.keys() >= KEYS
    assert json.loads((out / "result.json").read_text()) == result
    student = load.open_checkpoint(out / "distilled")
    assert (result["params_teacher"], result["params_student"]) == (
        arch.params(llama.config),
        arch.params(student.config),
    )
    assert result["kl_student"] >= 0
    assert 0 <= result["top1_student"] <= 1
    assert 0 < result["peak_bytes"] < result["budget_bytes"]
    assert result["tokens"] == ITERS * 2 * 31
    assert result["tokens_per_s"] > 0
    assert "| | teacher | pruned | distilled | student |" in done.stdout
    assert (out / "table.md").read_text().splitlines()[
        0
    ] == "| | teacher | pruned | distilled | student |"
    # this teacher has no chat template
    assert not [key for key in result if "answers" in key or "loops" in key]


def test_what_a_run_leaves_on_disk(finished: tuple[Path, Done]) -> None:
    """The house's files, every step logged once, the last two checkpoints (asked for), and no
    leftovers.
    """
    out, _ = finished
    assert {p.name for p in out.iterdir()} - {"thermal.jsonl"} == {
        ".lock",
        "asked.yaml",
        "config.yaml",
        "taken.json",
        "origin.json",
        "plan.json",
        "metrics.jsonl",
        "steps",
        "pruned",
        "distilled",
        "model",
        "rounded",
        "tune.jsonl",
        "tune-steps",
        "targets",
        "table.md",
        "result.json",
        "phases.jsonl",
    }
    assert [number for number, _, _ in losses(out)] == list(range(1, ITERS + 1))
    assert sorted(p.name for p in (out / "steps").iterdir()) == ["step-00000016", "step-00000018"]


def test_a_run_that_is_done_keeps_no_checkpoints(
    tmp_path: Path, flags: tuple[object, ...], command: Callable[..., Done]
) -> None:
    """Unless asked to: what nobody needs any more goes, targets on disk too, and --resume has
    nothing left to do.
    """
    few = [*(f for f in flags if f != "--keep-steps"), "--iters", 2, "--q-iters", 1]
    done = command("distill", *few, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    left = {p.name for p in (tmp_path / "run").iterdir()}
    assert not left & set(pipeline.TEMPORARY)
    assert {"pruned", "distilled", "model", "result.json"} <= left


def test_all_four_folders_open_and_speak(finished: tuple[Path, Done], llama: Checkpoint) -> None:
    """Stock mlx_lm.load opens teacher, pruned, distilled and 4-bit, and each generates text."""
    out, _ = finished
    for folder in (llama.path, out / "pruned", out / "distilled", out / "model"):
        model, tokenizer = load.mlx_lm("utils").load(str(folder))
        assert mx.isfinite(model(mx.array([[1, 2, 3]]))).all()
        assert (
            len(
                list(
                    mlx_generate.greedy(
                        model, mlx_generate.prompt_ids(tokenizer, "The for statement", 4), 5
                    )
                )
            )
            == 5
        )
    assert shape_of(load.open_checkpoint(out / "model").config) == shape_of(
        load.open_checkpoint(out / "pruned").config
    )
    assert arch.is_quantized(load.open_checkpoint(out / "model").tensors)


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


def test_flags_from_yaml(
    tmp_path: Path, flags: tuple[object, ...], command: Callable[..., Done]
) -> None:
    """A YAML with learning_rate: 1e-3 is used; quantize: 0 leaves the student as it was trained."""
    (tmp_path / "good.yaml").write_text("learning_rate: 1e-3\niters: 3\nquantize: 0\n")
    given = flags[: flags.index("--iters")]
    out = tmp_path / "run"
    done = command("distill", "-c", tmp_path / "good.yaml", *given, "--out", out)
    assert done.returncode == 0, done.stderr
    assert max(r["learning_rate"] for r in run_folder.metrics(out)) == pytest.approx(1e-3)
    assert not (out / "distilled").exists()
    assert not arch.is_quantized(load.open_checkpoint(out / "model").tensors)
    assert last_line(done)["nll_quantized"] is None
    assert last_line(done)["student"] == str(out / "model")


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
    flags = (
        "--teacher",
        teacher,
        "--data",
        text_folder,
        *SMALL,
        "--iters",
        3,
        "--q-iters",
        2,
        "--eval-prompts",
        4,
    )
    s = settings_of(distill, flags, tmp_path / "run")

    result = distill.run(s)

    out = capfd.readouterr()
    (file,) = Path("runs/answers").glob("*/answers.jsonl")
    assert "of 24 answers are kept" in out.err
    assert "training windows are 56% --data 1, 44% conversations" in out.err
    shown = [line for line in out.out.splitlines() if line]
    asked = [prompt.messages[-1]["content"] for prompt in answers.prompts(4)]
    assert "Loss on the teacher's answers" in shown[0]
    assert shown[1].startswith("Held-out text: ")
    assert shown[2] == f"> {asked[0]}"
    assert shown[3].startswith("teacher:") and shown[4].startswith("student:")
    table = shown.index("Answers in English to 2 held-out prompts, ± 95 %")
    assert [line for line in shown[:table] if line.startswith(">")] == [
        f"> {asked[0]}",
        f"> {asked[1]}",
    ]
    assert "Answers in Polish to 2 held-out prompts, ± 95 %" in shown[table:]
    page = (tmp_path / "run" / "table.md").read_text("utf-8")
    assert page.splitlines()[0] == shown[table]  # the dialogue is for the screen

    rows = [
        json.loads(line)
        for line in (tmp_path / "run" / "answers.jsonl").read_text("utf-8").splitlines()
    ]
    wanted = list(product(asked, ("teacher", "4-bit")))
    assert [(row["prompt"], row["model"]) for row in rows] == wanted
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result
    assert result["answers_prompts"] == 4
    assert result["nll_teacher"] < result["nll_pruned"]
    figures = set[str]()
    for metric in ("answers", "answers_excess"):
        figures |= {f"{metric}_distilled", f"{metric}_4-bit"}
    for metric in ("loops", "empty", "endless"):
        figures |= {f"{metric}_teacher", f"{metric}_4-bit"}
    assert result.keys() >= figures | {"answers_teacher", "answers_4-bit"}
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
@pytest.mark.parametrize("flag", ["--conversations", "--eval-prompts"])
def test_without_conversations_or_questions(
    tmp_path: Path, text_folder: Path, capfd: pytest.CaptureFixture[str], flag: str
) -> None:
    """--conversations 0 trains on --data alone, and the student is asked all the same;
    --eval-prompts 0 asks nobody.
    """
    teacher = tiny.talking(tmp_path / "teacher")
    flags = (
        "--teacher",
        teacher,
        "--data",
        text_folder,
        *SMALL,
        "--iters",
        1,
        "--quantize",
        0,
        "--eval-prompts",
        2,
    )
    s = settings_of(distill, (*flags, flag, 0), tmp_path / "run")

    result = distill.run(s)

    out = capfd.readouterr()
    trained = "conversations: " in out.err
    asked = (tmp_path / "run" / "answers.jsonl").exists()
    assert (trained, asked) == {"--conversations": (False, True), "--eval-prompts": (True, False)}[
        flag
    ]
    assert ("answers_prompts" in result) == asked == ("\n> " in out.out)
    assert ("training windows are" in out.err) == trained


@pytest.mark.thorough
def test_a_student_made_earlier(
    tmp_path: Path,
    finished: tuple[Path, Done],
    flags: tuple[object, ...],
    command: Callable[..., Done],
) -> None:
    """`--student RUN/pruned` starts from that folder: the same repair, training and weights."""
    out, _ = finished
    done = command("distill", *flags, "--student", out / "pruned", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "run" / "pruned").exists()
    assert weights(tmp_path / "run") == weights(out)
