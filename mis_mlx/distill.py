"""Distil: teacher in, small recovered 4-bit student out, with a table of what it cost. The main job."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mis_mlx import bench, cli, plan, prune, quantize
from mis_mlx.disk import checkpoint as protocol
from mis_mlx.disk import runs, text
from mis_mlx.disk.files import Files
from mis_mlx.machine import memory, rates, tea
from mis_mlx.maths.optimizer import GoralW
from mis_mlx.model import arch, compare, load, reconstruct, slice, stream, teacher, windows
from mis_mlx.training import distillation, loop, outcome
from mis_mlx.training.recipe import Recipe
from mis_mlx.training.supervise import supervise
from mis_mlx.training.weather import Weather
from mis_mlx.types import Budget, Checkpoint, Row

# Settings that may differ when a run is resumed: none of them changes a weight.
FREE = frozenset(
    {
        "out",
        "resume",
        "dry_run",
        "config",
        "budget",
        "eval_windows",
        "bench_tokens",
        "save_every",
        "governor",
        "thermal_replay",
    }
)


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
    weather: Weather


def _pick(data: windows.Data, count: int, seed: int, use: int) -> list[mx.array]:
    """`count` training windows (1, T) for one use; different uses get different ones."""
    at = np.random.default_rng([seed, use, 1]).permutation(len(data.train.tokens))[:count]
    return [mx.array(data.train.tokens[i][None]) for i in at]


def _prune(run: Run) -> Checkpoint:
    s, out = run.settings, run.folder / "pruned"
    if s.student is not None:
        return load.open_checkpoint(s.student)
    if not out.exists():
        cli.say("calibrate and prune")
        report = prune.prune(
            run.teacher,
            _pick(run.data, s.num_samples, s.seed, 1),
            compare.chosen(next(iter(run.data.held_out.values())), s.eval_windows),
            out,
            s,
            dtype=s.dtype,
            seed=s.seed,
            reading=run.weather.reading,
            files=run.files,
        )
        cli.say(prune.sentence(report))
    return load.open_checkpoint(out)


def _start(run: Run, pruned: Checkpoint, student: Any, optimizer: GoralW) -> tuple[int, float]:
    """(steps done, spread of eps_halny): the newest checkpoint, or the pruned weights after the repair."""
    s, steps = run.settings, run.folder / "steps"
    run.files.make_folder(steps)
    if saved := protocol.newest(steps, run.files):
        for note in [*saved.notes, f"continuing from step {saved.number}"]:
            cli.say(note)
        arrays = {key: protocol.load_arrays(saved, key) for key in saved.state["arrays"]}
        loop.restore(student, optimizer, arrays, saved.state["optimizer"])
        run.weather.breaks = tea.TeaBreaks(**saved.state["tea"])
        return saved.number, saved.state["halny_sigma"]
    keep = slice.read_keep(pruned.path)
    if s.reconstruct_samples and keep:
        cli.say("reconstruct: refit every down_proj to the teacher's stream")
        batches = _pick(run.data, s.reconstruct_samples, s.seed, 2)
        mended, _ = reconstruct.reconstruct(run.teacher, pruned, keep, batches)
        student.load_weights(list(mended.items()), strict=False)
    stream.into_memory(student, f"{pruned.path}: ")
    sigma = run.weather.sigma() if s.halny is None else s.halny
    _save(run, student, optimizer, 0, sigma)
    return 0, sigma


def _save(run: Run, student: Any, optimizer: GoralW, number: int, sigma: float) -> None:
    """One checkpoint: weights, moments, and everything else a resumed run needs."""
    arrays = {k: v for k, v in loop.arrays_of(student, optimizer).items() if v}
    state = {
        "arrays": list(arrays),
        "optimizer": optimizer.memory(),
        "halny_sigma": sigma,
        "tea": run.weather.breaks.saved(),
    }
    protocol.save_step(run.folder / "steps", number, arrays, state, run.files)


def _distil(run: Run, pruned: Checkpoint) -> Checkpoint:
    """Train to the end from wherever the run stands, then write the student's folder."""
    s, out = run.settings, run.folder / ("distilled" if run.settings.quantize else "model")
    if out.exists():
        return load.open_checkpoint(out)
    student = load.resident(pruned, mx.float32)
    optimizer = GoralW(weight_decay=s.weight_decay)
    start, sigma = _start(run, pruned, student, optimizer)
    student.train()
    source = distillation.Teacher(run.teacher, run.plan.teacher_resident)
    wind = [sigma]
    train = distillation.steps(student, source, run.data.train, s, optimizer, start, s.temperature, lambda: wind[0])

    def save(number: int) -> None:
        # The wind is fixed from one checkpoint to the next, so that a resumed run meets the same.
        wind[0] = run.weather.sigma() if s.halny is None else s.halny
        _save(run, student, optimizer, number, wind[0])

    supervise(train, run.folder, s.iters, s.save_every, save, run.weather, run.peak, run.files)
    config = {**pruned.config, "torch_dtype": s.dtype}
    extra = {"keep.json": slice.keep_json(keep)} if (keep := slice.read_keep(pruned.path)) else None
    trained = dict(tree_flatten(student.parameters()))
    slice.write_model(config, trained.__getitem__, pruned.path, out, s.dtype, run.files, extra)
    return load.open_checkpoint(out)


