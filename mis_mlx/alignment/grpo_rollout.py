"""Group-relative policy optimization: answers sampled and scored, groups that teach something,
their loss and steps.

A step's answers depend on the weights, the data, the seed and the step alone.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Annotated, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mis_mlx import cli
from mis_mlx.alignment import alignment_run
from mis_mlx.data.rows import Row
from mis_mlx.data.token_windows import order
from mis_mlx.distillation import train_loop
from mis_mlx.evaluation import rewards
from mis_mlx.maths import policy
from mis_mlx.maths.losses import token_logps
from mis_mlx.maths.optimizer import GuardedAdamW
from mis_mlx.models import attention_masks, distributed, load, mlx_generate, stream
from mis_mlx.models.config import softcap
from mis_mlx.types import MOST, Count, MisError, Positive, Rate, Step, Within

# micro-batches of a step, for `Settings.loss`; facts of it
Rollout = tuple[list[tuple[Any, ...]], dict[str, float]]
Group = list[list[int]]  # the answers to a prompt, as token ids
SAMPLES = "samples.jsonl"
# answers; decoding reads all weights once a token, for one answer or for many
SAMPLED_TOGETHER = 32
COUNTS = ("unscored", "kept", "groups")  # of facts
TABLE = (
    ("reward", ".3f"),
    ("answer_tokens", ".1f"),
    ("kept", ".0f"),
    ("groups", ".0f"),
    ("clipped", ".3f"),
)


@dataclass(frozen=True)
class Settings(alignment_run.Alignment):
    """One run. Rows: {"prompt", "answer"}."""

    learning_rate: Rate = 1e-6
    """peak; falls to a tenth along a cosine"""
    iters: Count = 60
    """steps, each of which samples and learns"""
    grad_accumulation_steps: Count = 4
    """prompts in a step, each with a group of answers"""
    batch_size: Count = 8
    """answers of one prompt in a micro-batch"""
    group_size: Annotated[int, Within(2, MOST)] = 8
    """answers to a prompt, which are compared with each other"""
    max_completion_length: Count = 128
    """most tokens of an answer"""
    temperature: Positive = 1.0
    """of the sampling"""
    loss_type: policy.LossType = "dapo"
    """dapo: mean over all tokens of a step; grpo: over answers; dr_grpo: constant divisor,
    advantages not scaled
    """
    epsilon: Annotated[float, Within(0.0, 0.999, above=True)] = 0.2
    """how far below 1 a token's ratio may fall and still count"""
    epsilon_high: Positive = 0.28
    """how far above 1 (DAPO's clip-higher)"""
    beta: Annotated[float, Within(0.0, 1e3)] = 0.0
    """weight of KL to the model as it was; above 0 that model is streamed once a step"""
    num_iterations: Count = 1
    """updates of the weights in a step, all on the same answers; with 1 every ratio is 1 and
    nothing is clipped
    """
    reward_functions: str | None = None
    """names with commas, whose rewards are added up; default: correct,format, or all functions of
    the file
    """
    reward_functions_file: str | None = None
    """Python file of functions f(prompts, completions, answer) -> list of numbers or None"""
    reward_timeout: Positive = rewards.SECONDS
    """seconds that a function of the file may take for the answers of a step"""
    tasks: str = "sums,two-digit-sums,bus,recipe,logic"
    """generated tasks, where no data is given"""

    @property
    def at_once(self) -> int:
        """Answers generated together: a group, or more where groups are small."""
        return max(self.group_size, SAMPLED_TOGETHER // self.group_size * self.group_size)

    def logps(self, model: nn.Module, b: attention_masks.Branches, frozen_head: bool) -> mx.array:
        """(B, T) log-probabilities of the answers' tokens at the sampling temperature."""
        hidden = attention_masks.forward(model, b.tokens, b.branch, b.positions)[
            0, b.at.reshape(-1)
        ]
        head = load.head_weight(model)
        targets = b.targets.reshape(-1)
        cap = load.logit_softcap(model)
        flat = token_logps(hidden, head, targets, self.temperature, frozen_head, softcap=cap)
        return flat.reshape(b.targets.shape)

    def loss(
        self,
        model: nn.Module,
        b: attention_masks.Branches,
        advantage: mx.array,
        old: mx.array | None = None,
        reference: mx.array | None = None,
    ) -> tuple[mx.array, mx.array, dict[str, mx.array]]:
        """(sum, count, further sums) over the answers of one micro-batch; old None: the model as it
        is now.
        """
        new = self.logps(model, b, self.lora is not None)
        before = mx.stop_gradient(new) if old is None else old
        bounds = self.epsilon, self.epsilon_high
        noise = policy.NOISE[load.activation_dtype(model)]
        losses, held = policy.token_losses(
            new, before, advantage, *bounds, reference, self.beta, noise=noise
        )
        total, count = policy.loss_sum(losses, b.mask, self.loss_type, self.max_completion_length)
        clipped, _ = policy.loss_sum(held, b.mask, self.loss_type, self.max_completion_length)
        return total, count, {"clipped": clipped, "tokens": mx.array(float(b.tokens.size))}


@dataclass
class Sampler:
    """Makes a step's rollout, this machine's part of it. prompts: token ids of each row of `rows`,
    in one order. reference: where KL is asked for, the model as it was.
    """

    settings: Settings
    model: nn.Module
    rows: Sequence[Row]
    prompts: Sequence[list[int]]
    tokenizer: Any
    functions: Sequence[rewards.Function]
    reference: stream.Stream | None = None
    log: Callable[[str], None] = field(default=lambda line: None)

    def __call__(self, step: int) -> Rollout:
        """Step `step`, counted from 0. MisError when no answer of it could be scored."""
        s = self.settings
        at = distributed.shard(order(len(self.rows), s.grad_accumulation_steps, step, s.seed))
        own = [s.seed, step, *([distributed.rank()] if distributed.size() > 1 else [])]
        draw = mlx_generate.sampler(
            s.temperature, int(np.random.SeedSequence(own).generate_state(1)[0])
        )
        rows = [self.rows[i] for i in at]
        answers, texts, scores, totals, mine = self.scored(
            rows, [self.prompts[i] for i in at], s.group_size, draw
        )
        kept = policy.teaches(totals)
        lines = [
            _record(step, *judged)
            for judged in zip(rows, texts, scores, kept.tolist(), strict=True)
        ]
        for line in chain.from_iterable(distributed.all_gather(lines)):
            self.log(line)
        advantage = policy.advantages(totals, scaled=s.loss_type != "dr_grpo")
        chosen = [(at[n], answers[n], advantage[n]) for n in np.flatnonzero(kept)]
        facts = distributed.all_gather(mine)
        return self._parts(chosen), facts[0] if len(facts) == 1 else _joined(facts)

    def scored(
        self,
        rows: Sequence[Row],
        prompts: Sequence[list[int]],
        count: int,
        draw: mlx_generate.Sampler,
    ) -> tuple[list[Group], list[list[str]], list[rewards.Scores], np.ndarray, dict[str, float]]:
        """`count` answers to each of these prompts, as token ids and, without stop tokens, as text;
        their scores; total rewards (prompts, answers), NaN where an answer is not scored; and what
        metrics hold beside the loss: means are over answers that were scored. MisError when none
        could be.
        """
        s = self.settings
        ends = self.tokenizer.eos_token_ids
        most = self.settings.max_completion_length
        answers = mlx_generate.groups(self.model, prompts, count, most, ends, draw, s.at_once)
        bare = (
            [[token for token in answer if token not in ends] for answer in group]
            for group in answers
        )
        texts = [list(map(self.tokenizer.decode, group)) for group in bare]
        scores = rewards.score(self.functions, rows, texts)
        totals = np.array([score.totals for score in scores], np.float64)
        if np.isnan(totals).all():
            why = next(
                chain.from_iterable(score.notes for score in scores), "every function returned None"
            )
            raise MisError(
                f"none of {totals.size} answers could be scored ({why}): fix reward functions or "
                f"data"
            )
        facts = {"reward": float(np.nanmean(totals))}
        for name in scores[0].parts:
            if values := [v for score in scores for v in score.parts[name] if v is not None]:
                facts[f"reward_{name}"] = float(np.mean(values))
        lengths = np.array([len(answer) for group in answers for answer in group])
        facts |= {
            "unscored": int(np.isnan(totals).sum()),
            "answer_tokens": float(lengths.mean()),
            "truncated": float((lengths >= most).mean()),
            "kept": int(policy.teaches(totals).sum()),
            "groups": len(totals),
        }
        return answers, texts, scores, totals, facts

    def _parts(self, chosen: Sequence[tuple[int, Group, np.ndarray]]) -> list[tuple[Any, ...]]:
        s = self.settings
        parts = list[tuple[Any, ...]]()
        references = self._references([(i, group) for i, group, _ in chosen])
        for (i, group, advantage), reference in zip(chosen, references, strict=True):
            for cut in (slice(a, a + s.batch_size) for a in range(0, len(group), s.batch_size)):
                b = attention_masks.join(self.prompts[i], group[cut])
                old = None
                if s.num_iterations > 1:
                    work = partial(s.logps, b=b, frozen_head=True)
                    old = train_loop.as_in_training(self.model, work)
                ref = None if reference is None else reference[cut, : b.targets.shape[1]]
                mx.eval([a for a in (old, ref) if a is not None])
                parts.append((b, mx.array(advantage[cut]), old, ref))
        return parts

    def _references(self, chosen: Sequence[tuple[int, Group]]) -> list[mx.array | None]:
        """(G, T) log-probabilities of each group under the reference, in one pass over its
        weights.
        """
        if self.reference is None or not chosen:
            return [None] * len(chosen)
        longest = [max(map(len, group)) for _, group in chosen]
        batches = []
        for (i, group), most in zip(chosen, longest, strict=True):
            batches.append(
                mx.array([[*self.prompts[i], *a, *[0] * (most - len(a))] for a in group])
            )
        head = load.dense_weight(self.reference.head())
        logps = list[mx.array | None]()
        for tokens, hidden, most in zip(
            batches, self.reference.forward(batches), longest, strict=True
        ):
            states = hidden[:, -most - 1 : -1].reshape(-1, hidden.shape[-1])
            targets = tokens[:, -most:].reshape(-1)
            cap = softcap(self.reference.checkpoint.config)
            flat = token_logps(
                states, head, targets, self.settings.temperature, frozen_head=True, softcap=cap
            )
            logps.append(flat.reshape(len(tokens), most))
        return logps


def _record(step: int, row: Row, texts: Sequence[str], score: rewards.Scores, kept: bool) -> str:
    parts = score.parts.items()
    each = enumerate(zip(texts, score.totals, strict=True))
    answers = [
        {"text": text, "reward": total, **{name: of[n] for name, of in parts}}
        for n, (text, total) in each
    ]
    about = {key: row[key] for key in ("prompt", "answer", "task", "language") if key in row}
    notes = {"notes": list(score.notes)} if score.notes else {}
    return json.dumps(
        {"number": step + 1, **about, "kept": kept, **notes, "answers": answers}, ensure_ascii=False
    )


def _joined(facts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Those of all machines: counts added, means weighed by groups."""
    joined = {}
    for name in dict.fromkeys(name for each in facts for name in each):
        values, groups = zip(
            *((each[name], each["groups"]) for each in facts if name in each), strict=True
        )
        joined[name] = sum(values) if name in COUNTS else float(np.average(values, weights=groups))
    return joined


def train(
    model: nn.Module,
    rollouts: Callable[[int], Rollout],
    loss: train_loop.Loss,
    optimizer: GuardedAdamW,
    s: Settings,
    start: int = 0,
) -> Iterator[Step]:
    """Steps as `train_loop.train` gives them; each samples, then takes its updates on what it
    sampled. A step of which every group has equal rewards leaves weights and moments as they are.
    One line of the table a step.
    """
    cli.say("  step  " + "  ".join(f"{name:>13}" for name, _ in TABLE))
    for step in range(start, s.iters):
        began = train_loop.CLOCK.monotonic()
        mx.reset_peak_memory()
        parts, facts = rollouts(step)
        peak = mx.get_peak_memory()
        done = Step(
            step + 1, 0.0, 0.0, s.rate(step), 0, 0.0, peak, "no group teaches anything: no update"
        )
        # The first update is of the model that sampled: its ratios are 1, and are not computed
        # another way.
        fresh = [(branches, advantage, None, ref) for branches, advantage, _, ref in parts]
        for update in range(s.num_iterations if distributed.any_rank(parts) else 0):
            seen = parts if update else fresh
            done = next(train_loop.train(model, {step: seen}.__getitem__, loss, optimizer, s, step))
        facts = {**done.more, **facts}
        seconds = train_loop.CLOCK.monotonic() - began
        peak = max(peak, done.peak_bytes)
        cells = "  ".join(f"{facts[n]:>13{form}}" if n in facts else " " * 13 for n, form in TABLE)
        cli.say(f"{step + 1:>6}  {cells}")
        yield replace(done, seconds=seconds, peak_bytes=peak, more=facts)


def measure(
    sampler: Sampler, rows: Sequence[Row], prompts: Sequence[list[int]], samples: int = 0
) -> dict[str, float]:
    """Means over answers to held-out rows, greedy or `samples` drawn for each; "loss", minus the
    reward, judges.
    """
    draw = mlx_generate.sampler(
        sampler.settings.temperature if samples else 0.0, sampler.settings.seed
    )
    *_, facts = sampler.scored(rows, prompts, samples or 1, draw)
    return {
        "loss": 0.0 - facts["reward"],
        **{k: v for k, v in facts.items() if k not in ("kept", "groups")},
    }
