"""Distil: teacher in, small recovered 4-bit student out, with a table of what it cost. The main
job.
"""

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import mlx.core as mx

from mis_mlx import bench, cli, plan, search, synthesize
from mis_mlx.data import preparation, token_windows
from mis_mlx.distillation import conversations, pipeline, run_loop, summary
from mis_mlx.evaluation import answers, comparison
from mis_mlx.hardware import memory
from mis_mlx.hardware.rates import Rates
from mis_mlx.hardware.thermal.run_monitor import battery
from mis_mlx.models import (
    arch,
    distributed,
    families,
    load,
    mlx_generate,
    pipeline_parallel,
    policy,
)
from mis_mlx.models.config import shape_of
from mis_mlx.planner import estimates, machines, phases
from mis_mlx.planner.recipe import (
    EVAL_PROMPTS,
    FIRST_STEPS,
    PLAIN,
    DistillationConfig,
    DistillationSpec,
    QuantizationConfig,
    spec_of,
    steps_of,
)
from mis_mlx.pruning import select, shape_search, vocabulary
from mis_mlx.quantization import packed_format, stage
from mis_mlx.reporting import html, progress, text
from mis_mlx.storage import run_folder
from mis_mlx.storage.files import DISK, json_sha256
from mis_mlx.types import MOST, Budget, Checkpoint, MisError, Row, Whole, Within, gib

# Settings that may differ when a run is resumed: none of them changes a weight.
FREE = frozenset(
    {
        "out",
        "resume",
        "dry_run",
        "config",
        "budget",
        "eval_windows",
        "eval_prompts",
        "bench_tokens",
        "report_to",
        "save_every",
        "governor",
        "thermal_replay",
        "spread",
        "keep_steps",
    }
)
DEFAULT_LOSS = 0.12  # bits a byte that a run allows where nothing is said about sizes
# folders of what teachers write; tokens of such a text, about
WRITTEN = Path("runs/text")
TEXT_TOKENS = 200


@dataclass(frozen=True)
class Settings(
    cli.Resumable, policy.Computing, select.PruningConfig, QuantizationConfig, DistillationConfig
):
    """One run. Every default is what was measured to work; nothing needs to be given."""

    RARE: ClassVar = frozenset(
        {
            "num_samples",
            "eval_windows",
            "eval_prompts",
            "heads",
            "targets",
            "train",
            "reconstruct_samples",
            "q_group_size",
            "q_method",
            "q_iters",
            "save_every",
            "keep_steps",
            "report_to",
            "compute_dtype",
            "altitude_m",
        }
    )
    # most are flags of `prune`, whose folder --student takes, or of `quantize`
    FILE_ONLY: ClassVar = frozenset(
        {
            "kv_heads",
            "importance",
            "hidden_by",
            "target",
            "temperature_unit",
            "experts_by",
            "thermal_replay",
            "vocab_text",
            "languages",
            "q_mode",
            "spread",
            "expected_loss",
        }
    )
    teacher: str | None = None
    """folder, hub id (docs/families.md: of which families) or gemma-3-270m; default:
    SmolLM2-135M-Instruct
    """
    student: str | None = None
    """folder of a student pruned earlier; default: prune now"""
    data: str | None = None
    """folder with train.jsonl (valid.jsonl, test.jsonl), or hub data set; teacher: it writes a
    quarter of it first; default: built-in text
    """
    conversations: Annotated[float | None, Within(0.0, 0.95)] = None
    """share of the training text in which the teacher answers our prompts, so that the student
    answers, too; a teacher other than the default one writes its answers first, once. Default:
    0.44, of a teacher with a chat template whose --data has no conversations; 0: none
    """
    lose: Annotated[float | None, Within(0.0, MOST)] = None
    """bits a byte of the teacher's answers (of text, for a teacher without a chat template) that
    the result may be above the teacher: `search` chooses the smallest student that should keep to
    it. Default: 0.12, where no size, no scenario and no --bytes is given
    """
    expected_loss: Annotated[float | None, Within(0.0, MOST)] = None
    """bits a byte that the result should be above the teacher, as the search for --lose or --bytes
    found
    """
    bytes: str | None = None
    """weights of the result on disk, such as 50MB: `search` chooses the sizes and bits that should
    lose least in it
    """
    quantize: Literal[4, 0] = 4
    """bits of the result; 0 keeps it unquantized"""
    eval_prompts: Whole = EVAL_PROMPTS
    """held-out prompts that teacher and student answer at the end; 0 asks none"""
    bench_tokens: Whole = 16
    """tokens timed per model, which then writes twice as many for `report`; 0 leaves both out"""
    report_to: str | None = None
    """tensorboard, wandb or swanlab, which must be installed: told of every step"""
    spread: Literal["whole", "layers"] = "whole"
    """whole: each of several machines passes its windows through all of the teacher; layers: all
    through its blocks
    """
    keep_steps: bool = False
    """keep what --resume would need once the run is done: checkpoints, the rounded student, stored
    targets
    """


