"""Plan: what fits, bytes, passes, hours and SSD wear of a distillation, from the configs alone, before any work."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from mis_mlx import cli
from mis_mlx.hardware import memory
from mis_mlx.hardware.thermal.run_monitor import WeatherFlags, battery
from mis_mlx.models import arch, load
from mis_mlx.models import resolve as teachers
from mis_mlx.models.arch import MIS_137B
from mis_mlx.models.config import read_config
from mis_mlx.planner import estimates, machines, phases
from mis_mlx.planner.estimates import Model
from mis_mlx.planner.job import Job, job_of
from mis_mlx.planner.phases import Plan
from mis_mlx.planner.recipe import Distillation, Rounding
from mis_mlx.reporting.text import markdown_table
from mis_mlx.types import Count, Within, duration, gib

LIFE_BYTES = 150e12  # written: 600 times a 256 GB SSD, a rule of thumb; Apple publishes no figure
PASSES = (1, 128, 512)  # tokens
ACCEPTED = (4, 6)  # tokens of a guessed tree that one pass confirms


def table(plan: Plan) -> str:
    """Markdown for people: every phase, one generated token, the decision."""
    one = estimates.token(plan.job.teacher, plan.job.length, plan.budget_bytes)
    head = ["phase", "read", "written", "peak memory", "operations", "time", "of an SSD's life"]
    rows = [
        [p.name, *map(gib, (p.read_bytes, p.written_bytes, p.peak_bytes)), f"{p.flops:.1e}",
         duration(p.seconds(plan.rates)), f"{p.written_bytes / LIFE_BYTES:.4%}"]
        for p in (*plan.phases, one)
    ]  # fmt: skip
    return f"{markdown_table(head, rows)}\n\n{decision(plan)}"


def disk_bytes(plan: Plan) -> int:
    """Files there may be at once, the teacher's not among them: models, two checkpoints, scratch."""
    m = plan.job.student
    params, shard = arch.params(m.config), m.block_params * plan.shard_layers
    run = 2 * phases.SAVED_BYTES * (shard or params) + (4 * params if shard else 0)
    kept = sum(p.written_bytes for p in plan.phases if p.name in ("quantize", "logit store"))
    return 2 * m.nbytes + run + kept + max(p.spooled_bytes for p in plan.phases)


def decision(plan: Plan) -> str:
    """What was chosen and what it comes to; or that nothing fits, and what would."""
    if not plan.fits:
        return f"This does NOT fit: {phases.remedy(plan)}."
    job, layers = plan.job, plan.job.student.shape.layers
    how = f"{plan.mode} training, micro-batches of {plan.micro_batch} of {job.batch} windows"
    if plan.mode == "sharded":
        visit = phases.steps_per_shard(job, plan.shard_layers)
        how += f", {plan.shard_layers} of {layers} student blocks trainable at a time for {visit} steps, after `local`"
    where = f"is streamed from disk at every step, {plan.pinned} of its {job.teacher.shape.layers} blocks kept"
    where = "stays in memory" if plan.teacher_resident else "has left its logits" if job.targets == "cached" else where
    spooled = max(p.spooled_bytes for p in plan.phases)
    hidden = f"up to {gib(spooled)} of hidden states on disk" if spooled else "hidden states in memory"
    hot = sum(p.seconds(plan.rates, hot=True) for p in plan.phases)
    warm = f" ({duration(hot)} once hot)" if plan.rates.hot < 1 else ""
    written = sum(p.written_bytes for p in plan.phases)
    return (
        f"Peak {gib(plan.peak_bytes)} fits the budget of {gib(plan.budget_bytes)}: {how}; the teacher {where}; "
        f"{hidden}. About {duration(plan.seconds)}{warm} in all, "
        f"{gib(written)} written, {written / LIFE_BYTES:.2%} of an SSD's life of {LIFE_BYTES / 1e12:.0f} TB; "
        f"up to {gib(disk_bytes(plan))} of files at a time."
    )