def _measure(run: Run, models: dict[str, Checkpoint]) -> tuple[list[Row], dict[str, list[Row]]]:
    """(rows of size and speed, rows of quality by held-out text)."""
    s, quality = run.settings, {}
    for at, (name, held_out) in enumerate(run.data.held_out.items()):
        cli.say(f"measure: {name}")
        count = s.eval_windows if at == 0 else max(1, s.eval_windows // 3)
        quality[name] = compare.rows_of(compare.compare(models, compare.chosen(held_out, count)))
    sizes = [Row(n, "params", arch.params(m.config) / 1e6) for n, m in models.items()]
    sizes += [Row(n, "bytes", m.nbytes / 1e6) for n, m in models.items()]
    if s.bench_tokens:
        fit = {n: m.path for n, m in models.items() if plan.timed_bytes(run.plan.budget_bytes, arch.params(m.config))}
        cli.say(f"measure: speed of {', '.join(fit) or 'none: no model fits the budget whole'}")
        sizes += bench.measure(list(fit.values()), list(fit), 2 * s.bench_tokens, s.bench_tokens, 2)
    return sizes, quality


def _resumed(settings: Settings) -> tuple[Settings, Path]:
    folder = runs.find(settings.out)
    values = runs.merged(asdict(settings), asdict(Settings()), runs.stored_settings(folder), FREE)
    return Settings(**values), folder


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
    sizes, quality = _measure(job, models)
    table = outcome.page(models, sizes, quality, s.max_seq_length)
    print(table)
    job.files.replace_text(folder / "table.md", table + "\n")
    result = {
        **outcome.result(folder, models, sizes, quality),
        "peak_bytes": job.peak.nbytes,
        "budget_bytes": job.plan.budget_bytes,
        **job.weather.account(),
        "seconds": round(time.monotonic() - began, 1),
    }
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
        small: Mapping[str, Any] = compare.same_vocabulary(checkpoint, load.open_checkpoint(s.student)).config
    else:
        shape = prune.wanted_shape(checkpoint.config, s)
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
    origin = runs.origin(checkpoint, text.fingerprint(data.train))
    if folder is None:
        name = f"{found.path.name}-{s.scenario}"
        stored = {k: v for k, v in asdict(s).items() if k not in ("out", "resume", "dry_run", "config")}
        folder = runs.create(s.out, name, stored, origin, files)
    else:
        for note in runs.same_origin(folder, origin):
            cli.say(note)
    cli.say(f"run folder: {folder}")
    with protocol.lock(folder), memory.limited(budget), Weather(s, folder / "thermal.jsonl", files) as weather:
        protocol.sweep(folder, files)
        return _all_stages(Run(s, folder, checkpoint, data, made, files, memory.Peak(), weather))


if __name__ == "__main__":
    cli.main(Settings, run)
