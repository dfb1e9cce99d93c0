"""The command `plan`: from configs alone to a table, a decision and an exit code."""

from __future__ import annotations

import json
import re
import runpy
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mis_mlx import cli, plan
from mis_mlx.distillation import plan_report, teacher_answers
from mis_mlx.hardware import rates
from mis_mlx.hardware.rates import M1_AIR
from mis_mlx.models.architectures import arch
from mis_mlx.types import GIB, Checkpoint, MisError
from tests import tiny
from tests.conftest import Done, last_line, sentence

PHASES = ["prune", "repair", "logit store", "distil", "quantize", "distil scales", "measure"]


def rows(text: str) -> list[str]:
    """First cells of the table's rows."""
    return [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")][1:]


def test_end_to_end(llama: Checkpoint, in_process: Callable[..., Done]) -> None:
    """A table, JSON last, exit code 0; a budget too small is a check that failed: 3; a wrong flag:
    2.
    """
    asked = ("plan", "--teacher", llama.path, "--scenario", "gazda", "--max-seq-length", 32)
    done = in_process(*asked, "--budget", "1GiB")
    assert done.returncode == 0, done.stderr
    result = last_line(done)
    assert result["params_teacher"] == arch.params(llama.config) > result["params_student"]
    assert result["least_budget_bytes"] <= result["peak_bytes"] <= result["budget_bytes"] == GIB
    assert (result["mode"], result["micro_batch"], result["scratch_bytes"]) == ("blocks", 2, 0)
    assert rows(done.stdout) == [*PHASES, "all"]
    assert "assumed" in done.stdout
    assert " of 1.00 GiB |" in done.stdout
    assert "MB when quantized" in done.stdout
    done = in_process(*asked, "--budget", "1GiB", "-v")
    assert rows(done.stdout) == PHASES
    assert "fits the budget" in done.stdout
    assert {**last_line(done), "seconds": 0} == {**result, "seconds": 0}
    done = in_process(*asked, "--budget", "1MiB")
    assert done.returncode == 3
    assert "This does NOT fit: " in done.stdout
    assert "the budget is 1 MiB" in done.stdout
    assert last_line(done)["check_failed"] is True
    done = in_process("plan", "--teacher", llama.path, "--scenario", "tatry")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.thorough
def test_a_config_is_enough(
    tmp_path: Path,
    llama: Checkpoint,
    models: Callable[[str], Checkpoint],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Folders that hold nothing but config.json, as teacher and as student: the same plan as with
    weights.
    """
    bare = {}
    for name, full in (("teacher", llama), ("student", models("qwen3"))):
        (tmp_path / name).mkdir()
        shutil.copy(full.path / "config.json", tmp_path / name)
        bare[name] = str(tmp_path / name)
    asked: dict[str, Any] = dict(machine="m1-air", budget="1GiB", max_seq_length=32)
    found = plan.run(plan.Settings(**bare, **asked))
    there = plan.run(
        plan.Settings(teacher=str(llama.path), student=str(models("qwen3").path), **asked)
    )
    assert {**found, "teacher": ""} == {**there, "teacher": ""}
    assert found["params_student"] == arch.params(models("qwen3").config)
    assert "not measured here" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "mode", "named"),
    [
        ({"train": "sharded"}, "sharded", "student blocks trainable at a time for "),
        ({"budget": "108MiB"}, "blocks", "the teacher is replaced by its stored logits"),
        (
            {"num_samples": 32768, "budget": "108MiB", "quantize": 0},
            "blocks",
            "of hidden states on disk",
        ),
    ],
)
def test_the_decision_in_words(
    tmp_path: Path,
    changes: dict[str, Any],
    mode: str,
    named: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which way, what stays in memory and what does not, wear and hours: one sentence for each
    choice.
    """
    monkeypatch.setenv(cli.DETAILS, "1")
    deep = {**tiny.CONFIG, "num_hidden_layers": 40}
    (tmp_path / "config.json").write_text(json.dumps(deep))
    settings = plan.Settings(
        teacher=str(tmp_path),
        scenario="goral",
        machine="m1-air",
        max_seq_length=32,
        **{"budget": "1GiB", **changes},
    )
    result = plan.run(settings)
    text = capsys.readouterr().out
    assert not result["check_failed"] and result["mode"] == mode and named in text, text
    assert "once hot) in all, " in text
    assert "of an SSD's life of 150 TB" in text
    assert ("logit store" in rows(text)) == ("stored logits" in text)


@pytest.fixture
def eight_billion(tmp_path: Path) -> Path:
    """The folder of a Llama of 8 B that is nothing but its config."""
    shape = {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "vocab_size": 128_256,
    }
    shape |= {
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
    }
    (tmp_path / "config.json").write_text(
        json.dumps({**tiny.CONFIG, **shape, "torch_dtype": "bfloat16"})
    )
    return tmp_path


@pytest.mark.thorough
def test_eight_billion_parameters_on_an_air(
    eight_billion: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the Air's default budget a student with half of its tokens is repaired, not trained, and
    what training would take is said.
    """
    asked = plan.Settings(teacher=str(eight_billion), machine="m1-air", scenario="half-vocab")
    found = plan.run(asked)
    text = capsys.readouterr().out
    assert found["mode"] == "none" and not found["check_failed"] and found["peak_bytes"] < 4.295e9
    head, _, _ = text.partition("| phase")
    assert "No training" in head and "--budget" in head


@pytest.mark.slow
def test_eight_billion_parameters_otherwise(
    eight_billion: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without sizes it keeps its blocks; where nobody asks for training, none is missed; in less
    memory it is refused.
    """
    whole = plan.run(plan.Settings(teacher=str(eight_billion), machine="m1-air"))
    assert whole["params_teacher"] - whole["params_student"] == 2 * 4096 * (128_256 - 96_256)
    asked = plan.Settings(teacher=str(eight_billion), machine="m1-air", scenario="half-vocab")
    capsys.readouterr()
    plan.run(replace(asked, train="none"))
    assert "for training" not in capsys.readouterr().out
    assert plan.run(replace(asked, budget="3.5GiB"))["check_failed"]


@pytest.mark.slow
def test_the_papers_teacher_on_an_air(command: Callable[..., Done]) -> None:
    """By its own shape; it does not fit, so the exit code is 3."""
    done = command("plan", "--teacher", "mis-137b", "--machine", "m1-air")
    assert done.returncode == 3, done.stderr
    result = last_line(done)
    assert (result["params_teacher"], result["params_student"]) == (84_244_176_896, 47_199_559_680)
    assert result["budget_bytes"] == 4 * 2**30 < result["least_budget_bytes"]


@pytest.mark.slow
def test_the_papers_figures(capsys: pytest.CaptureFixture[str]) -> None:
    """benchmarks/paper.py: both sizes side by side, every figure of the paper judged."""
    program = runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "paper.py"))
    program["main"](program["Settings"]())
    printed = capsys.readouterr().out
    assert "by its shape: 84.2B, 47.4 GB | by the paper: 137B, 70 GB" in printed
    for label, ours, papers in (
        ("a pass of 1 token", "18.7 s", "28.0 s"),  # nbytes / 2.5 GB/s
        ("a pass of 128 tokens", "18.7 s", "28.0 s"),
        ("a pass of 512 tokens", "58.8 s", "96.8 s"),  # 2 x parameters x tokens / 1.45 TFLOP/s
        ("N*: arithmetic takes as long as reading", "163", "148"),
        ("1,000,000 tokens, cool and hot", "32 h and 42 h", "52 h and 70 h"),
        ("one generated token, plain", "18.7 s, 0.053 tokens/s", "28.0 s, 0.036 tokens/s"),
        (
            "the same, 4 of a tree of N* guesses accepted",
            "4.7 s, 0.214 tokens/s",
            "7.0 s, 0.143 tokens/s",
        ),
        (
            "the same, 6 of a tree of N* guesses accepted",
            "3.1 s, 0.321 tokens/s",
            "4.7 s, 0.214 tokens/s",
        ),
    ):
        assert f"| {label} | {ours} | {papers} |" in printed, label
    verdicts = [line for line in printed.splitlines() if line.startswith('- "')]
    assert len(verdicts) == 4
    assert all("possible" in line for line in verdicts)
    assert "137B not possible, 8.4 to 12.6 guesses" in verdicts[2]
    assert "possible at its lower end" in verdicts[2]
    assert "77.1 GB" in verdicts[1]
    assert "0.7 to 1.0 million" in verdicts[3]
    page = (Path(__file__).parent.parent / "docs" / "paper.md").read_text(encoding="utf-8")
    assert all(f"{size} GiB" in page for size in re.findall(r"([\d.]+) GiB", verdicts[3]))


def test_measure_then_plan(
    tmp_path: Path,
    llama: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`--measure` alone prints rates and stops; the next plan uses them and says of when they
    are.
    """
    monkeypatch.setenv("MIS_MLX_CACHE", str(tmp_path))
    monkeypatch.setattr(rates, "SAMPLE_BYTES", 2**20)
    result = plan.run(plan.Settings(measure=True))
    assert result["source"].startswith("measured 20")
    assert result["read_bytes_per_s"] > 0
    assert rows(capsys.readouterr().out) == []
    later = plan.run(plan.Settings(teacher=str(llama.path), max_seq_length=32))
    assert later["rates"] == result["source"]
    assert result["source"] in capsys.readouterr().out


def test_what_a_machine_can_make_but_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    """17.5 GB on a machine that gives a process 5.7: a sentence with both, and in JSON."""
    small = plan.run(plan.Settings(teacher="gemma-4-e2b", machine="m1-air"))
    assert small["can_run"] and "cannot run" not in capsys.readouterr().out
    large = plan.run(plan.Settings(teacher="qwen3-30b-a3b", machine="m1-air"))
    assert not large["can_run"] and large["student_bytes"] == pytest.approx(17.5e9, rel=0.01)
    (sentence,) = [row for row in capsys.readouterr().out.splitlines() if "cannot run" in row]
    assert "17.5 GB" in sentence and "5.7 GB" in sentence


def test_refusals_are_sentences(tmp_path: Path, in_process: Callable[..., Done]) -> None:
    """A folder without a config; more budget than the Air has; measuring a machine that is
    elsewhere.
    """
    assert "config.json" in sentence(
        in_process("plan", "--teacher", tmp_path, "--machine", "m1-air")
    )
    said = sentence(
        in_process("plan", "--teacher", "mis-137b", "--machine", "m1-air", "--budget", "14GB")
    )
    assert "--budget 13.04 GiB is more than the 5.33 GiB" in said
    with pytest.raises(MisError, match="leave one of them out"):
        plan.run(plan.Settings(machine="m1-air", measure=True))


def test_a_teacher_with_a_template_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A template beside the config: answers are counted, those of the student where the teacher is
    read from disk, and fewer prompts judge; without one that is said.
    """
    (tmp_path / "config.json").write_text(json.dumps({**tiny.CONFIG, "num_hidden_layers": 40}))
    # the scales of a whole student that learn: what is asked for does not train its weights
    asked = plan.Settings(
        teacher=str(tmp_path),
        scenario="none",
        vocab="1x",
        machine="m1-air",
        max_seq_length=32,
        reconstruct_samples=0,
        target_bpw=None,
        q_method="round",
        budget="1GiB",
    )
    plan.run(asked)
    assert "has no chat template here: the plan counts no answers" in capsys.readouterr().err
    silent, _ = plan.planned(asked, M1_AIR)
    (tmp_path / "chat_template.jinja").write_text(tiny.CHAT_TEMPLATE)
    whole, _ = plan.planned(asked, M1_AIR)
    streamed, _ = plan.planned(replace(asked, budget="22MiB"), M1_AIR)

    assert list(whole.planned) == [teacher_answers.PHASE, *silent.planned]
    assert whole.planned["measure"] > silent.planned["measure"]
    assert (whole.job.answers, streamed.job.answers) == (60, 24)
    assert not streamed.job.teacher_writes
    assert list(streamed.planned) == ["quantize", "logit store", "distil scales", "measure"]


def test_longer_than_a_night_is_said_first(tmp_path: Path) -> None:
    """With what saves most of it; a shorter one says nothing."""
    (tmp_path / "config.json").write_text(json.dumps(tiny.CONFIG))
    (tmp_path / "chat_template.jinja").write_text(tiny.CHAT_TEMPLATE)
    asked = plan.Settings(teacher=str(tmp_path), machine="m1-air", budget="1GiB")
    slow = replace(M1_AIR, forward_flops_per_s=2e5, training_flops_per_s=1e12)
    long, _ = plan.planned(asked, slow)
    short, _ = plan.planned(asked, M1_AIR)

    first, *_ = plan_report.table(long).split("| phase")
    assert "This takes longer than a night: " in first
    assert "--conversations 0 saves " in first
    assert "--eval-prompts 0 saves " in first
    assert "longer than a night" not in plan_report.table(short)
    searched = plan_report.table(short, search=plan_report.Search(9 * 3600.0, 2**40))
    assert "| search for sizes | 9.0 h | 1024.00 GiB |" in searched
    assert " | 1024.00 GiB of " in searched  # the most of all
    assert "memory: up to 1024.00 GiB of " in plan_report.memory_line(
        short, plan_report.Search(1.0, 2**40)
    )
    assert "This takes longer than a night: a smaller model takes less." in searched
