"""The command `plan`: from configs alone to a table, a decision and an exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mis_mlx import plan
from mis_mlx.distillation import plan_report, teacher_answers
from mis_mlx.hardware import rates
from mis_mlx.hardware.rates import M1_AIR
from mis_mlx.models.architectures import arch
from mis_mlx.types import GIB, Checkpoint
from tests import tiny
from tests.conftest import Done, last_line

PHASES = ["prune", "logit store", "repair", "distil", "quantize", "distil scales", "measure"]


def rows(text: str) -> list[str]:
    """First cells of the table's rows."""
    return [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")][1:]


def test_end_to_end(llama: Checkpoint, command: Callable[..., Done]) -> None:
    """A table, JSON last, exit code 0; a budget too small is a check that failed: 3."""
    asked = ("plan", "--teacher", llama.path, "--scenario", "gazda", "--max-seq-length", 32)
    done = command(*asked, "--budget", "1GiB")
    assert done.returncode == 0, done.stderr
    result = last_line(done)
    assert result["params_teacher"] == arch.params(llama.config) > result["params_student"]
    assert result["least_budget_bytes"] <= result["peak_bytes"] <= result["budget_bytes"] == GIB
    assert (result["mode"], result["micro_batch"], result["scratch_bytes"]) == ("blocks", 2, 0)
    assert rows(done.stdout) == [*PHASES, "all"]
    done = command(*asked, "--budget", "1GiB", "-v")
    assert rows(done.stdout) == PHASES
    assert {**last_line(done), "seconds": 0} == {**result, "seconds": 0}
    done = command(*asked, "--budget", "1MiB")
    assert done.returncode == 3
    assert "the budget is 1 MiB" in done.stdout
    assert last_line(done)["check_failed"] is True


@pytest.mark.parametrize(
    ("changes", "mode"), [({"train": "sharded"}, "sharded"), ({"budget": "240MiB"}, "blocks")]
)
def test_the_decision(
    tmp_path: Path,
    changes: dict[str, Any],
    mode: str,
) -> None:
    """Which way the student is trained."""
    deep = {**tiny.CONFIG, "num_hidden_layers": 40}
    (tmp_path / "config.json").write_text(json.dumps(deep))
    asked = {"scenario": "goral", "machine": "m1-air", "max_seq_length": 32, "budget": "1GiB"}
    result = plan.run(plan.Settings(teacher=str(tmp_path), **{**asked, **changes}))
    assert (result["mode"], result["check_failed"]) == (mode, False)


def test_measure_then_plan(
    tmp_path: Path, llama: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--measure` alone has rates and no plan; the next plan uses them."""
    monkeypatch.setenv("MIS_MLX_CACHE", str(tmp_path))
    monkeypatch.setattr(rates, "SAMPLE_BYTES", 2**20)
    result = plan.run(plan.Settings(measure=True))
    assert result["read_bytes_per_s"] > 0
    assert "peak_bytes" not in result
    later = plan.run(plan.Settings(teacher=str(llama.path), max_seq_length=32))
    assert later["rates"] == result["source"]


def test_what_a_machine_can_make_but_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    """17.5 GB on a machine that gives a process 5.7: a sentence with both, and in JSON."""
    for teacher, runs in (("gemma-4-e2b", True), ("qwen3-30b-a3b", False)):
        found = plan.run(plan.Settings(teacher=teacher, machine="m1-air"))
        said = capsys.readouterr().out
        assert found["can_run"] == runs == ("5.7 GB" not in said)
    assert found["student_bytes"] == pytest.approx(17.5e9, rel=0.01) and "17.5 GB" in said
    assert "a machine of 26 GB or more" in said


def test_a_teacher_with_a_template_is_asked(tmp_path: Path) -> None:
    """A template beside the config: answers are counted, those of the student where the teacher is
    read from disk, and fewer prompts judge.
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
    silent, _ = plan.planned(asked, M1_AIR)
    (tmp_path / "chat_template.jinja").write_text(tiny.CHAT_TEMPLATE)
    whole, _ = plan.planned(asked, M1_AIR)
    streamed, _ = plan.planned(replace(asked, budget="168MiB"), M1_AIR)

    assert list(whole.planned) == [teacher_answers.PHASE, *silent.planned]
    assert whole.planned["measure"] > silent.planned["measure"]
    assert (whole.job.answers, streamed.job.answers) == (60, 24)
    assert not streamed.job.teacher_writes
    assert list(streamed.planned) == ["quantize", "logit store", "distil scales", "measure"]


def test_a_search_is_part_of_the_plan(tmp_path: Path) -> None:
    """Its hours have a row, and its memory is the most of all where it is."""
    (tmp_path / "config.json").write_text(json.dumps(tiny.CONFIG))
    asked = plan.Settings(teacher=str(tmp_path), machine="m1-air", budget="1GiB")
    planned, _ = plan.planned(asked, M1_AIR)
    search = plan_report.Search(9 * 3600.0, 2**40)
    table = plan_report.table(planned, search=search)
    assert "| search for sizes | 9.0 h | 1024.00 GiB |" in table
    assert " | 1024.00 GiB of " in table
    assert " 1024.00 GiB of " in plan_report.memory_line(planned, search)
