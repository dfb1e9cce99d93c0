"""Plans of an 8 GB Air where little is free: nothing that fits is refused, and what a budget has no
room for is not left out without a word.
"""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from mis_mlx import plan
from mis_mlx.cli import parse_bytes
from mis_mlx.distillation import plan_report, strategies
from mis_mlx.hardware.rates import M1_AIR
from mis_mlx.models.opening import wheel_model
from mis_mlx.planner import estimates
from mis_mlx.types import GIB
from tests.conftest import mostly_slow
from tests.models.test_contract import published

CUT: dict[str, Any] = {"scenario": "half-vocab"}
WHOLE: dict[str, Any] = {"scenario": "none", "vocab": "0.75x"}  # every block stays
BUDGETS = ("1.8GiB", "2.3GiB", "3GiB", "4GiB")
TEACHERS = {
    "default": wheel_model.SMOLLM2.files["config.json"],
    "qwen3-1.7b": published("qwen3-1.7b"),
    "llama-3.2-3b-4bit": {**published("llama-3.2-3b")}
    | {"quantization": {"group_size": 64, "bits": 4}},
}


def planned(folder: Path, teacher: str, budget: str, **flags: Any) -> strategies.MemoryPlan:
    """The plan of a teacher on an Air by published rates."""
    (folder / "config.json").write_text(json.dumps(TEACHERS[teacher]))
    asked = plan.Settings(teacher=str(folder), machine="m1-air", budget=budget, **flags)
    return plan.planned(asked, M1_AIR)[0]


CASES = list(product(TEACHERS, BUDGETS, (CUT, WHOLE)))
QUICK = [
    ("default", "1.8GiB", CUT),
    ("qwen3-1.7b", "2.3GiB", WHOLE),
    ("llama-3.2-3b-4bit", "4GiB", CUT),
]


@pytest.mark.parametrize(
    ("teacher", "budget", "flags"), mostly_slow(CASES, *QUICK, of_several=True), ids=str
)
def test_it_fits_and_says_what_it_leaves_out(
    tmp_path: Path, teacher: str, budget: str, flags: dict[str, Any]
) -> None:
    """Trained and tuned, or the first lines name the budget that would have it: that much is
    enough, and it is more than was given.
    """
    made = planned(tmp_path, teacher, budget, **flags)
    assert made.fits
    missing = {part.name: part for part in strategies.left_out(made)}
    trains = made.mode != "none" or made.job.uncut
    assert trains == ("training" not in missing)
    assert bool(made.tuning_steps) == ("distillation of scales" not in missing)
    head, _, _ = plan_report.table(made).partition("| phase")
    for name, part in missing.items():
        flag = estimates.budget_flag(part.budget_bytes)
        assert flag in head
        assert part.budget_bytes > made.budget_bytes
        assert part.loss > 1
        if part.budget_bytes < (M1_AIR.room_bytes or 0):
            enough = planned(tmp_path, teacher, flag, **flags)
            assert name not in {other.name for other in strategies.left_out(enough)}


def test_no_budget_between_two_that_fit_is_refused(tmp_path: Path) -> None:
    """A larger budget never refuses what a smaller one takes: the process has its share in every
    phase, by the machine that is planned for. From a gibibyte on the default run is tuned.
    """
    plans = [planned(tmp_path, "default", f"{mib}MiB") for mib in (*range(400, 2000, 200), 4096)]
    fitting = [made.fits for made in plans]
    assert fitting == sorted(fitting)
    assert all(made.tuning_steps for made in plans if made.budget_bytes >= GIB)


@pytest.mark.thorough
def test_what_is_left_out_raises_the_loss(tmp_path: Path) -> None:
    """Nothing left out: the loss that was promised. A cut student that does not learn loses more,
    and one whose scales do not learn either loses most.
    """
    whole = strategies.loss_factor(strategies.left_out(planned(tmp_path, "default", "4GiB")))
    trained = planned(tmp_path, "qwen3-1.7b", "4GiB", **CUT)
    untrained = replace(trained, mode="none")
    untuned = replace(untrained, phases=untrained.phases[:1])
    factors = [
        strategies.loss_factor(strategies.left_out(made)) for made in (trained, untrained, untuned)
    ]
    assert 1 == whole == factors[0] < factors[1] < factors[2]


def test_a_larger_mac_has_a_larger_budget(tmp_path: Path) -> None:
    """Of 16 GB: 8 GiB by default, and 10 GiB on demand, which an Air of 8 GB refuses."""
    (tmp_path / "config.json").write_text(json.dumps(TEACHERS["qwen3-1.7b"]))
    machine = estimates.machine_rates("m1-air-16gb")
    asked = plan.Settings(teacher=str(tmp_path), machine="m1-air-16gb")
    made, _ = plan.planned(asked, machine)
    assert made.budget_bytes == parse_bytes("8GiB")
    more, _ = plan.planned(
        plan.Settings(teacher=str(tmp_path), machine="m1-air-16gb", budget="10GiB"), machine
    )
    assert more.fits and more.tuning_steps
