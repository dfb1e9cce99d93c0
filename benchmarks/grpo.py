"""Does GRPO raise the verified reward on tasks that were never seen? The default teacher, one kind
of task, a seed.

A short SFT first teaches the form of an answer, so that some are right; that model is the baseline.
Rows to train on, to choose the best checkpoint by, and to measure on are three disjoint sets.
`scripts/mis benchmarks/grpo.py --seed 0` writes one file a seed; `--plot` draws all of them.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from laboratory import RESULTS, stored, write
from polish_text import problems

from mis_mlx import cli, grpo, sft
from mis_mlx.alignment import grpo_rollout as training
from mis_mlx.data import examples
from mis_mlx.judge.tasks import rewards
from mis_mlx.models.opening import compute_type, load
from mis_mlx.models.passing import stream
from mis_mlx.storage import run_folder

SHOWN = ("reward", "reward_correct", "reward_format", "answer_tokens", "truncated")


@dataclass(frozen=True)
class Settings:
    """One seed, or the plot of those there are."""

    seed: int = 0
    """of the adapters, the batches and the sampling; the SFT start is the same for all seeds"""
    kind: str = "sums"
    """which tasks, in English"""
    warm_iters: int = 6
    """steps of SFT on worked answers; the model is kept under build/ for the other seeds"""
    iters: int = 16
    """steps of GRPO"""
    prompts: int = 8
    """in a step, each with `group_size` answers"""
    group_size: int = 8
    """answers to a prompt"""
    max_completion_length: int = 12
    """most tokens of an answer"""
    learning_rate: float = 5e-5
    """of GRPO's adapters"""
    eval_rows: int = 112
    """tasks measured before and after"""
    eval_samples: int = 2
    """answers drawn for each of them, beside the greedy one"""
    plot: bool = False
    """draw the files of all seeds, and stop"""


def rows(s: Settings) -> dict[str, list[dict[str, str]]]:
    """To train on, to choose by, to measure on; no problem is in two of them. SFT learns the last
    line alone.
    """
    held = problems.rows("test", 0, count=s.eval_rows + 32, kinds=[s.kind], languages=["en"])
    train = problems.rows("train", 0, count=300, kinds=[s.kind], languages=["en"])
    for row in (*held, *train):
        row["completion"] = row["completion"].splitlines()[-1]
    return {"train": train, "valid": held[:32], "measured": held[32:]}


def measured(
    s: Settings, folder: Path, questions: Sequence[dict[str, str]]
) -> dict[str, dict[str, float]]:
    """{"greedy", "sampled"} of a model folder on the questions."""
    checkpoint = compute_type.open_to_compute(folder)
    model = stream.load_checked(load.resident_model(checkpoint, mx.float32))
    tokenizer = load.tokenizer(folder)
    placed = [(row, f"question {n}") for n, row in enumerate(questions, 1)]
    encoded, _ = examples.encode(placed, tokenizer, 512, ("answer",))
    prompts = []
    for ((ids, loss_mask),) in encoded:
        answer_starts = int(loss_mask.argmax())
        prompts.append(list(map(int, ids[:answer_starts])))
    # answers to 32 rows at once
    settings = training.Settings(max_completion_length=s.max_completion_length, seed=7)
    functions = rewards.functions(None, None)
    sampler = training.Sampler(
        settings=settings,
        model=model,
        rows=questions,
        prompts=prompts,
        tokenizer=tokenizer,
        functions=functions,
    )
    found = {}
    for name, samples in (("greedy", 0), ("sampled", s.eval_samples)):
        values = training.measure(sampler, questions, prompts, samples)
        found[name] = {key: round(values[key], 4) for key in SHOWN}
    return found


def warmed(s: Settings, data: Path, out: Path) -> Path:
    """The SFT start: the teacher after a few steps on worked answers."""
    if not (out / "model").is_dir():
        sft.run(
            sft.Settings(
                data=str(data),
                iters=s.warm_iters,
                batch_size=4,
                max_seq_length=160,
                learning_rate=5e-4,
                warmup=2,
                save_every=s.warm_iters,
                eval_rows=16,
                fine_tune_type="lora",
                dtype="float32",
                out=str(out),
            )
        )
    return out / "model"


def one(s: Settings) -> None:
    """Train and measure one seed."""
    sets = rows(s)
    with tempfile.TemporaryDirectory() as temp:
        data = Path(temp) / "data"
        out = Path(temp) / "run"
        data.mkdir()
        for name in ("train", "valid"):
            (data / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in sets[name]))
        start = warmed(s, data, Path("build") / f"grpo-start-{s.kind}-{s.warm_iters}")
        before = measured(s, start, sets["measured"])
        print(json.dumps({"before": before}), flush=True)
        began = time.monotonic()
        result = grpo.run(
            grpo.Settings(
                model=str(start),
                data=str(data),
                iters=s.iters,
                grad_accumulation_steps=s.prompts,
                group_size=s.group_size,
                batch_size=s.group_size,
                max_completion_length=s.max_completion_length,
                max_seq_length=128,
                learning_rate=s.learning_rate,
                warmup=2,
                save_every=8,
                eval_rows=32,
                fine_tune_type="lora",
                dtype="float32",
                seed=s.seed,
                out=str(out),
            )
        )
        seconds = time.monotonic() - began
        after = measured(s, out / "model", sets["measured"])
        print(json.dumps({"after": after}), flush=True)
        keys = ("number", "reward", "reward_correct", "answer_tokens", "kept", "seconds")
        steps = []
        for metrics in run_folder.metrics(out):
            steps.append({key: round(metrics[key], 4) for key in keys})
        chosen = []
        for record in run_folder.records(out / "held_out.jsonl"):
            chosen.append({key: record[key] for key in ("number", "reward", "reward_correct")})
    found = {
        "settings": {k: v for k, v in asdict(s).items() if k != "plot"},
        "rows": {name: len(part) for name, part in sets.items()},
        "before": before,
        "after": after,
        "best_step": result["best_step"],
        "steps": steps,
        "chosen_by": chosen,
        "seconds": round(seconds, 1),
    }
    write(f"grpo-{s.seed}", f"scripts/mis benchmarks/grpo.py --seed {s.seed}", found)


def plot() -> None:
    """benchmarks/results/<machine>/grpo.svg: reward of every step and seed, and held-out reward
    before and after.
    """
    from matplotlib.figure import Figure

    seeds = {seed: stored(f"grpo-{seed}") for seed in range(10)}
    found: dict[int, Any] = {seed: one for seed, one in seeds.items() if one}
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    for at, (seed, one) in enumerate(found.items()):
        numbers, rewards = zip(*((m["number"], m["reward"]) for m in one["steps"]), strict=True)
        left.plot(numbers, rewards, label=f"seed {seed}", color=f"C{at}")
        for name, style in (("greedy", "o-"), ("sampled", "s--")):
            ends = [one[when][name]["reward"] for when in ("before", "after")]
            right.plot([0, 1], ends, style, color=f"C{at}", label=name if at == 0 else None)
    left.set(xlabel="step", ylabel="mean reward of sampled answers", title="training tasks")
    right.set(
        xticks=[0, 1],
        xticklabels=["SFT start", "after GRPO"],
        title="held-out tasks",
        xlim=(-0.2, 1.2),
    )
    for axis in (left, right):
        axis.set_ylim(0, 1.15)
        axis.legend(frameon=False, fontsize="small")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(RESULTS / "grpo.svg", metadata={"Date": None})


if __name__ == "__main__":
    given = cli.parse(Settings)
    plot() if given.plot else one(given)
