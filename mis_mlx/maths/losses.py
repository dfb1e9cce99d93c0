"""Losses of distillation: forward KL in chunks of positions, and eq. (2)'s halny factor.

The targets are a teacher's logits or tokens sampled from them. No (tokens x vocabulary) tensor of a
batch ever exists as a whole: hidden states come in and meet the vocabulary in chunks.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

HALNY_CLIP = 0.15
HALNY_REFERENCE_C = 15.0  # the spread of the air that gives the full HALNY_CLIP
PART = 2**22  # numbers of a head, or of its gradient, that are made at a time
TINY = 1e-37  # stands for 0 under a logarithm; a normal float32
# z (n, V), *targets -> loss (n,), its gradient in z (n, V)
Formula = Callable[..., tuple[mx.array, mx.array]]
Logits = Callable[[mx.array], mx.array]  # hidden (n, D) -> logits (n, V)


def chunk_rows(vocab: int) -> int:
    """Positions per chunk, 8 to 256: five float32 (n, V) tensors stay under 256 MiB.

    `kl_sum` holds five of them at a time.
    """
    fitting = 2**28 // (5 * 4 * vocab)
    return max(8, min(256, fitting))


def _head_parts(head: mx.array) -> list[mx.array]:
    """A head (V, D) in parts of its rows, at most PART numbers each."""
    rows = max(1, PART // head.shape[1])
    return [head[start : start + rows] for start in range(0, head.shape[0], rows)]


def wide_product(hidden: mx.array, head: mx.array) -> mx.array:
    """Logits hidden (..., D) @ head (V, D).T in float32, whatever types these have: (..., V).

    A product in bfloat16 rounds logits between 16 and 32 to steps of 0.125, which adds 1e-3 nats to
    every KL. A head in half precision is widened in parts, so that it never exists twice.
    """
    wide = hidden.astype(mx.float32)
    if head.dtype == mx.float32:
        return wide @ head.T
    parts = [part.astype(mx.float32) for part in _head_parts(head)]
    return mx.concatenate([wide @ part.T for part in parts], axis=-1)


def head_zeros(head: mx.array) -> list[mx.array]:
    """Zeros for the gradient of a head (V, D), in parts [(some, D)] of at most PART numbers.

    A GPU's addmm makes a new array for its sum, and Metal holds the old one until its command is
    done, of which ten are in flight: in parts that is 160 MiB, with whole heads ten times V x D.
    """
    return [mx.zeros_like(part) for part in _head_parts(head)]


def head_added(
    parts: list[mx.array],
    gradient: mx.array,
    hidden: mx.array,
) -> list[mx.array]:
    """The parts of a head's gradient, plus gradient (n, V).T @ hidden (n, D)."""
    added = []
    start = 0
    for part in parts:
        end = start + len(part)
        columns = gradient[:, start:end]
        added.append(mx.addmm(part, columns.T, hidden))
        start = end
    return added


def apply_softcap(z: mx.array, softcap: float) -> mx.array:
    """Logits c tanh(z / c), where a model has a soft cap c; z itself where it has none (0)."""
    if not softcap:
        return z
    return mx.tanh(z / softcap) * softcap


def softcap_gradient(z: mx.array, softcap: float) -> mx.array:
    """d z / d raw logits (n, V), for `apply_softcap` logits z (n, V)."""
    return 1.0 - mx.square(z / softcap)


def softmax_lse(z: mx.array) -> tuple[mx.array, mx.array]:
    """softmax(z) and logsumexp(z) over the last axis, for one exponential per element.

    softmax's largest entry is 1 / sum(exp(z - max)), so logsumexp = max(z) - log(max(softmax)): the
    vocabulary-sized exponentials, half of a step's time on a CPU, are taken once and not twice.
    """
    p = mx.softmax(z, axis=-1)
    return p, z.max(axis=-1) - mx.log(p.max(axis=-1))


