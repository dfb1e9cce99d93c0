"""Group-relative policy optimization: sample answers, score them, learn from groups that differ.

A step's answers depend on the weights, the data, the seed and the step alone.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Annotated, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mis_mlx import cli
from mis_mlx.alignment import alignment_run, padded_rows
from mis_mlx.alignment.whole_model import Loss, WholeModel
from mis_mlx.data.rows import Row
from mis_mlx.data.token_windows import order
from mis_mlx.distillation import train_loop
from mis_mlx.judge.tasks import rewards
from mis_mlx.maths import rl_losses
from mis_mlx.maths.losses import token_logps
from mis_mlx.models.architectures import modules
from mis_mlx.models.architectures.families import family
from mis_mlx.models.opening import load
from mis_mlx.models.passing import stream
from mis_mlx.models.passing.resident import Resident
from mis_mlx.models.writing.draws import Draws, Sampling
from mis_mlx.models.writing.text_writer import Room, TextWriter
from mis_mlx.types import MOST, Count, MisError, Positive, Rate, Step, Within

# micro-batches of a step, for `Settings.loss`; facts about the step
Rollout = tuple[list[tuple[Any, ...]], dict[str, float]]
Group = list[list[int]]  # the answers to a prompt, as token ids
SAMPLES = "samples.jsonl"
# Answers that are written together, as many as fit: decoding reads all weights once per token, for
# one answer or for many.
AT_ONCE = (32, 16, 8, 4, 1)
TABLE = (
    ("reward", ".3f"),
    ("answer_tokens", ".1f"),
    ("kept", ".0f"),
    ("groups", ".0f"),
)


@dataclass(frozen=True)
class Settings(alignment_run.Alignment):
    """Trains on rows of {"prompt", "answer"}."""

    learning_rate: Rate = 1e-6
    """peak learning rate; decays to a tenth along a cosine"""
    iters: Count = 60
    """steps; each one samples answers and learns from them"""
    grad_accumulation_steps: Count = 4
    """prompts per step, each with a group of answers"""
    batch_size: Count = 8
    """answers to one prompt per micro-batch"""
    group_size: Annotated[int, Within(2, MOST)] = 8
    """answers per prompt, which are compared with each other"""
    max_completion_length: Count = 128
    """maximum tokens per answer"""
    temp: Positive = 1.0
    """sampling temperature"""
    beta: Annotated[float, Within(0.0, 1e3)] = 0.0
    """weight of the KL to the original model; above 0, that model is streamed once per step"""
    reward_functions: str | None = None
    """names, separated by commas; their rewards are added; default: correct,format, or all
    functions in the file
    """
    reward_functions_file: str | None = None
    """Python file with functions f(prompts, completions, answer) -> list of numbers or None"""
    tasks: str = "sums,two-digit-sums,bus,recipe,logic"
    """number of generated tasks, if you give no --data"""

    def logps(
        self,
        hidden: mx.array,
        head: mx.array,
        tokens: mx.array,
        count: int,
        *,
        softcap: float = 0.0,
        frozen_head: bool = True,
    ) -> mx.array:
        """(B, T) log-probabilities of the last T = `count` of tokens (B, S), as they are drawn.

        hidden (B, S, D): the final states. head (V, D).
        """
        # The state before a token predicts it.
        before = hidden[:, -count - 1 : -1]
        flat = token_logps(
            before.reshape(-1, hidden.shape[-1]),
            head,
            tokens[:, -count:].reshape(-1),
            temperature=self.temp,
            frozen_head=frozen_head,
            softcap=softcap,
        )
        return flat.reshape(len(tokens), count)

    def loss(
        self,
        model: nn.Module,
        tokens: mx.array,
        mask: mx.array,
        advantage: mx.array,
        reference: mx.array | None = None,
    ) -> tuple[mx.array, mx.array, dict[str, mx.array]]:
        """(sum, tokens that were sampled, further sums) over the answers of one micro-batch.

        tokens (B, S), mask (B, T): of `filled_up`. advantage: (B,). reference: (B, T)
        log-probabilities under the reference; None: it does not count.
        """
        logps = self.logps(
            model.model(tokens),
            load.head_weight(model),
            tokens,
            mask.shape[1],
            softcap=load.logit_softcap(model),
            frozen_head=self.lora is not None,
        )
        total = rl_losses.token_loss_sum(
            logps,
            advantage,
            mask,
            reference=reference,
            beta=self.beta,
            noise=rl_losses.NOISE[load.activation_dtype(model)],
        )
        return total, mask.sum(), {"tokens": mx.array(float(tokens.size))}


def filled_up(prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> tuple[mx.array, mx.array]:
    """(tokens, mask) of B answers, each behind its prompt, filled up at their ends.

    tokens: (B, S). mask (B, T): 1 where one of the last T, all behind the prompt, is an answer's.
    """
    before = [0] * len(prompt)
    rows = [([*prompt, *answer], [*before, *[1] * len(answer)]) for answer in answers]
    tokens, loss_mask = padded_rows.padded(rows)
    return tokens, loss_mask[:, len(before) - 1 : -1]


@dataclass
class Sampler:
    """Makes a step's rollout.

    prompts: token ids of each row of `rows`, in the same order. reference: where KL is asked for,
    the model as it was. log: takes a line of JSON per prompt. room: for answers side by side;
    None: for all.
    """

    settings: Settings
    model: nn.Module
    rows: Sequence[Row]
    prompts: Sequence[list[int]]
    tokenizer: Any
    functions: Sequence[rewards.Function]
    reference: stream.Stream | None = None
    log: Callable[[str], None] = field(default=lambda line: None)
    room: Room | None = None

    def __call__(self, step: int) -> Rollout:
        """Step `step`, counted from 0. MisError when no answer of it could be scored."""
        s = self.settings
        indices = order(len(self.rows), s.grad_accumulation_steps, step, s.seed)
        # Each answer has random numbers of its own, beside whatever it is written.
        seeds = []
        for place in range(len(indices)):
            entropy = [s.seed, step, place]
            state = np.random.SeedSequence(entropy)
            of_group = state.generate_state(s.group_size)
            seeds.append(of_group.tolist())
        rows = [self.rows[i] for i in indices]
        prompts = [self.prompts[i] for i in indices]
        answers, texts, scores, totals, facts = self.scored(rows, prompts, seeds)
        # A group whose rewards are equal has no advantages: it is logged, and not learned from.
        kept = rl_losses.teaches(totals)
        lines = []
        for row, group, score, teaches in zip(rows, texts, scores, kept.tolist(), strict=True):
            lines.append(_record(step, row, group, score, kept=teaches))
        for line in lines:
            self.log(line)
        advantage = rl_losses.advantages(totals)
        chosen = [(indices[n], answers[n], advantage[n]) for n in np.flatnonzero(kept)]
        return self._parts(chosen), facts

    def scored(
        self,
        rows: Sequence[Row],
        prompts: Sequence[list[int]],
        seeds: Sequence[Sequence[int]],
    ) -> tuple[list[Group], list[list[str]], list[rewards.Scores], np.ndarray, dict[str, float]]:
        """Answers to these prompts, scored: (ids, texts, scores, totals, facts).

        seeds: of a prompt's answers, as many for each; none: one greedy answer. ids: of the
        answers' tokens. texts: without stop tokens. totals: rewards (prompts, answers), NaN where
        an answer is not scored. facts: what metrics hold beside the loss; means are over answers
        that were scored. MisError when none could be.
        """
        ends = self.tokenizer.eos_token_ids
        answers = self._answers(prompts, seeds)
        texts: list[list[str]] = []
        for group in answers:
            texts.append([])
            for answer in group:
                bare = [token for token in answer if token not in ends]
                texts[-1].append(self.tokenizer.decode(bare))
        scores = rewards.score(self.functions, rows, texts)
        totals = np.array([score.totals for score in scores], np.float64)
        if np.isnan(totals).all():
            notes = chain.from_iterable(score.notes for score in scores)
            why = next(notes, "every function returned None")
            raise MisError(
                f"none of {totals.size} answers could be scored ({why}): fix the reward functions "
                f"or the data"
            )
        return answers, texts, scores, totals, self._facts(answers, scores, totals)

    def _answers(
        self,
        prompts: Sequence[list[int]],
        seeds: Sequence[Sequence[int]],
    ) -> list[Group]:
        """The answers of `scored`, as token ids."""
        s = self.settings
        count = 1
        draws = Draws()
        if seeds:
            count = len(seeds[0])
            in_order = list(chain.from_iterable(seeds))
            sampling = Sampling(s.temp)
            draws = Draws(sampling, in_order)
        asked = list[list[int]]()
        for prompt in prompts:
            asked.extend([prompt] * count)
        writer = TextWriter(Resident(self.model), self.room)
        stop = self.tokenizer.eos_token_ids
        longest = s.max_completion_length
        ids = writer.write(asked, longest, stop, draws)
        groups = list[Group]()
        for start in range(0, len(ids), count):
            group = ids[start : start + count]
            groups.append(group)
        return groups

    def _facts(
        self,
        answers: Sequence[Group],
        scores: Sequence[rewards.Scores],
        totals: np.ndarray,
    ) -> dict[str, float]:
        """Rewards, lengths and counts of a rollout, as `scored` gives them."""
        facts = {"reward": float(np.nanmean(totals))}
        for name in scores[0].parts:
            parts = chain.from_iterable(score.parts[name] for score in scores)
            values = [value for value in parts if value is not None]
            if values:
                facts[f"reward_{name}"] = float(np.mean(values))
        most = self.settings.max_completion_length
        ends = self.tokenizer.eos_token_ids
        every = list(chain.from_iterable(answers))
        lengths = np.array([len(answer) for answer in every])
        truncated = np.array([len(ids) >= most and ids[-1] not in ends for ids in every])
        facts["unscored"] = int(np.isnan(totals).sum())
        facts["answer_tokens"] = float(lengths.mean())
        facts["truncated"] = float(truncated.mean())
        facts["kept"] = int(rl_losses.teaches(totals).sum())
        facts["groups"] = len(totals)
        return facts

    def _parts(self, chosen: Sequence[tuple[int, Group, np.ndarray]]) -> list[tuple[Any, ...]]:
        """Micro-batches for `Settings.loss`, from (number of the prompt, its answers, advantages).

        Each has answers of one prompt, of like length.
        """
        batches = []
        for i, group, advantage in chosen:
            rising = np.argsort([len(answer) for answer in group], kind="stable")
            for start in range(0, len(group), self.settings.batch_size):
                places = rising[start : start + self.settings.batch_size]
                tokens, mask = filled_up(self.prompts[i], [group[place] for place in places])
                batches.append((tokens, mask, mx.array(advantage[places])))
        reference = self.reference
        if reference is None or not batches:
            return batches
        # Log-probabilities (B, T) under the reference, in one pass over its weights.
        head = modules.dense_weight(reference.head())
        cap = family(reference.checkpoint.config).softcap
        parts = list[tuple[Any, ...]]()
        states = reference.forward([tokens for tokens, *_ in batches])
        for (tokens, mask, given), hidden in zip(batches, states, strict=True):
            found = self.settings.logps(hidden, head, tokens, mask.shape[1], softcap=cap)
            mx.eval(found)
            parts.append((tokens, mask, given, found))
        return parts


def _record(
    step: int,
    row: Row,
    texts: Sequence[str],
    score: rewards.Scores,
    *,
    kept: bool,
) -> str:
    """A prompt's line in SAMPLES: its answers with all their rewards, as JSON."""
    answers = []
    for n, (text, total) in enumerate(zip(texts, score.totals, strict=True)):
        parts = {name: values[n] for name, values in score.parts.items()}
        answers.append({"text": text, "reward": total, **parts})
    record: dict[str, Any] = {"number": step + 1}
    for key in ("prompt", "answer", "task", "language"):
        if key in row:
            record[key] = row[key]
    record["kept"] = kept
    if score.notes:
        record["notes"] = list(score.notes)
    record["answers"] = answers
    return json.dumps(record, ensure_ascii=False)


