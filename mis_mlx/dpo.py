"""Preference optimization: of two answers the chosen one becomes likelier; DPO-Positive, DPO, IPO or hinge."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import mlx.core as mx
import numpy as np

from mis_mlx import cli
from mis_mlx.alignment import alignment_plan, alignment_run, preference_pairs
from mis_mlx.alignment.alignment_plan import Alignment
from mis_mlx.alignment.preference_pairs import Objective, Pair
from mis_mlx.data import examples
from mis_mlx.maths.preference import LossType
from mis_mlx.models import distributed, load
from mis_mlx.planner import estimates
from mis_mlx.planner.estimates import Phase
from mis_mlx.types import Checkpoint, Positive, Rate, Within

ANSWERS = ("chosen", "rejected")


@dataclass(frozen=True)
class Settings(Alignment):
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

    @property
    def objective(self) -> Objective:
        """The loss asked for."""
        cli.check_ranges(self)
        return Objective(self.loss_type, self.beta, self.dpop_lambda)


def _pairs(s: Settings, checkpoint: Checkpoint) -> tuple[list[Pair], list[Pair], dict[str, Any]]:
    """(pairs to train on, held-out ones, what is known of the data); every row is checked."""
    found = examples.load(s.data, ("pair",), s.data_licence, s.scrub_pii)
    tokenizer = load.tokenizer(checkpoint.path)
    train, cut = examples.encode(found.train, tokenizer, s.max_seq_length, ANSWERS)
    valid, _ = examples.encode(found.valid, tokenizer, s.max_seq_length, ANSWERS)
    for note in [*found.notes, *([f"{cut} answers are cut at {s.max_seq_length} tokens"] if cut else [])]:
        cli.say(note)
    return [*train], [*valid[: s.eval_rows]], found.card(examples.fingerprint([*train, *valid]))


def _reference(s: Settings, checkpoint: Checkpoint, pairs: list[Pair], limit: int) -> Phase:
    """What the reference takes beside the model that waits to be trained; in as few passes as memory allows."""
    m, length = alignment_plan.sizes(s, checkpoint), max(map(preference_pairs.longest, pairs))
    micro, tokens = 2 * s.batch_size * length, sum(2 * preference_pairs.longest(pair) for pair in pairs)
    beside = alignment_plan.weight_bytes(s, checkpoint)
    one = estimates.streamed_pass("reference", m, micro, micro, length, spool=False, beside_bytes=beside)
    each = m.shape.hidden * m.item
    held = min(max(micro, tokens), micro + estimates.room(limit, one.peak_bytes) // each)
    passes = math.ceil(tokens / held)
    return replace(
        one,
        read_bytes=passes * one.read_bytes,
        peak_bytes=one.peak_bytes + (held - micro) * each,
        flops=estimates.forward_flops(m, tokens, length),
        held_tokens=held,
    )


def run(settings: Settings) -> dict[str, Any]:
    """The command: open, read and check the data, plan, ask the reference, train, write the best student."""
    s, folder = alignment_plan.resumed(settings)
    objective, checkpoint = s.objective, alignment_plan.opened(s)
    train, valid, card = _pairs(s, checkpoint)

    def training(parts: Settings) -> Phase:
        length = max(map(preference_pairs.longest, [*train, *valid]))
        return alignment_plan.training(parts, checkpoint, 2 * parts.batch_size, length, "dpo")

    parts = alignment_plan.cut(s, folder, training)
    drawing = (parts.batch_size, parts.grad_accumulation_steps, s.seed)
    seen = preference_pairs.visited(train, s.iters, *drawing)
    compared = [*(train[i] for i in seen), *valid]
    asked = _reference(parts, checkpoint, compared, alignment_plan.budget(s).limit_bytes)
    made = alignment_plan.plan(parts, asked, training(parts))
    made.tell()
    if s.dry_run:
        return {"model": str(checkpoint.path), "pairs": len(train), **made.result()}
    with alignment_run.running(s, folder, checkpoint, made, card, "dpo") as r:
        dtype = alignment_plan.dtype_of(s, checkpoint)

        def ask() -> np.ndarray:
            return preference_pairs.reference(checkpoint, compared, parts.batch_size, dtype, asked.held_tokens)

        found = np.zeros((len(compared), 2), np.float32)
        if distributed.first():
            found = preference_pairs.stored_reference(r.folder, card["fingerprint"], r.files, ask)
        found = np.array(distributed.sent_array(mx.array(found)))
        theirs, held = np.full((len(train), 2), np.nan, np.float32), found[len(seen) :]
        theirs[seen] = found[: len(seen)]
        each = preference_pairs.micro_batches(train, theirs, *drawing)
        loss = partial(objective.loss, frozen_head=s.lora is not None)
        held_out = partial(preference_pairs.measure, r.model, objective, valid, held, parts.batch_size)
        judge = preference_pairs.OF_MEANS if s.loss_type == "dpop" else "loss"
        return r.train(each, loss, held_out, "dpo", judge=judge)


if __name__ == "__main__":
    cli.main(Settings, run, several=True)
