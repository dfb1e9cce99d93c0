"""What a run tells: of every step, by mlx-lm's keys, to TensorBoard (by tensorboardX), Weights &
Biases or SwanLab; in the end one dictionary for machines, one page of tables for people.
"""

import atexit
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mis_mlx.distillation import conversations
from mis_mlx.evaluation import answers, comparison
from mis_mlx.models import arch, families, load, model_writer, policy
from mis_mlx.models.config import read_config
from mis_mlx.pruning import select
from mis_mlx.reporting import html, text
from mis_mlx.storage import run_folder
from mis_mlx.types import MisError, Row, Step

# the second where models read different tokens
LOSSES = (("nll", "nats/token"), ("bpb", "bits per byte"))

Quality = Mapping[str, list[Row]]  # rows of every held-out text
# in the JSON: a model
NAMES = {"teacher": "teacher", "pruned": "pruned", "student": "distilled", "quantized": "4-bit"}
MISSED = 0.3  # of what was expected: reached losses farther from it are said to be
LEAST_LOSS = 0.02  # bits a byte: less is expected with an error of this size
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "swanlab": "swanlab"}


def trackers(report_to: str | None) -> list[str]:
    """The names in `report_to`. MisError when one is unknown or its package is not installed."""
    names = [name.strip().lower() for name in (report_to or "").split(",") if name.strip()]
    for name in names:
        if name not in PACKAGES:
            raise MisError(
                f"--report-to {name} is not known: give {', '.join(PACKAGES)}, or several with "
                f"commas"
            )
        if find_spec(PACKAGES[name]) is None:
            raise MisError(
                f"--report-to {name} needs a package that is not installed: pip install "
                f"{PACKAGES[name]}"
            )
    return names


def reporter(
    report_to: str | None, folder: Path, config: Mapping[str, Any]
) -> Callable[[Step], None] | None:
    """`tell(step)` for the services in `report_to`, of the run in `folder`; None when there are
    none.
    """
    if not (names := trackers(report_to)):
        return None
    others = ",".join(name for name in names if name != "tensorboard")
    callbacks = load.mlx_lm("tuner.callbacks").get_reporting_callbacks
    service = callbacks(others, project_name=folder.name, log_dir=str(folder), config=dict(config))
    writer = None
    if "tensorboard" in names:
        from tensorboardX import SummaryWriter

        writer = SummaryWriter(str(folder / "tensorboard"), flush_secs=2)
        # a thread of its own writes; what it has not yet written is not to be lost
        atexit.register(writer.close)
    # before it was resumed
    trained = sum(int(step["tokens"]) for step in run_folder.metrics(folder))

    def tell(step: Step) -> None:
        nonlocal trained
        trained += step.tokens
        info = {
            "iteration": step.number,
            "train_loss": step.loss,
            "learning_rate": step.learning_rate,
            "iterations_per_second": 1 / max(step.seconds, 1e-9),
            "tokens_per_second": step.tokens / max(step.seconds, 1e-9),
            "trained_tokens": trained,
            "peak_memory": step.peak_bytes / 1e9,  # GB, as mlx-lm has it
        }
        if service:
            service.on_train_loss_report(info)
        if writer:
            for name, value in info.items():
                writer.add_scalar(name, value, step.number)

    return tell


def result(
    folder: Path, models: comparison.Models, sizes: list[Row], quality: Quality
) -> dict[str, Any]:
    """The run's JSON. `models`: teacher, pruned, distilled and perhaps 4-bit; the first text of
    `quality` counts.
    """
    main = {(r.model, r.metric): r.value for r in next(iter(quality.values()))}
    loss = "nll" if ("teacher", "nll") in main else "bpb"  # which is the same share of the gap
    steps = run_folder.metrics(folder)
    tokens, seconds = (sum(r[key] for r in steps) for key in ("tokens", "seconds"))
    gap = main["pruned", loss] - main["teacher", loss]
    keep = model_writer.read_keep(models["pruned"].path)
    return {
        "teacher": str(models["teacher"].path),
        "student": str(folder / "model"),
        "run": str(folder),
        "params_teacher": arch.params(models["teacher"].config),
        "params_student": arch.params(models["distilled"].config),
        # none where it reads other tokens
        **{f"nll_{key}": main.get((name, "nll")) for key, name in NAMES.items()},
        **{f"bits_per_byte_{name}": main.get((name, "bpb")) for name in models},
        "gap_closed": (main["pruned", loss] - main["distilled", loss]) / gap
        if round(gap, 3)
        else None,
        "kl_pruned": main["pruned", "kl"],
        "kl_student": main["distilled", "kl"],
        "top1_student": main["distilled", "top1"],
        **{f"{r.metric}_{r.model}": round(r.value, 3) for r in sizes if r.metric != "params"},
        "iters": len(steps),
        "tokens": tokens,
        "tokens_per_s": round(tokens / max(seconds, 1e-9), 1),
        **({k: v for k, v in keep.report.items() if k not in select.BULKY} if keep else {}),
    }