Judging = dict[str, tuple[token_windows.Windows, token_windows.Windows | None]]


def _prune(s: Settings, c: pipeline.Run, data: preparation.Data, before: int) -> Checkpoint:
    out = c.folder / "pruned"
    if s.student is not None:
        return load.open_checkpoint(s.student)
    if not distributed.broadcast_json(out.exists):
        cli.say("calibrate and prune")
        held_out = comparison.chosen(next(iter(data.held_out.values())), s.eval_windows)
        with c.phase("prune"):
            report = select.prune(
                c.teacher,
                c.pick(s.num_samples, 1),
                held_out,
                out,
                s,
                dtype=pipeline.DTYPE,
                reading=c.weather.latest,
                files=c.files,
                held=c.plan.held_windows("prune"),
                shares=c.shares,
            )
        if distributed.is_main():
            cli.say(html.document("pruned.md", {**report, "params_before": before}))
    distributed.broadcast_folder(out, c.files)
    return load.open_checkpoint(out)


def _quantize(s: Settings, c: pipeline.Run, dense: Path) -> None:
    """Round the student, then let its scales learn; what is there is not made again."""
    out = c.folder / "model"
    rounded = c.folder / ("rounded" if c.plan.tuned else "model")
    if distributed.is_main() and not rounded.exists() and not out.exists():
        batches = c.pick(s.num_samples * s.looks, 1)
        held = c.plan.held_windows("quantize")
        with c.phase("quantize"):
            stage.quantize(dense, rounded, s, c.files, batches, held, s.seed)
    if not distributed.broadcast_json(out.exists):
        distributed.broadcast_folder(rounded, c.files)
        cli.say(f"tune: {c.plan.tuned} steps of scales, biases and norms")
        pipeline.tune(c, rounded, out, s.q_learning_rate)