def steps_of(
    student: WholeModel,
    rollouts: Callable[[int], Rollout],
    loss: Loss,
    s: Settings,
    start: int = 0,
) -> Iterator[Step]:
    """Steps as `train_loop.steps` gives them; each samples, then updates on its own samples.

    A step in which every group has equal rewards leaves weights and moments as they are. Prints one
    line of the table a step.
    """
    cli.say("  step  " + "  ".join(f"{name:>13}" for name, _ in TABLE))
    for step in range(start, s.iters):
        began = train_loop.CLOCK.monotonic()
        mx.reset_peak_memory()
        parts, facts = rollouts(step)
        # `train_loop.steps` starts the count of the peak anew, so the sampling's is read here.
        peak = mx.get_peak_memory()
        done = Step(
            number=step + 1,
            loss=0.0,
            grad_norm=0.0,
            learning_rate=s.rate(step),
            tokens=0,
            seconds=0.0,
            peak_bytes=peak,
            note="no group has different rewards: no update",
        )
        if parts:
            batches = {step: parts}
            # The generator is not named: it would live on, and with it the arrays of its frame.
            done = next(train_loop.steps(student, batches.__getitem__, loss, s, start=step))
        facts = {**done.further, **facts}
        seconds = train_loop.CLOCK.monotonic() - began
        peak = max(peak, done.peak_bytes)
        cells = [f"{step + 1:>6}"]
        for name, form in TABLE:
            cells.append(f"{facts[name]:>13{form}}" if name in facts else " " * 13)
        cli.say("  ".join(cells))
        yield replace(done, seconds=seconds, peak_bytes=peak, further=facts)


def measure(
    sampler: Sampler,
    rows: Sequence[Row],
    prompts: Sequence[list[int]],
) -> dict[str, float]:
    """Means over greedy answers to held-out rows; "loss", minus the reward, judges."""
    *_, facts = sampler.scored(rows, prompts, [])
    measured = {"loss": 0.0 - facts["reward"]}
    for name, value in facts.items():
        if name not in ("kept", "groups"):
            measured[name] = value
    return measured
