"""The losses of a vocabulary by numpy, a few rows at a time: of training where MLX computes on a
CPU, whose exp takes seven times as long as numpy's (maths/losses has the formulas, which a GPU
computes with); and of comparisons.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import numpy as np

from mis_mlx.hardware import lanes
from mis_mlx.maths.losses import Logits, chunk_rows, softmax_lse, wide_product
from mis_mlx.models import policy, stream

NUMBERS = 8 * 49_152  # logits at a time: 1.5 MB
# tokens compared in one part of the vocabulary before the next is read; those at a time
GROUP = 4096
CHUNK = 256


def view(array: mx.array) -> np.ndarray:
    """The memory of an array, evaluated; numpy may write there."""
    stream.evaluate_now(array)
    whole: Any = array
    return np.asarray(memoryview(whole))


def softmax(z: np.ndarray) -> np.ndarray:
    """Rows z (n, V) become softmax(z), in place; their logsumexp (n,)."""
    top = z.max(axis=1)
    z -= top[:, None]
    np.exp(z, out=z)
    total = z.sum(axis=1)
    z *= (1.0 / total)[:, None]
    return np.asarray(top + np.log(total))


def by_rows(work: Callable[..., np.ndarray], *arrays: np.ndarray) -> np.ndarray:
    """`work` of these arrays (n, ...), a few rows at a time, in as many threads as there are lanes:
    (n, ...).
    """

    rows = max(1, NUMBERS // arrays[0].shape[1])

    def of_piece(start: int) -> np.ndarray:
        with np.errstate(all="ignore"):  # who gets NaN says so
            return work(*(array[start : start + rows] for array in arrays))

    with ThreadPoolExecutor(lanes.count()) as pool:
        return np.concatenate(list(pool.map(of_piece, range(0, len(arrays[0]), rows))))


def _divergence(
    z: np.ndarray, target: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of rows (n, V): (KL(softmax(target) || softmax(z)) in nats, the logsumexp of target, that of
    z, all (n,), and softmax(target)). z becomes its softmax, target is spent.
    """
    p = target.copy()
    lse_t = softmax(p)
    target -= z
    lse = softmax(z)
    return np.einsum("ij,ij->i", p, target) - lse_t + lse, lse_t, lse, p


def kl_gradients(
    student: mx.array,
    head: mx.array,
    teacher: mx.array,
    teacher_logits: Logits,
    learn: mx.array,
    temperature: float = 1.0,
    frozen_head: bool = False,
    softcap: float = 0.0,
) -> tuple[float, mx.array, mx.array | None]:
    """`losses.kl_sum` without labels: (the sum, its gradients in student (n, D) and in a head (V,
    D) not frozen).
    """

    # z becomes its gradient times `learn`
    def kl(z: np.ndarray, target: np.ndarray, learn: np.ndarray) -> np.ndarray:
        slope: np.ndarray | None = None
        if softcap:
            z *= 1.0 / softcap
            np.tanh(z, out=z)
            slope = 1.0 - np.square(z)
            z *= softcap
        if temperature != 1.0:
            z *= 1.0 / temperature
            target *= 1.0 / temperature
        each, _, _, p = _divergence(z, target)
        z -= p
        z *= (learn / temperature)[:, None]
        if slope is not None:
            z *= slope
        return each

    loss = 0.0
    dh = list[mx.array]()
    dw = None if frozen_head else mx.zeros_like(head)
    weights = np.array(learn, np.float32)
    for start in range(0, len(student), rows := chunk_rows(head.shape[0])):
        at = slice(start, start + rows)
        z = wide_product(student[at], head)
        target = teacher_logits(teacher[at]).astype(mx.float32)
        stream.evaluate_now(z, target)
        each = by_rows(kl, view(z), view(target), weights[at])
        loss += float(each.astype(np.float64) @ weights[at])
        # what numpy made of it; by no other name, under which it would outlive the next
        z = z.astype(head.dtype)
        dh.append(z @ head)
        dw = None if dw is None else mx.addmm(dw, z.T, student[at])
        stream.evaluate_now(dh[-1], dw)
    return loss, mx.concatenate(dh), dw


def compared(
    teacher: mx.array, student: mx.array, targets: np.ndarray, start: int = 0
) -> np.ndarray | mx.array:
    """What `over_parts` needs to know of logits (n, v) float32, which are made over, of a part of
    the vocabulary: (n, 9); on a GPU lazy, so that it need not wait for numpy. targets: (n,), the
    right tokens. start: the first token of this part.
    """
    if policy.name() != "cpu":
        return _compared_on_device(teacher, student, mx.array(targets - start), start)

    def of_rows(z_t: np.ndarray, z: np.ndarray, targets: np.ndarray) -> np.ndarray:
        here = (targets >= 0) & (targets < z.shape[1])
        at = np.arange(len(z)), np.where(here, targets, 0)
        known = [np.where(here, each[at], -np.inf) for each in (z_t, z)]
        known += [
            found for each in (z_t, z) for found in (each.max(axis=1), each.argmax(axis=1) + start)
        ]
        return np.stack([*_divergence(z, z_t)[:3], *known], axis=1)

    stream.evaluate_now(teacher, student)
    return by_rows(of_rows, view(teacher), view(student), targets - start)


def _compared_on_device(
    teacher: mx.array, student: mx.array, targets: mx.array, start: int
) -> mx.array:
    """`compared` as MLX's own operations, lazy. targets: counted from the first token of this
    part.
    """
    p, lse_t = softmax_lse(teacher)
    _, lse = softmax_lse(student)
    kl = (p * (teacher - student)).sum(axis=-1) - lse_t + lse
    here = (targets >= 0) & (targets < student.shape[1])
    at = mx.where(here, targets, 0)[:, None]
    known = [
        mx.where(here, mx.take_along_axis(z, at, axis=-1)[:, 0], -mx.inf)
        for z in (teacher, student)
    ]
    for z in (teacher, student):
        # exact up to 2^24 tokens
        known += [z.max(axis=-1), (z.argmax(axis=-1) + start).astype(mx.float32)]
    return mx.stack([kl, lse_t, lse, *known], axis=1)


def over_parts(parts: Sequence[np.ndarray | mx.array]) -> np.ndarray:
    """What was found in all parts (n, 9) of a vocabulary, in their order, together: (n, 4) float64,
    the teacher's negative log-likelihood, the student's, KL(teacher || student), all in nats, 1
    where the top token is the same.
    """
    with np.errstate(all="ignore"):
        every = np.array([np.asarray(part) for part in parts], np.float64)
        kl, lse_t, lse, right_t, right, top_t, best_t, top, best = np.moveaxis(every, 2, 0)
        whole_t = np.logaddexp.reduce(lse_t)
        whole = np.logaddexp.reduce(lse)
        # A part's KL is that of the probabilities in it; its share of the teacher's weighs it.
        kl = (np.exp(lse_t - whole_t) * (kl + lse_t - lse)).sum(axis=0) - whole_t + whole
        same = [
            np.take_along_axis(i, t.argmax(axis=0)[None], 0)[0]
            for t, i in ((top_t, best_t), (top, best))
        ]
        return np.stack(
            [whole_t - right_t.max(axis=0), whole - right.max(axis=0), kl, np.equal(*same)], axis=1
        )
