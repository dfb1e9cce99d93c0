"""What the attention of each block is worth: left out, and with one matrix in its place.

    scripts/mis benchmarks/absent_attention.py                            # half an hour on 2 cores
    scripts/mis benchmarks/absent_attention.py --teacher gemma-3-270m --windows 6
    scripts/mis benchmarks/absent_attention.py --steps 0                  # without training
    scripts/mis benchmarks/absent_attention.py --table

The matrix maps what goes into an attention to what comes out of it: least squares over calibration
windows, with the ridge that does best on every fourth of them. First each block alone: the model
without its attention, and with the matrix. Then several blocks together, those that cost least
first, each matrix fitted to the stream that the matrices before it leave. Last, one such student
after some steps of distillation. Judged in bits per byte above the whole model: on the teacher's
answers to conversations that no training window has, where there is a chat template, and on
held-out text of each kind. The windows that rank blocks do not judge them together. Writes
benchmarks/results/<machine>/absent_attention-<teacher>.json after every part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
from laboratory import resumed, start, stored, write
from mlx.utils import tree_map

from mis_mlx import cli
from mis_mlx.data import preparation
from mis_mlx.data.token_windows import Windows
from mis_mlx.distillation import answer_loss
from mis_mlx.judge import comparison
from mis_mlx.maths.reconstruction import RIDGES, NormalEquations
from mis_mlx.models.architectures import sizes
from mis_mlx.models.opening import compute_type, load, resolve
from mis_mlx.models.writing import mlx_generate
from mis_mlx.reporting.text import markdown_table
from mis_mlx.types import Checkpoint

LENGTH = 256
ANSWERS = "answers"
ROWS_AT_ONCE = 512  # of logits
LEARNING_RATE = 1e-4
BATCH = 4  # windows a step


@dataclass(frozen=True)
class Settings:
    """How much."""

    teacher: str | None = None
    """folder, hub id or gemma-3-270m; default: SmolLM2-135M-Instruct"""
    calibration: int = 48
    """windows that fit the matrices, every fourth of which chooses the ridge"""
    windows: int = 12
    """held-out windows of the first text that rank blocks, and as many that judge; a third as many
    of each other text, and as many answers
    """
    together: tuple[int, ...] = (1, 2, 3, 4, 6, 8)
    """numbers of attentions that are replaced together"""
    train: int = 4
    """attentions that the student that learns has less"""
    steps: int = 30
    """of it"""
    table: bool = False
    """print what there is, and make nothing"""


class Absent(nn.Module):
    """An attention that is left out."""

    def __call__(self, x: mx.array, *_args: Any, **_more: Any) -> mx.array:
        """x (B, T, D) -> zeros."""
        return mx.zeros_like(x)


class Matrix(nn.Module):
    """One matrix in the place of an attention."""

    def __init__(self, weight: mx.array):
        super().__init__()
        self.weight = weight

    def __call__(self, x: mx.array, *_args: Any, **_more: Any) -> mx.array:
        """x (B, T, D) -> (B, T, D)."""
        return x @ self.weight.T


class Recorder(nn.Module):
    """An attention that remembers its last input and output."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.attention = attention
        self._seen: list[mx.array] = []

    def __call__(self, x: mx.array, *args: Any, **more: Any) -> mx.array:
        """As of the attention."""
        y = self.attention(x, *args, **more)
        self._seen = [x, y]
        return y


@dataclass
class Text:
    """Texts to judge by: token ids [(T,)], which predictions count, bytes of all of these."""

    tokens: list[np.ndarray] = field(default_factory=list)
    masks: list[np.ndarray] = field(default_factory=list)
    nbytes: float = 0.0

    def batches(self) -> list[mx.array]:
        """[(1, T)]."""
        return [mx.array(ids[None]) for ids in self.tokens]


def of_windows(windows: Windows) -> Text:
    """Held-out windows as they are."""
    return Text(list(windows.tokens), list(windows.loss_mask), float(windows.text_bytes.sum()))


