"""What the experiments share: teacher and text, a judge on held-out windows, results with machine and versions.

Does not know what is compared.
"""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import psutil

from mis_mlx.disk.text import Windows
from mis_mlx.maths import losses
from mis_mlx.model import compare, load, teacher, windows
from mis_mlx.training import distillation

RESULTS = Path(__file__).resolve().parent / "results" / f"{platform.system()}-{platform.machine()}".lower()
METRICS = ("nll", "kl", "top1")


def machine() -> dict[str, Any]:
    """What a number was measured on."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "python": platform.python_version(),
        **{name: version(name) for name in ("mlx", "mlx-lm", "numpy")},
    }


def write(name: str, command: str, found: dict[str, Any]) -> None:
    """Put benchmarks/results/<machine>/<name>.json in place."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"command": command, **machine(), **found}, indent=1) + "\n")
    temporary.replace(path)


def stored(name: str) -> dict[str, Any]:
    """What `write` put there; {} when there is nothing."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


class Judge:
    """Held-out loss, KL to the teacher and agreement of any student in memory, on one text."""

    def __init__(self, source: distillation.Teacher, held_out: Windows):
        self.source, self.held_out = source, held_out
        self.hidden = list(source.hidden([mx.array(w[None]) for w in held_out.tokens]))

    def __call__(self, student: Any) -> dict[str, float]:
        """{"nll", "kl", "top1"}: means over windows, in nats per token and as a share."""
        head, means = load.head_weight(student), []
        rows = losses.chunk_rows(head.shape[0])
        for tokens, learn, target in zip(self.held_out.tokens, self.held_out.learn, self.hidden, strict=True):
            hidden, found = student.model(mx.array(tokens[None]))[0], []
            for start in range(0, len(tokens) - 1, rows):
                at = np.s_[start : min(start + rows, len(tokens) - 1)]
                reference = losses.Reference(self.source.logits(target[0, at]), mx.array(tokens[1:][at]))
                found.append(np.array(mx.stack(reference.compare(hidden[at] @ head.T))))
            means.append((np.concatenate(found, axis=1) * learn[:-1]).sum(axis=1) / max(learn.sum(), 1.0))
        return dict(zip(METRICS, np.mean(means, axis=0).tolist(), strict=True))


class Laboratory:
    """The default teacher whole in memory, its text, and a judge for each held-out text."""

    def __init__(self, length: int, eval_windows: int, teacher_folder: str | None = None):
        self.checkpoint = load.open_checkpoint(teacher.find(teacher_folder).path)
        self.data = windows.prepare(None, self.checkpoint.path, length)
        self.source = distillation.Teacher(self.checkpoint, None)
        self.held_out = {
            name: compare.chosen(text, max(1, eval_windows // (1 if at == 0 else 3)))
            for at, (name, text) in enumerate(self.data.held_out.items())
        }
        self.judges = {name: Judge(self.source, text) for name, text in self.held_out.items()}

    def judge(self, student: Any) -> dict[str, float]:
        """{"nll", "kl", "top1"} on the first text, and with the text's name behind on the others."""
        found: dict[str, float] = {}
        for at, (name, judge) in enumerate(self.judges.items()):
            found |= {m if at == 0 else f"{m}_{name.lower()}": round(v, 5) for m, v in judge(student).items()}
        return found

    def teacher_nll(self) -> dict[str, float]:
        """The teacher's own held-out loss, by text."""
        model = load.resident(self.checkpoint, mx.float32)
        return {name: round(judge(model)["nll"], 5) for name, judge in self.judges.items()}

    def pick(self, count: int, seed: int, use: int) -> list[mx.array]:
        """`count` training windows (1, T) for one use; as training/course picks them."""
        at = np.random.default_rng([seed, use, 1]).permutation(len(self.data.train.tokens))[:count]
        return [mx.array(self.data.train.tokens[i][None]) for i in at]
