"""Evaluate students against their teacher on held-out text: loss, KL, agreement, with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mis_mlx import cli
from mis_mlx.disk.text import Windows, fingerprint
from mis_mlx.machine import memory
from mis_mlx.model import compare, kld, load, teacher, windows
from mis_mlx.training import planning
from mis_mlx.types import Checkpoint, MisError, Row


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
    max_seq_length: int | None = None
    """tokens in a window; default: 256, with --kld 512"""
    kld: bool = False
    """llama.cpp's quality report instead, with the teacher as reference, over the second half of every window"""
    budget: str | None = None
    """memory this may take, such as 600MiB; default: 5GiB or 75 % of what is there"""
    config: cli.ConfigFile = None
    """YAML file with any of these flags"""


def _kld(models: Mapping[str, Checkpoint], held_out: Windows, title: str) -> dict[str, Any]:
    """Print the report on all models but the first, the reference; the same for the JSON line."""
    held_out = kld.second_half(held_out)
    base, *names = models
    found = kld.against(models[base], {name: models[name] for name in names}, held_out)
    tokens, sha256 = int((held_out.learn > 0).sum()), fingerprint(held_out)
    rows, said = [], dict[str, Any]({"tokens": tokens, "sha256_tokens": sha256})
    for name, figures in found.items():
        for metric, (value, error) in figures.items():
            low, high = (None, None) if error is None else (value - error, value + error)
            rows.append(Row(name, metric, value, low, high, tokens))
            said |= {f"{metric}_{name}": value} | ({} if error is None else {f"{metric}_se_{name}": error})
    print(f"\n{title}: the {tokens} tokens of their second halves, ± one standard error\n")
    print(cli.table(rows, names, kld.METRICS))
    print(f"\nsha256 of the tokens: {sha256}")
    return said


def run(settings: Settings) -> dict[str, Any]:
    """The command: one table a text."""
    length = settings.max_seq_length or (512 if settings.kld else 256)
    if settings.kld and not settings.students:
        raise MisError("--kld compares two models, there is only the teacher: name the other with --students")
    found = teacher.find(settings.teacher)
    models = {"teacher": load.open_checkpoint(found.path)}
    for name, folder in zip(load.labels(settings.students, ("teacher",)), settings.students, strict=True):
        models[name] = load.open_checkpoint(folder)
        compare.same_vocabulary(models["teacher"], models[name])
    limit = memory.budget(None if settings.budget is None else cli.parse_bytes(settings.budget))
    planned = planning.compared([planning.model_of(m) for m in models.values()], settings.eval_windows, length)
    planning.fit(limit, planned)
    data = windows.prepare(settings.data, found.path, length)
    result: dict[str, Any] = {"teacher": str(found.path), "students": list(settings.students)}
    for text_name, held_out in data.held_out.items():
        chosen = compare.chosen(held_out, settings.eval_windows)
        title = f"{text_name}, {len(chosen.tokens)} windows of {length} tokens"
        with memory.limited(limit, planned.peak_bytes):
            if settings.kld:
                result[text_name] = _kld(models, chosen, title)
                continue
            rows = compare.rows_of(compare.compare(models, chosen))
        print(f"\n{title}\n")
        print(cli.table(rows, list(models), compare.METRICS))
        result[text_name] = {f"{r.metric}_{r.model}": r.value for r in rows}
    return result


if __name__ == "__main__":
    cli.main(Settings, run)