def of_answers(teacher: Checkpoint, asked: Any, chosen: Sequence[int]) -> Text:
    """Some of the teacher's answers; predictions of the prompt do not count."""
    tokenizer = load.tokenizer(teacher.path)
    text = Text()
    for number in chosen:
        before = mlx_generate.chat_ids(tokenizer, asked.prompts[number].messages)
        answer = tokenizer.encode(asked.answers[number].text, add_special_tokens=False)
        ids = np.array([*before, *answer], np.int32)
        mask = np.zeros(len(ids), np.float32)
        mask[len(before) - 1 : -1] = 1.0
        text.tokens.append(ids)
        text.masks.append(mask)
    text.nbytes = float(asked.nbytes[list(chosen)].sum())
    return text


class Texts:
    """Texts by kind, half of them to rank blocks, half to judge several together."""

    def __init__(self, teacher: Checkpoint, data: preparation.Data, windows: int):
        self.ranking: dict[str, Text] = {}
        self.judging: dict[str, Text] = {}
        asked = answer_loss.of_talks(teacher, data.talks)
        if asked is not None:
            every = range(len(asked.prompts))
            self.ranking[ANSWERS] = of_answers(teacher, asked, every[: 2 * windows : 2])
            self.judging[ANSWERS] = of_answers(teacher, asked, every[1 : 2 * windows : 2])
        count = windows
        for name, held_out in data.held_out.items():
            picked = comparison.spread_windows(held_out, 2 * count)
            self.ranking[name] = of_windows(picked.pick(slice(0, None, 2)))
            self.judging[name] = of_windows(picked.pick(slice(1, None, 2)))
            count = max(2, windows // 3)


class Model:
    """A model in memory, block by block."""

    def __init__(self, teacher: Checkpoint):
        self.module = load.resident_model(teacher, mx.float32)
        mx.eval(self.module.parameters())
        inner = self.module.model
        self.blocks: list[Any] = list(self.module.layers)
        self.norm = inner.norm
        self.scale = sizes.embedding_scale(teacher.config, mx.float32)
        self.embed_tokens = inner.embed_tokens

    def embed(self, tokens: mx.array) -> mx.array:
        """(B, T) -> (B, T, D)."""
        hidden = self.embed_tokens(tokens)
        return hidden if self.scale is None else hidden * self.scale

    def run(self, number: int, hidden: mx.array) -> mx.array:
        """(B, T, D) through one block."""
        block = self.blocks[number]
        return block(hidden, load.mask(self.module.args, block, hidden))

    def final(self, hidden: mx.array, first: int = 0) -> mx.array:
        """(B, T, D) in front of block `first` -> (B, T, D) in front of the head."""
        for number in range(first, len(self.blocks)):
            hidden = self.run(number, hidden)
        return self.norm(hidden)

    def logits(self, states: mx.array) -> mx.array:
        """(n, D) -> (n, V)."""
        head = getattr(self.module, "lm_head", None) or self.embed_tokens
        return load.wide_logits(head, states)

    def bits(self, text: Text, hidden: Sequence[mx.array], first: int) -> float:
        """Bits a byte of a text, from its states in front of block `first`."""
        nats = 0.0
        for ids, mask, states in zip(text.tokens, text.masks, hidden, strict=True):
            behind = self.final(states, first)[0]
            places = np.flatnonzero(mask)
            for begin in range(0, len(places), ROWS_AT_ONCE):
                part = places[begin : begin + ROWS_AT_ONCE]
                logits = self.logits(behind[mx.array(part)])
                target = mx.array(ids[part + 1])[:, None]
                own = mx.take_along_axis(logits, target, axis=-1)[:, 0]
                nats += float((mx.logsumexp(logits, axis=-1) - own).sum())
        return nats / math.log(2) / text.nbytes


def squares(array: mx.array) -> float:
    """The sum of the squares of an array."""
    return float(mx.square(array).sum())


def fitted(model: Model, number: int, hidden: Sequence[mx.array]) -> tuple[mx.array, float]:
    """(matrix (D, D), share of the attention's squared output that it misses on other windows).

    hidden: of calibration windows in front of the block. The ridge that misses least is taken.
    """
    attention = model.blocks[number].self_attn
    recorder = Recorder(attention)
    model.blocks[number].self_attn = recorder
    size = hidden[0].shape[-1]
    equations = NormalEquations(size, size)
    judged = list[list[mx.array]]()
    for window, states in enumerate(hidden):
        mx.eval(model.run(number, states), *recorder._seen)
        x, y = (array.reshape(-1, size) for array in recorder._seen)
        if window % 4 == 3:
            judged.append([x, y])
            continue
        gram, cross = equations.products(x, y, mx.ones(len(x)))
        equations.add(gram, cross)
    model.blocks[number].self_attn = attention
    total = sum(squares(y) for _, y in judged)
    best = mx.zeros((size, size))
    least = 1.0
    for ridge in (1e-3, 1e-2, *RIDGES):
        weight = mx.array(equations.update(ridge).astype(np.float32))
        missed = sum(squares(y - x @ weight.T) for x, y in judged) / total
        if missed < least:
            best = weight
            least = missed
    return best, least


class Judged:
    """A model that is changed, and what its texts cost under it above what they cost before.

    judging: by kind.
    """

    def __init__(self, model: Model, judging: Mapping[str, Text]):
        self.model = model
        self.judging = judging
        self.whole_bits = self.judged()

    def judged(self) -> dict[str, float]:
        """Bits a byte by kind, under the model as it stands."""
        bits = {}
        for kind, text in self.judging.items():
            embedded = [self.model.embed(tokens) for tokens in text.batches()]
            bits[kind] = self.model.bits(text, embedded, 0)
        return bits

    def excess(self) -> dict[str, float]:
        """`judged`, above the whole model."""
        excess = {}
        for kind, bits in self.judged().items():
            excess[kind] = round(bits - self.whole_bits[kind], 4)
        return excess


def targets(
    model: Model, windows: Windows, steps: int, drawn: np.ndarray
) -> list[tuple[mx.array, mx.array]]:
    """[(tokens (B, T), the model's states in front of the head)] of every step.

    drawn: numbers of the windows of all steps.
    """
    pairs = []
    for part in np.split(drawn, steps):
        tokens = mx.array(windows.tokens[part])
        final = model.final(model.embed(tokens))
        mx.eval(final)
        pairs.append((tokens, final))
    return pairs


def distil(model: Model, head: mx.array, pairs: Sequence[tuple[mx.array, mx.array]]) -> None:
    """Train all weights of the model as it stands: KL to the states of `targets` behind `head`."""

    def loss(_module: Any, tokens: mx.array, target: mx.array) -> mx.array:
        own = model.logits(model.final(model.embed(tokens)))
        theirs = nn.log_softmax(target @ head.T, axis=-1)
        mine = nn.log_softmax(own, axis=-1)
        return (mx.exp(theirs) * (theirs - mine)).sum(axis=-1).mean()

    module = model.module
    step = nn.value_and_grad(module, loss)
    rate = optimizers.linear_schedule(LEARNING_RATE, 0.0, len(pairs))
    optimizer = optimizers.AdamW(learning_rate=rate)
    for number, (tokens, target) in enumerate(pairs):
        value, grads = step(module, tokens, target)
        optimizer.update(module, grads)
        mx.eval(module.parameters(), optimizer.state)
        cli.say(f"step {number + 1}/{len(pairs)}: {value.item():.4f}")


class Trial(Judged):
    """The whole model, its texts, and what they cost under it."""

    def __init__(self, s: Settings):
        self.checkpoint = compute_type.open_to_compute(resolve.resolve_model(s.teacher).path)
        self.data = preparation.prepare(None, load.tokenizer(self.checkpoint.path), LENGTH)
        self.texts = Texts(self.checkpoint, self.data, s.windows)
        self.calibration = preparation.calibration(self.data.train, s.calibration, 0)
        super().__init__(Model(self.checkpoint), self.texts.judging)
        self.attentions = [block.self_attn for block in self.model.blocks]

    def restore(self) -> None:
        """All attentions back in their places."""
        for block, attention in zip(self.model.blocks, self.attentions, strict=True):
            block.self_attn = attention

    def alone(self) -> list[dict[str, Any]]:
        """Every block: what its attention costs, left out and with the matrix in its place."""
        model = self.model
        calibration = [model.embed(tokens) for tokens in self.calibration]
        ranking = self.texts.ranking
        streams = {}
        before = {}
        for kind, text in ranking.items():
            streams[kind] = [model.embed(tokens) for tokens in text.batches()]
            before[kind] = model.bits(text, streams[kind], 0)
        rows = []
        for number, attention in enumerate(self.attentions):
            matrix, missed = fitted(model, number, calibration)
            row: dict[str, Any] = {"block": number, "missed": round(missed, 3)}
            replacements = {"left out": Absent(), "matrix": Matrix(matrix)}
            for name, replacement in replacements.items():
                model.blocks[number].self_attn = replacement
                costs = {}
                for kind, text in ranking.items():
                    bits = model.bits(text, streams[kind], number)
                    costs[kind] = round(bits - before[kind], 4)
                row[name] = costs
            model.blocks[number].self_attn = attention
            cli.say(str(row))
            rows.append(row)
            for hidden in (calibration, *streams.values()):
                for window, states in enumerate(hidden):
                    hidden[window] = model.run(number, states)
                mx.eval(hidden)
        return rows

    def replace(self, blocks: Sequence[int]) -> None:
        """Matrices in the place of some attentions, each fitted behind those before it."""
        self.restore()
        model = self.model
        hidden = [model.embed(tokens) for tokens in self.calibration]
        for number in range(len(model.blocks)):
            if number in blocks:
                matrix, _ = fitted(model, number, hidden)
                model.blocks[number].self_attn = Matrix(matrix)
            hidden = [model.run(number, states) for states in hidden]
            mx.eval(hidden)

    def distilled(self, blocks: Sequence[int], steps: int) -> dict[str, float]:
        """The excess of the student with these matrices after some steps: KL to the whole model."""
        self.restore()
        module = self.model.module
        drawn = preparation.calibration_indices(self.data.train, steps * BATCH, 1)
        pairs = targets(self.model, self.data.train, steps, drawn)
        head = mx.array(load.head_weight(module))
        mx.eval(head)
        self.replace(blocks)
        module.update(tree_map(lambda array: array * 1, module.parameters()))
        distil(self.model, head, pairs)
        return self.excess()


def cost(row: Mapping[str, Any]) -> float:
    """By which blocks are ranked: of the matrix, on the first kind (answers, where there are)."""
    return float(next(iter(row["matrix"].values())))


def table(found: Mapping[str, Any]) -> str:
    """Markdown: every block, then several together."""
    kinds = list(found["alone"][0]["matrix"])
    body = []
    for row in found["alone"]:
        cells = [f"block {row['block']}", f"{row['missed']:.2f}"]
        cells += [f"{row['left out'][kind]:.3f}" for kind in kinds]
        cells += [f"{row['matrix'][kind]:.3f}" for kind in kinds]
        body.append(cells)
    for name, excess in found.get("together", {}).items():
        cells = [name] + [""] * (1 + len(kinds))
        cells += [f"{excess[kind]:.3f}" for kind in kinds]
        body.append(cells)
    header = ["", "missed", *[f"{kind}, left out" for kind in kinds]]
    return markdown_table([*header, *[f"{kind}, matrix" for kind in kinds]], body)


def main(s: Settings) -> None:
    """Every part that is not there yet."""
    name = "absent_attention" if s.teacher is None else f"absent_attention-{Path(s.teacher).name}"
    given = {"calibration": s.calibration, "windows": s.windows}
    found = resumed(name, given, ["alone", "together"])
    command = "scripts/mis benchmarks/absent_attention.py"
    if s.teacher is not None:
        command += f" --teacher {s.teacher} --windows {s.windows}"

    def keep() -> None:
        write(name, command, {"given": given, **found})

    if s.table:
        cli.say(table(stored(name)))
        return
    trial = Trial(s)
    if "alone" not in found:
        found["alone"] = trial.alone()
        keep()
    # The first attention stays: stock loaders make their mask from its cache.
    ranked = [row["block"] for row in sorted(found["alone"][1:], key=cost)]
    together = found.setdefault("together", {})
    for count in s.together:
        label = f"{count} together"
        if label not in together:
            trial.replace(ranked[:count])
            together[label] = trial.excess()
            cli.say(f"{label}: blocks {sorted(ranked[:count])}: {together[label]}")
            keep()
    label = f"{s.train} together, {s.steps} steps"
    if s.steps and label not in together:
        together[label] = trial.distilled(ranked[: s.train], s.steps)
        keep()
    cli.say(table(found))


if __name__ == "__main__":
    start(Settings, main)
