"""Make a small 4-bit student: prune, distill, quantize, measure."""

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from mis_mlx import bench, cli, plan, search, synthesize
from mis_mlx.data import preparation
from mis_mlx.distillation import (
    compression,
    conversations,
    measurement,
    pipeline,
    run_plan,
    summary,
)
from mis_mlx.evaluation import comparison
from mis_mlx.hardware import memory
from mis_mlx.hardware.thermal.run_monitor import battery
from mis_mlx.models import arch, distributed, families, load, mlx_generate, policy
from mis_mlx.models.config import shape_of
from mis_mlx.planner import machines, phases
from mis_mlx.pruning import select, vocabulary
from mis_mlx.quantization import packed_format
from mis_mlx.reporting import progress, text
from mis_mlx.runs import run_loop
from mis_mlx.settings.recipe import (
    EVAL_PROMPTS,
    DistillationConfig,
    QuantizationConfig,
    steps_of,
)
from mis_mlx.size_search import candidates, shape_search
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
DEFAULT_LOSS = 0.1  # bits a byte that a run allows where nothing is said about sizes
WRITTEN = Path("runs/text")  # folders of texts that teachers write
TEXT_TOKENS = 200  # of such a text, about
# Settings that say how large the result is.
SIZES = ("student", "scenario", *families.ALL, "ffn_widths", "target_bpw", "q_mode")


@dataclass(frozen=True)
class Settings(
    cli.Resumable, policy.Computing, select.PruningConfig, QuantizationConfig, DistillationConfig
):
    """Every default was measured to work. No flag is required."""

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
            "ffn_widths",
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
    """folder, hub id (docs/families.md lists the families) or gemma-3-270m; default:
    SmolLM2-135M-Instruct
    """
    student: str | None = None
    """folder of a student that is already pruned; default: prune now"""
    data: str | None = None
    """folder with train.jsonl (valid.jsonl, test.jsonl), or hub data set; `--data teacher`: the
    teacher writes a quarter of the text first; default: built-in text
    """
    conversations: Annotated[float | None, Within(0.0, 0.95)] = None
    """share of the training text in which the teacher answers our prompts, so that the student
    learns to answer; any teacher but the default one writes its answers first, once. Default: 0.44
    if the teacher has a chat template and --data has no conversations; 0: none
    """
    lose: Annotated[float | None, Within(0.0, MOST)] = None
    """bits per byte that the result may lose on the teacher's answers (on text, if the teacher has
    no chat template): `search` chooses the smallest student that should stay within it. Default:
    0.1, unless you give a size, a scenario or --bytes
    """
    expected_loss: Annotated[float | None, Within(0.0, MOST)] = None
    """bits per byte that the result should lose, as predicted by the search for --lose or --bytes
    """
    bytes: str | None = None
    """size of the result's weights on disk, such as 50MB: `search` chooses the sizes and bits that
    should lose least
    """
    quantize: Literal[4, 0] = 4
    """bits per weight of the result; 0: no quantization"""
    eval_prompts: Whole = EVAL_PROMPTS
    """held-out prompts that teacher and student answer at the end; 0: none"""
    bench_tokens: Whole = 16
    """tokens timed per model; each model then writes twice as many for `report`; 0: neither"""
    report_to: str | None = None
    """tensorboard, wandb or swanlab: logs every step there; install the package first"""
    spread: Literal["whole", "layers"] = "whole"
    """with several machines: each passes its own windows through the whole teacher (whole), or all
    windows through its own blocks (layers)
    """
    keep_steps: bool = False
    """after the run, keep the files that only --resume needs: checkpoints, the rounded student,
    stored targets
    """


def _sizes(s: Settings, c: pipeline.Run, models: comparison.Models) -> list[Row]:
    """Rows of size and speed. The models that are timed also write samples, for the report."""
    sizes = []
    fitting = {}
    for name, model in models.items():
        params = arch.params(model.config)
        sizes.append(Row(name, "params", params / 1e6))
        if phases.timed_bytes(params) <= c.plan.budget_bytes:
            fitting[name] = model.path
    sizes += [Row(name, "bytes", model.nbytes / 1e6) for name, model in models.items()]
    if s.bench_tokens:
        cli.say(f"measure: speed of {', '.join(fitting) or 'none: no model fits the budget whole'}")
        sizes += bench.measure(
            fitting,
            prompt_tokens=2 * s.bench_tokens,
            tokens=s.bench_tokens,
            count=2,
            limit_bytes=c.plan.peak_bytes,
        )
        samples = mlx_generate.samples(fitting, 2 * s.bench_tokens)
        lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples]
        c.files.replace_text(c.folder / run_folder.SAMPLES, "".join(lines))
    return sizes


