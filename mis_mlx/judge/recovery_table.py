"""The recovery table in Markdown and in plain words. Knows marks, and no model."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mis_mlx.judge.tasks.instructions import Levels
from mis_mlx.maths.stats import LEAST_FOR_INTERVAL, bounds, interval, recovery
from mis_mlx.reporting import html
from mis_mlx.reporting.text import plus_minus


class Outcome(NamedTuple):
    """The marks of all models on one task of n questions.

    marks: {model: (n,)}, the teacher first. chance (n,): expected marks of guessing. constant:
    (share, answer) of the best constant answer, U Zośki. uniform (n,): expected marks of a model to
    which all tokens are equally likely. levels: {model: IFEval's two accuracies}, whose mean is the
    mean of the marks. ways: {model: how options were put to it}. shares: {model: figures of its
    calls, by name, a tool's task}; forced: {student: {figure: (n,)}} on the tokens of right calls.
    None: not known, or a task of another kind.
    """

    task: str
    about: str
    marks: Mapping[str, np.ndarray]
    chance: np.ndarray
    constant: tuple[float, str] | None = None
    sha256: str = ""
    uniform: np.ndarray | None = None
    levels: Mapping[str, Levels] | None = None
    ways: Mapping[str, str] | None = None
    shares: Mapping[str, Mapping[str, float]] | None = None
    forced: Mapping[str, Mapping[str, np.ndarray]] | None = None

    @property
    def teacher(self) -> np.ndarray:
        """The teacher's marks."""
        return next(iter(self.marks.values()))

    @property
    def beats_chance(self) -> bool:
        """Whether the teacher is better than chance by more than the noise."""
        _, low, _ = interval(self.teacher - self.chance)
        return low > 0

    @property
    def knows(self) -> bool:
        """Whether the teacher also beats a count of tokens; else nothing can be recovered."""
        if not self.beats_chance:
            return False
        if self.uniform is None:
            return True
        _, low, _ = interval(self.teacher - self.uniform)
        return low > 0

    def recovered(self, model: str) -> tuple[float, float, float] | None:
        """(share, low, high) of the teacher's knowledge that is left; None where it has none."""
        if not self.knows:
            return None
        return recovery(self.marks[model], self.teacher, self.chance)

    def flips(self, model: str) -> tuple[int, int]:
        """(questions with a better mark than the teacher's, with a worse one): their difference may
        be nothing while half of all answers changed."""
        above = self.marks[model] - self.teacher
        return int((above > 0).sum()), int((above < 0).sum())

    def json(self) -> dict[str, Any]:
        """All of it, numbers not rounded."""
        models = {}
        for name, marks in self.marks.items():
            of_model: dict[str, Any] = {
                "score": bounds(interval(marks)),
                "recovery": self.recovered(name),
                "marks": marks.tolist(),
                "less_teacher": bounds(interval(marks - self.teacher)),
                "flips": self.flips(name),
            }
            if self.levels:
                of_model |= self.levels[name].json()
            if self.ways:
                of_model["asked"] = self.ways[name]
            if self.shares:
                of_model["calls"] = dict(self.shares[name])
            for figure, values in (self.forced or {}).get(name, {}).items():
                of_model.setdefault("right_calls", {})[figure] = bounds(interval(values))
            models[name] = of_model
        constant: dict[str, Any] | None = None
        if self.constant:
            share, answer = self.constant
            constant = {"share": share, "answer": answer}
        return {
            "task": self.task,
            "about": self.about,
            "sha256": self.sha256,
            "n": len(self.chance),
            "chance": float(self.chance.mean()),
            "u_zoski": constant,
            "uniform": None if self.uniform is None else float(self.uniform.mean()),
            "models": models,
        }


def markdown(outcomes: Sequence[Outcome], tables: str = "") -> str:
    """Two tables, one line a task and one column a model, with sentences about them.

    tables: more of them, from elsewhere.
    """
    if not outcomes:
        return tables
    outcomes = [outcome._replace(about=_about(outcome)) for outcome in outcomes]
    _, *students = outcomes[0].marks
    # A model has the same mark on all questions, so that its interval has no width.
    alike = [each for each in outcomes if any(len(set(m)) == 1 for m in each.marks.values())]
    constants = []
    for outcome in outcomes:
        if outcome.knows and outcome.constant:
            share, answer = outcome.constant
            _, low, _ = interval(outcome.teacher - share)
            if low <= 0:
                constants.append(f"{outcome.task} ({answer})")
    values: dict[str, Any] = {
        "names": students,
        "interval": interval,
        "plus_minus": plus_minus,
        "few": [outcome.task for outcome in outcomes if len(outcome.chance) < LEAST_FOR_INTERVAL],
        "least": LEAST_FOR_INTERVAL,
        "tables": tables,
        "outcomes": outcomes,
        "constant": constants,
        "alike": [outcome.task for outcome in alike],
        "fewest": min((len(outcome.chance) for outcome in alike), default=0),
        "students": [_compared(name, outcomes) for name in students],
    }
    return html.document("recovery.md", values)


def _about(outcome: Outcome) -> str:
    """A task's origin, how the models were asked, and both accuracies where they have them."""
    if outcome.ways:
        return f"{outcome.about}; {_asked(outcome.ways)}"
    if outcome.shares:
        return f"{outcome.about}; {_called(outcome.shares)}{_forced(outcome.forced or {})}"
    if not outcome.levels:
        return outcome.about
    accuracies = []
    for name, levels in outcome.levels.items():
        accuracies.append(
            f"{name}: prompt {levels.prompt_strict:.1%}, instruction {levels.inst_strict:.1%}, "
            f"mean {levels.mean:.1%}"
        )
    return f"{outcome.about}; strict accuracies of {'; '.join(accuracies)}"


def _asked(ways: Mapping[str, str]) -> str:
    """How the models were asked, in words."""
    different = sorted(set(ways.values()))
    if len(different) == 1:
        return f"every model was asked {different[0]}"
    parts = []
    for way in different:
        names = [name for name, of_model in ways.items() if of_model == way]
        parts.append(f"{', '.join(names)} {way}")
    return f"asked: {'; '.join(parts)}"


def _called(shares: Mapping[str, Mapping[str, float]]) -> str:
    """Every model's figures of its calls, in words."""
    models = []
    for name, figures_of in shares.items():
        parts = []
        for figure_name, value in figures_of.items():
            shown = f"{value:.1%}" if value <= 1 and "rounds" not in figure_name else f"{value:.1f}"
            parts.append(f"{figure_name} {shown}")
        models.append(f"{name}: {', '.join(parts)}")
    return "; ".join(models)


def _forced(figures: Mapping[str, Mapping[str, np.ndarray]]) -> str:
    """What every student loses on the tokens of the right calls, in words."""
    text = ""
    for name, of_model in figures.items():
        less, kl = (interval(of_model[figure]) for figure in ("less likely", "KL"))
        text += (
            f"; on the tokens of the right calls {name} loses {less[0]:.3f} nats a token"
            f"{plus_minus(*less[1:], '.3f')}, KL {kl[0]:.3f}{plus_minus(*kl[1:], '.3f')}"
        )
    return text


def _compared(name: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """A student's tasks by how it compares with the teacher.

    below: worse. same: not worse as far as one can tell, where the teacher knows something. above:
    better, perhaps by luck. clearly: better beyond the noise.
    """
    compared: dict[str, Any] = {
        "name": name,
        "below": [],
        "same": [],
        "above": [],
        "clearly": [],
    }
    for outcome in outcomes:
        task = outcome.task
        mean, low, high = interval(outcome.marks[name] - outcome.teacher)
        if high < 0:
            compared["below"].append(task)
        elif outcome.knows:
            compared["same"].append(task)
        if mean > 0:
            compared["above"].append(f"{task} ({100 * mean:+.1f} points)")
        if low > 0:
            compared["clearly"].append(task)
    return compared
