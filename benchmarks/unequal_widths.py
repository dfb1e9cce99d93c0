"""FFN widths that differ from block to block, against equal ones, at equal parameters.

    scripts/mis benchmarks/unequal_widths.py               # half an hour on 2 cores
    scripts/mis benchmarks/unequal_widths.py --seeds 0     # one draw of calibration windows
    scripts/mis benchmarks/unequal_widths.py --steps 30    # and students after some training
    scripts/mis benchmarks/unequal_widths.py --table

Each block keeps its most important neurons, in widths that mlx-lm's nemotron-nas can state:
multiples of 256, to which it rounds up. First each block alone is cut to each width, by calibration
windows of seed 0: the share of its importance that goes, the error in the stream that the cut
makes and that a least-squares repair leaves of it, and the KL to the whole model after that repair,
on windows that rank. Of each of these costs the widths of least sum at an equal total are taken.
Then students of these widths are judged, without a repair and repaired one block after the other,
in bits a byte above the whole model: on the teacher's answers to conversations that
no training window has, and on three held-out texts. The windows that rank blocks do not judge
students. A seed draws the windows that choose neurons and repair. Writes
benchmarks/results/<machine>/unequal_widths.json after every row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from absent_attention import (
    ANSWERS,
    Judged,
    Model,
    Text,
    distil,
    of_answers,
    of_windows,
    targets,
)
from laboratory import resumed, start, stored, write
from mlx.utils import tree_map

from mis_mlx import cli
from mis_mlx.data import preparation, token_windows
from mis_mlx.data.token_windows import Windows
from mis_mlx.distillation import answer_loss
from mis_mlx.judge import comparison
from mis_mlx.maths import importance
from mis_mlx.maths.reconstruction import HELD_OUT, HeldOut, NormalEquations
from mis_mlx.models.architectures import modules
from mis_mlx.models.opening import load, resolve
from mis_mlx.types import Checkpoint

NAME = "unequal_widths"
COMMAND = "scripts/mis benchmarks/unequal_widths.py"
LENGTH = 256
RANKING_LENGTH = 128
RANKING_ROWS = {ANSWERS: 2, "English": 1, "Polish": 1, "docstrings": 1}
ROWS_AT_ONCE = 256  # of logits
EVERY = 2  # of the positions of a ranking window, one counts
LOCAL_RIDGE = 0.3
STEP = 256
WIDTHS = (512, 768, 1024, 1280)  # a block is cut to
BETWEEN = 768  # its KL is the geometric mean of those of its neighbours, which are measured
EQUAL = "equal"
MEASURED = "KL"
COSTS = ("importance cut", "error", "error left", MEASURED)
BATCH = 2  # windows a step


@dataclass(frozen=True)
class Settings:
    """How much."""

    calibration: int = 8
    """windows that choose neurons and fit repairs"""
    windows: int = 2
    """held-out windows of the first text that judge, as many answers, half as many of other texts
    """
    seeds: tuple[int, ...] = (0, 1, 2)
    """of the calibration windows"""
    widths: tuple[int, ...] = (1024, 1280)
    """neurons that a block keeps in the mean"""
    by: tuple[str, ...] = (EQUAL, *COSTS)
    """how widths are chosen"""
    repaired_only: bool = False
    """do not judge students without a repair"""
    steps: int = 0
    """of distillation; judged beside the rest"""
    table: bool = False
    """print what there is, and make nothing"""


@dataclass(frozen=True)
class MlpWeights:
    """A block's MLP: gate and up (F, D), down (D, F)."""

    gate: mx.array
    up: mx.array
    down: mx.array

    @classmethod
    def of(cls, block: Any) -> MlpWeights:
        """As they are in the block."""
        mlp = block.mlp
        return cls(mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)

    def cut(self, kept: np.ndarray) -> MlpWeights:
        """Those of some neurons."""
        rows = mx.array(kept)
        return MlpWeights(self.gate[rows], self.up[rows], mx.take(self.down, rows, axis=1))

    def put(self, block: Any) -> None:
        """Into the block."""
        block.mlp.gate_proj.weight = self.gate
        block.mlp.up_proj.weight = self.up
        block.mlp.down_proj.weight = self.down