def _stages(
    s: Settings, c: pipeline.Run, data: preparation.Data, teacher: Checkpoint
) -> tuple[str, dict[str, Any]]:
    """(what the screen shows, the result); ("", {}) on machines beside the first one.

    teacher: with its own vocabulary.
    """
    folder = c.folder
    judging = measurement.judging_windows(c, data, teacher, s.eval_windows)
    load.opened_tokenizer.cache_clear()  # else every phase would hold them, too
    pruned = compression.prune(s, c, data, arch.params(teacher.config))
    models = {"teacher": teacher, "pruned": pruned}
    distilled = folder / ("distilled" if s.quantize else "model")
    pipeline.distil(c, pruned, distilled)
    if s.quantize:
        compression.quantize(s, c, distilled)
    # Other machines are needed only for a teacher whose blocks are shared.
    main = distributed.is_main()
    if not main and not c.shares:
        return "", {}
    if main:
        models["distilled"] = load.open_checkpoint(distilled)
        if s.quantize:
            models["4-bit"] = load.open_checkpoint(folder / "model")
    with c.phase("measure"):
        answered = measurement.answered(c, models, s.eval_prompts) if main else None
        quality = measurement.quality(c, judging, models)
        sizes = _sizes(s, c, models) if main else []
    if not main:
        return "", {}
    expected = summary.expectation(s.expected_loss, list(models)[-1], answered, quality)
    sentence = summary.expectation_sentence(expected, s.lose) if expected else ""
    table = summary.result_page(
        models, sizes, quality, s.max_seq_length, answered=answered, expectation=sentence
    )
    c.files.replace_text(folder / "table.md", table + "\n")
    figures = conversations.figures(answered) if answered else {}
    result = summary.result(folder, models, sizes, quality)
    result = c.finish({**figures, **result, **expected, "mode": c.plan.mode})
    # The answer first: what was won, then what the models say, then the tables.
    screen = summary.result_page(
        models,
        sizes,
        quality,
        s.max_seq_length,
        answered=answered,
        for_screen=True,
        expectation=sentence,
    )
    if not s.keep_steps:
        for name in pipeline.TEMPORARY:
            c.files.discard(folder / name)
    return screen, result


