"""What a policy learns by: the clipped loss of a group of answers and their advantages; losses on
pairs of answers.

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
# By how many nats a token's log-probability may differ between two ways of computing it. Attention
# in another order moved SmolLM2-135M's by 1e-5, 0.034 and 0.23 at most (31 tokens, on a CPU); a sum
# of n grows like the root of n.
NOISE = {mx.float32: 2e-5, mx.float16: 0.04, mx.bfloat16: 0.3}


def dead_zone(apart: mx.array, width: mx.array | float) -> mx.array:
    """Differences of log-probabilities, nearer to 0 by `width`, and exactly 0 within it; the
    gradient stays as it was.

    The model and its reference are computed in two ways (MLX has a kernel for attention of which no
    gradient is taken), so a model that has learned nothing yet differs from itself by rounding.
    That is no reward.
    """
    return apart - mx.stop_gradient(mx.clip(apart, -width, width))


def advantages(rewards: np.ndarray, scaled: bool) -> np.ndarray:
    """How much better each answer is than the rest of its group: (N, G) float32, of rewards (N, G).

    reward - mean, over the standard deviation (with Bessel's correction, + 1e-4) where `scaled`;
    Dr. GRPO leaves that out. NaN is an answer that could not be scored: advantage 0, and nothing to
    the mean or the deviation.
    """
    known = ~np.isnan(rewards)
    count = known.sum(axis=1, keepdims=True)
    mean = np.where(known, rewards, 0.0).sum(axis=1, keepdims=True) / np.maximum(count, 1)
    apart = np.where(known, rewards - mean, 0.0)
    if scaled:
        variance = np.square(apart).sum(axis=1, keepdims=True) / np.maximum(count - 1, 1)
        apart = apart / (np.sqrt(variance) + TINY_STD)
    return np.where(teaches(rewards)[:, None], apart, 0.0).astype(np.float32)


def teaches(rewards: np.ndarray) -> np.ndarray:
    """(N,) bool: whether the scored answers of a group differ. The others have no advantage,
    exactly: equal rewards leave rounding errors, and dividing by a deviation of 1e-4 makes
    something of these.
    """
    known = ~np.isnan(rewards)
    high = np.where(known, rewards, -np.inf).max(axis=1)
    low = np.where(known, rewards, np.inf).min(axis=1)
    return high > low


def token_losses(
    new: mx.array,
    old: mx.array,
    advantage: mx.array,
    epsilon: float,
    epsilon_high: float,
    reference: mx.array | None = None,
    beta: float = 0.0,
    *,
    noise: float = 0.0,
) -> tuple[mx.array, mx.array]:
    """-min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A) + beta k3 of every token, (B, T); rho
    = pi_new / pi_old. And (B, T): 1 where the bound holds a token's gradient back, else 0.

    new, old, reference: (B, T) log-probabilities, all at the sampling temperature; only `new` has a
    gradient. advantage: (B,). DAPO's clip-higher is an epsilon_high above epsilon. k3 = e^d - d -
    1, d = log pi_ref - log pi_new: DeepSeekMath's, which TRL by default multiplies by rho. noise:
    the `dead_zone` of d.
    """
    ratio = mx.exp(new - mx.stop_gradient(old))
    each = advantage[:, None]
    losses = -mx.minimum(ratio * each, mx.clip(ratio, 1 - epsilon, 1 + epsilon_high) * each)
    if beta and reference is not None:
        apart = dead_zone(mx.stop_gradient(reference) - new, noise)
        losses = losses + beta * (mx.exp(apart) - apart - 1)
    held = ((ratio > 1 + epsilon_high) & (each > 0)) | ((ratio < 1 - epsilon) & (each < 0))
    return losses, held.astype(mx.float32)


def loss_sum(
    losses: mx.array, mask: mx.array, kind: LossType, max_tokens: int
) -> tuple[mx.array, mx.array]:
    """(sum, count) of token losses (B, T) where mask (B, T) is 1; the step's loss is the sums over
    the counts.

    grpo: a mean over answers of means over tokens. dr_grpo: over answers times `max_tokens`, a
    constant, so that long wrong answers are not favoured. dapo: over all tokens of the step.
    """
    masked = mx.where(mask > 0, losses, 0.0)  # not a product: what was not sampled may be infinite
    if kind == "grpo":
        return (masked.sum(axis=-1) / mx.maximum(mask.sum(axis=-1), 1.0)).sum(), mx.array(
            float(len(losses))
        )
    return masked.sum(), mx.array(
        float(len(losses) * max_tokens)
    ) if kind == "dr_grpo" else mask.sum()


def pair_losses(
    chosen: mx.array,
    rejected: mx.array,
    beta: float,
    kind: PairLoss = "dpop",
    dpop_lambda: float = 5.0,
    chosen_tokens: mx.array | float = 1.0,
    rejected_tokens: mx.array | float = 1.0,
) -> mx.array:
    """(B,) losses of pairs whose answers have rewards r_w, chosen, and r_l, rejected, (B,) each,
    and so many tokens.

    r = log pi(y|x) - log pi_ref(y|x): DPO's implicit reward over beta. sigmoid: -log sigma(beta
    (r_w - r_l)) (arXiv 2305.18290 eq. 7). dpop: -log sigma(beta (r_w - r_l - lambda max(0, -r_w)))
    (arXiv 2402.13228 eq. 3): lambda stands inside beta and
        inside sigma; it pushes back as soon as the chosen answer becomes less likely than it was.
        At r_w = 0, where
        training begins, the derivative of the penalty is taken to be 0.
    ipo: (r_w / |y_w| - r_l / |y_l| - 1 / (2 beta))^2 (arXiv 2310.12036 eq. 17, averaged over tokens
    as TRL does). hinge: max(0, 1 - beta (r_w - r_l)) (arXiv 2305.10425).
    """
    if kind == "ipo":
        return mx.square(chosen / chosen_tokens - rejected / rejected_tokens - 1 / (2 * beta))
    margin = chosen - rejected
    if kind == "hinge":
        return mx.maximum(0.0, 1 - beta * margin)
    if kind == "dpop":
        margin = margin - dpop_lambda * mx.where(chosen < 0, -chosen, 0.0)
    return -nn.log_sigmoid(beta * margin)
