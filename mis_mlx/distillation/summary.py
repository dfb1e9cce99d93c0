"""The result of a run: a dictionary for machines and a page of tables for people."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mis_mlx import cli
from mis_mlx.compute import precision
from mis_mlx.distillation import conversations
from mis_mlx.judge import answers, comparison
from mis_mlx.models.architectures import arch
from mis_mlx.models.architectures.families import family
from mis_mlx.models.opening.config import read_config
from mis_mlx.models.writing import model_writer
from mis_mlx.pruning import select
from mis_mlx.reporting import html, text
from mis_mlx.storage import run_folder
from mis_mlx.types import Row

# Measures of a loss and their units; the second counts where models read different tokens.
LOSSES = (("nll", "nats/token"), ("bpb", "bits per byte"))

Quality = Mapping[str, list[Row]]  # rows of every held-out text
# A model's name in the JSON -> in a run. "trimmed" is an uncut teacher with fewer tokens.
NAMES = {"teacher": "teacher", "pruned": "pruned", "student": "distilled", "quantized": "4-bit"}
MISSED = 0.3  # share of the expected loss by which a reached one may differ without a remark
JUDGED = ("4-bit", "distilled")  # the first one that a result knows is the student
LEAST_LOSS = 0.02  # bits a byte: for a smaller expected loss, MISSED is a share of this


def result(
    folder: Path, models: comparison.Models, sizes: list[Row], quality: Quality
) -> dict[str, Any]:
    """The run's JSON. models: the teacher, and those of the other NAMES that the run has.

    The first text of `quality` counts. A figure of a model that the run does not have is None.
    """
    rows = next(iter(quality.values()))
    main = {(row.model, row.metric): row.value for row in rows}
    # Either gives the same share of the gap.
    loss = "nll" if ("teacher", "nll") in main else "bpb"
    steps = run_folder.metrics(folder)
    tokens = sum(step["tokens"] for step in steps)
    seconds = sum(step["seconds"] for step in steps)
    gap_closed = None
    pruning = dict[str, Any]()
    if "pruned" in models:
        gap = main["pruned", loss] - main["teacher", loss]
        if round(gap, 3):
            gap_closed = (main["pruned", loss] - main["distilled", loss]) / gap
        keep = model_writer.read_keep(models["pruned"].path)
        report = keep.report if keep else {}
        pruning = {name: value for name, value in report.items() if name not in select.BULKY}
    *_, student = models.values()
    return {
        "teacher": str(models["teacher"].path),
        "student": str(folder / "model"),
        "run": str(folder),
        "params_teacher": arch.params(models["teacher"].config),
        "params_student": arch.params(student.config),
        # None for a model that reads other tokens, too.
        **{f"nll_{key}": main.get((name, "nll")) for key, name in NAMES.items()},
        **{f"bits_per_byte_{name}": main.get((name, "bpb")) for name in models},
        "gap_closed": gap_closed,
        "kl_pruned": main.get(("pruned", "kl")),
        "kl_student": main.get(("distilled", "kl")),
        "top1_student": main.get(("distilled", "top1")),
        **{
            f"{row.metric}_{row.model}": round(row.value, 3)
            for row in sizes
            if row.metric != "params"
        },
        "iters": len(steps),
        "tokens": tokens,
        "tokens_per_s": round(tokens / max(seconds, 1e-9), 1),
        **pruning,
    }


def _texts(quality: Quality, losses: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """For templates: every text, with each model's loss by the first measure that it has."""
    texts = list[dict[str, Any]]()
    for name, rows in quality.items():
        measured = {row.metric for row in rows}
        metric, unit = next(loss for loss in losses if loss[0] in measured)
        texts.append(
            {
                "name": name,
                "windows": rows[0].n,
                "metric": metric,
                "unit": unit,
                "loss": {row.model: row.value for row in rows if row.metric == metric},
            }
        )
    return texts


def result_page(
    models: comparison.Models,
    sizes: list[Row],
    quality: Quality,
    length: int,
    *,
    answered: answers.Judgement | None = None,
    for_screen: bool = False,
    losses: Mapping[str, Any] = MappingProxyType({}),
    lose: float | None = None,
    languages: Mapping[str, float] | None = None,
) -> str:
    """Markdown: what the models answer, where they were asked; sizes and speeds; a table a text.

    length: tokens of a held-out window. losses: of `expectation`. lose: the loss
    that was the target. languages: what the last model loses in some. for_screen: the sentences on
    what was won come first, then some of the answers; in a file they are the last lines.
    """
    columns = columns_of(models)
    texts = _texts(quality, LOSSES)
    for of_text in texts:
        rows = quality[of_text["name"]]
        of_text["table"] = text.table(rows, columns, text.TABLES["held-out"])
    asked = list[dict[str, Any]]()
    verdict = ""
    if answered:
        for language, rows in conversations.tables(answered).items():
            table = text.table(rows, columns, text.TABLES["answers"])
            asked.append({"language": language, "prompts": rows[0].n, "table": table})
        verdict = conversations.loop_warning(answered)
    won = gain_sentence(models, sizes, quality, answered=answered, lose=lose, languages=languages)
    sentence = expectation_sentence(losses, lose) if losses else ""
    if for_screen and answered and not _is_far(losses):
        sentence = ""  # the first line of the screen has the loss and the target
    lead = ""
    dialogue = ""
    if for_screen:
        lead = won
        dialogue = conversations.dialogue(answered) if answered else ""
    values = {
        "lead": lead,
        "sizes": text.table(sizes, columns, text.TABLES["sizes"]),
        "texts": texts,
        "length": length,
        "dialogue": dialogue,
        "expectation": sentence,
        "answers": asked,
        "verdict": verdict,
        "across": comparison.ACROSS,
        "dequantized": not precision.keeps_packed() and "4-bit" in models,
        "won": won,
    }
    return html.document("table.md", values)


