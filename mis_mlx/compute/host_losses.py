"""Losses over a vocabulary by numpy, a few rows at a time.

Training uses them where MLX computes on a CPU, whose exp takes seven times as long as numpy's;
comparisons use them there, too. maths/losses has the formulas, and computes them on a GPU.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import numpy as np

from mis_mlx.compute import precision, streams
from mis_mlx.maths.losses import Logits, chunk_rows, softmax_lse, wide_product

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


def kl_gradients(
    student: mx.array,
    head: mx.array,
    teacher: mx.array,
    teacher_logits: Logits,
    loss_mask: mx.array,
    temperature: float = 1.0,
    frozen_head: bool = False,
    softcap: float = 0.0,
) -> tuple[float, mx.array, mx.array | None]:
    """`losses.kl_sum` without labels, and its gradients.

    Returns (the sum over tokens, in nats, its gradient in student (n, D), that in head (V, D)); the
    last is None with `frozen_head`. loss_mask (n,): the weight of each token.
    """

    def kl(z: np.ndarray, target: np.ndarray, loss_mask: np.ndarray) -> np.ndarray:
        """KL (n,) of some rows (n, V); z becomes its gradient times `loss_mask`."""
        slope: np.ndarray | None = None
        if softcap:
            # z = c tanh(z / c), whose derivative is 1 - tanh^2
            z *= 1.0 / softcap
            np.tanh(z, out=z)
            slope = 1.0 - np.square(z)
            z *= softcap
        if temperature != 1.0:
            z *= 1.0 / temperature
            target *= 1.0 / temperature
        divergence, _, _, p = _divergence(z, target)
        # d KL / d z = (softmax(z) - p) / temperature; z is its softmax by now
        z -= p
        z *= (loss_mask / temperature)[:, None]
        if slope is not None:
            z *= slope
        return divergence

    loss = 0.0
    hidden_grads = list[mx.array]()
    head_grad = None if frozen_head else mx.zeros_like(head)
    weights = np.array(loss_mask, np.float32)
    step = chunk_rows(head.shape[0])
    # As many tokens at a time as a chunk of logits (rows, V) may hold: all would not fit.
    for start in range(0, len(student), step):
        rows = slice(start, start + step)
        z = wide_product(student[rows], head)
        target = teacher_logits(teacher[rows]).astype(mx.float32)
        # numpy writes into the memory of both: nothing may still be computed from them
        mx.eval(z, target)
        divergence = by_rows(kl, view(z), view(target), weights[rows])
        loss += float(divergence.astype(np.float64) @ weights[rows])
        # z is the gradient now. The cast keeps the name: another name would outlive the next chunk.
        z = z.astype(head.dtype)
        hidden_grads.append(z @ head)
        if head_grad is not None:
            head_grad = mx.addmm(head_grad, z.T, student[rows])
        # z goes with the next chunk, so what is made of it is computed now
        mx.eval(hidden_grads[-1], head_grad)
    return loss, mx.concatenate(hidden_grads), head_grad


def likelihood_gradients(z: mx.array, drawn: mx.array) -> mx.array:
    """`token_losses.likelihood_gradients`, in the memory of z."""
    # numpy writes into z, so z and everything that is made of it must be evaluated before
    mx.eval(z, drawn)
    columns = np.array(drawn)
    p = view(z)
    by_rows(softmax, p)
    np.negative(p, out=p)
    rows = np.arange(len(p))
    p[rows, columns] += 1.0
    return z


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
