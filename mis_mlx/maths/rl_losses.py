"""Losses of reinforcement learning and preference learning: answers in groups, answers in pairs.

Formulas: GRPO (arXiv 2402.03300), DAPO (arXiv 2503.14476); numbers agree with TRL 1.16. A loss is
a sum and a count, as everywhere here, so micro-batches of any size add up to the same step.
"""

from typing import Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np

PairLoss = Literal["dpop", "sigmoid"]
TINY_STD = 1e-4  # TRL's
# Nats by which a token's log-probability may differ between two ways to compute it. Attention in
# another order moved SmolLM2-135M's by 1e-5, 0.034 and 0.23 at most (31 tokens, on a CPU); a sum of
# n of them grows like the root of n.
NOISE = {mx.float32: 2e-5, mx.float16: 0.04, mx.bfloat16: 0.3}


def dead_zone(apart: mx.array, width: mx.array | float) -> mx.array:
    """Differences of log-probabilities moved towards 0 by `width`, and exactly 0 within it.

    The gradient is that of `apart`. The model and its reference are computed in two ways (MLX has a
    kernel for attention without a gradient), so even before any training the model differs from
    itself by rounding. That must not count as a reward.
    """
    return apart - mx.stop_gradient(mx.clip(apart, -width, width))


def advantages(rewards: np.ndarray) -> np.ndarray:
    """How much better each answer is than its group: (N, G) float32, from rewards (N, G).

    reward - mean, over the standard deviation (with Bessel's correction, + 1e-4). NaN marks an
    answer without a score: its advantage is 0, and it counts neither in the mean nor in the
    deviation.
    """
    known = ~np.isnan(rewards)
    count = known.sum(axis=1, keepdims=True)
    total = np.where(known, rewards, 0.0).sum(axis=1, keepdims=True)
    mean = total / np.maximum(count, 1)
    apart = np.where(known, rewards - mean, 0.0)
    squares = np.square(apart).sum(axis=1, keepdims=True)
    variance = squares / np.maximum(count - 1, 1)
    apart = apart / (np.sqrt(variance) + TINY_STD)
    return np.where(teaches(rewards)[:, None], apart, 0.0).astype(np.float32)


def teaches(rewards: np.ndarray) -> np.ndarray:
    """(N,) bool: whether the scored answers of each group differ in their rewards.

    The other groups get advantages of exactly 0. Their equal rewards leave rounding errors, which a
    deviation of 1e-4 would blow up.
    """
    known = ~np.isnan(rewards)
    high = np.where(known, rewards, -np.inf).max(axis=1)
    low = np.where(known, rewards, np.inf).min(axis=1)
    return high > low


def token_loss_sum(
    new: mx.array,
    advantage: mx.array,
    mask: mx.array,
    *,
    reference: mx.array | None = None,
    beta: float = 0.0,
    noise: float = 0.0,
) -> mx.array:
    """The sum of the losses of answers' tokens (B, T) where mask (B, T) is 1.

    A token's loss is -rho A + beta k3. rho, the ratio to the model that sampled, is 1: that is the
    model itself, and the gradient of rho is that of `new`. k3 = e^d - d - 1, d = log pi_ref - log
    pi_new: DeepSeekMath's. DAPO divides the sum by all tokens of the step.

    new, reference: (B, T) log-probabilities, both at the sampling temperature; only `new` has a
    gradient. Whatever stands where mask is 0 has no part in value or gradient. advantage: (B,).
    noise: the width of d's `dead_zone`.
    """
    # What goes into exp is masked, not what comes out: an infinity times 0 is NaN in a gradient.
    sampled = mask > 0
    new = mx.where(sampled, new, 0.0)
    losses = -mx.exp(new - mx.stop_gradient(new)) * advantage[:, None]
    if beta and reference is not None:
        reference = mx.where(sampled, reference, 0.0)
        apart = dead_zone(mx.stop_gradient(reference) - new, noise)
        losses = losses + beta * (mx.exp(apart) - apart - 1)
    return mx.where(sampled, losses, 0.0).sum()


def pair_losses(
    chosen: mx.array,
    rejected: mx.array,
    beta: float,
    kind: PairLoss = "dpop",
    dpop_lambda: float = 5.0,
) -> mx.array:
    """(B,) losses of pairs of answers, from their rewards: r_w chosen (B,), r_l rejected (B,).

    r = log pi(y|x) - log pi_ref(y|x): DPO's implicit reward over beta.

    * sigmoid: -log sigma(beta (r_w - r_l)) (arXiv 2305.18290 eq. 7).
    * dpop: -log sigma(beta (r_w - r_l - lambda max(0, -r_w))) (arXiv 2402.13228 eq. 3). lambda
      stands inside beta and inside sigma; it pushes back as soon as the chosen answer becomes less
      likely than it was. At r_w = 0, where training begins, the penalty's derivative is taken as 0.
    """
    margin = chosen - rejected
    if kind == "dpop":
        margin = margin - dpop_lambda * mx.where(chosen < 0, -chosen, 0.0)
    return -nn.log_sigmoid(beta * margin)