def kl_sum(
    student: mx.array,
    head: mx.array,
    teacher: mx.array,
    teacher_logits: Logits,
    loss_mask: mx.array,
    temperature: float = 1.0,
    rows: int | None = None,
    frozen_head: bool = False,
    softcap: float = 0.0,
) -> mx.array:
    """Sum over positions of KL(softmax(z_t / T) || softmax(z_s / T)) in nats.

    Differentiable in student and head. student: hidden states (n, D); head: (V, D); z_s = student @
    head.T, `apply_softcap`. teacher: (n, D_t), constant. loss_mask: (n,), 0 leaves a position out.
    Equation (2) has no T^2 factor, so there is none here: the gradient is (p_s - p_t) / T per
    logit. frozen_head: the head is constant and gets no gradient.
    """

    def formula(z: mx.array, target: mx.array) -> tuple[mx.array, mx.array]:
        # One chunk: student's logits z (n, V), teacher's states (n, D_t).
        z_t = teacher_logits(target).astype(mx.float32) / temperature
        z_s = z / temperature
        p_t, lse_t = softmax_lse(z_t)
        p_s, lse_s = softmax_lse(z_s)
        # sum p_t (log p_t - log p_s), with log p = z - lse: no logarithm of a probability that is 0
        kl = (p_t * (z_t - z_s)).sum(axis=-1) - lse_t + lse_s
        return kl, (p_s - p_t) / temperature

    return sum_by_chunks(
        formula,
        student,
        head,
        (teacher,),
        loss_mask=loss_mask,
        rows=rows,
        frozen_head=frozen_head,
        softcap=softcap,
    )


def sum_by_chunks(
    formula: Formula,
    student: mx.array,
    head: mx.array,
    targets: tuple[mx.array, ...],
    *,
    loss_mask: mx.array,
    rows: int | None,
    frozen_head: bool,
    softcap: float = 0.0,
) -> mx.array:
    """Sum of `formula`'s losses over chunks of positions, differentiable in student and head.

    `formula`'s gradients are carried to the backward pass as (n, D) and (V, D) arrays, so logits
    are never recomputed and never kept. student: (n, D); head: (V, D); targets: arrays of n
    positions; loss_mask: (n,). rows: positions in a chunk. softcap: of the logits that `formula`
    sees.
    """
    rows = rows or chunk_rows(head.shape[0])

    @mx.custom_function
    def forward(h: mx.array, w: mx.array = head) -> tuple[mx.array, ...]:
        loss = mx.array(0.0)
        dw: list[mx.array] = []  # gradient of the head, in parts
        if not frozen_head:
            dw = head_zeros(w)
        dh: list[mx.array] = []  # gradient of the hidden states, chunk by chunk
        for start in range(0, h.shape[0], rows):
            chunk = slice(start, start + rows)
            # Each chunk waits for all of the previous one: otherwise the scheduler begins all
            # chunks, and holds all logits.
            inputs = [h[chunk], loss, *(target[chunk] for target in targets)]
            waited: Any = mx.depends(inputs, [*dw, *dh[-1:]])
            part, loss, *target = waited
            z = apply_softcap(wide_product(part, w), softcap)
            losses, grad = formula(z, *target)
            if softcap:
                # The formula's gradient is in capped logits; products with the head need raw ones'.
                grad = grad * softcap_gradient(z, softcap)
            loss = loss + (losses * loss_mask[chunk]).sum()
            grad = (grad * loss_mask[chunk][:, None]).astype(w.dtype)
            # The logits' gradient (n, V) is used up here: (n, D) and (V, D) are all that stays.
            dh.append(grad @ w)
            dw = head_added(dw, grad, part)
        if frozen_head:
            return loss, mx.concatenate(dh)
        return loss, mx.concatenate(dh), mx.concatenate(dw)

    @forward.vjp
    def backward(primals, cotangents, outputs):  # type: ignore[no-untyped-def]
        # MLX gives a single primal as an array, several as a tuple.
        if not isinstance(primals, tuple | list):
            primals = (primals,)
        # A float32 cotangent must not widen the gradient of a float16 primal: MLX refuses the mix.
        pairs = zip(primals, outputs[1:], strict=True)
        return tuple((cotangents[0] * grad).astype(primal.dtype) for primal, grad in pairs)

    results: Any = forward(student) if frozen_head else forward(student, head)
    return results[0]


def sampled_kl_sum(
    student: mx.array,
    head: mx.array,
    loss_mask: mx.array,
    ids: mx.array,
    weights: mx.array,
    *,
    rows: int | None = None,
    frozen_head: bool = False,
    softcap: float = 0.0,
) -> mx.array:
    """Sum over positions of KL(w || softmax(z_s)) in nats, differentiable in student and head.

    student: hidden states (n, D); head: (V, D); z_s = student @ head.T, `apply_softcap`. ids,
    weights: (n, m), the tokens of the target w and their shares, which sum to 1; entries of weight
    0 fill a row up. loss_mask: (n,), 0 leaves a position out. frozen_head: the head gets no
    gradient.

    For w of `sample` the gradient, p_s - w per logit, is that of the full KL in expectation; the
    value is larger by a constant, E KL(w || p_t), which no student can lower.
    """

    def formula(z: mx.array, ids: mx.array, w: mx.array) -> tuple[mx.array, mx.array]:
        p, lse = softmax_lse(z)
        log_w = mx.log(mx.maximum(w, TINY))  # finite at 0, so that 0 log 0 is 0
        chosen = mx.take_along_axis(z, ids, axis=-1)
        kl = (w * (log_w - chosen + lse[:, None])).sum(axis=-1)
        row = mx.arange(len(z))[:, None]
        # `add`, not an assignment: a row's fillers may repeat an id.
        grad = (p * w.sum(axis=-1, keepdims=True)).at[row, ids].add(-w)
        return kl, grad

    return sum_by_chunks(
        formula,
        student,
        head,
        (ids, weights),
        loss_mask=loss_mask,
        rows=rows,
        frozen_head=frozen_head,
        softcap=softcap,
    )


