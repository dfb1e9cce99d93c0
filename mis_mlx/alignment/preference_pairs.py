"""Preference optimization: pairs of answers as rectangles, the reference's log-probabilities, the loss of a pair.

The reference is the model before it is trained: two floats a pair, kept in the run folder with their hashes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mis_mlx.alignment import sequence_packing
from mis_mlx.data.examples import Sequenced
from mis_mlx.distillation.live_teacher import labels
from mis_mlx.maths import preference
from mis_mlx.maths.likelihood import token_logps
from mis_mlx.models import distributed, load
from mis_mlx.storage import checkpoint as protocol
from mis_mlx.storage.files import Files

REFERENCE = "reference"
OF_MEANS = "loss_of_means"  # dpop of the mean pair
Pair = Sequence[Sequenced]  # (chosen, rejected), prompts included


@dataclass(frozen=True)
class Objective:
    """Which loss of `maths/preference`, and its numbers."""

    kind: preference.LossType
    beta: float
    dpop_lambda: float

    def loss(
        self, student: nn.Module, tokens: mx.array, learn: mx.array, reference: mx.array, frozen_head: bool = False
    ) -> tuple[mx.array, mx.array, dict[str, mx.array]]:
        """(sum over pairs, pairs, further sums) of 2 B rows (2 B, T), the chosen first; reference: (2 B,). margin: r_w
        - r_l in nats, without beta; chosen, rejected: log pi(y|x)."""
        sums, counts = _sums(student, tokens, learn, frozen_head)
        r_w, r_l = mx.split(sums - reference, 2)
        n_w, n_l = mx.split(counts, 2)
        each = preference.pair_losses(r_w, r_l, self.beta, self.kind, self.dpop_lambda, n_w, n_l)
        chosen, rejected = (part.sum() for part in mx.split(sums, 2))
        more = {
            "margin": (r_w - r_l).sum(),
            "accuracy": (r_w > r_l).astype(mx.float32).sum(),
            "chosen": chosen,
            "rejected": rejected,
            "tokens": mx.array(float(tokens.size)),
        }
        return each.sum(), mx.array(float(len(each))), more


def _sums(student: nn.Module, tokens: mx.array, learn: mx.array, frozen_head: bool) -> tuple[mx.array, mx.array]:
    """Of rows (B, T): (the sum of log-probabilities where `learn` is 1, how many tokens these are), (B,) each."""
    hidden = student.model(tokens)
    flat, head = hidden.reshape(-1, hidden.shape[-1]), load.head_weight(student)
    logps = token_logps(flat, head, labels(tokens), frozen_head=frozen_head)
    return (logps.reshape(tokens.shape) * learn).sum(axis=-1), learn.sum(axis=-1)


def rectangle(pairs: Sequence[Pair]) -> tuple[mx.array, mx.array]:
    """(tokens, learn), (2 B, T) each: the chosen answers, then the rejected ones."""
    tokens, learn, _ = sequence_packing.rectangle([[pair[side]] for side in (0, 1) for pair in pairs])
    return tokens, learn


def reference(model: nn.Module, pairs: Sequence[Pair], batch_size: int) -> np.ndarray:
    """log pi_ref(y|x) of the chosen and the rejected answer of every pair, (N, 2) float32."""
    logps = np.zeros((len(pairs), 2), np.float32)
    for at in sequence_packing.by_length("reference: batch", list(map(longest, pairs)), batch_size):
        sums, _ = _sums(model, *rectangle([pairs[i] for i in at]), frozen_head=True)
        logps[at] = np.array(sums).reshape(2, -1).T
    return logps


def stored_reference(folder: Path, fingerprint: str, files: Files, make: Callable[[], np.ndarray]) -> np.ndarray:
    """What `make()` gave, (N, 2): from the run folder, hashes checked, where it lies there; else made and put there."""
    saved = protocol.newest(folder / REFERENCE, files)
    if saved is not None and saved.state["fingerprint"] == fingerprint:
        return np.array(protocol.load_arrays(saved, "logps")["chosen_rejected"])
    values = make()
    files.make_folder(folder / REFERENCE)
    number = saved.number + 1 if saved else 0
    arrays = {"logps": {"chosen_rejected": mx.array(values)}}
    protocol.save_step(folder / REFERENCE, number, arrays, {"fingerprint": fingerprint}, files)
    return values


def longest(pair: Pair) -> int:
    """Tokens of the longer answer of a pair, its prompt included."""
    return max(len(ids) for ids, _ in pair)


def visited(pairs: Sequence[Pair], iters: int, batch_size: int, parts: int, seed: int) -> np.ndarray:
    """The pairs that the steps of a run train on, rising: those that need the reference."""
    lengths = list(map(longest, pairs))
    steps = [np.concatenate(sequence_packing.drawn(lengths, batch_size, parts, step, seed)) for step in range(iters)]
    return np.unique(np.concatenate(steps))


def micro_batches(
    pairs: Sequence[Pair], logps: np.ndarray, batch_size: int, parts: int, seed: int
) -> Callable[[int], list[tuple[mx.array, ...]]]:
    """Those of any step: tokens, learn (2 B, T) and the reference's log-probabilities (2 B,)."""
    lengths = [longest(pair) for pair in pairs]

    def of_step(step: int) -> list[tuple[mx.array, ...]]:
        at = sequence_packing.drawn(lengths, batch_size, parts, step, seed, distributed.shard)
        return [(*rectangle([pairs[i] for i in part]), mx.array(logps[part].T.reshape(-1))) for part in at]

    return of_step


def measure(
    student: nn.Module, objective: Objective, pairs: Sequence[Pair], logps: np.ndarray, batch_size: int
) -> dict[str, float]:
    """Means over pairs of the loss and all that `Objective.loss` tells beside it, and by how much the chosen answers
    became likelier than under the reference ("chosen_gain", nats an answer). With dpop also `OF_MEANS`, by which
    checkpoints are judged: it falls where the margin grows and the chosen answers do not become less likely on the
    whole. The mean of the losses rises as soon as one chosen answer does, and on held-out pairs one always does."""
    sums = dict[str, float]()
    for at in sequence_packing.by_length("held out: batch", list(map(longest, pairs)), batch_size):
        tokens, learn = rectangle([pairs[i] for i in at])
        total, _, more = objective.loss(student, tokens, learn, mx.array(logps[at].T.reshape(-1)), frozen_head=True)
        for name, value in {"loss": total, **more}.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    sums.pop("tokens")
    means = {name: value / len(pairs) for name, value in sums.items()}
    means["chosen_gain"] = gain = means["chosen"] - float(logps[:, 0].mean())
    if objective.kind == "dpop":
        mean = mx.array(gain), mx.array(gain - means["margin"])
        means[OF_MEANS] = float(preference.pair_losses(*mean, objective.beta, "dpop", objective.dpop_lambda))
    return means
