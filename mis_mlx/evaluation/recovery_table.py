"""The recovery table in Markdown, as a figure, and what it says in plain words. Knows marks, and no model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mis_mlx.maths.stats import interval, recovery
from mis_mlx.reporting import figures
from mis_mlx.reporting.text import markdown_table

RULE_OF_THREE = 3.0  # nothing seen in n tries: at 95 % it is in fewer than 3 of n
Three = tuple[float, float, float]  # value, low, high


@dataclass(frozen=True)
class Outcome:
    """One task. marks: {model: (n,)}, the teacher first. chance (n,). constant: U Zośki's (share, answer). overlap: of
    `Known`. uniform (n,): expected marks of a model to which all tokens are equally likely. None: not known."""

    task: str
    about: str
    marks: Mapping[str, np.ndarray]
    chance: np.ndarray
    constant: tuple[float, str] | None = None
    overlap: tuple[int, int] | None = None
    sha256: str = ""
    uniform: np.ndarray | None = None

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
        counts = self.uniform is not None and interval(self.teacher - self.uniform)[1] <= 0
        return self.beats_chance and not counts

    def recovered(self, model: str) -> Three | None:
        """Of what the teacher knows; None where it knows nothing."""
        return recovery(self.marks[model], self.teacher, self.chance) if self.knows else None

    def difference(self, model: str) -> Three:
        """Model less teacher, paired."""
        return interval(self.marks[model] - self.teacher)

    def json(self) -> dict[str, Any]:
        """Everything of it, numbers not rounded."""
        models = {}
        for name, marks in self.marks.items():
            models[name] = {"score": interval(marks), "recovery": self.recovered(name), "marks": marks.tolist()}
            models[name] |= {"less_teacher": self.difference(name)}
        about = {"task": self.task, "about": self.about, "sha256": self.sha256, "n": len(self.chance)}
        about |= {"chance": float(self.chance.mean())}
        about["u_zoski"] = self.constant and dict(zip(("share", "answer"), self.constant, strict=True))
        about["contamination"] = self.overlap and dict(zip(("shared", "looked_up"), self.overlap, strict=True))
        return about | {"uniform": None if self.uniform is None else float(self.uniform.mean()), "models": models}


def markdown(outcomes: Sequence[Outcome], tables: str = "") -> str:
    """Two tables, one line a task and one column a model, and what they say. tables: more of them, from elsewhere."""
    if not outcomes:
        return tables
    names = list(outcomes[0].marks)
    head = ["", "n", "chance", "U Zośki", "uniform", *names]
    parts = ["Share of right answers, ± 95 %\n\n" + markdown_table(head, [_scores(o) for o in outcomes])]
    if names[1:]:
        title = "Recovered: (student − chance) / (teacher − chance), 95 % interval over the same questions"
        shares = [[o.recovered(name) for name in names[1:]] for o in outcomes]
        cells = [[f"{s[0]:.0%} [{s[1]:.0%}, {s[2]:.0%}]" if s else "–" for s in row] for row in shares]
        rows = [[o.task, *row] for o, row in zip(outcomes, cells, strict=True)]
        parts.append(f"{title}\n\n" + markdown_table(["", *names[1:]], rows))
    parts += [tables] if tables else []
    parts.append("\n".join(f"- {line}" for line in findings(outcomes)))
    parts.append("\n".join(f"- `{o.task}`: {o.about}." for o in outcomes))
    return "\n\n".join(parts)


def _scores(o: Outcome) -> list[str]:
    intervals = [interval(marks) for marks in o.marks.values()]
    cells = [f"{mean:.1%} ± {(high - low) / 2:.1%}" for mean, low, high in intervals]
    constant = f"{o.constant[0]:.1%}" if o.constant else "–"
    uniform = "–" if o.uniform is None else f"{o.uniform.mean():.1%}"
    return [o.task, str(len(o.chance)), f"{o.chance.mean():.1%}", constant, uniform, *cells]


def findings(outcomes: Sequence[Outcome]) -> list[str]:
    """What can be said, and what cannot, in sentences."""
    lines, knows = [], [o for o in outcomes if o.knows]
    if ignorant := [o.task for o in outcomes if not o.beats_chance]:
        lines.append(f"The teacher is not better than chance on {_and(ignorant)}: there is nothing to recover (–).")
    if counting := [o.task for o in outcomes if o.beats_chance and not o.knows]:
        lines.append(
            f"On {_and(counting)} the teacher is not better than a model to which all tokens are equally likely "
            "(uniform), and which takes the option of the fewest: no evidence of knowledge, nothing to recover (–)."
        )
    if beaten := [o for o in knows if o.constant and interval(o.teacher - o.constant[0])[1] <= 0]:
        answers = _and([f"{o.task} ({o.constant[1]})" for o in beaten if o.constant])
        lines.append(f"U Zośki, who always says the same, does as well as the teacher on {answers}.")
    if alike := [o for o in outcomes if any(len(set(marks)) == 1 for marks in o.marks.values())]:
        most = max(RULE_OF_THREE / len(o.chance) for o in alike)
        lines.append(
            f"Where all answers are right, or all wrong ({_and([o.task for o in alike])}), ± 0 means no spread was "
            f"seen; up to {most:.0%} the other way fits as well."
        )
    for name in list(outcomes[0].marks)[1:]:
        below = [o.task for o in outcomes if o.difference(name)[2] < 0]
        above = [o for o in outcomes if o.difference(name)[0] > 0]
        if below:
            lines.append(f"{name} is worse than the teacher, by more than the noise, on {_and(below)}.")
        if same := [o.task for o in knows if o.task not in below]:
            lines.append(f"Between {name} and the teacher no loss can be told from noise on {_and(same)}.")
        if above:
            lines.append(_lucky(name, above, len(outcomes)))
    if looked := [(o.task, *o.overlap) for o in outcomes if o.overlap]:
        shared = [f"{count} of {total} in {task}" for task, count, total in looked if count]
        share = f"{_and(shared)} share" if shared else f"none of {sum(total for *_, total in looked)} shares"
        lines.append(
            f"Contamination: of the questions that could be looked up, {share} 13 words in a row (or all words of a "
            "shorter one) with the text the students were distilled on."
        )
    return lines


def _lucky(name: str, above: Sequence[Outcome], count: int) -> str:
    clearly = [o.task for o in above if o.difference(name)[1] > 0]
    points = _and([f"{o.task} ({100 * o.difference(name)[0]:+.1f} points)" for o in above])
    if not clearly:
        return f"{name} has more than the teacher on {points}, within the noise: luck explains it."
    return (
        f"{name} has more than the teacher on {points}, by more than the noise on {_and(clearly)}; of {count} tasks "
        "one in 40 does so by luck, and a student may have learned the form of the questions: measure on others."
    )


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def figure(outcomes: Sequence[Outcome]) -> str:
    """The recoveries with their intervals as HTML; tasks of which the teacher knows nothing are not in it."""
    known, names = [o for o in outcomes if o.knows], list(outcomes[0].marks)[1:] if outcomes else []
    if not known or not names:
        return ""
    rows, limits = {o.task: [o.recovered(name) for name in names] for o in known}, {"chance": 0.0, "teacher": 1.0}
    about = (
        "Share of what the teacher knows above chance that a student still knows, with 95 % intervals; 0 % is chance."
    )
    return figures.intervals("recovery", "Recovered", about, "recovered", rows, names, limits)
