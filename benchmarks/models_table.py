"""What `plan` says of models that people have, for the table of docs/models.md. Computed, not
measured.

    scripts/mis benchmarks/models_table.py    # minutes; nothing is downloaded
    scripts/mis scripts/render.py             # writes the page's tables from it

The shapes are in benchmarks/model_configs/, each with its source; those of Gemma 4 come with the
package. The machine is an 8 GB MacBook Air M1 by published rates, the budget what `distill` takes
there by itself. The student is the one that `plan` counts where nothing is said about sizes: every
block and three quarters of the tokens, as a search usually leaves them. It is planned for smaller
budgets, too, such as a browser leaves. So are the hours of the search.

A config alone does not say whether a model has a chat template. Of one that has, `distill` lets the
teacher answer prompts before the run, and teacher and student others at its end. The hours of both
are computed here, too, and stored beside the plan's.

Writes benchmarks/results/<machine>/models.json.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import laboratory

from mis_mlx import cli, plan, search
from mis_mlx.distillation import conversations, plan_report, strategies, teacher_answers
from mis_mlx.hardware import rates
from mis_mlx.hardware.stage_cost import StageCost
from mis_mlx.models.architectures import arch
from mis_mlx.models.architectures.families import family
from mis_mlx.models.opening.config import read_config
from mis_mlx.quantization import rounded_size
from mis_mlx.settings.recipe import EVAL_PROMPTS, EVAL_PROMPTS_STREAMED
from mis_mlx.size_search import shape_search, size_request
from mis_mlx.types import Budget

CONFIGS = Path(__file__).parent / "model_configs"
BUDGETS = ("4GiB", "2.5GiB", "1.8GiB")  # the default there, and two where less is free
# Student: flags of `plan`.
RECIPES: dict[str, dict[str, Any]] = {"default": {}}
PACKAGED = {"gemma-4-e2b": "Gemma 4 E2B, text part", "gemma-4-e4b": "Gemma 4 E4B, text part"}
PACKAGED_SOURCE = (
    "mis_mlx/models/architectures/{}.json; tests/models/test_gemma4.py compares its "
    "parameters with the published number"
)
ORDER = (
    "llama-3.2-1b",
    "llama-3.2-3b",
    "qwen3-0.6b",
    "qwen3-1.7b",
    "qwen3-4b",
    "qwen3-8b",
    "gemma-3-1b",
    "gemma-3-4b",
    "gemma-4-e2b",
    "gemma-4-e4b",
    "lfm2-350m",
    "lfm2-700m",
    "lfm2-1.2b",
    "smollm3-3b",
    "bielik-1.5b-v3",
    "bielik-4.5b-v3",
    "bielik-11b",
    "gpt-oss-20b",
)


@dataclass(frozen=True)
class Settings:
    """Which models."""

    only: tuple[str, ...] = ()
    """names, such as qwen3-4b; these are printed and nothing is stored; default: all"""


@dataclass(frozen=True)
class Model:
    """A model of the table. config: what is in its config.json, without weights."""

    name: str
    title: str
    source: list[str]
    config: Mapping[str, Any]


def opened(name: str) -> Model:
    """The model of this name, packaged or in model_configs."""
    if name in PACKAGED:
        return Model(
            name=name,
            title=PACKAGED[name],
            source=[PACKAGED_SOURCE.format(name)],
            config=arch.PUBLISHED[name],
        )
    found = json.loads((CONFIGS / f"{name}.json").read_text("utf-8"))
    title = found.pop("title")
    source = found.pop("source")
    config = family(found).own_config()
    return Model(name=name, title=title, source=source, config=config)


def search_of(made: strategies.MemoryPlan, config: Mapping[str, Any]) -> list[StageCost]:
    """What a search for tokens and bits takes, as `distill` does without sizes.

    [] of a mixture, for which there is no search. As distill's own rule, but without weights: a
    tokenizer is taken for one that can be trimmed."""
    if size_request.unsearchable(config):
        return []
    teacher = made.job.shown or made.job.teacher
    streams = 2 * teacher.nbytes > made.budget_bytes
    evaluations = search.PASSES if streams else search.SETTLED_AFTER
    sizes = shape_search.axis_sizes(config, size_request.vocabularies(config, None))
    return search.search_cost(
        teacher,
        search.Settings(),
        sizes,
        probes=len(shape_search.probes_of(sizes)) + 2,
        measured=evaluations,
        streams=streams,
        limit=made.budget_bytes,
    )


def hours_of(stages: Iterable[StageCost], machine: rates.Rates, *, hot: bool = False) -> float:
    """Hours of stages one after the other; hot: of a hot machine."""
    return round(sum(stage.seconds(machine, hot) for stage in stages) / 3600, 3)


def hours_of_answers(made: strategies.MemoryPlan) -> dict[str, float | str | None]:
    """Hours that a teacher with a chat template adds.

    before: it answers the fewest prompts that a run asks for; None where it is too big to write.
    at_end: it and its student answer others. None where a model cannot write in the budget, so that
    nobody is asked. hot: both, of a hot machine."""
    asked = strategies.plan_strategy(
        job=plan.talking(made.job, Budget(made.budget_bytes), known=False),
        limit=made.budget_bytes,
        rates=made.rates,
        **made.strategy,
    )
    before = asked.planned.get(teacher_answers.PHASE, 0.0)
    at_end = asked.planned["measure"] - made.planned["measure"]
    return {
        "before": round(before / 3600, 3) if before else None,
        "at_end": round(at_end / 3600, 3) if at_end else None,
        "hot": hours_of(asked.phases, made.rates, hot=True)
        - hours_of(made.phases, made.rates, hot=True),
    }


def row(model: Model, folder: Path) -> dict[str, Any]:
    """Everything that is stored of a model. folder: an empty one, which gets its config.json."""
    teacher = model.name
    if model.name not in PACKAGED:
        (folder / "config.json").write_text(json.dumps(model.config), "utf-8")
        read_config(folder)  # refuses what no loader would take
        teacher = str(folder)
    students = {}
    for recipe, flags in RECIPES.items():
        settings = plan.Settings(teacher=teacher, machine="m1-air", **flags)
        made, _ = plan.planned(settings, rates.M1_AIR)
        students[recipe] = student(made)
        searching = search_of(made, model.config)
    budgets = {}
    for budget in BUDGETS:
        settings = plan.Settings(teacher=teacher, machine="m1-air", budget=budget)
        made, _ = plan.planned(settings, rates.M1_AIR)
        budgets[budget] = within(made)
    return {
        "title": model.title,
        "source": model.source,
        "model_type": model.config["model_type"],
        "params": arch.params(model.config),
        "bytes": 2 * arch.params(model.config),
        "hours_of_search": hours_of(searching, made.rates) if searching else None,
        "hours_of_search_hot": hours_of(searching, made.rates, hot=True),
        "students": students,
        "budgets": budgets,
    }


def within(made: strategies.MemoryPlan) -> dict[str, Any]:
    """What a plan does in its budget; where nothing fits, the least that would do."""
    return {
        "fits": made.fits,
        "least_bytes": strategies.least_bytes(made.job, made.rates),
        "mode": made.mode,
        "uncut": made.job.uncut,
        "tuned": made.tuning_steps,
        "hours": hours_of(made.phases, made.rates),
        "peak_bytes": made.peak_bytes,
        "left_out": {part.name: part.budget_bytes for part in strategies.left_out(made)},
    }


def student(made: strategies.MemoryPlan) -> dict[str, Any]:
    """What a plan says of the student that it makes."""
    small = made.job.student
    return {
        "params": arch.params(small.config),
        "bytes": rounded_size.rounded_bytes(small, made.job.rounding),
        "shape": str(small.shape),
        "peak_bytes": made.peak_bytes,
        "fits": made.fits,
        "hours": hours_of(made.phases, made.rates),
        "hours_hot": hours_of(made.phases, made.rates, hot=True),
        "hours_of_answers": hours_of_answers(made),
        "mode": made.mode,
        "uncut": made.job.uncut,
        "disk_bytes": plan_report.disk_bytes(made),
    }


def main(s: Settings) -> None:
    """Plan for every model; store the rows."""
    rows = {}
    for name in s.only or ORDER:
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = row(opened(name), Path(folder))
        cli.say(f"{name}: {rows[name]['students']['default']['hours']} h")
    if s.only:
        print(json.dumps(rows, indent=1))
        return
    given = {
        "machine": "m1-air",
        "rates": rates.M1_AIR.source,
        "budgets": BUDGETS,
        "recipes": RECIPES,
        "lose": size_request.DEFAULT_LOSS,
        "answers_before": conversations.FEWEST,
        "answers_at_end": [EVAL_PROMPTS, EVAL_PROMPTS_STREAMED],
    }
    laboratory.write(
        name="models",
        command="scripts/mis benchmarks/models_table.py",
        found={"given": given, "rows": rows},
    )


if __name__ == "__main__":
    laboratory.start(Settings, main)
