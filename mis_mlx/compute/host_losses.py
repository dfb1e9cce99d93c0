"""Losses over a vocabulary by numpy, a few rows at a time.

Comparisons use them where MLX computes on a CPU, whose exp takes seven times as long as numpy's.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import numpy as np

from mis_mlx.compute import precision, streams
from mis_mlx.maths.losses import softmax_lse

NUMBERS = 8 * 49_152  # logits at a time: 1.5 MB
GROUP = 4096  # tokens compared in one part of the vocabulary before the next part is read
CHUNK = 256  # of those tokens, as many at a time


def view(array: mx.array) -> np.ndarray:
    """The memory of an array, evaluated; numpy may write there."""
    mx.eval(array)
    buffer: Any = array
    return np.asarray(memoryview(buffer))


def softmax(z: np.ndarray) -> np.ndarray:
    """Rows z (n, V) become softmax(z), in place; returns their logsumexp (n,)."""
    top = z.max(axis=1)
    z -= top[:, None]
    np.exp(z, out=z)
    total = z.sum(axis=1)
    z *= (1.0 / total)[:, None]
    return np.asarray(top + np.log(total))


def by_rows(work: Callable[..., np.ndarray], *arrays: np.ndarray) -> np.ndarray:
    """`work` on arrays (n, ...), a few rows at a time, in as many threads as there are streams.

    Returns the results in the order of the rows: (n, ...).
    """
    count, columns = arrays[0].shape[:2]
    rows = max(1, NUMBERS // columns)

    def of_piece(start: int) -> np.ndarray:
        stop = start + rows
        pieces = [array[start:stop] for array in arrays]
        with np.errstate(all="ignore"):  # the caller checks for NaN and says so
            return work(*pieces)

    starts = range(0, count, rows)
    with ThreadPoolExecutor(streams.count()) as pool:
        results = list(pool.map(of_piece, starts))
    return np.concatenate(results)


def _divergence(
    z: np.ndarray, target: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """For rows (n, V): KL(softmax(target) || softmax(z)) in nats, and what it is made of.

    Returns the KL, the logsumexp of target, that of z, all (n,), and softmax(target) (n, V). z
    becomes its softmax; target is overwritten.
    """
    p = target.copy()
    target_lse = softmax(p)
    target -= z
    lse = softmax(z)
    # sum p (log p - log q) = sum p (target - z) - lse(target) + lse(z)
    kl = np.einsum("ij,ij->i", p, target) - target_lse + lse
    return kl, target_lse, lse, p


def compared(
    teacher: mx.array, student: mx.array, targets: np.ndarray, start: int = 0
) -> np.ndarray | mx.array:
    """What `over_parts` needs of logits (n, v) float32 in one part of the vocabulary: (n, 11).

    The logits are overwritten. On a GPU the result is lazy, so that it need not wait for numpy.
    targets (n,): the right tokens. start: the first token of this part.
    """
    # Of the token that the teacher draws in this part: the same for every model on one text.
    seed = (start, int(targets.sum()))
    chance = np.random.default_rng(seed).random(len(targets), np.float32)
    if not precision.numpy_is_quicker():
        columns = mx.array(targets - start)
        return _compared_on_device(teacher, student, columns, start, chance=mx.array(chance))

    def of_rows(
        teacher: np.ndarray, student: np.ndarray, targets: np.ndarray, chance: np.ndarray
    ) -> np.ndarray:
        # The right token is in this part or in another one, where its logit is -inf.
        in_part = (targets >= 0) & (targets < student.shape[1])
        rows = np.arange(len(student))
        columns = np.where(in_part, targets, 0)
        figures = []
        for z in (teacher, student):
            right = z[rows, columns]
            figures.append(np.where(in_part, right, -np.inf))
        for z in (teacher, student):
            largest = z.max(axis=1)
            best = z.argmax(axis=1) + start
            figures += [largest, best]
        # last, because it overwrites the logits, with the student's probabilities
        kl, teacher_lse, lse, p = _divergence(student, teacher)
        # A share of the sum, which rounding may leave below 1: a token without any probability is
        # not drawn, whose two logarithms would have no difference.
        sums = np.cumsum(p, axis=1)
        drawn = (sums < chance[:, None] * sums[:, -1:]).sum(axis=1)
        for probabilities in (p, student):
            figures.append(np.log(probabilities[rows, drawn]))
        return np.stack([kl, teacher_lse, lse, *figures], axis=1)

    mx.eval(teacher, student)
    return by_rows(of_rows, view(teacher), view(student), targets - start, chance)


def _compared_on_device(
    teacher: mx.array, student: mx.array, targets: mx.array, start: int, *, chance: mx.array
) -> mx.array:
    """`compared` by MLX's own operations, lazy.

    targets: counted from the first token of this part. chance (n,): from 0 to 1.
    """
    p, teacher_lse = softmax_lse(teacher)
    q, lse = softmax_lse(student)
    weighted = p * (teacher - student)
    kl = weighted.sum(axis=-1) - teacher_lse + lse
    in_part = (targets >= 0) & (targets < student.shape[1])
    columns = mx.where(in_part, targets, 0)[:, None]
    figures = []
    for z in (teacher, student):
        right = mx.take_along_axis(z, columns, axis=-1)
        right = right[:, 0]
        figures.append(mx.where(in_part, right, -mx.inf))
    for z in (teacher, student):
        largest = z.max(axis=-1)
        best = z.argmax(axis=-1) + start
        # float32 holds the number of a token exactly up to 2^24
        figures += [largest, best.astype(mx.float32)]
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