def paper(plan: Plan, tokens: int) -> str:
    """What this machine makes of the paper's figures: by its teacher's own shape, and by its 137B and 70 GB."""
    at, m = plan.rates, plan.job.teacher
    labels = [*(f"a pass of {n:,} token{'s'[: n > 1]}" for n in PASSES), "N*: arithmetic takes as long as reading"]
    labels += [f"{tokens:,} tokens, cool and hot", "one generated token, plain"]
    labels += [f"the same, {n} of a tree of N* guesses accepted" for n in ACCEPTED]
    columns, verdicts = [], []
    streamed = m.shape.layers * m.block_bytes + m.head_bytes
    for params, nbytes in ((estimates.forward_flops(m, 1, 0) / 2, streamed), (137e9, 70e9)):
        reading, computing = nbytes / at.read_bytes_per_s, 2 * params / at.forward_flops_per_s  # s a pass, s a token
        cells = [duration(max(reading, computing * n)) for n in PASSES]
        epochs = [f"{max(reading, computing * tokens / hot) / 3600:.0f} h" for hot in (1.0, at.hot)]
        cells += [f"{reading / computing:.0f}", " and ".join(epochs)]
        cells += [f"{reading / n:.1f} s, {n / reading:.3f} tokens/s" for n in (1, *ACCEPTED)]
        columns.append(cells)
        best = ACCEPTED[-1] / reading  # tokens/s
        word = "possible" if best >= 0.45 else "possible at its lower end" if best >= 0.3 else "not possible"
        verdicts.append(f"{word}, {0.3 * reading:.1f} to {0.45 * reading:.1f} guesses a pass would have to be right")
    shape, least = arch.params(m.config) / 1e9, phases.least_bytes(plan.job, at)
    room = memory.room_bytes() if at.room_bytes is None else at.room_bytes
    read = [hours * 3600 * at.forward_flops_per_s * at.hot / 2 / 137e9 / 1e6 for hours in (48, 72)]
    head = ["", f"by its shape: {shape:.1f}B, {m.nbytes / 1e9:.1f} GB", "by the paper: 137B, 70 GB"]
    return "\n".join(
        [
            markdown_table(head, zip(labels, *columns, strict=True)),
            "",
            f'- "137B teacher": not possible, its own shape gives {shape:.1f}B; the figure does not follow from it.',
            f'- "70 GB in 4 bits": not possible, 137B take {137 * 0.5625:.1f} GB in groups of 64 with float16 scales; '
            f"70 GB are {70 * 8 / 137:.2f} bits a parameter.",
            f'- "0.3-0.45 tokens/s": with 137B {verdicts[1]}; with its shape {verdicts[0]} (4 to 6 are usual).',
            f'- "48-72 h of distillation": possible for the teacher\'s part, {read[0]:.1f} to {read[1]:.1f} million '
            f"tokens once; the student's is {'possible' if least <= room else 'not possible'}, it takes {gib(least)} "
            f"of memory and the machine gives {gib(room)}.",
        ]
    )


@dataclass(frozen=True)
class Settings(Rounding, Distillation):
    """What would `distill` take with these flags? Reads configs, computes, starts nothing."""

    teacher: str | None = None
    """folder (config.json is enough) or hub id; mis-137b: the paper's; default: SmolLM2-135M-Instruct"""
    student: str | None = None
    """folder of a student pruned earlier; default: what --scenario gives"""
    scenario: Literal["gazda", "goral", "baca", "halny", "juhas", "zbojnik"] | None = None
    """sizes as in `prune`; default: gazda, of mis-137b goral, the paper's own student"""
    budget: str | None = None
    """memory this may take, such as 600MiB"""
    machine: Literal["here", "m1-air"] = "here"
    """m1-air: an 8 GB fanless laptop, by published figures"""
    measure: bool = False
    """take this machine's rates first, in 20 s; later plans use them; without --teacher that is all"""
    num_samples: Count = 32
    """calibration windows"""
    eval_windows: Count = 24
    """held-out windows measured"""
    quantize: Literal[4, 0] = 4
    """bits of the result; 0 keeps it unquantized"""
    hosts: str | None = None
    """budgets of several machines, such as 5GiB,12GiB: whose blocks are whose, and what the cable carries"""
    epoch_tokens: Annotated[int, Within(1, 10**12)] = 1_000_000
    """of mis-137b's comparison with the paper"""
    config: cli.ConfigFile = None
    """YAML file with any of these flags"""