def columns_of(models: comparison.Models) -> dict[str, str]:
    """{a model's name: what a table calls it}."""
    *_, student = models
    shown = {name: name for name in models}
    if "trimmed" in models:
        shown["trimmed"] = "fewer tokens"
    return {**shown, student: "student"}


def gain_sentence(
    models: comparison.Models,
    sizes: list[Row],
    quality: Quality,
    *,
    answered: answers.Judgement | None = None,
    lose: float | None = None,
    languages: Mapping[str, float] | None = None,
) -> str:
    """Two lines: what the student gained over the teacher, and what it costs."""
    teacher, *_, student = models
    figures = {}
    if answered:
        figures = {(row.model, row.metric): row.value for row in answered.rows}
    values = {
        "teacher": {row.metric: row.value for row in sizes if row.model == teacher},
        "student": {row.metric: row.value for row in sizes if row.model == student},
        "last": student,
        "excess": figures.get((student, "answers_excess")),
        "lose": lose,
        "loops": figures.get((student, "loops")),
        "teacher_loops": figures.get((teacher, "loops")),
        "texts": _texts(quality, LOSSES[::-1]),
        "languages": languages or {},
    }
    return html.document("won.md", values)


def expectation(
    expected: float | None,
    student: str,
    answered: answers.Judgement | None,
    quality: Quality,
) -> dict[str, float | str]:
    """The loss that a search expected of the last model, and the loss it has, in bits a byte.

    On the teacher's answers, or else the mean of the held-out texts. {} where nothing was expected.
    """
    if expected is None:
        return {}
    if answered is not None:
        rows = {(row.model, row.metric): row.value for row in answered.rows}
        reached = rows[student, "answers_excess"]
        return {"expected_loss": expected, "reached_loss": round(reached, 4), "loss_of": "answers"}
    above = []
    for rows_of_text in quality.values():
        bits = {row.model: row.value for row in rows_of_text if row.metric == "bpb"}
        above.append(bits[student] - bits["teacher"])
    return {
        "expected_loss": expected,
        "reached_loss": round(sum(above) / len(above), 4),
        "loss_of": "text",
    }


def expectation_sentence(losses: Mapping[str, Any], lose: float | None) -> str:
    """The allowed, expected and reached loss in a sentence, with a remark if they are far apart."""
    return html.document("expected.md", {**losses, "lose": lose, "far": _is_far(losses)})


def _is_far(losses: Mapping[str, Any]) -> bool:
    """Whether the loss reached differs from the expected one so much that it is said."""
    if not losses:
        return False
    expected = float(losses["expected_loss"])
    return abs(losses["reached_loss"] - expected) > MISSED * max(abs(expected), LEAST_LOSS)


def next_steps(folder: Path) -> str:
    """What to do with a finished run: lines to paste."""
    model = folder / "model"
    exports = not model.is_dir() or family(read_config(model)).gguf != ""
    values = {
        "python": shlex.quote(str(cli.from_here(Path(sys.executable)))),
        "run": shlex.quote(str(cli.from_here(folder.absolute()))),
        "exports": exports,
    }
    return html.document("next.md", values)


def first_sentences(result: Mapping[str, Any], lose: float | None) -> list[str]:
    """What is said first of a finished run: size, loss, loops; what was expected.

    result: of a run; figures that it does not have are left out. lose: the loss that was allowed.
    """
    name = next((name for name in JUDGED if f"bytes_{name}" in result), "")
    values = {
        "quantized": name == "4-bit",
        "nbytes": result.get(f"bytes_{name}"),
        "teacher_bytes": result.get("bytes_teacher"),
        "prompts": result.get("answers_prompts"),
        "excess": result.get(f"answers_excess_{name}"),
        "loops": result.get(f"loops_{name}"),
        "teacher_loops": result.get("loops_teacher"),
        "bits": result.get(f"bits_per_byte_{name}"),
        "teacher_bits": result.get("bits_per_byte_teacher"),
    }
    lines = html.document("verdict.md", values).splitlines()
    if "expected_loss" in result:
        lines.append(expectation_sentence(result, lose))
    return [line for line in lines if line]