def inverse_rms(rows: mx.array) -> mx.array:
    """(n, D) -> (n,), by which a repair weighs tokens."""
    return mx.rsqrt(mx.maximum(mx.square(rows).mean(axis=-1), 1e-12))


def flat(states: mx.array) -> mx.array:
    """(B, T, D) -> (B T, D)."""
    return states.reshape(-1, states.shape[-1])


class Ranking:
    """Windows of equal length in one batch, of which each kind counts alike.

    tokens (n, T). kinds: of the n. chosen: by kind, places in (n T,) whose predictions count.
    """

    def __init__(self, texts: Mapping[str, Text]):
        rows: list[Any] = []
        self.chosen: dict[str, np.ndarray] = {}
        for kind, text in texts.items():
            places = []
            for ids, mask in zip(text.tokens, text.masks, strict=True):
                counted = np.flatnonzero(mask[: RANKING_LENGTH - 1])[::EVERY]
                places.append(counted + len(rows) * RANKING_LENGTH)
                rows.append(ids[:RANKING_LENGTH])
            self.chosen[kind] = np.concatenate(places)
        self.tokens = mx.array(np.stack(rows))
        self.targets: dict[str, mx.array] = {}

    def logits(self, model: Model, final: mx.array, kind: str) -> mx.array:
        """(places of the kind, V) log-probabilities, from (n, T, D) in front of the head."""
        states = flat(final)[mx.array(self.chosen[kind])]
        return nn.log_softmax(model.logits(states), axis=-1)

    def remember(self, model: Model) -> None:
        """What the whole model says."""
        final = model.final(model.embed(self.tokens))
        for kind in self.chosen:
            self.targets[kind] = self.logits(model, final, kind)
            mx.eval(self.targets[kind])

    def divergence(self, model: Model, hidden: mx.array, first: int) -> float:
        """Nats a token of KL to the whole model, from (n, T, D) in front of block `first`."""
        final = model.final(hidden, first)
        mx.eval(final)
        by_kind = []
        for kind, target in self.targets.items():
            own = self.logits(model, final, kind)
            nats = (mx.exp(target) * (target - own)).sum(axis=-1).mean()
            by_kind.append(float(nats))
        return float(np.mean(by_kind))


def docstrings(tokenizer: Any) -> Windows:
    """numpy's, which no training window has."""
    texts = [str(getattr(np, name).__doc__) for name in sorted(np.__all__)]
    long = [text for text in texts if len(text) > 2000]
    rows = token_windows.tokenize([{"text": "\n\n".join(long)[:24_000]}], tokenizer)
    windows = token_windows.windows(rows, LENGTH)
    return Windows(
        tokens=windows.tokens,
        loss_mask=windows.loss_mask,
        text_bytes=token_windows.text_bytes(windows, tokenizer),
    )