def _open(name: str | None, gpu: bool) -> tuple[Model, str]:
    """(sizes, path or name) of a folder with or without weights, a model of the hub, or the paper's teacher."""
    if name == "mis-137b":
        return estimates.model_of(MIS_137B, gpu), name
    folder = teachers.find(name).path
    bare = not any(folder.glob("*.safetensors"))
    return estimates.model_of(read_config(folder) if bare else load.open_checkpoint(folder), gpu), str(folder)


def _job(s: Settings, teacher: Model, gpu: bool) -> Job:
    if s.student:
        student, _ = _open(s.student, gpu)
    else:
        name = s.scenario or ("goral" if s.teacher == "mis-137b" else "gazda")
        shape = arch.target_shape(teacher.config, arch.SCENARIOS[name])
        small = arch.student_config(teacher.config, shape, tuple(range(shape.layers)), "bfloat16")
        student = estimates.model_of(small, gpu)
    return job_of(teacher, student, s)


def _several(budgets: str | None, plan: Plan) -> dict[str, Any]:
    """The same on several machines, printed; for the JSON line their parts."""
    if budgets is None:
        return {}
    job, sizes = plan.job, [cli.parse_bytes(each, "--hosts") for each in budgets.split(",")]
    made = machines.split(job.teacher, sizes, job.step, plan.micro_batch * job.length, job.length, plan.rates)
    print(f"\n{machines.table(plan, made)}")
    return {
        "hosts": [asdict(host) for host in made],
        "relayed_bytes": machines.relayed_bytes(job.teacher, len(made), job.step),
        "gradient_bytes": machines.gradient_bytes(job, len(made)),
    }


def run(settings: Settings) -> dict[str, Any]:
    """The command: print the plan."""
    at = estimates.machine_rates(settings.machine, settings.measure)
    print(f"{at}\n")
    if settings.measure and settings.teacher is None:
        return asdict(at)
    teacher, name = _open(settings.teacher, at.gpu)
    job = _job(settings, teacher, at.gpu)
    asked = None if settings.budget is None else cli.parse_bytes(settings.budget)
    budget = memory.budget(asked, at.room_bytes)
    plan = phases.make(job, budget.limit_bytes, at)
    params = [arch.params(m.config) for m in (teacher, job.student)]
    print(f"{params[0]:,} -> {params[1]:,} parameters: {job.student.shape}\n\n{table(plan)}")
    if settings.machine == "here" and (said := battery(WeatherFlags())):
        print(f"\nThis machine is {said}.")
    several = _several(settings.hosts, plan)
    if settings.teacher == "mis-137b":
        print(f"\n{paper(plan, settings.epoch_tokens)}")
    return {
        "teacher": name,
        "params_teacher": params[0],
        "params_student": params[1],
        "mode": plan.mode,
        "micro_batch": plan.micro_batch,
        "shard_layers": plan.shard_layers,
        "pinned": plan.pinned,
        "spooled_bytes": max(p.spooled_bytes for p in plan.phases),
        "read_bytes": sum(p.read_bytes for p in plan.phases),
        "written_bytes": sum(p.written_bytes for p in plan.phases),
        "disk_bytes": disk_bytes(plan),
        "peak_bytes": plan.peak_bytes,
        "budget_bytes": plan.budget_bytes,
        "least_budget_bytes": phases.least_bytes(job, at),
        "seconds": round(plan.seconds),
        **several,
        "rates": at.source,
        "check_failed": not plan.fits,
    }


if __name__ == "__main__":
    cli.main(Settings, run)
