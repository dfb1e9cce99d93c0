"""The page of a run: a student that came out worse than it went in is said to be so, by text."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mis_mlx.distillation import summary
from mis_mlx.types import Checkpoint, Row
from tests.distillation.test_conversations import FINE, answers_with, judged


def own_folders(model: Checkpoint, *names: str) -> dict[str, Checkpoint]:
    """The model under all these names, as if each were another one."""
    return {name: replace(model) for name in names}


@pytest.mark.parametrize(("distilled", "worse"), [(3.0, []), (3.9, ["Polish"])])
def test_worse_than_pruned_is_said(distilled: float, worse: list[str], llama: Checkpoint) -> None:
    """English falls, Polish rises or does not; both numbers and a way out stand there."""
    models = own_folders(llama, "teacher", "pruned", "distilled")
    sizes = [Row(name, "params", 1.0) for name in models]
    quality = {"English": (2.0, 4.0, 2.5), "Polish": (2.0, 3.5, distilled)}
    rows = {}
    for text, losses in quality.items():
        rows[text] = [
            Row(model=name, metric="nll", value=loss, low=0.1, high=0.1, n=3)
            for name, loss in zip(models, losses, strict=True)
        ]
    page = summary.result_page(models, sizes, rows, 32)
    said = [text for text in quality if f"On {text} distillation made the student worse" in page]
    assert said == worse and ("3.900 nats/token, after 3.500" in page) == bool(worse)


@pytest.mark.parametrize(
    ("loops", "first"),
    [(5, "**The student repeats itself**: 5 of its 8 "), (0, "Answers in English")],
)
def test_the_page_begins_with_what_the_students_answer(
    loops: int, first: str, llama: Checkpoint
) -> None:
    """That it repeats itself, if it does; then a table for every language, then all that was there
    before.
    """
    models = own_folders(llama, "teacher", "pruned", "distilled", "4-bit")
    sizes = [Row(name, "params", 1.0) for name in models]
    quality = {
        "English": [
            Row(model=name, metric="nll", value=2.0, low=0.1, high=0.1, n=3) for name in models
        ]
    }
    greedy = {"teacher": [FINE] * 8, "distilled": [], "4-bit": answers_with(loops, 8)}
    plain = summary.result_page(models, sizes, quality, 32)

    page = summary.result_page(
        models, sizes, quality=quality, length=32, answered=judged("eeeeeeee", greedy)
    )

    assert page.startswith(first)
    assert page.partition("| parameters")[2].partition("\n\n")[0] in plain
    lines = page.splitlines()
    assert "Answers in English to 8 held-out prompts, ± 95 %" in lines
    assert "Answers in Polish" not in page
    (loops_row,) = (line for line in lines if line.startswith("| own answers that loop"))
    cells = [cell.strip().split(" ")[0] for cell in loops_row.strip("|").split("|")]
    assert cells[1] == "0"
    assert cells[4] == f"{100 * loops / 8:.0f}"
    assert cells[2] == cells[3] != "0"  # of these nobody asked


def test_what_was_won_and_lost_is_two_lines(llama: Checkpoint) -> None:
    """By pencil: sizes, the loss against the target, loops; then text."""
    models = own_folders(llama, "teacher", "pruned", "distilled", "4-bit")
    figures = {
        "params": (150.0, 100.0, 100.0, 100.0),
        "bytes": (300.0, 200.0, 200.0, 60.0),
    }
    sizes = []
    for metric, values in figures.items():
        sizes += [Row(name, metric, value) for name, value in zip(models, values, strict=True)]
    rows = {
        "English": [Row(n, "bpb", v) for n, v in zip(models, (1.0, 1.5, 1.1, 1.14), strict=True)]
    }
    greedy = {"teacher": [FINE] * 8, "distilled": [], "4-bit": answers_with(2, 8)}
    answered = judged("eeeeeeee", greedy)
    (excess,) = (
        row.value for row in answered.rows if (row.model, row.metric) == ("4-bit", "answers_excess")
    )
    for lose, verdict in ((excess + 0.01, "reached"), (excess - 0.01, "missed")):
        first, second = summary.gain_sentence(
            models, sizes, rows, answered=answered, lose=lose
        ).splitlines()
        assert first == (
            f"300.0 → 60.0 MB. Loss on the teacher's answers {excess:+.3f} bits per byte (target "
            f"{lose:.3f}: {verdict}). Loops 25 % (teacher 0 %)."
        )
        assert second == "Held-out text: English +0.140 bits per byte."
    dense = own_folders(llama, "teacher", "pruned", "distilled")
    params = [Row(n, "params", 1.0) for n in dense]
    assert summary.gain_sentence(dense, params, rows).startswith("1.0M → 1.0M parameters.")


def test_a_column_is_a_model_of_its_own(llama: Checkpoint) -> None:
    """An uncut teacher with fewer tokens is called so; the last model is the student."""
    for names, labels in (
        (
            ("teacher", "pruned", "distilled", "4-bit"),
            ["teacher", "pruned", "distilled", "student"],
        ),
        (("teacher", "trimmed", "4-bit"), ["teacher", "fewer tokens", "student"]),
        (("teacher", "pruned", "distilled"), ["teacher", "pruned", "student"]),
    ):
        assert list(summary.columns_of(own_folders(llama, *names)).values()) == labels
