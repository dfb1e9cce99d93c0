"""Train on pairs of better and worse answers: DPO-Positive, DPO.

The reference is the model before it is trained: two floats a pair, saved in the run folder with
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
from mis_mlx.alignment import alignment_run, padded_rows
from mis_mlx.alignment.whole_model import as_in_training
from mis_mlx.data.examples import Sequenced
from mis_mlx.hardware.stage_cost import StageCost
from mis_mlx.maths import losses, rl_losses
from mis_mlx.models.opening import load
from mis_mlx.models.passing import pass_cost
from mis_mlx.storage import checkpoint as protocol
from mis_mlx.types import Positive, Rate, Within

ANSWERS = ("chosen", "rejected")
REFERENCE = "reference"
OF_MEANS = "loss_of_means"  # dpop of the mean pair
Pair = Sequence[Sequenced]  # (chosen, rejected), prompts included


@dataclass(frozen=True)
class Settings(alignment_run.Alignment):
    """Trains on rows of {"prompt", "chosen", "rejected"}."""

    learning_rate: Rate = 5e-6
    """peak learning rate; decays to a tenth along a cosine; for billions of parameters, try 1e-6"""
    loss_type: rl_losses.PairLoss = "dpop"
    """dpop: DPO that keeps the chosen answer likely; sigmoid: plain DPO"""
    beta: Positive = 0.1
    """how strongly the model is held to its original self"""
    dpop_lambda: Annotated[float, Within(0.0, 1e4)] = 5.0
    """weight of dpop's penalty, inside beta; 0 is plain DPO; at the paper's 50, the default model
    learns the chosen answers but no preference (measured)
    """

    def loss(
        self,
        student: nn.Module,
        tokens: mx.array,
        loss_mask: mx.array,
        reference: mx.array,
    ) -> tuple[mx.array, mx.array, dict[str, mx.array]]:
        """(sum over pairs, pairs, further sums) of 2 B rows (2 B, T), the chosen answers first.

        loss_mask: (2 B, T), 1 where a prediction counts. reference: (2 B,) log-probabilities.
        Further sums: margin, r_w - r_l in nats, without beta; chosen, rejected: log pi(y|x);
        chosen_gain: r_w. Rewards within rounding are 0.
        """
        sums, counts = _sums(student, tokens, loss_mask, self.lora is not None)
        noise = rl_losses.NOISE[load.activation_dtype(student)] * mx.sqrt(counts)
        r_w, r_l = mx.split(rl_losses.dead_zone(sums - reference, noise), 2)
        losses = rl_losses.pair_losses(
            r_w,
            r_l,
            beta=self.beta,
            kind=self.loss_type,
            dpop_lambda=self.dpop_lambda,
        )
        chosen, rejected = mx.split(sums, 2)
        further = {
            "margin": (r_w - r_l).sum(),
            "accuracy": (r_w > r_l).astype(mx.float32).sum(),
            "chosen": chosen.sum(),
            "rejected": rejected.sum(),
            "chosen_gain": r_w.sum(),
            "tokens": mx.array(float(tokens.size)),
        }
        return losses.sum(), mx.array(float(len(losses))), further


def _sums(
    student: nn.Module,
    tokens: mx.array,
    loss_mask: mx.array,
    frozen_head: bool,
) -> tuple[mx.array, mx.array]:
    """(sums of the log-probabilities where `loss_mask` is 1, counts of these tokens), (B,) each.

    tokens, loss_mask: (B, T).
    """
    hidden = student.model(tokens)
    logps = losses.token_logps(
        hidden.reshape(-1, hidden.shape[-1]),
        load.head_weight(student),
        losses.next_tokens(tokens),
        frozen_head=frozen_head,
        softcap=load.logit_softcap(student),
    )
    return (logps.reshape(tokens.shape) * loss_mask).sum(axis=-1), loss_mask.sum(axis=-1)


def padded_pairs(pairs: Sequence[Pair]) -> tuple[mx.array, mx.array]:
    """(tokens, learn), (2 B, T) each: the chosen answers, then the rejected ones."""
    chosen = [pair[0] for pair in pairs]
    rejected = [pair[1] for pair in pairs]
    return padded_rows.padded([*chosen, *rejected])


def reference(
    model: nn.Module,
    pairs: Sequence[Pair],
    batch_size: int,
    *,
    trained: bool,
) -> np.ndarray:
    """log pi_ref(y|x) of the chosen and the rejected answer of every pair, (N, 2) float32.

    trained: computed as in training, where a gradient is taken; otherwise as for held-out pairs.
    """
    logps = np.zeros((len(pairs), 2), np.float32)
    lengths = list(map(longer_answer_tokens, pairs))
    for batch in padded_rows.by_length("reference: batch", lengths, batch_size):
        tokens, loss_mask = padded_pairs([pairs[i] for i in batch])
        work = partial(_row_sums, tokens=tokens, loss_mask=loss_mask)
        sums = as_in_training(model, work) if trained else work(model)
        logps[batch] = np.array(sums).reshape(2, -1).T
    return logps


def _row_sums(model: nn.Module, tokens: mx.array, loss_mask: mx.array) -> mx.array:
    return _sums(model, tokens, loss_mask, frozen_head=True)[0]


def longer_answer_tokens(pair: Pair) -> int:
    """Tokens of the longer answer of a pair, its prompt included."""
    return max(len(ids) for ids, _ in pair)


def _batch(
    pairs: Sequence[Pair],
    logps: np.ndarray,
    indices: Sequence[int] | np.ndarray,
) -> tuple[mx.array, mx.array, mx.array]:
    """Some of the pairs: tokens, learn (2 B, T) and the reference's log-probabilities (2 B,)."""
    tokens, loss_mask = padded_pairs([pairs[i] for i in indices])
    return tokens, loss_mask, mx.array(logps[indices].T.reshape(-1))


