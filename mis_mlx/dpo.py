"""Preference optimization: of two answers the chosen one becomes likelier; DPO-Positive, DPO, IPO or hinge."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import mlx.core as mx
import numpy as np

from mis_mlx import cli
from mis_mlx.alignment import alignment_plan, alignment_run, preference_pairs
from mis_mlx.distillation import run_loop
from mis_mlx.maths.preference import LossType
from mis_mlx.models import distributed
from mis_mlx.planner import estimates
from mis_mlx.types import Positive, Rate, Within

ANSWERS = ("chosen", "rejected")


@dataclass(frozen=True)
class Settings(alignment_plan.Alignment):
    """One run. Rows: {"prompt", "chosen", "rejected"}."""

    learning_rate: Rate = 5e-6
    """peak; falls to a tenth along a cosine; 1e-6 suits a model of billions"""
    loss_type: LossType = "dpop"
    """dpop: DPO that does not let the chosen answer become less likely; sigmoid: plain DPO; ipo; hinge"""
    beta: Positive = 0.1
    """how far the model may go from the one it was"""
    dpop_lambda: Annotated[float, Within(0.0, 1e4)] = 5.0
    """weight of the penalty in dpop, inside beta; 0 is plain DPO; at 50, the paper's, the default model learns the
    chosen answers and prefers nothing (measured)"""


def run(settings: Settings) -> dict[str, Any]:
    """The command: open, read and check the data, plan, ask the reference, train, write the best student."""
    s, folder = run_loop.resumed(settings, alignment_plan.FREE)
    checkpoint = alignment_plan.opened(s)
    objective = preference_pairs.Objective(s.loss_type, s.beta, s.dpop_lambda)
    train, valid, card = alignment_run.data(s, checkpoint, ("pair",), ANSWERS)

    def training(parts: Settings) -> estimates.StageCost:
        length = max(map(preference_pairs.longest, [*train, *valid]))
        return alignment_plan.training(parts, checkpoint, 2 * parts.batch_size, length, "dpo")

    parts = alignment_plan.cut(s, folder, training)
    drawing = (parts.batch_size, parts.grad_accumulation_steps, s.seed)
    seen = preference_pairs.visited(train, s.iters, *drawing)
    compared = [*(train[i] for i in seen), *valid]
    tokens, phase = sum(2 * preference_pairs.longest(pair) for pair in compared), training(parts)
    asking = estimates.forward_flops(alignment_plan.sizes(s, checkpoint), tokens, s.max_seq_length)
    plan = alignment_plan.plan(parts, replace(phase, flops=phase.flops + asking))
    if s.dry_run:
        return {"model": str(checkpoint.path), "pairs": len(train), **plan.result()}
    with alignment_run.running(s, folder, checkpoint, plan, card, "dpo") as r:
        logps = np.zeros((len(compared), 2), np.float32)
        if distributed.is_main():
            ask = partial(preference_pairs.reference, r.model, compared, parts.batch_size)
            logps = preference_pairs.stored_reference(r.folder, card["fingerprint"], r.files, ask)
        logps = np.array(distributed.broadcast_array(mx.array(logps)))
        of_train = np.full((len(train), 2), np.nan, np.float32)
        of_train[seen] = logps[: len(seen)]
        each = preference_pairs.micro_batches(train, of_train, *drawing)
        loss = partial(objective.loss, frozen_head=s.lora is not None)
        held_out = partial(preference_pairs.measure, r.model, objective, valid, logps[len(seen) :], parts.batch_size)
        judge = preference_pairs.OF_MEANS if s.loss_type == "dpop" else "loss"
        return r.train(each, loss, held_out, judge=judge)


if __name__ == "__main__":
    cli.main(Settings, run, several=True)
