"""Evaluate students against their teacher on held-out text: loss, KL, agreement, with intervals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mis_mlx import cli
from mis_mlx.machine import memory
from mis_mlx.model import compare, load, teacher, windows
from mis_mlx.training import planning


@dataclass(frozen=True)
class Settings:
    """Compare any number of models with one teacher that shares their tokenizer."""

    teacher: str | None = None
    """folder or hub id; default: SmolLM2-135M-Instruct"""
    students: tuple[str, ...] = ()
    """model folders"""
    data: str | None = None
    """a folder with train.jsonl and test.jsonl, or a hub data set; default: built in"""
    eval_windows: int = 24
    """held-out windows"""
    max_seq_length: int = 256
    """tokens in a window"""
    budget: str | None = None
    """memory this may take, such as 600MiB; default: 5GiB or 75 % of what is there"""
    config: cli.ConfigFile = None
    """YAML file with any of these flags"""


def run(settings: Settings) -> dict[str, Any]:
    """The command: one table a text."""
    found = teacher.find(settings.teacher)
    models = {"teacher": load.open_checkpoint(found.path)}
    for name, folder in zip(load.labels(settings.students, ("teacher",)), settings.students, strict=True):
        models[name] = load.open_checkpoint(folder)
        compare.same_vocabulary(models["teacher"], models[name])
    limit = memory.budget(None if settings.budget is None else cli.parse_bytes(settings.budget))
    planned = planning.compared(
        [planning.model_of(m) for m in models.values()], settings.eval_windows, settings.max_seq_length
    )
    planning.fit(limit, planned)
    data = windows.prepare(settings.data, found.path, settings.max_seq_length)
    result: dict[str, Any] = {"teacher": str(found.path), "students": list(settings.students)}
    for text_name, held_out in data.held_out.items():
        with memory.limited(limit, planned.peak_bytes):
            rows = compare.rows_of(compare.compare(models, compare.chosen(held_out, settings.eval_windows)))
        print(f"\n{text_name}, {rows[0].n} windows of {settings.max_seq_length} tokens\n")
        print(cli.table(rows, list(models), compare.METRICS))
        result[text_name] = {f"{r.metric}_{r.model}": r.value for r in rows}
    return result


if __name__ == "__main__":
    cli.main(Settings, run)
