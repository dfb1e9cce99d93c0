"""What the experiments share: teacher and text, a judge on held-out windows, results with machine
and versions.

Does not know what is compared.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import psutil

from mis_mlx import cli
from mis_mlx.compute import logit_figures
from mis_mlx.data import preparation
from mis_mlx.data.token_windows import Windows
from mis_mlx.distillation import pipeline, targets
from mis_mlx.distillation.block_student import BlockStudent
from mis_mlx.hardware import memory, rates
from mis_mlx.judge import comparison
from mis_mlx.maths import losses
from mis_mlx.models.architectures.families import family
from mis_mlx.models.opening import compute_type, load, resolve
from mis_mlx.models.passing import stream
from mis_mlx.pruning import vocabulary
from mis_mlx.quantization import learned_scales
from mis_mlx.settings.recipe import TUNE_RATE, DistillationConfig
from mis_mlx.types import Checkpoint, MisError

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / f"{platform.system()}-{platform.machine()}".lower()
METRICS = ("nll", "kl", "top1")


def start(settings: type, main: Callable[[Any], None]) -> None:
    """A program's way in: flags, one sentence for what a user can mend, and for Ctrl-C."""
    try:
        main(cli.parse(settings))
    except MisError as error:
        sys.exit(f"mis_mlx: {error}")
    except KeyboardInterrupt:
        cli.say("stopped by hand; what was finished is kept, the same command goes on from there")
        sys.exit(130)


def machine() -> dict[str, Any]:
    """What a number was measured on, and by which version of this program."""
    return {**rates.about(), "git": version()}


