"""Distil: teacher in, small recovered 4-bit student out, with a table of what it cost. The main job."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import mlx.core as mx

from mis_mlx import bench, cli, plan, prune, quantize
from mis_mlx.data import preparation, token_windows
from mis_mlx.distillation import pipeline, scale_tuning, summary, trackers
from mis_mlx.distillation.pipeline import Run
from mis_mlx.distillation.run_loop import open_run, resumed
from mis_mlx.evaluation import comparison
from mis_mlx.hardware import memory
from mis_mlx.hardware.thermal.run_monitor import battery
from mis_mlx.models import arch, distributed, load, mlx_generate, model_writer, pipeline_parallel, policy, resolve
from mis_mlx.models.policy import Computing
from mis_mlx.planner import estimates, machines, phases
from mis_mlx.planner.job import spec_of
from mis_mlx.planner.recipe import DistillationConfig, QuantizationConfig
from mis_mlx.pruning import select
from mis_mlx.reporting import progress
from mis_mlx.storage import run_folder
from mis_mlx.storage.files import Files, need_place
from mis_mlx.types import FILE_ONLY, Budget, Checkpoint, Count, MisError, Row, Whole

# Settings that may differ when a run is resumed: none of them changes a weight.
FREE = frozenset({
    "out", "resume", "dry_run", "config", "budget", "eval_windows", "bench_tokens", "report_to", "save_every",
    "governor", "thermal_replay", "spread", "keep_steps",
})  # fmt: skip


DTYPE = "bfloat16"  # of unquantized weights on disk


@dataclass(frozen=True)
class Settings(Computing, select.PruningConfig, QuantizationConfig, DistillationConfig):
    """One run. Every default is what was measured to work; nothing needs to be given."""

    RARE: ClassVar = frozenset({
        "num_samples", "eval_windows", "heads", "targets", "train", "reconstruct_samples", "q_group_size",
        "q_mode", "q_method", "q_iters", "save_every", "keep_steps", "report_to", "compute_dtype", "altitude_m",
        "thermal_replay", "spread",
    })  # fmt: skip
    teacher: str | None = None
    """folder, hub id (docs/families.md: of which families) or gemma-3-270m; default: SmolLM2-135M-Instruct"""
    student: str | None = None
    """folder of a student pruned earlier; default: prune now"""
    data: str | None = None
    """folder with train.jsonl (valid.jsonl, test.jsonl), or hub data set; default: built-in text"""
    budget: str | None = None
    """memory this may take, such as 5GiB; default: 5GiB or 75 % of what is there"""
    num_samples: Count = 32
    """calibration windows for importance"""
    # What a YAML file may say of pruning; `prune`, whose folder --student takes, has flags for it.
    kv_heads: Annotated[Count | None, FILE_ONLY] = None
    importance: Annotated[Literal["aais", "rms", "activation"], FILE_ONLY] = "aais"
    hidden_by: Annotated[Literal["importance", "pca"], FILE_ONLY] = "pca"
    target: Annotated[Literal["fixed", "conditions"], FILE_ONLY] = "fixed"
    temperature_unit: Annotated[Literal["kelvin", "celsius"], FILE_ONLY] = "kelvin"
    quantize: Literal[4, 0] = 4
    """bits of the result; 0 keeps it unquantized"""
    eval_windows: Count = 24
    """held-out windows measured; a third as many of the second text"""
    bench_tokens: Whole = 16
    """tokens timed per model, which then writes twice as many for `report`; 0 leaves both out"""
    report_to: str | None = None
    """tensorboard, wandb or swanlab, which must be installed: told of every step"""
    spread: Literal["whole", "layers"] = "whole"
    """whole: each of several machines passes its own windows through all of the teacher; layers: all windows through
    its own blocks"""
    out: str | None = None
    """run folder; default: the next free runs/NAME-00N"""
    keep_steps: bool = False
    """keep what --resume would need once the run is done: checkpoints, the rounded student, stored targets"""
    resume: bool = False
    """continue the run in --out, or the newest unfinished one"""
    dry_run: bool = False
    """print the plan and stop"""
    config: cli.ConfigFile = None
    """YAML file with any of these flags"""

    @property
    def stored(self) -> dict[str, Any]:
        """What a run keeps of them."""
        return {name: value for name, value in asdict(self).items() if name not in run_folder.NOT_STORED}


def _prune(s: Settings, c: Run, data: preparation.Data) -> Checkpoint:
    out = c.folder / "pruned"
    if s.student is not None:
        return load.open_checkpoint(s.student)
    if not distributed.broadcast_json(out.exists):
        cli.say("calibrate and prune")
        with c.phase("prune"):
            report = select.prune(
                c.teacher,
                c.pick(s.num_samples, 1),
                comparison.chosen(next(iter(data.held_out.values())), s.eval_windows),
                out,
                s,
                dtype=DTYPE,
                reading=c.weather.reading,
                files=c.files,
                held=c.plan.held_windows("prune"),
                shares=c.shares,
            )
        if distributed.is_main():
            cli.say(prune.sentence(report))
    distributed.broadcast_folder(out, c.files)
    return load.open_checkpoint(out)


def _distil(s: Settings, c: Run, pruned: Checkpoint) -> Path:
    """Train to the end from wherever the run stands, then write the student's folder."""
    out = c.folder / ("distilled" if s.quantize else "model")
    if not distributed.broadcast_json(out.exists):
        take = pipeline.train(c, pruned)
        config = {**pruned.config, "torch_dtype": DTYPE}
        extra = model_writer.keep_files(model_writer.read_keep(pruned.path))
        if distributed.is_main():
            model_writer.write_model(config, take, pruned.path, out, DTYPE, c.files, extra)
    return out


