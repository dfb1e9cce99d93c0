"""What two models' logits say of each other, of a vocabulary that comes in parts."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mis_mlx.compute import quick_exp

GROUP = 4096  # tokens compared in one part of the vocabulary before the next part is read
CHUNK = 256  # of those tokens, as many at a time
ARRAYS = 8  # float32 (n, v) that a comparison of n tokens in a part of v holds at a time


def compared(teacher: mx.array, student: mx.array, targets: np.ndarray, start: int = 0) -> mx.array:
    """What `over_parts` needs of logits (n, v) in one part of the vocabulary: (n, 11); lazy.

    targets (n,): the right tokens. start: the first token of this part.
    """
    # Of the token that the teacher draws in this part: the same for every model on one text.
    seed = (start, int(targets.sum()))
    chance = mx.array(np.random.default_rng(seed).random(len(targets), np.float32))
    p, teacher_lse = quick_exp.softmax_lse(teacher)
    q, lse = quick_exp.softmax_lse(student)
    kl = (p * (teacher - student)).sum(axis=-1) - teacher_lse + lse
    # The right token is in this part or in another one, where its logit is -inf.
    places = mx.array(targets - start)
    in_part = (places >= 0) & (places < student.shape[1])
    columns = mx.where(in_part, places, 0)[:, None]
    figures = []
    for z in (teacher, student):
        right = mx.take_along_axis(z, columns, axis=-1)[:, 0]
        figures.append(mx.where(in_part, right, -mx.inf))
    for z in (teacher, student):
        best = z.argmax(axis=-1) + start
        # float32 holds the number of a token exactly up to 2^24
        figures += [z.max(axis=-1), best.astype(mx.float32)]
    # A share of the sum, which rounding may leave below 1: a token without any probability is not
    # drawn, whose two logarithms would have no difference.
    sums = mx.cumsum(p, axis=-1)
    drawn = (sums < chance[:, None] * sums[:, -1:]).sum(axis=-1, keepdims=True)
    for probabilities in (p, q):
        figures.append(mx.log(mx.take_along_axis(probabilities, drawn, axis=-1)[:, 0]))
    return mx.stack([kl, teacher_lse, lse, *figures], axis=1)


def over_parts(parts: Sequence[np.ndarray | mx.array]) -> np.ndarray:
    """Figures of a whole vocabulary from its parts' (n, 11), in their order: (n, 5) float64.

    The five are the teacher's negative log-likelihood, the student's, KL(teacher || student), all
    in nats, 1 where the top token is the same, and an estimate of 1 - total variation: how often
    both can draw the same token ("EAR", arXiv 2605.02404).

    1 - total variation = sum min(p, q) = sum p min(1, q / p). Nobody knows p and q before the last
    part has come, so each part leaves one token, drawn from p within the part: unbiased, and the
    mean of thousands of predictions is within half a point.
    """
    with np.errstate(all="ignore"):
        # the axes of each of the eleven: (part, n)
        stack = np.array([np.asarray(part) for part in parts], np.float64)
        figures = np.moveaxis(stack, 2, 0)
        part_kl, teacher_lse, lse, *others = figures
        teacher_right, right, teacher_max, teacher_best, largest, best, *drawn = others
        teacher_total = np.logaddexp.reduce(teacher_lse)
        total = np.logaddexp.reduce(lse)
        # A part's KL is that of the probabilities in it; its share of the teacher's weighs it.
        share = np.exp(teacher_lse - teacher_total)
        weighted = share * (part_kl + teacher_lse - lse)
        kl = weighted.sum(axis=0) - teacher_total + total
        teacher_top = _over_all(teacher_max, teacher_best)
        top = _over_all(largest, best)
        same = np.equal(teacher_top, top)
        teacher_nll = teacher_total - teacher_right.max(axis=0)
        nll = total - right.max(axis=0)
        teacher_drawn, student_drawn = drawn
        ratio = student_drawn + lse - total - (teacher_drawn + teacher_lse - teacher_total)
        shared = (share * np.exp(np.minimum(ratio, 0.0))).sum(axis=0)
        return np.stack([teacher_nll, nll, kl, same, shared], axis=1)


def _over_all(largest: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The top token (n,) over all parts; largest, tokens (part, n): each part's logit and token."""
    part = largest.argmax(axis=0)[None]
    return np.take_along_axis(tokens, part, 0)[0]