def _judging(s: Settings, c: pipeline.Run, data: preparation.Data, teacher: Checkpoint) -> Judging:
    """By name, the held-out windows that judge and, where the teacher has more tokens, their text
    in those.
    """
    found = {}
    tokenizers = (
        [load.tokenizer(m.path) for m in (c.teacher, teacher)] if teacher is not c.teacher else []
    )
    for at, (name, held_out) in enumerate(data.held_out.items()):
        chosen = comparison.chosen(
            held_out, s.eval_windows if at == 0 else max(1, s.eval_windows // 3)
        )
        found[name] = chosen, token_windows.reread(chosen, *tokenizers) if tokenizers else None
    return found


def _quality(c: pipeline.Run, judging: Judging, models: comparison.Models) -> summary.Quality:
    """Rows by held-out text, on the first machine; where machines share the teacher's blocks, all
    help.
    """
    quality = {}
    teacher = models["teacher"]

    def states(model: Checkpoint, chosen: token_windows.Windows) -> Any:
        windows = [mx.array(w[None]) for w in chosen.tokens] if distributed.is_main() else []
        whole = model, policy.compute_dtype(model), 0, c.direct
        return pipeline_parallel.Relay(*whole, c.shares).forward(windows) if c.shares else None

    for name, (chosen, own) in judging.items():
        cli.say(f"measure: {name}")
        hidden = states(c.teacher, chosen)
        own_hidden = states(teacher, own) if own else None
        if distributed.is_main():
            rows = comparison.rows_of(
                comparison.compare({**models, "teacher": c.teacher}, chosen, hidden), chosen
            )
            if own:
                rows = comparison.across(
                    rows, comparison.compare({"teacher": teacher}, own, own_hidden), own
                )
            quality[name] = rows
    return quality


def _answers(s: Settings, c: pipeline.Run, models: comparison.Models) -> answers.Judgement | None:
    """What teacher, distilled and rounded student answer; None where nobody is asked, or can be."""
    if not s.eval_prompts or c.shares:  # no machine holds a teacher whose blocks several share
        return None
    asked = {name: model for name, model in models.items() if name != "pruned"}
    found = conversations.judged(asked, s.eval_prompts, Budget(c.plan.budget_bytes))
    if found:
        conversations.keep(found, c.folder, c.files)
    return found


def _sizes(s: Settings, c: pipeline.Run, models: comparison.Models) -> list[Row]:
    """Rows of size and speed. The models that are timed also write something, for the report."""
    sizes = [Row(n, "params", arch.params(m.config) / 1e6) for n, m in models.items()]
    sizes += [Row(n, "bytes", m.nbytes / 1e6) for n, m in models.items()]
    fit = {
        n: m.path
        for n, m in models.items()
        if phases.timed_bytes(arch.params(m.config)) <= c.plan.budget_bytes
    }
    if s.bench_tokens:
        cli.say(f"measure: speed of {', '.join(fit) or 'none: no model fits the budget whole'}")
        sizes += bench.measure(fit, 2 * s.bench_tokens, s.bench_tokens, 2, c.plan.peak_bytes)
        lines = [
            json.dumps(one, ensure_ascii=False)
            for one in mlx_generate.samples(fit, 2 * s.bench_tokens)
        ]
        c.files.replace_text(c.folder / run_folder.SAMPLES, "\n".join([*lines, ""]))
    return sizes


def _stages(
    s: Settings, c: pipeline.Run, data: preparation.Data, teacher: Checkpoint
) -> tuple[str, dict[str, Any]]:
    """(the table, the result); nothing on machines beside the first one. teacher: with its own
    vocabulary.
    """
    folder = c.folder
    judging = _judging(s, c, data, teacher)
    load.opened_tokenizer.cache_clear()  # each phase would have them beside it
    models = {"teacher": teacher, "pruned": _prune(s, c, data, arch.params(teacher.config))}
    distilled = folder / ("distilled" if s.quantize else "model")
    pipeline.distil(c, models["pruned"], distilled)
    if s.quantize:
        _quantize(s, c, distilled)
    if not distributed.is_main() and not c.shares:  # what is left to do, the first one does
        return "", {}
    if distributed.is_main():
        models["distilled"] = load.open_checkpoint(distilled)
        if s.quantize:
            models["4-bit"] = load.open_checkpoint(folder / "model")
    with c.phase("measure"):
        answered = _answers(s, c, models) if distributed.is_main() else None
        quality = _quality(c, judging, models)
        sizes = _sizes(s, c, models) if distributed.is_main() else []
    if not distributed.is_main():
        return "", {}
    expected = summary.expectation(s.expected_loss, list(models)[-1], answered, quality)
    told = summary.expectation_sentence(expected, s.lose) if expected else ""
    table = summary.page(models, sizes, quality, s.max_seq_length, answered, expectation=told)
    c.files.replace_text(folder / "table.md", table + "\n")
    said = conversations.figures(answered) if answered else {}
    result = summary.result(folder, models, sizes, quality)
    result = c.done({**said, **result, **expected, "mode": c.plan.mode})
    if answered:
        # The sentence on loops, then what the models say, then figures.
        table = summary.page(
            models,
            sizes,
            quality,
            s.max_seq_length,
            answered,
            dialogue=conversations.dialogue(answered),
            expectation=told,
        )
    for name in () if s.keep_steps else pipeline.LEFT:
        c.files.discard(folder / name)
    return table, result


def _plan(s: Settings, teacher: Checkpoint, rows: int, folder: Path | None) -> phases.MemoryPlan:
    """The plan of a new run; or of one that has begun, which goes on in its own way whatever the
    budget is now. Several machines go the first one's way, each with its own budget; MisError where
    the student is not whole there.
    """
    seen = vocabulary.first_rows(teacher, rows)
    if s.student:
        small = load.open_checkpoint(s.student).config
    else:
        small = arch.student_config(
            seen.config, select.wanted_shape(seen.config, s), dtype=pipeline.DTYPE
        )
    if s.quantize:
        stage.check(small, s)
    rounding = s if s.quantize else PLAIN
    at = estimates.machine_rates()
    own = estimates.model_of(seen, dtype=policy.compute_dtype(teacher))
    student, whole = (estimates.model_of(model) for model in (small, teacher))
    asked = s.eval_prompts if preparation.takes_conversations(load.tokenizer(teacher.path)) else 0
    job = spec_of(
        own,
        student,
        s,
        rounding,
        s.hidden_by == "pca",
        whole,
        not s.student,
        answers=asked,
        answers_known=asked > 0 and answers.known(teacher, answers.prompts(asked)),
    )
    limit = memory.budget(s.budget_bytes).limit_bytes
    if s.minutes is not None:
        job = _paced(s.minutes, job, limit, at)

    def way() -> dict[str, Any]:
        return (
            run_folder.stored_settings(folder, run_folder.PLAN)
            if folder
            else phases.make(job, limit, at).way
        )

    made = phases.one(job, limit, at, **distributed.broadcast_json(way))
    if distributed.size() > 1 and made.mode == "sharded":
        why = (
            f"{distributed.size()} machines train a student whole, {gib(limit)} hold a part of "
            f"this one"
        )
        raise MisError(f"{why}: give more --budget, leave out --train, or use one machine")
    return made


def _paced(minutes: float, job: DistillationSpec, limit: int, at: Rates) -> DistillationSpec:
    """The job with as many steps as the plan expects to fit into the minutes.

    MisError where that number must be known before the first step: --iters takes it."""
    made = phases.make(job, limit, at)
    seconds = made.planned.get("distil", 0.0)
    if not seconds:
        return job
    iters = max(2 * FIRST_STEPS, int(60 * minutes * job.iters / seconds))
    if made.mode == "sharded" or job.targets == "cached":
        why = "a student in parts" if made.mode == "sharded" else "targets on disk"
        need = f"{why} must know their number at first: give --iters {iters}"
        raise MisError(
            f"--minutes {minutes:g} counts steps as they are made, {need}, which should take about "
            f"as long"
        )
    return replace(job, iters=iters)


def _text(s: Settings, teacher: Checkpoint) -> str | None:
    """--data; of the teacher's own text the folder, which `synthesize` writes once for a teacher, a
    seed and a size.
    """
    if s.data != preparation.TEACHER:
        return s.data
    visited = (
        steps_of(s, teacher.config) * s.batch_size * s.grad_accumulation_steps * s.max_seq_length
    )
    texts = max(synthesize.Settings.num_samples, visited // (4 * TEXT_TOKENS))
    out = (
        WRITTEN
        / f"{teacher.path.name}-{run_folder.origin(teacher, '')['teacher'][:8]}-{s.seed}-{texts}"
    )
    shared = {name: getattr(s, name) for name in ("budget", "compute_dtype", "seed", "dry_run")}
    if distributed.is_main() and not out.exists():
        cli.say(f"--data teacher: the teacher writes first, into {out}")
        synthesize.run(
            synthesize.Settings(model=str(teacher.path), out=str(out), num_samples=texts, **shared)
        )
    if not s.dry_run:
        distributed.broadcast_folder(out, DISK)
    return str(out)


def _source(s: Settings, teacher: Checkpoint, made: phases.MemoryPlan) -> preparation.Source:
    """The text of a run, which its teacher perhaps writes first: texts for --data teacher, and its
    answers.
    """
    wanted = conversations.wanted_of(s, _text(s, teacher), made.job.iters)
    return conversations.source(teacher, wanted, Budget(made.budget_bytes), dry_run=s.dry_run)


# settings that say how large the result is
SIZES = ("student", "scenario", *families.ALL, "target_bpw", "q_mode")


def _given_sizes(s: Settings) -> list[str]:
    """The settings of SIZES that were given, as flags."""
    defaults = asdict(Settings())
    given = {name: getattr(s, name) for name in SIZES}
    return [
        f"--{name.replace('_', '-')} {value}"
        for name, value in given.items()
        if value != defaults[name]
    ]


def _refuse_sizes(s: Settings, flags: str, teacher: Checkpoint) -> None:
    """MisError where sizes are given beside --lose or --bytes, which choose them, or no search
    knows the teacher.
    """
    if why := search.unknown(teacher.config):
        raise MisError(f"{flags} is not searched for, because {why}: {search.GIVE_SIZES}")
    if taken := _given_sizes(s):
        raise MisError(f"{flags} chooses sizes and bits: leave out {', '.join(taken)}, or {flags}")
    if s.bytes and not s.quantize:
        raise MisError(f"{flags} chooses bits, --quantize 0 wants none: leave one of them out")
    if distributed.size() > 1:
        raise MisError(
            f"{flags} is searched for on one machine: run `search` there, then the line it prints"
        )


def _default_loss(s: Settings, teacher: Checkpoint) -> float | None:
    """The loss that a run allows where nothing was said about sizes; None where it keeps to a
    scenario, said why.
    """
    if _given_sizes(s) or s.vocab or s.target == "conditions":
        return None
    if families.family(teacher.config).experts:
        return None
    kept = "sizes are a scenario's, not chosen by what is lost"
    if why := search.unknown(teacher.config):
        cli.say(f"{kept}: {why}")
        return None
    limit = memory.budget(s.budget_bytes).limit_bytes
    if distributed.size() > 1:
        why = "several machines do not search"
    elif not shape_search.group_of(shape_of(teacher.config)):
        why = "32 does not divide the rows of this teacher's matrices"
    elif 2 * teacher.nbytes > limit:
        why = (
            f"the teacher has {gib(teacher.nbytes)}, a search for sizes would go through it "
            f"again and again"
        )
    else:
        return DEFAULT_LOSS
    cli.say(f"{kept}: {why}; --lose {DEFAULT_LOSS:g} chooses all the same")
    return None


def _searched(s: Settings, teacher: Checkpoint) -> dict[str, Any]:
    """What a search for --lose or --bytes finds, or with --dry-run what it says.

    A search with the same settings that was stopped goes on; one that has ended is read."""
    shared = {f.name for f in fields(search.Settings)} & {f.name for f in fields(s)}
    own = {"out", "resume", "iters", "eval_windows"}  # other things to a search
    given = {name: getattr(s, name) for name in shared - own}
    asked = search.Settings(**given, finalists=0, student_iters=s.iters)
    if not s.quantize:
        asked = replace(asked, axes=tuple(axis for axis in asked.axes if axis != "bits"))
    if s.dry_run:
        return search.run(asked)
    same = {name: value for name, value in asdict(asked).items() if name not in search.FREE}
    out = search.UNDER / f"{teacher.path.name}-{json_sha256(same)[:8]}"
    return search.run(replace(asked, out=str(out), resume=(out / run_folder.CONFIG).is_file()))


def _sized(s: Settings, teacher: Checkpoint) -> Settings:
    """The settings with the sizes that a search chooses, and what this student should lose.

    As they are where sizes were given, or chosen before."""
    if s.expected_loss is not None:
        return s
    if s.lose is None and not s.bytes:
        allowed = _default_loss(s, teacher)
        if allowed is None:
            return s
        s = replace(s, lose=allowed)
    flags = [f"--lose {s.lose:g}"] if s.lose is not None else []
    flags += [f"--bytes {s.bytes}"] if s.bytes else []
    _refuse_sizes(s, " ".join(flags), teacher)
    cli.say(
        f"{' '.join(flags)}: a search chooses sizes and bits; the plan of the rest follows when it "
        f"has"
    )
    found = _searched(replace(s, data=_text(s, teacher)), teacher)
    if s.dry_run:
        layers = shape_of(teacher.config).layers
        cli.say(
            "what follows is the plan of a student that lacks one block: a smaller one takes less"
        )
        return replace(s, scenario="none", layers=max(1, layers - 1))
    return replace(s, **found["best"], expected_loss=max(0.0, found["expected_bits"]))


def run(settings: Settings) -> dict[str, Any]:
    """The command: open, plan, prune, repair, distil, quantize, measure."""
    s, folder = run_loop.resumed(settings, FREE)
    s.check()
    summary.trackers(s.report_to)
    teacher = run_loop.opened(s, s.teacher, "teacher")
    if folder is None:
        s = _sized(s, teacher)
    s = replace(s, **packed_format.of_mixture(teacher.config, s))
    if s.student is None:
        s = replace(s, **vocabulary.defaults(s.scenario, s.vocab, teacher.config, teacher.path))
    rows = vocabulary.rows_left(teacher, s, s.student)
    made = _plan(s, teacher, rows, folder)
    cli.say(text.aligned(plan.table(made)))
    if not (s.dry_run or made.fits):
        raise MisError(phases.remedy(made))
    if s.dry_run:
        if made.fits:
            _source(s, teacher, made)  # says what the teacher would write
        if note := battery(s):  # a run says it when it begins
            cli.say(note)
        return plan.outcome(made, str(teacher.path))
    source = _source(s, teacher, made)
    if folder is None:
        cli.say(progress.promise(sum(made.planned.values())))
    with progress.run("distill", made.planned):
        # With --minutes the first steps say how many there are.
        iters = made.job.iters if s.minutes is None else None
        decided = replace(s, iters=iters, learning_rate=made.recipe(s, teacher).learning_rate)
        table, result = _begin(decided, source, folder, teacher, rows, made)
    if table:
        print(text.aligned(table))
        cli.say(summary.next_steps(Path(result["run"])))
    return result


def _begin(
    s: Settings,
    source: preparation.Source,
    folder: Path | None,
    teacher: Checkpoint,
    rows: int,
    made: phases.MemoryPlan,
) -> tuple[str, dict[str, Any]]:
    """Read the data, of --data or written by the teacher, enter the run folder, go through all
    stages.
    """
    shares = machines.shares(made) if s.spread == "layers" else ()
    data, origin = run_loop.prepared(s, teacher, source)
    name = f"{teacher.path.name}-{s.scenario or 'student'}"
    wired = made.peak_bytes if made.mode != "sharded" else 0
    with run_loop.open_run(
        s, folder, name, origin, made.way, Budget(made.budget_bytes), wired
    ) as place:
        given = asdict(s)
        defaults = asdict(Settings())
        flags = {
            k: v for k, v in given.items() if k not in run_folder.NOT_STORED and v != defaults[k]
        }
        planned = [
            {
                "phase": p.name,
                "seconds": round(p.seconds(made.rates), 3),
                "peak_bytes": p.peak_bytes,
            }
            for p in made.phases
        ]
        sizes = {
            "budget_bytes": made.budget_bytes,
            "step_tokens": made.job.step,
            "iters": made.job.iters,
        }
        begun = {
            **place.weather.now(),
            "flags": flags,
            "planned": planned,
            "mode": made.mode,
            **sizes,
        }
        place.files.append(
            place.folder / run_folder.PHASES, json.dumps({**begun, "rates": asdict(made.rates)})
        )
        told = summary.reporter(s.report_to if distributed.is_main() else None, place.folder, given)
        seen, data = vocabulary.of_run(
            teacher, s.student, rows, data, s, source, place.folder, place.files
        )
        c = pipeline.Run(
            **vars(place),
            recipe=made.recipe(s, seen),
            teacher=seen,
            data=data.train,
            plan=made,
            report=told,
            shares=shares,
        )
        return _stages(s, c, data, teacher)


if __name__ == "__main__":
    cli.main(Settings, run, several=True)