def _quantize(s: Settings, c: Run, pruned: Checkpoint, dense: Path) -> None:
    """Round the student, then let its scales learn; what is there is not made again."""
    out = c.folder / "model"
    steps = c.plan.tuned
    rounded = c.folder / "rounded" if steps else out
    if distributed.is_main() and not rounded.exists() and not out.exists():
        batches, held = c.pick(s.num_samples * s.looks, 1), c.plan.held_windows("quantize")
        with c.phase("quantize"):
            quantize.quantize(dense, rounded, s, c.files, batches, held, s.seed)
    if not distributed.broadcast_json(out.exists):
        distributed.broadcast_folder(rounded, c.files)
        cli.say(f"tune: {steps} steps of scales, biases and norms")
        r = scale_tuning.recipe_of(c.recipe, steps, s.q_learning_rate)
        scale_tuning.tune(c, pipeline.source_of(c), rounded, out, r)


def _measure(
    s: Settings, c: Run, data: preparation.Data, models: dict[str, Checkpoint]
) -> tuple[list[Row], dict[str, list[Row]]]:
    """(rows of size and speed, rows of quality by held-out text); of machines that share the teacher's blocks all help
    with its part, and the first one has the rows."""
    quality = {}
    whole = c.teacher, policy.compute_dtype(c.teacher), 0, c.direct
    source = pipeline_parallel.Relay(*whole, c.shares) if c.shares else None
    for at, (name, held_out) in enumerate(data.held_out.items()):
        cli.say(f"measure: {name}")
        chosen = comparison.chosen(held_out, s.eval_windows if at == 0 else max(1, s.eval_windows // 3))
        asked = [mx.array(w[None]) for w in chosen.tokens] if distributed.is_main() else []
        states = source.forward(asked) if source else None
        if distributed.is_main():
            quality[name] = comparison.rows_of(comparison.compare(models, chosen, states))
    if not distributed.is_main():
        return [], {}
    sizes = [Row(n, "params", arch.params(m.config) / 1e6) for n, m in models.items()]
    sizes += [Row(n, "bytes", m.nbytes / 1e6) for n, m in models.items()]
    fit = {n: m.path for n, m in models.items() if phases.timed_bytes(m.config) <= c.plan.budget_bytes}
    if s.bench_tokens:
        cli.say(f"measure: speed of {', '.join(fit) or 'none: no model fits the budget whole'}")
        sizes += bench.measure(list(fit.values()), list(fit), 2 * s.bench_tokens, s.bench_tokens, 2, c.plan.peak_bytes)
        said = [json.dumps(one, ensure_ascii=False) for one in mlx_generate.samples(fit, 2 * s.bench_tokens)]
        c.files.replace_text(c.folder / run_folder.SAMPLES, "\n".join([*said, ""]))
    return sizes, quality


def _plan(
    s: Settings, checkpoint: Checkpoint, small: Mapping[str, Any], budget: Budget, folder: Path | None
) -> phases.MemoryPlan:
    """The plan of a new run; or of one that has begun, which goes on in its own way whatever the budget is now."""
    job = spec_of(estimates.model_of(checkpoint), estimates.model_of(small), s)
    if folder and distributed.is_main():
        made = phases.one(job, budget.limit_bytes, estimates.machine_rates(), **run_folder.stored_plan(folder))
    else:
        made = phases.make(job, budget.limit_bytes, estimates.machine_rates())
    return machines.agreed(made)


def _all_stages(s: Settings, c: Run, data: preparation.Data) -> tuple[str, dict[str, Any]]:
    """(the table, the result); nothing on machines beside the first one."""
    began, folder = time.monotonic(), c.folder
    models = {"teacher": c.teacher, "pruned": _prune(s, c, data)}
    distilled = _distil(s, c, models["pruned"])
    if s.quantize:
        _quantize(s, c, models["pruned"], distilled)
    if distributed.is_main():
        models["distilled"] = load.open_checkpoint(distilled)
        if s.quantize:
            models["4-bit"] = load.open_checkpoint(folder / "model")
    if distributed.is_main() or c.shares:
        with c.phase("measure"):
            sizes, quality = _measure(s, c, data, models)
    if not distributed.is_main():  # what is left to do, the first one does
        return "", {}
    table = summary.page(models, sizes, quality, s.max_seq_length)
    c.files.replace_text(folder / "table.md", table + "\n")
    result = {
        **summary.result(folder, models, sizes, quality),
        "mode": c.plan.mode,
        "peak_bytes": c.peak.nbytes,
        "budget_bytes": c.plan.budget_bytes,
        **c.weather.account(),
        "seconds": round(time.monotonic() - began, 1),
    }
    c.files.replace_text(folder / run_folder.RESULT, json.dumps(result, indent=2))
    for name in () if s.keep_steps else pipeline.LEFT:
        if (folder / name).exists():
            c.files.remove_tree(folder / name)
    return table, result


def run(settings: Settings) -> dict[str, Any]:
    """The command: open, plan, prune, repair, distil, quantize, measure."""
    s, folder = resumed(settings, FREE) if settings.resume else (settings, None)
    policy.use(s.compute_dtype)
    s.check()
    if distributed.is_main():
        need_place("--out", s.out or "runs")
    trackers.check(s.report_to)
    found = resolve.resolve_model(s.teacher)
    cli.say(f"teacher: {found.source}")
    checkpoint = load.open_checkpoint(found.path)
    if s.student:
        small: Mapping[str, Any] = comparison.same_vocabulary(checkpoint, load.open_checkpoint(s.student)).config
    else:
        shape = select.wanted_shape(checkpoint.config, s)
        small = arch.student_config(checkpoint.config, shape, tuple(range(shape.layers)), DTYPE)
    if s.quantize:
        quantize.check(small, s)
    budget = memory.budget(None if s.budget is None else cli.parse_bytes(s.budget))
    made = _plan(s, checkpoint, small, budget, folder)
    cli.say(plan.table(made))
    if not s.dry_run and made.fits and folder is None:
        cli.say(progress.promise(made.seconds))
    if s.dry_run and (said := battery(s)):  # a run says it when it begins
        cli.say(said)
    if s.dry_run:
        return {
            "teacher": str(found.path),
            "params_teacher": arch.params(checkpoint.config),
            "params_student": arch.params(small),
            "mode": made.mode,
            "peak_bytes": made.peak_bytes,
            "budget_bytes": budget.limit_bytes,
            "seconds": round(made.seconds),
            "check_failed": not made.fits,
        }
    if not made.fits:
        raise MisError(phases.remedy(made))
    with progress.run("distill", made.planned):
        table, result = _begin(s, folder, found.path, checkpoint, made, budget)
    if table:
        print(table)
    return result


def _begin(
    s: Settings, folder: Path | None, teacher: Path, checkpoint: Checkpoint, made: phases.MemoryPlan, budget: Budget
) -> tuple[str, dict[str, Any]]:
    """Read the data, enter the run folder, go through all stages."""
    shares = machines.shares(made) if s.spread == "layers" else ()
    data = preparation.prepare(s.data, load.tokenizer(teacher), s.max_seq_length)
    for note in data.notes:
        cli.say(note)
    files = Files()
    origin = run_folder.origin(checkpoint, token_windows.fingerprint(data.train))

    def new() -> Path:
        return run_folder.create(s.out, f"{teacher.name}-{s.scenario}", s.stored, origin, made.way, files)

    wired = made.peak_bytes if made.mode != "sharded" else 0
    with open_run(folder, new, origin, budget, wired, s, files) as (place, weather):
        recipe = made.recipe(s)
        flags = {name: value for name, value in s.stored.items() if value != getattr(Settings(), name)}
        files.append(place / run_folder.PHASES, json.dumps({**weather.now(), **summary.begun(made, flags)}))
        report = trackers.reporter(s.report_to if distributed.is_main() else None, place.name, place, asdict(s))
        c = Run(recipe, place, checkpoint, data.train, made, files, memory.Peak(), weather, report, shares)
        return _all_stages(s, c, data)


if __name__ == "__main__":
    cli.main(Settings, run, several=True)