def micro_batches(
    s: Settings,
    pairs: Sequence[Pair],
    logps: np.ndarray,
    step: int,
) -> list[tuple[mx.array, ...]]:
    """Those of a step: tokens, learn (2 B, T) and the reference's log-probabilities (2 B,)."""
    batches = padded_rows.drawn_indices(list(map(longer_answer_tokens, pairs)), s, step)
    return [_batch(pairs, logps, indices) for indices in batches]


def measure(
    model: nn.Module,
    s: Settings,
    pairs: Sequence[Pair],
    logps: np.ndarray,
    batch: int,
) -> dict[str, float]:
    """Means over pairs of the loss and of all further figures of `Settings.loss`.

    "chosen_gain" (nats an answer) says how much likelier the chosen answers became than under the
    reference. With dpop also `OF_MEANS`, which judges checkpoints: it falls where the margin grows
    and the chosen answers do not become less likely on the whole. The mean of the losses rises as
    soon as one chosen answer becomes less likely, and on held-out pairs one always does. batch:
    pairs measured at a time.
    """
    sums: dict[str, float] = {}
    lengths = list(map(longer_answer_tokens, pairs))
    for indices in padded_rows.by_length("held out: batch", lengths, batch):
        total, _, further = s.loss(model, *_batch(pairs, logps, indices))
        for name, value in {"loss": total, **further}.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    sums.pop("tokens")
    means = {name: value / len(pairs) for name, value in sums.items()}
    if s.loss_type == "dpop":
        chosen = means["chosen_gain"]
        rejected = chosen - means["margin"]
        loss = rl_losses.pair_losses(
            mx.array(chosen),
            mx.array(rejected),
            beta=s.beta,
            kind="dpop",
            dpop_lambda=s.dpop_lambda,
        )
        means[OF_MEANS] = float(loss)
    return means


def _reference(
    alignment: alignment_run.AlignmentRun,
    trained: Sequence[Pair],
    held_out: Sequence[Pair],
    batch_size: int,
) -> np.ndarray:
    """The reference's log-probabilities of these pairs, (N, 2), which the run keeps."""
    folder = alignment.folder / REFERENCE
    saved = protocol.newest(folder)
    if saved:
        # of the same data: a run is not resumed with others
        return np.array(protocol.load_arrays(saved, "logps")["chosen_rejected"])
    parts = [
        reference(alignment.model, trained, batch_size=batch_size, trained=True),
        reference(alignment.model, held_out, batch_size=batch_size, trained=False),
    ]
    logps = np.concatenate(parts)
    arrays = {"logps": {"chosen_rejected": mx.array(logps)}}
    state = {"fingerprint": alignment.card["fingerprint"]}
    protocol.save_step(folder, 0, arrays, state)
    return logps


def run(settings: Settings) -> dict[str, Any]:
    """The command: open, check the data, plan, ask the reference, train, write the best student."""
    s, folder, checkpoint = alignment_run.open_run_model(settings)
    train, valid, card = alignment_run.data(s, checkpoint, ("pair",), ANSWERS)

    def training(parts: Settings) -> StageCost:
        length = max(map(longer_answer_tokens, [*train, *valid]))
        return alignment_run.training_cost(
            parts, checkpoint, 2 * parts.batch_size, length, name="dpo"
        )

    parts = alignment_run.fit_micro_batches(s, folder, training)
    # Only pairs that a step sees need the reference.
    seen = padded_rows.visited_rows(len(train), parts)
    trained = [train[i] for i in seen]
    tokens = sum(2 * longer_answer_tokens(pair) for pair in [*trained, *valid])
    phase = training(parts)
    asking = pass_cost.forward_flops(
        alignment_run.model_size(s, checkpoint), tokens, s.max_seq_length
    )
    phases = [replace(phase, flops=phase.flops + asking)]
    planned = alignment_run.report_plan(s, phases)
    if s.dry_run:
        return {"model": str(checkpoint.path), "pairs": len(train), **planned}
    with alignment_run.start_run(
        s,
        folder,
        checkpoint,
        micro=parts.batch_size,
        planned=planned,
        card=card,
        name="dpo",
    ) as alignment:
        logps = _reference(alignment, trained, valid, parts.batch_size)
        # NaN where no step looks
        of_train = np.full((len(train), 2), np.nan, np.float32)
        of_train[seen] = logps[: len(seen)]
        of_valid = logps[len(seen) :]
        batches = partial(micro_batches, parts, train, of_train)
        held_out = partial(measure, s=s, pairs=valid, logps=of_valid, batch=parts.batch_size)
        judge = OF_MEANS if s.loss_type == "dpop" else "loss"
        return alignment.train(batches, s.loss, held_out, judge=judge)


if __name__ == "__main__":
    cli.main(Settings, run, several=True)