def _texts(quality: Quality, losses: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """For templates: every text, with each model's loss by the first measure that it has."""
    texts = []
    for name, rows in quality.items():
        metric, unit = next((m, u) for m, u in losses if any(r.metric == m for r in rows))
        loss = {r.model: r.value for r in rows if r.metric == metric}
        texts.append(
            {"name": name, "windows": rows[0].n, "metric": metric, "unit": unit, "loss": loss}
        )
    return texts


def page(
    models: comparison.Models,
    sizes: list[Row],
    quality: Quality,
    length: int,
    answered: answers.Judgement | None = None,
    *,
    dialogue: str = "",
    expectation: str = "",
) -> str:
    """Markdown: what the models answer, where they were asked; sizes and speeds; then one table a
    text. `length` is the tokens of a held-out window. dialogue, expectation: stand before the first
    table.
    """
    names = list(models)
    texts = _texts(quality, LOSSES)
    texts = [
        t | {"table": text.table(quality[t["name"]], names, text.TABLES["held-out"])} for t in texts
    ]
    values = {
        "sizes": text.table(sizes, names, text.TABLES["sizes"]),
        "texts": texts,
        "length": length,
    }
    asked = list[dict[str, Any]]()
    for language, rows in conversations.tables(answered).items() if answered else ():
        table = text.table(rows, names, text.TABLES["answers"])
        asked.append({"language": language, "prompts": rows[0].n, "table": table})
    values |= {"dialogue": dialogue, "expectation": expectation, "answers": asked}
    values["verdict"] = conversations.verdict(answered) if answered else ""
    values |= {
        "across": comparison.ACROSS,
        "dequantized": not policy.keeps_packed() and "4-bit" in models,
    }
    return html.document("table.md", {**values, "won": won(models, sizes, quality)})


def won(models: comparison.Models, sizes: list[Row], quality: Quality) -> str:
    """A sentence: what the student gained over the teacher, and what it costs."""
    teacher, *_, student = (
        {r.metric: r.value for r in sizes if r.model == name} for name in models
    )
    fast = {r.model: r.value for r in sizes if r.metric == "decode_tps"}
    values = {
        "teacher": teacher,
        "student": student,
        "fast": fast,
        "texts": _texts(quality, LOSSES[::-1]),
    }
    return html.document("won.md", values)


def expectation(
    expected: float | None,
    student: str,
    answered: answers.Judgement | None,
    quality: Quality,
) -> dict[str, float | str]:
    """What a search expected the last model to lose and what it lost, in bits a byte; {} where
    nothing was expected.

    On the teacher's answers, or else the mean of the held-out texts.
    """
    if expected is None:
        return {}
    if answered is not None:
        rows = {(row.model, row.metric): row.value for row in answered.rows}
        reached = rows[student, "answers_excess"]
        return {"expected_loss": expected, "reached_loss": round(reached, 4), "loss_of": "answers"}
    above = list[float]()
    for rows_of_text in quality.values():
        bits = {row.model: row.value for row in rows_of_text if row.metric == "bpb"}
        above.append(bits[student] - bits["teacher"])
    return {
        "expected_loss": expected,
        "reached_loss": round(sum(above) / len(above), 4),
        "loss_of": "text",
    }


def expectation_sentence(found: Mapping[str, Any], lose: float | None) -> str:
    """What was allowed, expected and reached, in a sentence; and that the expectation was wrong,
    where it was.
    """
    expected = float(found["expected_loss"])
    reached = float(found["reached_loss"])
    far = abs(reached - expected) > MISSED * max(abs(expected), LEAST_LOSS)
    return html.document("expected.md", {**found, "lose": lose, "far": far})


def next_steps(folder: Path) -> str:
    """What to do with a finished run: lines to paste."""
    here = Path.cwd()
    paths = (Path(sys.executable), folder.absolute())
    python, run = (path.relative_to(here) if path.is_relative_to(here) else path for path in paths)
    made = folder / "model"
    exports = not made.is_dir() or families.family(read_config(made)).gguf != ""
    return html.document(
        "next.md", {"python": python, "run": shlex.quote(str(run)), "exports": exports}
    )
