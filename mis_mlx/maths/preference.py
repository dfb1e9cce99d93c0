"""Losses on pairs of answers: DPO, DPO-Positive, IPO and hinge, as pure functions of log-probabilities."""

from typing import Literal

import mlx.core as mx
import mlx.nn as nn

LossType = Literal["dpop", "sigmoid", "ipo", "hinge"]


def pair_losses(
    chosen: mx.array,
    rejected: mx.array,
    beta: float,
    kind: LossType = "dpop",
    dpop_lambda: float = 5.0,
    chosen_tokens: mx.array | float = 1.0,
    rejected_tokens: mx.array | float = 1.0,
) -> mx.array:
    """(B,) losses of pairs whose answers have rewards r_w, chosen, and r_l, rejected, (B,) each, and so many tokens.

    r = log pi(y|x) - log pi_ref(y|x): DPO's implicit reward over beta.
    sigmoid: -log sigma(beta (r_w - r_l)) (arXiv 2305.18290 eq. 7).
    dpop: -log sigma(beta (r_w - r_l - lambda max(0, -r_w))) (arXiv 2402.13228 eq. 3): lambda stands inside beta and
        inside sigma; it pushes back as soon as the chosen answer becomes less likely than it was. At r_w = 0, where
        training begins, the derivative of the penalty is taken to be 0.
    ipo: (r_w / |y_w| - r_l / |y_l| - 1 / (2 beta))^2 (arXiv 2310.12036 eq. 17, averaged over tokens as TRL does).
    hinge: max(0, 1 - beta (r_w - r_l)) (arXiv 2305.10425)."""
    if kind == "ipo":
        return mx.square(chosen / chosen_tokens - rejected / rejected_tokens - 1 / (2 * beta))
    margin = chosen - rejected
    if kind == "hinge":
        return mx.maximum(0.0, 1 - beta * margin)
    if kind == "dpop":
        margin = margin - dpop_lambda * mx.where(chosen < 0, -chosen, 0.0)
    return -nn.log_sigmoid(beta * margin)
