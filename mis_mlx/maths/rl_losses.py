"""Losses of reinforcement learning and preference learning: answers in groups, answers in pairs.

Formulas: GRPO (arXiv 2402.03300), Dr. GRPO (arXiv 2503.20783), DAPO (arXiv 2503.14476); numbers
agree with TRL 1.16. A loss is a sum and a count, as everywhere here, so micro-batches of any size
add up to the same step.
"""

from typing import Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np

LossType = Literal["grpo", "dr_grpo", "dapo"]
PairLoss = Literal["dpop", "sigmoid", "ipo", "hinge"]
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


def advantages(rewards: np.ndarray, scaled: bool) -> np.ndarray:
    """How much better each answer is than its group: (N, G) float32, from rewards (N, G).

    reward - mean, where `scaled` over the standard deviation (with Bessel's correction, + 1e-4);
    Dr. GRPO leaves that division out. NaN marks an answer without a score: its advantage is 0, and
    it counts neither in the mean nor in the deviation.
    """
    known = ~np.isnan(rewards)
    count = known.sum(axis=1, keepdims=True)
    total = np.where(known, rewards, 0.0).sum(axis=1, keepdims=True)
    mean = total / np.maximum(count, 1)
    apart = np.where(known, rewards - mean, 0.0)
    if scaled:
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


def token_losses(
    new: mx.array,
    old: mx.array,
    advantage: mx.array,
    *,
    epsilon: float,
    epsilon_high: float,
    reference: mx.array | None = None,
    beta: float = 0.0,
    noise: float = 0.0,
) -> tuple[mx.array, mx.array]:
    """(losses (B, T), (B, T): 1 where clipping stops a token's gradient, else 0).

    A token's loss is -min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A) + beta k3, with rho =
    pi_new / pi_old. k3 = e^d - d - 1, d = log pi_ref - log pi_new: DeepSeekMath's, which TRL by
    default multiplies by rho.

    new, old, reference: (B, T) log-probabilities, all at the sampling temperature; only `new` has a
    gradient. advantage: (B,). DAPO's clip-higher is an epsilon_high above epsilon. noise: the width
    of d's `dead_zone`.
    """
    ratio = mx.exp(new - mx.stop_gradient(old))
    advantage = advantage[:, None]
    bounded = mx.clip(ratio, 1 - epsilon, 1 + epsilon_high)
    losses = -mx.minimum(ratio * advantage, bounded * advantage)
    if beta and reference is not None:
        apart = dead_zone(mx.stop_gradient(reference) - new, noise)
        losses = losses + beta * (mx.exp(apart) - apart - 1)
    above = (ratio > 1 + epsilon_high) & (advantage > 0)
    below = (ratio < 1 - epsilon) & (advantage < 0)
    return losses, (above | below).astype(mx.float32)


def loss_sum(
    losses: mx.array,
    mask: mx.array,
    kind: LossType,
    max_tokens: int,
) -> tuple[mx.array, mx.array]:
    """(sum, count) of token losses (B, T) where mask (B, T) is 1.

    A step's loss is the sum over its micro-batches' sums, divided by that of their counts. grpo: a
    mean over answers of means over tokens. dr_grpo: divided by answers times `max_tokens`, a
    constant, so that long wrong answers are not favoured. dapo: divided by all tokens of the step.
    """
    masked = mx.where(mask > 0, losses, 0.0)  # not a product: what was not sampled may be infinite
    if kind == "grpo":
        means = masked.sum(axis=-1) / mx.maximum(mask.sum(axis=-1), 1.0)
        return means.sum(), mx.array(float(len(losses)))
    if kind == "dr_grpo":
        return masked.sum(), mx.array(float(len(losses) * max_tokens))
    return masked.sum(), mask.sum()


def pair_losses(
    chosen: mx.array,
    rejected: mx.array,
    beta: float,
    kind: PairLoss = "dpop",
    dpop_lambda: float = 5.0,
    chosen_tokens: mx.array | float = 1.0,
    rejected_tokens: mx.array | float = 1.0,
) -> mx.array:
    """(B,) losses of pairs of answers, from their rewards: r_w chosen (B,), r_l rejected (B,).

    r = log pi(y|x) - log pi_ref(y|x): DPO's implicit reward over beta.

    * sigmoid: -log sigma(beta (r_w - r_l)) (arXiv 2305.18290 eq. 7).
    * dpop: -log sigma(beta (r_w - r_l - lambda max(0, -r_w))) (arXiv 2402.13228 eq. 3). lambda
      stands inside beta and inside sigma; it pushes back as soon as the chosen answer becomes less
      likely than it was. At r_w = 0, where training begins, the penalty's derivative is taken as 0.
    * ipo: (r_w / |y_w| - r_l / |y_l| - 1 / (2 beta))^2 (arXiv 2310.12036 eq. 17, averaged over
      tokens as TRL does). chosen_tokens, rejected_tokens: |y_w| and |y_l|, (B,) each.
    * hinge: max(0, 1 - beta (r_w - r_l)) (arXiv 2305.10425).
    """
    if kind == "ipo":
        margin = chosen / chosen_tokens - rejected / rejected_tokens
        return mx.square(margin - 1 / (2 * beta))
    margin = chosen - rejected
    if kind == "hinge":
        return mx.maximum(0.0, 1 - beta * margin)
    if kind == "dpop":
        margin = margin - dpop_lambda * mx.where(chosen < 0, -chosen, 0.0)
    return -nn.log_sigmoid(beta * margin)
