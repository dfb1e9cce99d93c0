"""Preference optimization: of two answers the chosen one becomes likelier; DPO-Positive, DPO, IPO
or hinge.

The reference is the model before it is trained: two floats a pair, kept in the run folder with
their hashes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mis_mlx import cli
from mis_mlx.alignment import alignment_run, sequence_packing
from mis_mlx.data.examples import Sequenced
from mis_mlx.distillation import live_teacher, train_loop
from mis_mlx.maths import losses, policy
from mis_mlx.models import distributed, load
from mis_mlx.planner import estimates
from mis_mlx.storage import checkpoint as protocol
from mis_mlx.types import Positive, Rate, Within

ANSWERS = ("chosen", "rejected")
REFERENCE = "reference"
OF_MEANS = "loss_of_means"  # dpop of the mean pair
Pair = Sequence[Sequenced]  # (chosen, rejected), prompts included


@dataclass(frozen=True)
class Settings(alignment_run.Alignment):
    """One run. Rows: {"prompt", "chosen", "rejected"}."""

    learning_rate: Rate = 5e-6
    """peak; falls to a tenth along a cosine; 1e-6 suits a model of billions"""
    loss_type: policy.PairLoss = "dpop"
    """dpop: DPO that does not let the chosen answer become less likely; sigmoid: plain DPO; ipo;
    hinge
    """
    beta: Positive = 0.1
    """how far the model may go from the one it was"""
    dpop_lambda: Annotated[float, Within(0.0, 1e4)] = 5.0
    """weight of the penalty in dpop, inside beta; 0 is plain DPO; at 50, the paper's, the default
    model learns the chosen answers and prefers nothing (measured)
    """

    def loss(
        self, student: nn.Module, tokens: mx.array, learn: mx.array, reference: mx.array
    ) -> tuple[mx.array, mx.array, dict[str, mx.array]]:
        """(sum over pairs, pairs, further sums) of 2 B rows (2 B, T), the chosen first; reference:
        (2 B,). margin: r_w
        - r_l in nats, without beta; chosen, rejected: log pi(y|x); chosen_gain: r_w. Rewards within
          rounding are 0.
        """
        sums, counts = _sums(student, tokens, learn, self.lora is not None)
        noise = policy.NOISE[load.activation_dtype(student)] * mx.sqrt(counts)
        r_w, r_l = mx.split(policy.dead_zone(sums - reference, noise), 2)
        n_w, n_l = mx.split(counts, 2)
        each = policy.pair_losses(r_w, r_l, self.beta, self.loss_type, self.dpop_lambda, n_w, n_l)
        chosen, rejected = (part.sum() for part in mx.split(sums, 2))
        more = {
            "margin": (r_w - r_l).sum(),
            "accuracy": (r_w > r_l).astype(mx.float32).sum(),
            "chosen": chosen,
            "rejected": rejected,
            "chosen_gain": r_w.sum(),
            "tokens": mx.array(float(tokens.size)),
        }
        return each.sum(), mx.array(float(len(each))), more


def _sums(
    student: nn.Module, tokens: mx.array, learn: mx.array, frozen_head: bool
) -> tuple[mx.array, mx.array]:
    """Of rows (B, T): (the sum of log-probabilities where `learn` is 1, how many tokens these are),
    (B,) each.
    """
    hidden = student.model(tokens)
    flat = hidden.reshape(-1, hidden.shape[-1])
    head = load.head_weight(student)
    cap = load.logit_softcap(student)
    logps = losses.token_logps(
        flat, head, live_teacher.labels(tokens), frozen_head=frozen_head, softcap=cap
    )
    return (logps.reshape(tokens.shape) * learn).sum(axis=-1), learn.sum(axis=-1)


def rectangle(pairs: Sequence[Pair]) -> tuple[mx.array, mx.array]:
    """(tokens, learn), (2 B, T) each: the chosen answers, then the rejected ones."""
    tokens, learn, _ = sequence_packing.rectangle(
        [[pair[side]] for side in (0, 1) for pair in pairs]
    )
    return tokens, learn


def reference(
    model: nn.Module, pairs: Sequence[Pair], batch_size: int, *, trained: bool
) -> np.ndarray:
    """log pi_ref(y|x) of the chosen and the rejected answer of every pair, (N, 2) float32.

    trained: as training computes them, of which a gradient is taken; else as what is held out."""
    logps = np.zeros((len(pairs), 2), np.float32)
    for at in sequence_packing.by_length("reference: batch", list(map(longest, pairs)), batch_size):
        tokens, learn = rectangle([pairs[i] for i in at])
        work = partial(_row_sums, tokens=tokens, learn=learn)
        sums = train_loop.as_in_training(model, work) if trained else work(model)
        logps[at] = np.array(sums).reshape(2, -1).T
    return logps


def _row_sums(model: nn.Module, tokens: mx.array, learn: mx.array) -> mx.array:
    return _sums(model, tokens, learn, frozen_head=True)[0]


def longest(pair: Pair) -> int:
    """Tokens of the longer answer of a pair, its prompt included."""
    return max(len(ids) for ids, _ in pair)


def micro_batches(
    s: Settings, pairs: Sequence[Pair], logps: np.ndarray, step: int
) -> list[tuple[mx.array, ...]]:
    """Those of a step: tokens, learn (2 B, T) and the reference's log-probabilities (2 B,)."""
    at = sequence_packing.drawn(list(map(longest, pairs)), s, step)
    return [
        (*rectangle([pairs[i] for i in part]), mx.array(logps[part].T.reshape(-1))) for part in at
    ]


