"""Distil: teacher in, small recovered 4-bit student out, with a table of what it cost. The main job."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mis_mlx import __version__, bench, cli, evaluate, plan, prune, quantize
from mis_mlx.disk import checkpoint as protocol
from mis_mlx.disk import runs, text
from mis_mlx.disk.files import Files
from mis_mlx.machine import memory, rates
from mis_mlx.maths.optimizer import GoralW
from mis_mlx.model import arch, load, reconstruct, slice, stream, teacher, windows
from mis_mlx.training import distillation, loop
from mis_mlx.training.recipe import Recipe
from mis_mlx.types import Budget, Checkpoint, Keep, MisError, Row

# Settings that may differ when a run is resumed: none of them changes a weight.
FREE = frozenset({"out", "resume", "dry_run", "config", "budget", "eval_windows", "bench_tokens", "save_every"})


@dataclass(frozen=True)
class Settings(prune.Cut, Recipe):
    """One run. Every default is what was measured to work; nothing needs to be given."""

    teacher: str | None = None
    """folder or hub id of a llama, mistral, qwen2 or qwen3; default: SmolLM2-135M-Instruct"""
    student: str | None = None
    """folder of a student pruned earlier; default: prune now"""
    data: str | None = None
    """folder with train.jsonl (valid.jsonl, test.jsonl), or hub data set; default: built-in text"""
    budget: str | None = None
    """memory this may take, such as 5GiB; default: 5GiB or 75 % of what is there"""
    temperature: float = 1.0
    """T of eq. (2), which softens both distributions"""
    halny: float | None = None
    """spread of eps_halny in eq. (2); 0 switches it off; default: from measured T_env, 0 when unmeasured"""
    num_samples: int = 32
    """calibration windows for importance"""
    reconstruct_samples: int = 64
    """calibration windows for the closed-form repair before training; 0 leaves it out"""
    quantize: Literal[4, 0] = 4
    """bits of the result; 0 keeps it unquantized"""
    q_group_size: Literal[32, 64] = 64
    """weights that share one scale"""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """type of unquantized weights on disk"""
    eval_windows: int = 24
    """held-out windows measured; a third as many of the second text"""
    bench_tokens: int = 16
    """tokens timed per model; 0 leaves timing out"""
    preset: Literal["default", "paper"] = "default"
    """paper: 8,000 steps, peak 1.5e-4"""
    out: str | None = None
    """run folder; default: the next free runs/NAME-00N"""
    resume: bool = False
    """continue the run in --out, or the newest unfinished one"""
    dry_run: bool = False
    """print the plan and stop"""
    config: cli.ConfigFile = None
    """YAML file with any of these flags"""


@dataclass
class Run:
    """What the stages share."""

    settings: Settings
    folder: Path
    teacher: Checkpoint
    data: windows.Data
    plan: plan.Plan
    files: Files
    peak: memory.Peak


def _pick(windows_: text.Windows, count: int, seed: int, use: int) -> list[mx.array]:
    """`count` training windows (1, T) for one use; different uses get different ones."""
    at = np.random.default_rng([seed, use, 1]).permutation(len(windows_.tokens))[:count]
    return [mx.array(windows_.tokens[i][None]) for i in at]


def _prune(run: Run) -> Checkpoint:
    s, out = run.settings, run.folder / "pruned"
    if s.student is not None:
        return load.open_checkpoint(s.student)
    if not out.exists():
        cli.say("calibrate and prune")
        given = prune.given_reading(s)
        batches = _pick(run.data.train, s.num_samples, s.seed, 1)
        report = prune.prune(
            run.teacher, batches, out, s, dtype=s.dtype, seed=s.seed, reading=lambda: given, files=run.files
        )
        cli.say(
            f"pruned: {report['params_before'] / 1e6:.1f}M -> {report['params'] / 1e6:.1f}M parameters, "
            f"importance {report['importance']}"
        )
    return load.open_checkpoint(out)


def _starting_weights(run: Run, pruned: Checkpoint) -> dict[str, mx.array]:
    """The closed-form repair, as weights to put over the pruned ones; {} when there is nothing to go by."""
    keep_file = pruned.path / "keep.json"
    if run.settings.reconstruct_samples == 0 or not keep_file.is_file():
        return {}
    saved = json.loads(keep_file.read_text())
    kept = {(int(k.split("/")[0]), k.split("/")[1]): tuple(v) for k, v in saved["kept"].items()}
    keep = Keep(tuple(saved["layers"]), kept, saved["why"])
    cli.say("reconstruct: refit every down_proj to the teacher's stream")
    batches = _pick(run.data.train, run.settings.reconstruct_samples, run.settings.seed, 2)
    return reconstruct.reconstruct(run.teacher, pruned, keep, batches)[0]


def _distil(run: Run, pruned: Checkpoint) -> Checkpoint:
    """Train from the newest checkpoint (or from the repaired, pruned weights) to the end; write the student."""
    s = run.settings
    out = run.folder / ("distilled" if s.quantize else "model")
    if out.exists():
        return load.open_checkpoint(out)
    student = load.resident(pruned, mx.float32)
    optimizer = GoralW(weight_decay=s.weight_decay)
    steps = run.folder / "steps"
    run.files.make_folder(steps)
    saved = protocol.newest(steps, run.files)
    if saved:
        for note in saved.notes:
            cli.say(note)
        cli.say(f"continuing from step {saved.number}")
        arrays = {key: protocol.load_arrays(saved, key) for key in saved.state["arrays"]}
        loop.restore(student, optimizer, arrays, saved.state["optimizer"])
        del arrays
    else:
        mended = _starting_weights(run, pruned)
        student.load_weights(list(mended.items()), strict=False)
        stream.into_memory(student)
        _save(run, student, optimizer, 0)
    student.train()
    start = saved.number if saved else 0
    source = distillation.Teacher(run.teacher, run.plan.teacher_resident)
    train = distillation.steps(student, source, run.data.train, s, optimizer, start, s.temperature, s.halny)
    with cli.stop_asked() as asked, cli.progress("distil", s.iters) as show:
        for step in train:
            run.peak.note(step.peak_bytes)
            record = {k: v for k, v in asdict(step).items() if k != "reading"}
            run.files.append(run.folder / "metrics.jsonl", json.dumps(record))
            show(step.number, cli.step_text(step))
            if step.number % s.save_every == 0 or step.number == s.iters or asked:
                _save(run, student, optimizer, step.number)
            if asked and step.number < s.iters:
                raise MisError(
                    f"stopped at step {step.number} of {s.iters}, all of it saved: go on with "
                    f"--out {run.folder} --resume"
                )
    config = {**pruned.config, "torch_dtype": s.dtype}
    slice.write_model(config, dict(tree_flatten(student.parameters())), pruned.path, out, s.dtype, run.files)
    return load.open_checkpoint(out)


def _save(run: Run, student: Any, optimizer: GoralW, number: int) -> None:
    arrays = {k: v for k, v in loop.arrays_of(student, optimizer).items() if v}
    protocol.save_step(
        run.folder / "steps", number, arrays, {"arrays": list(arrays), "optimizer": optimizer.memory()}, run.files
    )


def _measure(run: Run, models: dict[str, Checkpoint]) -> tuple[list[Row], dict[str, list[Row]]]:
    """(rows of speed and size, rows of quality by held-out text)."""
    s, quality = run.settings, {}
    for at, (name, held_out) in enumerate(run.data.held_out.items()):
        cli.say(f"measure: {name}")
        count = s.eval_windows if at == 0 else max(1, s.eval_windows // 3)
        quality[name] = evaluate.rows_of(evaluate.compare(models, evaluate.chosen(held_out, count)))
    speed = []
    if s.bench_tokens:
        cli.say("measure: speed")
        speed = bench.measure([m.path for m in models.values()], list(models), 2 * s.bench_tokens, s.bench_tokens, 2)
    return speed, quality


def _result(run: Run, models: dict[str, Checkpoint], speed: list[Row], quality: dict[str, list[Row]]) -> dict[str, Any]:
    main = {(r.model, r.metric): r.value for r in next(iter(quality.values()))}
    student = models["distilled"]
    steps = runs.metrics(run.folder)
    tokens, seconds = (sum(r[key] for r in steps) for key in ("tokens", "seconds"))
    gap = main["pruned", "nll"] - main["teacher", "nll"]
    return {
        "teacher": str(run.teacher.path),
        "student": str(run.folder / "model"),
        "run": str(run.folder),
        "params_teacher": arch.params(run.teacher.config),
        "params_student": arch.params(student.config),
        "nll_teacher": main["teacher", "nll"],
        "nll_pruned": main["pruned", "nll"],
        "nll_student": main["distilled", "nll"],
        "nll_quantized": main.get(("4-bit", "nll")),
        "gap_closed": (main["pruned", "nll"] - main["distilled", "nll"]) / gap if gap else None,
        "kl_student": main["distilled", "kl"],
        "top1_student": main["distilled", "top1"],
        "bytes": {name: m.nbytes for name, m in models.items()},
        **{f"{r.metric}_{r.model}": round(r.value, 3) for r in speed},
        "peak_bytes": run.peak.nbytes,
        "budget_bytes": run.plan.budget_bytes,
        "tokens": tokens,
        "tokens_per_s": round(tokens / max(seconds, 1e-9), 1),
    }


def _table(run: Run, models: dict[str, Checkpoint], speed: list[Row], quality: dict[str, list[Row]]) -> str:
    names = list(models)
    sizes = [Row(n, "params", arch.params(m.config) / 1e6) for n, m in models.items()]
    parts = [cli.table([*sizes, *speed], names, (("params", "parameters, millions", ".1f"), *bench.METRICS))]
    for name, rows in quality.items():
        parts.append(
            f"{name}, {rows[0].n} windows of {run.settings.max_seq_length} tokens held out, ± 95 %\n\n"
            + cli.table(rows, names, evaluate.METRICS)
        )
    note = (
        "The 4-bit loss is computed from the de-quantized weights, which are the same numbers; speeds are those of "
        "stock mlx-lm with float32 activations, 4-bit kernels included."
    )
    return "\n\n".join([*parts, note] if load.unpacks() and "4-bit" in models else parts)


def _resumed(settings: Settings) -> tuple[Settings, Path]:
    folder = runs.find(settings.out)
    values = runs.merged(asdict(settings), asdict(Settings()), runs.stored_settings(folder), FREE)
    return Settings(**values), folder


def _origin(checkpoint: Checkpoint, data: windows.Data) -> dict[str, str]:
    """What a resumed run must share: the teacher's and the data's fingerprints, and the versions at work."""
    table = sorted((n, t.dtype, t.shape, t.nbytes) for n, t in checkpoint.tensors.items())
    teacher_hash = hashlib.sha256(json.dumps([dict(checkpoint.config), table], sort_keys=True).encode()).hexdigest()
    versions = {name: importlib.metadata.version(name) for name in ("mlx", "mlx-lm", "numpy")}
    return {"teacher": teacher_hash, "data": text.fingerprint(data.train), "mis_mlx": __version__, **versions}


def _plan(s: Settings, checkpoint: Checkpoint, small: Mapping[str, Any], budget: Budget) -> plan.Plan:
    return plan.make(
        checkpoint.config,
        small,
        teacher_bytes=checkpoint.nbytes,
        iters=s.iters,
        micro_batch=s.batch_size,
        accumulate=s.grad_accumulation_steps,
        length=s.max_seq_length,
        calibration=max(s.num_samples, s.reconstruct_samples),
        held_out=2 * s.eval_windows,
        saves=s.iters // s.save_every + 2,
        budget_bytes=budget.limit_bytes,
        flops_per_s=rates.matmul_flops(),
    )


def _all_stages(job: Run) -> dict[str, Any]:
    began, s, folder = time.monotonic(), job.settings, job.folder
    models = {"teacher": job.teacher, "pruned": _prune(job)}
    models["distilled"] = _distil(job, models["pruned"])
    if s.quantize:
        if not (folder / "model").exists():
            quantize.quantize(models["distilled"].path, folder / "model", s.q_group_size, job.files)
        models["4-bit"] = load.open_checkpoint(folder / "model")
    speed, quality = _measure(job, models)
    table = _table(job, models, speed, quality)
    print(table)
    job.files.replace_text(folder / "table.md", table + "\n")
    result = {**_result(job, models, speed, quality), "seconds": round(time.monotonic() - began, 1)}
    job.files.replace_text(folder / runs.RESULT, json.dumps(result, indent=2))
    return result


def run(settings: Settings) -> dict[str, Any]:
    """The command: open, plan, prune, reconstruct, distil, quantize, measure."""
    s, folder = _resumed(settings) if settings.resume else (settings, None)
    if s.preset == "paper":
        s = replace(s, iters=8000, learning_rate=1.5e-4)
    found = teacher.find(s.teacher)
    cli.say(f"teacher: {found.source}")
    checkpoint = load.open_checkpoint(found.path)
    if s.student:
        small: Mapping[str, Any] = load.open_checkpoint(s.student).config
    else:
        shape = arch.target_shape(
            checkpoint.config,
            arch.SCENARIOS.get(s.scenario, {}),
            layers=s.layers,
            ffn=s.ffn,
            heads=s.heads,
            hidden=s.hidden,
        )
        small = arch.student_config(checkpoint.config, shape, tuple(range(shape.layers)), s.dtype)
    if s.quantize:
        quantize.check(small, s.q_group_size)
    budget = memory.budget(None if s.budget is None else cli.parse_bytes(s.budget))
    made = _plan(s, checkpoint, small, budget)
    cli.say(plan.table(made))
    if s.dry_run:
        return {
            "teacher": str(found.path),
            "params_teacher": arch.params(checkpoint.config),
            "params_student": arch.params(small),
            "peak_bytes": made.peak_bytes,
            "budget_bytes": budget.limit_bytes,
            "seconds": round(made.seconds),
            "check_failed": made.peak_bytes > budget.limit_bytes,
        }
    budget.need(made.peak_bytes, "this distillation", "lower --batch-size or --max-seq-length, or prune harder")
    data = windows.prepare(s.data, found.path, s.max_seq_length)
    for note in data.notes:
        cli.say(note)
    files = Files()
    if folder is None:
        name = f"{found.path.name}-{s.scenario}"
        stored = {k: v for k, v in asdict(s).items() if k not in ("out", "resume", "dry_run", "config")}
        folder = runs.create(s.out, name, stored, _origin(checkpoint, data), files)
    else:
        for note in runs.same_origin(folder, _origin(checkpoint, data)):
            cli.say(note)
    cli.say(f"run folder: {folder}")
    with protocol.lock(folder), memory.limited(budget):
        protocol.sweep(folder, files)
        return _all_stages(Run(s, folder, checkpoint, data, made, files, memory.Peak()))


if __name__ == "__main__":
    cli.main(Settings, run)