class Texts:
    """Texts by kind: those that rank blocks, and those that judge students."""

    def __init__(self, teacher: Checkpoint, data: preparation.Data, windows: int):
        asked = answer_loss.of_talks(teacher, data.talks)
        assert asked is not None, "the default teacher has a chat template"
        every = range(len(asked.prompts))
        self.judging = {ANSWERS: of_answers(teacher, asked, every[1 : 2 * windows : 2])}
        ranking = {ANSWERS: of_answers(teacher, asked, long_answers(teacher, asked, every[::2]))}
        held_out = {**data.held_out, "docstrings": docstrings(load.tokenizer(teacher.path))}
        count = windows
        for kind, text in held_out.items():
            picked = comparison.spread_windows(text, 2 * max(count, RANKING_ROWS[kind]))
            ranking[kind] = of_windows(picked.pick(slice(0, 2 * RANKING_ROWS[kind], 2)))
            self.judging[kind] = of_windows(picked.pick(slice(1, 2 * count, 2)))
            count = max(2, windows // 2)
        self.ranking = Ranking(ranking)


def long_answers(teacher: Checkpoint, asked: Any, candidates: Sequence[int]) -> list[int]:
    """The first of them that fill a ranking window, at least half of it with the answer."""
    chosen = []
    for number in candidates:
        mask = of_answers(teacher, asked, [number]).masks[0]
        if mask[: RANKING_LENGTH - 1].sum() >= RANKING_LENGTH / 2:
            chosen.append(number)
    return chosen[: RANKING_ROWS[ANSWERS]]


class Grams:
    """Products of a block's neurons over calibration tokens, each weighed by 1 / rms of its goal.

    learned, held_out (F, F): of tokens that fit, and of every fourth window, which judges.
    """

    def __init__(self, activations: Sequence[mx.array], goals: Sequence[mx.array]):
        size = activations[0].shape[-1]
        self.learned = np.zeros((size, size), np.float32)
        self.held_out = np.zeros((size, size), np.float32)
        self.squares = 0.0  # of the goals of those held out, weighed: D a token
        for window, (inputs, goal) in enumerate(zip(activations, goals, strict=True)):
            rows = flat(inputs) * inverse_rms(flat(goal))[:, None]
            product = np.asarray(rows.T @ rows)
            if window % HELD_OUT == HELD_OUT - 1:
                self.held_out += product
                self.squares += float(flat(goal).size)
            else:
                self.learned += product

    def error(self, wrong: np.ndarray) -> float:
        """The share of the stream that a change (D, F) of down_proj makes wrong, on those held out.

        Squares over squares.
        """
        return float(((wrong @ self.held_out) * wrong).sum()) / self.squares

    def repaired(self, down: mx.array, kept: np.ndarray) -> tuple[mx.array, float, float]:
        """(`down` (D, k) of the kept neurons, refitted, error of the cut, error that is left)."""
        weight = np.asarray(down)
        gone = np.setdiff1d(np.arange(weight.shape[1]), kept)
        gram = self.learned[np.ix_(kept, kept)]
        ridge = LOCAL_RIDGE * np.trace(gram) / len(kept)
        gram[np.diag_indices(len(kept))] += ridge
        cross = self.learned[np.ix_(kept, gone)] @ weight[:, gone].T
        update = np.linalg.solve(gram, cross).T
        wrong = weight.copy()
        wrong[:, kept] = 0.0
        before = self.error(wrong)
        wrong[:, kept] = -update
        return mx.array(weight[:, kept] + update), before, self.error(wrong)


class Trial(Judged):
    """The whole model, its texts, and what they cost under it."""

    def __init__(self, s: Settings):
        self.checkpoint = load.open_checkpoint(resolve.resolve_model(None).path)
        self.data = preparation.prepare(None, load.tokenizer(self.checkpoint.path), LENGTH)
        self.texts = Texts(self.checkpoint, self.data, s.windows)
        super().__init__(Model(self.checkpoint), self.texts.judging)
        self.calibration = s.calibration
        self.skips_cut = s.repaired_only
        blocks = self.model.blocks
        # Copies of the names, not of the numbers: arrays never change in place.
        self.whole = tree_map(lambda array: array, self.model.module.parameters())
        self.mlps = [MlpWeights.of(block) for block in blocks]
        self.neurons = self.mlps[0].gate.shape[0]

    def restore(self) -> None:
        """The whole model."""
        self.model.module.update(self.whole)

    def recorded(
        self, number: int, hidden: Sequence[mx.array]
    ) -> tuple[list[mx.array], list[mx.array]]:
        """(inputs of a block's down_proj [(1, T, F)], what the block puts out [(1, T, D)])."""
        mlp = self.model.blocks[number].mlp
        linear = mlp.down_proj
        recorder = modules.InputRecorder(linear)
        mlp.down_proj = recorder
        activations = []
        outputs = []
        for states in hidden:
            after = self.model.run(number, states)
            inputs = recorder.take()
            mx.eval(after, inputs)
            activations.append(inputs)
            outputs.append(after)
        mlp.down_proj = linear
        return activations, outputs

    def calibrated(self, seed: int) -> Calibrated:
        """The whole model's stream over the calibration windows of a seed, and its neurons."""
        drawn = preparation.calibration(self.data.train, self.calibration, seed)
        hidden = [self.model.embed(tokens) for tokens in drawn]
        streams = [hidden]
        scores = []
        for number in range(len(self.model.blocks)):
            activations, hidden = self.recorded(number, hidden)
            squares = sum(importance.square_sample(inputs) for inputs in activations)
            scores.append(np.sqrt(np.array(squares)))
            streams.append(hidden)
        return Calibrated(streams, scores)

    def costs(self, calibrated: Calibrated) -> list[dict[str, Any]]:
        """Every block alone, cut to every width: {cost: {width: number}}."""
        model = self.model
        ranking = self.texts.ranking
        ranking.remember(model)
        hidden = model.embed(ranking.tokens)
        rows = []
        for number, block in enumerate(model.blocks):
            whole = self.mlps[number]
            activations, goals = self.recorded(number, calibrated.streams[number])
            grams = Grams(activations, goals)
            row: dict[str, Any] = {cost: {} for cost in COSTS}
            for width in WIDTHS:
                kept = calibrated.kept(number, width)
                scores = calibrated.scores[number]
                repaired, error, left = grams.repaired(whole.down, kept)
                row["importance cut"][str(width)] = 1.0 - float(scores[kept].sum() / scores.sum())
                row["error"][str(width)] = error
                row["error left"][str(width)] = left
                if width == BETWEEN:
                    continue
                whole.cut(kept).put(block)
                block.mlp.down_proj.weight = repaired
                row[MEASURED][str(width)] = ranking.divergence(model, hidden, number)
            neighbours = [row[MEASURED][str(BETWEEN + step)] for step in (-STEP, STEP)]
            row[MEASURED][str(BETWEEN)] = float(np.sqrt(np.prod(np.maximum(neighbours, 0.0))))
            row = tree_map(lambda value: float(f"{value:.4g}"), row)
            whole.put(block)
            hidden = model.run(number, hidden)
            mx.eval(hidden)
            cli.say(f"block {number}: {row}")
            rows.append(row)
        return rows

    def cut(self, calibrated: Calibrated, widths: Sequence[int]) -> None:
        """Blocks of these widths, without a repair."""
        self.restore()
        for number, width in enumerate(widths):
            kept = calibrated.kept(number, width)
            self.mlps[number].cut(kept).put(self.model.blocks[number])

    def repair(self, calibrated: Calibrated) -> None:
        """Fit each block's down_proj to the whole model's stream, behind those before it.

        As pruning/reconstruct does.
        """
        hidden = calibrated.streams[0]
        for number, block in enumerate(self.model.blocks):
            linear = block.mlp.down_proj
            activations, outputs = self.recorded(number, hidden)
            equations = NormalEquations(linear.weight.shape[1], linear.weight.shape[0])
            # float32 sums are solved by MLX, four times as quick as numpy's float64.
            equations.gram = equations.gram.astype(np.float32)
            equations.cross = equations.cross.astype(np.float32)
            judging = []
            goals = calibrated.streams[number + 1]
            for window, goal in enumerate(goals):
                missing = flat(goal - outputs[window])
                inputs = flat(activations[window])
                weight = inverse_rms(flat(goal))
                if window % HELD_OUT == HELD_OUT - 1:
                    judging.append(HeldOut.of(inputs, missing, weight))
                else:
                    equations.add(*equations.products(inputs, missing, weight))
            update, _ = equations.best_update(judging)
            change = mx.array(update.astype(np.float32))
            linear.weight = linear.weight + change
            # What the block gives now, without another pass through it.
            hidden = []
            for inputs, after in zip(activations, outputs, strict=True):
                hidden.append(after + inputs @ change.T)
            mx.eval(hidden, linear.weight)


@dataclass(frozen=True)
class Calibrated:
    """The whole model over calibration windows.

    streams: [[(1, T, D) of every window] in front of every block, and behind the last one].
    scores: of every block, (F,): rms of its neurons.
    """

    streams: list[list[mx.array]]
    scores: list[np.ndarray]

    def kept(self, number: int, width: int) -> np.ndarray:
        """The neurons of a block that stay."""
        return np.array(importance.top(self.scores[number], width))


def least(costs: Sequence[Mapping[int, float]], total: int) -> list[int]:
    """A width for each block, of least cost in sum, whose sum is `total`: dynamic programming."""
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for by_width in costs:
        longer: dict[int, tuple[float, list[int]]] = {}
        for taken, (sum_of_costs, widths) in best.items():
            for width, cost in by_width.items():
                both = (sum_of_costs + cost, [*widths, width])
                room = taken + width
                if room not in longer or both[0] < longer[room][0]:
                    longer[room] = both
        best = longer
    return best[total][1]


def chosen_widths(rows: Sequence[Mapping[str, Any]], by: str, mean: int, whole: int) -> list[int]:
    """A width for each block, `mean` in the mean, by one of the costs or equal."""
    if by == EQUAL:
        return [mean] * len(rows)
    costs = []
    for row in rows:
        by_width = {int(width): cost for width, cost in row[by].items()}
        costs.append({**by_width, whole: 0.0})
    return least(costs, mean * len(rows))


def label_of(seed: int, mean: int, by: str) -> str:
    """A row's name."""
    return f"seed {seed}, {mean}, {by}"


def ratio(students: Mapping[str, Any], label: str, by: str, state: str) -> float | None:
    """The excess of a row over that of equal widths: the mean over kinds of text of its shares."""
    equal = students.get(label.replace(by, EQUAL), {}).get(state)
    own = students[label].get(state)
    if not equal or not own:
        return None
    return float(np.mean([own[kind] / equal[kind] for kind in own]))


def table(students: Mapping[str, Any], print_line: Callable[[str], None] = cli.say) -> None:
    """Every student: its excess by kind, and the mean share of that of equal widths."""
    for label, row in students.items():
        by = label.split(", ", 2)[2]
        for state in ("cut", "repaired", "trained"):
            if state not in row:
                continue
            numbers = "  ".join(f"{value:.3f}" for value in row[state].values())
            share = ratio(students, label, by, state)
            print_line(f"{label:34} {state:9} {numbers}  {share or 0.0:.3f} of equal")


def main(s: Settings) -> None:
    """Every row that is not there yet."""
    given = {"calibration": s.calibration, "windows": s.windows}
    found = resumed(NAME, given, ["teacher", "students"])
    for part in ("costs", "widths"):  # of the model, whatever judges students
        if part in stored(NAME):
            found[part] = stored(NAME)[part]
    if s.table:
        table(stored(NAME)["students"])
        return
    trial = Trial(s)
    found["teacher"] = {kind: round(bits, 4) for kind, bits in trial.whole_bits.items()}
    cli.say(f"teacher: {found['teacher']}")
    if "costs" not in found:
        found["costs"] = trial.costs(trial.calibrated(0))
        write(NAME, COMMAND, {"given": given, **found})
    students = found.setdefault("students", {})
    widths_by_name = found.setdefault("widths", {})
    for seed in s.seeds:
        trial.restore()
        calibrated = trial.calibrated(seed)
        for mean in s.widths:
            for by in s.by:
                widths = chosen_widths(found["costs"], by, mean, trial.neurons)
                widths_by_name[f"{mean}, {by}"] = widths
                row = students.setdefault(label_of(seed, mean, by), {})
                complete(trial, calibrated, widths, row=row, steps=s.steps, seed=seed)
                cli.say(f"{label_of(seed, mean, by)}: {row}")
                write(NAME, COMMAND, {"given": given, **found})
    table(students)


def complete(
    trial: Trial,
    calibrated: Calibrated,
    widths: Sequence[int],
    *,
    row: dict[str, Any],
    steps: int,
    seed: int,
) -> None:
    """What a student's row does not have yet."""
    trained = bool(steps) and "trained" not in row
    repaired = trained or "repaired" not in row
    judged_cut = not trial.skips_cut and "cut" not in row
    if not repaired and not judged_cut:
        return
    pairs = []
    if trained:
        trial.restore()
        drawn = preparation.calibration_indices(trial.data.train, steps * BATCH, seed, 5)
        pairs = targets(trial.model, trial.data.train, steps, drawn)
    trial.cut(calibrated, widths)
    if judged_cut:
        row["cut"] = trial.excess()
    if not repaired:
        return
    trial.repair(calibrated)
    if "repaired" not in row:
        row["repaired"] = trial.excess()
    if trained:
        head = mx.array(trial.whole["model"]["embed_tokens"]["weight"])
        distil(trial.model, head, pairs)
        row["trained"] = trial.excess()


if __name__ == "__main__":
    start(Settings, main)