def measure(
    model: nn.Module, s: Settings, pairs: Sequence[Pair], logps: np.ndarray, batch: int
) -> dict[str, float]:
    """Means over pairs of the loss and all that `Settings.loss` tells beside it, and by how much
    the chosen answers became likelier than under the reference ("chosen_gain", nats an answer).
    With dpop also `OF_MEANS`, by which checkpoints are judged: it falls where the margin grows and
    the chosen answers do not become less likely on the whole. The mean of the losses rises as soon
    as one chosen answer does, and on held-out pairs one always does.
    """
    sums = dict[str, float]()
    for at in sequence_packing.by_length("held out: batch", list(map(longest, pairs)), batch):
        tokens, learn = rectangle([pairs[i] for i in at])
        total, _, more = s.loss(model, tokens, learn, mx.array(logps[at].T.reshape(-1)))
        for name, value in {"loss": total, **more}.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    sums.pop("tokens")
    means = {name: value / len(pairs) for name, value in sums.items()}
    gain = means["chosen_gain"]
    if s.loss_type == "dpop":
        mean = mx.array(gain), mx.array(gain - means["margin"])
        means[OF_MEANS] = float(policy.pair_losses(*mean, s.beta, "dpop", s.dpop_lambda))
    return means


def run(settings: Settings) -> dict[str, Any]:
    """The command: open, read and check the data, plan, ask the reference, train, write the best
    student.
    """
    s, folder, checkpoint = alignment_run.opened(settings)
    train, valid, card = alignment_run.data(s, checkpoint, ("pair",), ANSWERS)

    def training(parts: Settings) -> estimates.StageCost:
        length = max(map(longest, [*train, *valid]))
        return alignment_run.training(parts, checkpoint, 2 * parts.batch_size, length, "dpo")

    parts = alignment_run.cut(s, folder, training)
    seen = sequence_packing.visited(len(train), parts)  # who needs the reference
    compared = [*(train[i] for i in seen), *valid]
    tokens = sum(2 * longest(pair) for pair in compared)
    phase = training(parts)
    asking = estimates.forward_flops(alignment_run.sizes(s, checkpoint), tokens, s.max_seq_length)
    phases = [replace(phase, flops=phase.flops + asking)]
    planned = alignment_run.planned(s, phases)
    if s.dry_run:
        return {"model": str(checkpoint.path), "pairs": len(train), **planned}
    with alignment_run.running(s, folder, checkpoint, parts.batch_size, phases, card, "dpo") as r:
        logps = np.zeros((len(compared), 2), np.float32)
        kept = r.folder / REFERENCE
        if distributed.is_main():
            # of the same data: a run is not resumed with others
            if saved := protocol.newest(kept, r.files):
                logps = np.array(protocol.load_arrays(saved, "logps")["chosen_rejected"])
            else:
                asked = partial(reference, r.model, batch_size=parts.batch_size)
                learned = asked(compared[: len(seen)], trained=True)
                held = asked(valid, trained=False)
                logps = np.concatenate([learned, held])
                arrays = {"logps": {"chosen_rejected": mx.array(logps)}}
                protocol.save_step(kept, 0, arrays, {"fingerprint": card["fingerprint"]}, r.files)
        logps = np.array(distributed.broadcast_array(mx.array(logps)))
        of_train = np.full((len(train), 2), np.nan, np.float32)
        of_train[seen] = logps[: len(seen)]
        each = partial(micro_batches, parts, train, of_train)
        held_out = partial(measure, r.model, s, valid, logps[len(seen) :], parts.batch_size)
        return r.train(each, s.loss, held_out, judge=OF_MEANS if s.loss_type == "dpop" else "loss")


if __name__ == "__main__":
    cli.main(Settings, run, several=True)