def version() -> str | None:
    """The commit of this program, and whether it was changed since; None where there is no git or
    no repository.
    """
    said = []
    for words in (
        ("rev-parse", "--short=12", "HEAD"),
        ("status", "--porcelain", "--", "mis_mlx", "benchmarks/*.py"),
    ):
        try:
            done = subprocess.run(
                ["git", *words], cwd=ROOT, capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        said.append(done.stdout.strip())
    return said[0] + (", changed" if said[1] else "")


def weights_sha256(folder: Path) -> str:
    """Twelve digits that a model's weights, and only they, give: of all its safetensors files."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]


def packed(folder: Path, out: Path, bits: int = 4, group: int = 64) -> Path:
    """`out`: the model as `mlx_lm.convert -q` packs it."""
    load.mlx_lm("convert").convert(
        str(folder), str(out), quantize=True, q_group_size=group, q_bits=bits, dtype="float16"
    )
    return out


def tuned(
    folder: Path,
    out: Path,
    *,
    taught_by: Checkpoint,
    train: Windows,
    q_iters: int,
    seed: int = 0,
    batch_size: int = DistillationConfig.batch_size,
) -> None:
    """Write `out`: the packed model in `folder`, whose scales and norms have learned from another.

    That happens in so many steps, at the default rate.
    """
    checkpoint = compute_type.open_to_compute(folder)
    rate = TUNE_RATE
    recipe = pipeline.tuning_recipe(
        DistillationConfig(seed=seed, batch_size=batch_size), checkpoint, q_iters, rate
    )
    with vocabulary.shared(taught_by, [checkpoint]) as teacher:
        kept = kept_targets(teacher, train, recipe)
    layers = checkpoint.config["num_hidden_layers"]
    student = BlockStudent(checkpoint, "scales", kept=layers)
    student.begin()
    for _ in kept.steps(student, train, recipe):
        memory.give_back(cache=False)
    learned_scales.write_learned(checkpoint, student.learned, out)


def kept_targets(
    teacher: Checkpoint, train: Windows, recipe: DistillationConfig
) -> targets.KeptTargets:
    """A teacher's targets for all steps of a recipe, in a folder that is gone with the process."""
    windows = targets.visited_windows(train, recipe)
    folder = tempfile.mkdtemp(prefix="mis-targets-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    store = targets.write_store(teacher, train.pick(windows), Path(folder), seed=recipe.seed)
    return targets.KeptTargets(store, windows, family(teacher.config).softcap)


def unpacked(folder: Path, out: Path) -> Path:
    """`out`: a packed model's numbers as float32 weights.

    MLX's kernels for few bits are ten times slower on a CPU.
    """
    load.mlx_lm("convert").convert(str(folder), str(out), dequantize=True, dtype="float32")
    return out


def write(name: str, command: str, found: dict[str, Any]) -> None:
    """Put benchmarks/results/<machine>/<name>.json in place."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"command": command, **machine(), **found}, indent=1) + "\n")
    temporary.replace(path)


def bits_per_byte(table: str) -> dict[str, list[float]]:
    """{text: bits per byte of every model} in the table of a run: the teacher's, the pruned
    student's, ...
    """
    bits = dict[str, list[float]]()
    text = ""
    for line in table.splitlines():
        text = line.partition(",")[0] if " held out, " in line else text
        if line.startswith("| bits per byte of text |"):
            bits[text] = [float(cell.split("±")[0]) for cell in line.strip("| ").split("|")[1:]]
    return bits


def stored(name: str) -> dict[str, Any]:
    """What `write` put there; {} when there is nothing."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def resumed(name: str, given: dict[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """What `write` put there before under these `keys`, if it was given the same; else {}."""
    found = stored(name)
    return {key: found[key] for key in keys if key in found} if found.get("given") == given else {}


def experiment(
    name: str,
    command: str,
    given: dict[str, Any],
    rows: Iterable[tuple[str, Callable[[], dict[str, Any] | None]]],
) -> dict[str, Any]:
    """All rows of a results file by label; those that are not there yet are measured and stored.

    rows: labels, and what measures each; None leaves a row out. Rows of another `given` do not
    count.
    """
    found = resumed(name, given, ["rows"]).get("rows", {})
    for label, measure in rows:
        if label in found:
            continue
        row = measure()
        if row is not None:
            found[label] = row
            cli.say(f"{label}: {row}")
            write(name, command, {"given": given, "rows": found})
    return found


def count_anew() -> None:
    """Have Linux forget the largest resident set of this process."""
    if (place := Path("/proc/self/clear_refs")).exists():
        place.write_text("5")


def largest() -> int:
    """The largest resident set of this process since it was last told to count anew, in bytes.

    0 where Linux does not say it.
    """
    status = Path("/proc/self/status")
    if not status.is_file():
        return 0
    for line in status.read_text().splitlines():
        if line.startswith("VmHWM"):
            return 1024 * int(line.split()[1])
    return 0


def busy(when: str) -> list[str]:
    """[why times taken now measure more than the program], or []."""
    load_average = psutil.getloadavg()[0]
    cores = os.cpu_count() or 1
    return (
        [f"{when}: load average {load_average:.1f}, more than there are cores"]
        if load_average > cores
        else []
    )


def goal(value: float, form: str, aim: str, holds: bool) -> dict[str, Any]:
    """What was to be shown: what came out, also as people read it, and whether that is enough."""
    return {"value": value, "shown": form.format(value), "aim": aim, "holds": holds}


def say_goals(verdict: dict[str, dict[str, Any]]) -> None:
    """A line each."""
    for what, one in verdict.items():
        cli.say(
            f"{what}: {one['shown']}, aim {one['aim']}: "
            f"{'holds' if one['holds'] else 'DOES NOT HOLD'}"
        )


class Judge:
    """Held-out loss, KL to the teacher and agreement of any student in memory, on one text."""

    def __init__(self, source: stream.Stream, held_out: Windows):
        self.source = source
        self.held_out = held_out
        self.hidden = source.forward([mx.array(w[None]) for w in held_out.tokens])

    def __call__(self, student: Any) -> dict[str, float]:
        """{"nll", "kl", "top1"}: means over windows, in nats per token and as a share."""
        head = load.head_weight(student)
        means = []
        rows = losses.chunk_rows(head.shape[0])
        for tokens, loss_mask, target in zip(
            self.held_out.tokens, self.held_out.loss_mask, self.hidden, strict=True
        ):
            hidden = student.model(mx.array(tokens[None]))[0]
            found = []
            for start in range(0, len(tokens) - 1, rows):
                at = np.s_[start : min(start + rows, len(tokens) - 1)]
                theirs = load.wide_logits(self.source.head(), target[0, at])
                right = tokens[1:][at]
                whole = logit_figures.compared(theirs, hidden[at] @ head.T, right)
                found.append(logit_figures.over_parts([whole])[:, 1:4].T)
            means.append(
                (np.concatenate(found, axis=1) * loss_mask[:-1]).sum(axis=1)
                / max(loss_mask.sum(), 1.0)
            )
        return dict(zip(METRICS, np.mean(means, axis=0).tolist(), strict=True))


class Laboratory:
    """The default teacher whole in memory, its text, and a judge for each held-out text."""

    def __init__(self, length: int, eval_windows: int, teacher_folder: str | None = None):
        self.checkpoint = compute_type.open_to_compute(resolve.resolve_model(teacher_folder).path)
        self.data = preparation.prepare(None, load.tokenizer(self.checkpoint.path), length)
        self.source = stream.Stream(self.checkpoint, headroom_bytes=None)
        self.held_out = {
            name: comparison.spread_windows(text, max(1, eval_windows // (1 if at == 0 else 3)))
            for at, (name, text) in enumerate(self.data.held_out.items())
        }
        self.judges = {name: Judge(self.source, text) for name, text in self.held_out.items()}

    def judge(self, student: Any) -> dict[str, float]:
        """{"nll", "kl", "top1"} on the first text, and with the text's name behind on the
        others.
        """
        found: dict[str, float] = {}
        for at, (name, judge) in enumerate(self.judges.items()):
            found |= {
                m if at == 0 else f"{m}_{name.lower()}": round(v, 5)
                for m, v in judge(student).items()
            }
        return found

    def teacher_nll(self) -> dict[str, float]:
        """The teacher's own held-out loss, by text."""
        model = load.resident_model(self.checkpoint, mx.float32)
        return {name: round(judge(model)["nll"], 5) for name, judge in self.judges.items()}

    def pick(self, count: int, seed: int, use: int) -> list[mx.array]:
        """`count` training windows (1, T) for one use; as distillation/pipeline picks them."""
        return preparation.calibration(self.data.train, count, seed, use)
