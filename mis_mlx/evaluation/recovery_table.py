"""The recovery table in Markdown, as a figure, and what it says in plain words. Knows marks, and no
model.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mis_mlx.evaluation.instructions import Levels
from mis_mlx.maths.stats import interval, recovery
from mis_mlx.reporting import figures, html


class Outcome(NamedTuple):
    """One task. marks: {model: (n,)}, the teacher first. chance (n,). constant: U Zośki's (share,
    answer). overlap: of `Known`. uniform (n,): expected marks of a model to which all tokens are
    equally likely. None: not known. levels: {model: IFEval's two accuracies}, whose mean is the
    mean of the marks; None: a task without instructions.
    """

    task: str
    about: str
    marks: Mapping[str, np.ndarray]
    chance: np.ndarray
    constant: tuple[float, str] | None = None
    overlap: tuple[int, int] | None = None
    sha256: str = ""
    uniform: np.ndarray | None = None
    levels: Mapping[str, Levels] | None = None

    @property
    def teacher(self) -> np.ndarray:
        """The teacher's marks."""
        return next(iter(self.marks.values()))

    @property
    def beats_chance(self) -> bool:
        """Whether the teacher is better than chance by more than the noise."""
        return interval(self.teacher - self.chance)[1] > 0

    @property
    def knows(self) -> bool:
        """Whether it is better, too, than counting tokens: else nothing can be recovered."""
        return self.beats_chance and (
            self.uniform is None or interval(self.teacher - self.uniform)[1] > 0
        )

    def recovered(self, model: str) -> tuple[float, float, float] | None:
        """(share, low, high) of what the teacher knows; None where it knows nothing."""
        return recovery(self.marks[model], self.teacher, self.chance) if self.knows else None

    def json(self) -> dict[str, Any]:
        """Everything of it, numbers not rounded."""
        models = {}
        for name, marks in self.marks.items():
            models[name] = {
                "score": interval(marks),
                "recovery": self.recovered(name),
                "marks": marks.tolist(),
            }
            models[name] |= {"less_teacher": interval(marks - self.teacher)}
            if self.levels:
                models[name] |= self.levels[name].json()
        about = {
            "task": self.task,
            "about": self.about,
            "sha256": self.sha256,
            "n": len(self.chance),
        }
        about |= {"chance": float(self.chance.mean())}
        about["u_zoski"] = self.constant and dict(
            zip(("share", "answer"), self.constant, strict=True)
        )
        about["contamination"] = self.overlap and dict(
            zip(("shared", "looked_up"), self.overlap, strict=True)
        )
        return about | {
            "uniform": None if self.uniform is None else float(self.uniform.mean()),
            "models": models,
        }


def markdown(outcomes: Sequence[Outcome], tables: str = "") -> str:
    """Two tables, one line a task and one column a model, and what can be said. tables: more, from
    elsewhere.
    """
    if not outcomes:
        return tables
    outcomes = [o._replace(about=_about(o)) for o in outcomes]
    knows = [o for o in outcomes if o.knows]
    names = list(outcomes[0].marks)[1:]
    alike = [o for o in outcomes if any(len(set(marks)) == 1 for marks in o.marks.values())]
    constants = [(o, *o.constant) for o in knows if o.constant]
    overlaps = [(o.task, *o.overlap) for o in outcomes if o.overlap]
    values: dict[str, Any] = {
        "names": names,
        "interval": interval,
        "tables": tables,
        "outcomes": outcomes,
    }
    values |= {
        "constant": [
            f"{o.task} ({a})" for o, share, a in constants if interval(o.teacher - share)[1] <= 0
        ],
        "alike": [o.task for o in alike],
        "fewest": min((len(o.chance) for o in alike), default=0),
        "students": [_student(name, outcomes) for name in names],
        "shared": [f"{count} of {total} in {task}" for task, count, total in overlaps if count],
        "looked_up": sum(total for *_, total in overlaps),
    }
    return html.document("recovery.md", values)


def _about(outcome: Outcome) -> str:
    """Where a task is from, and both accuracies of every model where it has them."""
    if not outcome.levels:
        return outcome.about
    told = []
    for name, levels in outcome.levels.items():
        accuracies = (
            f"prompt {levels.prompt_strict:.1%}, instruction {levels.inst_strict:.1%}, "
            f"mean {levels.mean:.1%}"
        )
        told.append(f"{name}: {accuracies}")
    return f"{outcome.about}; strict accuracies of {'; '.join(told)}"


def _student(name: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Tasks on which it is worse than the teacher, the same as far as one can tell, better, and
    clearly better.
    """
    less = {o.task: interval(o.marks[name] - o.teacher) for o in outcomes}
    return {
        "name": name,
        "below": [task for task, (_, _, high) in less.items() if high < 0],
        "same": [o.task for o in outcomes if o.knows and less[o.task][2] >= 0],
        "above": [
            f"{task} ({100 * mean:+.1f} points)" for task, (mean, _, _) in less.items() if mean > 0
        ],
        "clearly": [task for task, (mean, low, _) in less.items() if low > 0],
    }


def figure(outcomes: Sequence[Outcome]) -> str:
    """The recoveries with their intervals as HTML; tasks of which the teacher knows nothing are not
    in it.
    """
    known = [o for o in outcomes if o.knows]
    names = list(outcomes[0].marks)[1:] if outcomes else []
    if not known or not names:
        return ""
    rows = {o.task: [o.recovered(name) for name in names] for o in known}
    limits = {"chance": 0.0, "teacher": 1.0}
    about = (
        "Share of what the teacher knows above chance that a student still knows, ± 95 % "
        "intervals; 0 % is chance."
    )
    return figures.intervals(("recovery", "Recovered", about), "recovered", rows, names, limits)