def _text(s: Settings, teacher: Checkpoint) -> str | None:
    """--data; for --data teacher the folder of a text that the teacher writes.

    `synthesize` writes it once for a teacher, a seed and a size.
    """
    if s.data != preparation.TEACHER:
        return s.data
    step = s.batch_size * s.grad_accumulation_steps * s.max_seq_length
    visited = steps_of(s, teacher.config) * step
    texts = max(synthesize.Settings.num_samples, visited // (4 * TEXT_TOKENS))
    identity = run_folder.origin(teacher, "")["teacher"]
    out = WRITTEN / f"{teacher.path.name}-{identity[:8]}-{s.seed}-{texts}"
    if distributed.is_main() and not out.exists():
        cli.say(f"--data teacher: the teacher writes first, into {out}")
        synthesize.run(
            synthesize.Settings(
                model=str(teacher.path),
                out=str(out),
                num_samples=texts,
                budget=s.budget,
                compute_dtype=s.compute_dtype,
                seed=s.seed,
                dry_run=s.dry_run,
            )
        )
    if not s.dry_run:
        distributed.broadcast_folder(out, DISK)
    return str(out)


def _source(s: Settings, teacher: Checkpoint, memory_plan: phases.MemoryPlan) -> preparation.Source:
    """The text of a run. Its teacher perhaps writes first: --data teacher, and its answers."""
    wanted = conversations.wanted_of(s, _text(s, teacher), memory_plan.job.iters)
    return conversations.source(
        teacher, wanted, Budget(memory_plan.budget_bytes), dry_run=s.dry_run
    )


def _given_sizes(s: Settings) -> list[str]:
    """The settings of SIZES that were given, as flags."""
    defaults = Settings()
    flags = []
    for name in SIZES:
        value = getattr(s, name)
        if value != getattr(defaults, name):
            flags.append(f"--{name.replace('_', '-')} {value}")
    return flags


def _refuse_sizes(s: Settings, flags: str, teacher: Checkpoint) -> None:
    """MisError where sizes are given together with --lose or --bytes, which choose them.

    Also where no search knows the teacher, or several machines would search.
    """
    why = search.unknown(teacher.config)
    if why:
        raise MisError(f"{flags} cannot be searched for, because {why}: {search.GIVE_SIZES}")
    taken = _given_sizes(s)
    if taken:
        raise MisError(f"{flags} chooses sizes and bits: leave out {', '.join(taken)}, or {flags}")
    if s.bytes and not s.quantize:
        raise MisError(
            f"{flags} chooses bits, but --quantize 0 turns them off: leave one of them out"
        )
    if distributed.size() > 1:
        raise MisError(
            f"{flags} needs a search, which runs on one machine: run `search` there, then the "
            f"command it prints"
        )


def _default_loss(s: Settings, teacher: Checkpoint) -> float | None:
    """The loss that a run allows where nothing was said about sizes.

    None where a scenario gives its sizes; the reason is said.
    """
    if _given_sizes(s) or s.vocab or s.target == "conditions":
        return None
    if families.family(teacher.config).experts:
        return None
    kept = "the sizes come from a scenario, not from a search by loss"
    why = search.unknown(teacher.config)
    if why:
        cli.say(f"{kept}: {why}")
        return None
    family = families.family(teacher.config)
    if family.per_layer:
        why = f"most of a {family.name} is tables with a row for each token"
        cli.say(f"{kept}: {why}; --lose {DEFAULT_LOSS:g} searches anyway")
        return None
    limit = memory.budget(s.budget_bytes).limit_bytes
    if distributed.size() > 1:
        why = "a search runs on one machine only"
    elif not shape_search.group_of(shape_of(teacher.config)):
        why = "the rows of this teacher's matrices are not divisible by 32"
    elif 2 * teacher.nbytes > limit:
        why = (
            f"the teacher has {gib(teacher.nbytes)}, and a search for sizes would read it many "
            f"times"
        )
    else:
        return DEFAULT_LOSS
    cli.say(f"{kept}: {why}; --lose {DEFAULT_LOSS:g} searches anyway")
    return None


def _searched(s: Settings, teacher: Checkpoint) -> dict[str, Any]:
    """The result of a search for --lose or --bytes; with --dry-run its plan.

    A search with the same settings that was stopped goes on; one that has ended is read.
    """
    names = {field.name for field in fields(search.Settings)} & {field.name for field in fields(s)}
    names -= {"out", "resume", "iters", "eval_windows"}  # a search has its own
    given = {name: getattr(s, name) for name in names}
    asked = search.Settings(**given, finalists=0, student_iters=s.iters)
    if not s.quantize:
        axes = tuple(axis for axis in asked.axes if axis != "bits")
        asked = replace(asked, axes=axes)
    if s.dry_run:
        return search.run(asked)
    same = {name: value for name, value in asdict(asked).items() if name not in search.FREE}
    out = search.UNDER / f"{teacher.path.name}-{json_sha256(same)[:8]}"
    begun = (out / run_folder.CONFIG).is_file()
    return search.run(replace(asked, out=str(out), resume=begun))


def _sized(s: Settings, teacher: Checkpoint) -> Settings:
    """The settings with the sizes that a search chooses, and the loss that it expects.

    Unchanged where sizes were given, or chosen before.
    """
    if s.expected_loss is not None:
        return s
    if s.lose is None and not s.bytes:
        allowed = _default_loss(s, teacher)
        if allowed is None:
            return s
        s = replace(s, lose=allowed)
    given = []
    if s.lose is not None:
        given.append(f"--lose {s.lose:g}")
    if s.bytes:
        given.append(f"--bytes {s.bytes}")
    flags = " ".join(given)
    _refuse_sizes(s, flags, teacher)
    cli.say(f"{flags}: a search chooses sizes and bits; the plan for the rest follows it")
    searched = _searched(replace(s, data=_text(s, teacher)), teacher)
    if s.dry_run:
        return _likely(s, teacher)
    return replace(s, **searched["best"], expected_loss=max(0.0, searched["expected_bits"]))


def _likely(s: Settings, teacher: Checkpoint) -> Settings:
    """The settings of the student that a --dry-run plans in place of a search's choice.

    Searches take tokens and bits first. Where no tokens can go, it is a student without one block.
    """
    rows = candidates.vocabularies(teacher)
    if rows:
        cli.say(
            f"the plan below keeps every block and {rows[-1]:,} tokens, as a search usually does; "
            f"if it cuts blocks, repair and training take longer"
        )
        return replace(s, scenario="none", vocab=str(rows[-1]))
    layers = shape_of(teacher.config).layers
    cli.say(
        "the plan below is for a student without one of the blocks; a smaller student takes less "
        "time"
    )
    return replace(s, scenario="none", layers=max(1, layers - 1))


def run(settings: Settings) -> dict[str, Any]:
    """The command: open, plan, prune, repair, distil, quantize, measure."""
    s, folder = run_loop.resumed(settings, FREE)
    s.check()
    summary.trackers(s.report_to)
    teacher = run_loop.open_model(s, s.teacher, "teacher")
    if folder is None:
        s = _sized(s, teacher)
    s = replace(s, **packed_format.of_mixture(teacher.config, s))
    if s.student is None:
        s = replace(s, **vocabulary.defaults(s.scenario, s.vocab, teacher.config, teacher.path))
    rows = vocabulary.rows_left(teacher, s, s.student)
    memory_plan = run_plan.plan_run(s, teacher, rows, folder)
    cli.say(text.aligned(plan.table(memory_plan)))
    if not (s.dry_run or memory_plan.fits):
        raise MisError(phases.remedy(memory_plan))
    if s.dry_run:
        if memory_plan.fits:
            _source(s, teacher, memory_plan)  # says what the teacher would write
        note = battery(s)  # a run says it when it begins
        if note:
            cli.say(note)
        return plan.outcome(memory_plan, str(teacher.path))
    source = _source(s, teacher, memory_plan)
    if folder is None:
        cli.say(progress.promise(sum(memory_plan.planned.values())))
    with progress.run("distill", memory_plan.planned):
        # With --minutes the first steps say how many there are.
        iters = memory_plan.job.iters if s.minutes is None else None
        rate = memory_plan.recipe(s, teacher).learning_rate
        decided = replace(s, iters=iters, learning_rate=rate)
        table, result = _begin(
            decided,
            source,
            folder,
            teacher,
            rows=rows,
            memory_plan=memory_plan,
        )
    if table:
        print(text.aligned(table))
        cli.say(summary.next_steps(Path(result["run"])))
    return result


def _begin(
    s: Settings,
    source: preparation.Source,
    folder: Path | None,
    teacher: Checkpoint,
    *,
    rows: int,
    memory_plan: phases.MemoryPlan,
) -> tuple[str, dict[str, Any]]:
    """Read the data, enter the run folder, go through all stages.

    rows: of the vocabulary that the student has.
    """
    shares = machines.blocks_by_machine(memory_plan) if s.spread == "layers" else ()
    data, origin = run_loop.prepare_text(s, teacher, source)
    with run_loop.open_run(
        s,
        folder,
        f"{teacher.path.name}-{s.scenario or 'student'}",
        origin,
        strategy=memory_plan.strategy,
        limit=Budget(memory_plan.budget_bytes),
        wired=memory_plan.peak_bytes if memory_plan.mode != "sharded" else 0,
    ) as place:
        run_plan.log(s, place, memory_plan)
        reported = s.report_to if distributed.is_main() else None
        report = summary.reporter(reported, place.folder, asdict(s))
        seen, data = vocabulary.of_run(
            teacher,
            s.student,
            rows,
            data,
            config=s,
            source=source,
            run=place.folder,
            files=place.files,
        )
        c = pipeline.Run(
            **vars(place),
            recipe=memory_plan.recipe(s, seen),
            teacher=seen,
            data=data.train,
            plan=memory_plan,
            report=report,
            shares=shares,
        )
        return _stages(s, c, data, teacher)


if __name__ == "__main__":
    cli.main(Settings, run, several=True)