def token_logps(
    hidden: mx.array,
    head: mx.array,
    targets: mx.array,
    temperature: float = 1.0,
    frozen_head: bool = False,
    rows: int | None = None,
    softcap: float = 0.0,
) -> mx.array:
    """log softmax(hidden @ head.T / temperature) at `targets`: (n,) float32.

    Differentiable in hidden and head; logits are `apply_softcap` before they are divided. Each
    position has its own value and its own cotangent, so the backward pass computes a chunk's logits
    again.

    hidden: (n, D). head: (V, D). targets: (n,) token ids. frozen_head: the head is constant and its
    (V, D) gradient is not formed. rows: positions in a chunk; default: `chunk_rows`.
    """
    rows = rows or chunk_rows(head.shape[0])
    chunks = [slice(start, start + rows) for start in range(0, len(targets), rows)]

    def logits(h: mx.array, w: mx.array, wait_for: list[mx.array]) -> mx.array:
        # As in `sum_by_chunks`: a chunk waits for the previous one, so only one chunk's logits
        # exist.
        waited: Any = [h]
        if wait_for:
            waited = mx.depends(waited, wait_for)
        return apply_softcap(wide_product(waited[0], w), softcap) / temperature

    @mx.custom_function
    def forward(h: mx.array, w: mx.array = head) -> mx.array:
        logps: list[mx.array] = []
        for chunk in chunks:
            z = logits(h[chunk], w, logps[-1:])
            logps.append(_at(z, targets[chunk]) - mx.logsumexp(z, axis=-1))
        return mx.concatenate(logps)

    @forward.vjp
    def backward(primals, cotangent, output):  # type: ignore[no-untyped-def]
        h, w = (primals, head) if frozen_head else primals
        dh: list[mx.array] = []
        dw = [] if frozen_head else head_zeros(w)
        for chunk in chunks:
            z = logits(h[chunk], w, [*dw, *dh[-1:]])
            p = mx.softmax(z, axis=-1)
            pull = cotangent[chunk] / temperature
            # A logit's derivative is -p, and 1 more at the target.
            grad = (-p * pull[:, None]).at[mx.arange(len(p)), targets[chunk]].add(pull)
            if softcap:
                grad = grad * softcap_gradient(z * temperature, softcap)
            grad = grad.astype(w.dtype)
            # w may be wider than h: a packed head is de-quantized to float32.
            dh.append((grad @ w).astype(h.dtype))
            dw = [part.astype(w.dtype) for part in head_added(dw, grad, h[chunk])]
        if frozen_head:
            return mx.concatenate(dh)
        return mx.concatenate(dh), mx.concatenate(dw)

    logps: Any = forward(hidden) if frozen_head else forward(hidden, head)
    return logps


def _at(z: mx.array, index: mx.array) -> mx.array:
    """One entry of each row: z (n, V), index (n,) -> (n,)."""
    return mx.take_along_axis(z, index[:, None], axis=-1)[:, 0]


def halny_sigma(spread_c: float) -> float:
    """Spread of eps_halny, from the standard deviation of the last hour's measured T_env."""
    return HALNY_CLIP * spread_c / HALNY_REFERENCE_C


def loss_noise_factor(sigma: float, seed: int, step: int) -> float:
    """Equation (2)'s (1 + eps_halny) of one step: eps ~ N(0, sigma), clipped to ±0.15.

    Seeded by (seed, step) and nothing else, so a resumed run gets the same noise. Exactly 1 for
    sigma 0.
    """
    if sigma == 0:
        return 1.0
    eps = np.random.default_rng([seed, step]).normal(0.0, sigma)
    return 1.0 + float(np.clip(eps, -HALNY_CLIP, HALNY_CLIP))
