"""Losses of distillation: forward KL in chunks of positions, on logits or on sampled tokens; eq.
(2)'s halny factor.

No (tokens x vocabulary) tensor of a batch is ever whole: hidden states come in and meet the
vocabulary in chunks.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from mis_mlx.types import MisError

HALNY_CLIP = 0.15
PART = 2**22  # numbers of a head, or of its gradient, that are made at a time
TINY = 1e-37  # stands for 0 under a logarithm; a normal float32
# z (n, V), *targets -> loss (n,), its gradient in z (n, V)
Formula = Callable[..., tuple[mx.array, mx.array]]
Logits = Callable[[mx.array], mx.array]  # hidden (n, D) -> logits (n, V)


def chunk_rows(vocab: int) -> int:
    """Positions per chunk so that the five float32 (n, V) tensors of `kl_sum` stay under 256 MiB; 8
    to 256.
    """
    return max(8, min(256, 2**28 // (5 * 4 * vocab)))


def wide_product(hidden: mx.array, head: mx.array) -> mx.array:
    """Logits hidden (..., D) @ head (V, D).T in float32, whatever types these have: (..., V).

    A product in bfloat16 rounds logits between 16 and 32 to steps of 0.125, which adds 1e-3 nats to
    every KL. A head in half precision is widened in parts, so that it is never there twice.
    """
    wide = hidden.astype(mx.float32)
    if head.dtype == mx.float32:
        return wide @ head.T
    rows = max(1, PART // head.shape[1])
    parts = [
        head[start : start + rows].astype(mx.float32) for start in range(0, head.shape[0], rows)
    ]
    return mx.concatenate([wide @ part.T for part in parts], axis=-1)


def head_zeros(head: mx.array) -> list[mx.array]:
    """Zeros for the gradient of a head (V, D), in parts [(some, D)] of at most PART numbers.

    A GPU's addmm makes a new array for its sum, and Metal holds the old one until its command is
    done, of which ten are in flight: in parts that is 160 MiB, with whole heads ten times V x D.
    """
    rows = max(1, PART // head.shape[1])
    return [mx.zeros_like(head[start : start + rows]) for start in range(0, head.shape[0], rows)]


def head_added(parts: list[mx.array], gradient: mx.array, hidden: mx.array) -> list[mx.array]:
    """The parts of a head's gradient, plus gradient (n, V).T @ hidden (n, D)."""
    added = list[mx.array]()
    start = 0
    for part in parts:
        of_part = gradient[:, start : start + len(part)]
        added.append(mx.addmm(part, of_part.T, hidden))
        start += len(part)
    return added


def capped(z: mx.array, softcap: float) -> mx.array:
    """Logits c tanh(z / c), where a model has a soft cap c; z itself where it has none (0)."""
    return mx.tanh(z / softcap) * softcap if softcap else z


def cap_slope(z: mx.array, softcap: float) -> mx.array:
    """d z / d raw logits (n, V), for `capped` logits z (n, V)."""
    return 1.0 - mx.square(z / softcap)


def softmax_lse(z: mx.array) -> tuple[mx.array, mx.array]:
    """softmax(z) and logsumexp(z) over the last axis, for one exponential per element.

    softmax's largest entry is 1 / sum(exp(z - max)), so logsumexp = max(z) - log(max(softmax)): the
    vocabulary-sized exponentials, half of a step's time on a CPU, are taken once and not twice."""
    p = mx.softmax(z, axis=-1)
    return p, z.max(axis=-1) - mx.log(p.max(axis=-1))


def kl_sum(
    student: mx.array,
    head: mx.array,
    teacher: mx.array,
    teacher_logits: Logits,
    learn: mx.array,
    temperature: float = 1.0,
    rows: int | None = None,
    frozen_head: bool = False,
    labels: mx.array | None = None,
    cross_entropy: float = 0.0,
    softcap: float = 0.0,
) -> mx.array:
    """Sum over positions of KL(softmax(z_t / T) || softmax(z_s / T)) in nats, differentiable in
    student, head.

    student: hidden states (n, D) and head: (V, D), z_s = student @ head.T, `capped`.  teacher: (n,
    D_t), constant. learn: (n,), 0 leaves a position out. Equation (2) has no T^2 factor, so there
    is none here. The gradient is (p_s - p_t) / T per logit. frozen_head: of a constant head none is
    formed. labels: (n,), the text's own next tokens: the loss is (1 - c) KL + c CE, c =
    `cross_entropy`, CE at T = 1.
    """

    def formula(z: mx.array, target: mx.array, *label: mx.array) -> tuple[mx.array, mx.array]:
        z_t = teacher_logits(target).astype(mx.float32) / temperature
        z_s = z / temperature
        p_t, lse_t = softmax_lse(z_t)
        p_s, lse_s = softmax_lse(z_s)
        each = (p_t * (z_t - z_s)).sum(axis=-1) - lse_t + lse_s
        g = (p_s - p_t) / temperature
        if not label:
            return each, g
        p, lse = (p_s, lse_s) if temperature == 1.0 else softmax_lse(z)
        g = (
            ((1.0 - cross_entropy) * g + cross_entropy * p)
            .at[mx.arange(len(z)), label[0]]
            .add(-cross_entropy)
        )
        return (1.0 - cross_entropy) * each + cross_entropy * (lse - _at(z, label[0])), g

    if labels is None:
        return sum_by_chunks(formula, student, head, (teacher,), learn, rows, frozen_head, softcap)
    # up to a third more (n, V) tensors at a time (measured)
    rows = rows or chunk_rows(head.shape[0]) * 3 // 4
    return sum_by_chunks(
        formula, student, head, (teacher, labels), learn, rows, frozen_head, softcap
    )


def sum_by_chunks(
    formula: Formula,
    student: mx.array,
    head: mx.array,
    targets: tuple[mx.array, ...],
    learn: mx.array,
    rows: int | None,
    frozen_head: bool,
    softcap: float = 0.0,
) -> mx.array:
    """Sum of `formula`'s losses over chunks of positions; its gradients are carried to the backward
    pass as (n, D) and (V, D) arrays, so logits are never recomputed and never kept. softcap: of the
    logits that `formula` sees.
    """
    rows = rows or chunk_rows(head.shape[0])

    @mx.custom_function
    def forward(h: mx.array, w: mx.array = head) -> tuple[mx.array, ...]:
        loss = mx.array(0.0)
        dw = [] if frozen_head else head_zeros(w)
        dh: list[mx.array] = []
        for at in (slice(start, start + rows) for start in range(0, h.shape[0], rows)):
            # Each chunk waits for all of the one before: else the scheduler begins them all, and
            # holds all logits.
            waited: Any = mx.depends([h[at], loss, *(t[at] for t in targets)], [*dw, *dh[-1:]])
            part, loss, *target = waited
            z = capped(wide_product(part, w), softcap)
            each, g = formula(z, *target)
            g = g * cap_slope(z, softcap) if softcap else g
            loss = loss + (each * learn[at]).sum()
            g = (g * learn[at][:, None]).astype(w.dtype)
            dh.append(g @ w)
            dw = head_added(dw, g, part)
        whole = [mx.concatenate(dw)] if dw else []
        return loss, mx.concatenate(dh), *whole

    @forward.vjp
    def backward(primals, cotangents, outputs):  # type: ignore[no-untyped-def]
        # A float32 cotangent must not widen the gradient of a float16 primal: MLX refuses the mix.
        given = primals if isinstance(primals, tuple | list) else (primals,)
        return tuple(
            (cotangents[0] * g).astype(p.dtype) for p, g in zip(given, outputs[1:], strict=True)
        )

    results: Any = forward(student) if frozen_head else forward(student, head)
    return results[0]


def sample(
    logits: mx.array, count: int, seed: int, first: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`count` tokens for each position, drawn from softmax(logits) with replacement (arXiv
    2503.16870).

    logits: (n, V), of positions number `first` and up. Returns sizes (n,): how many distinct tokens
    each position got; ids and counts (sum of sizes,): those of one position after the other, ids
    rising. counts / count is an unbiased estimate of the softmax. The draws of a position depend on
    its number and the seed alone, however positions are cut into calls: Philox is a function of a
    counter.
    """
    blocks = -(-count // 4)  # one step of Philox's counter makes four numbers
    random = np.random.Generator(np.random.Philox(key=seed, counter=first * blocks))
    drawn = []
    uniform = np.sort(random.random((len(logits), 4 * blocks))[:, :count], axis=1)
    shares = np.array(mx.softmax(logits.astype(mx.float32), axis=-1))
    if not np.isfinite(shares[:, 0]).all():  # softmax spreads one NaN over its row
        raise MisError(
            "the teacher's logits are not numbers: it overflows in this precision, use another "
            "teacher"
        )
    for p, u in zip(shares, uniform, strict=True):
        cdf = np.cumsum(p, dtype=np.float64)  # in float32 it would drift over a whole vocabulary
        # u < 1, but u * total may round up to the total, which no token's share exceeds.
        u = np.minimum(u * cdf[-1], np.nextafter(cdf[-1], 0.0))
        drawn.append(np.unique(np.searchsorted(cdf, u, side="right"), return_counts=True))
    ids, counts = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
    return np.array([len(i) for i, _ in drawn]), ids, counts


def sampled_kl_sum(
    student: mx.array,
    head: mx.array,
    learn: mx.array,
    ids: mx.array,
    weights: mx.array,
    *,
    rows: int | None = None,
    frozen_head: bool = False,
    softcap: float = 0.0,
) -> mx.array:
    """Sum over positions of KL(w || softmax(z_s)) in nats, differentiable in student and head.

    student: hidden states (n, D) and head: (V, D), z_s = student @ head.T, `capped`. ids, weights:
    (n, m), the tokens of the target w and their shares, which sum to 1; entries of weight 0 fill a
    row up. learn: (n,), 0 leaves a position out. frozen_head: no gradient for the head. For w =
    counts / N of `sample` the gradient, p_s - w per logit, is that of the full KL in expectation;
    the value is larger by a constant, E KL(w || p_t), which no student can lower.
    """

    def formula(z: mx.array, ids: mx.array, w: mx.array) -> tuple[mx.array, mx.array]:
        p, lse = softmax_lse(z)
        log_w = mx.log(mx.maximum(w, TINY))  # finite at 0, so that 0 log 0 is 0
        kl = (w * (log_w - mx.take_along_axis(z, ids, axis=-1) + lse[:, None])).sum(axis=-1)
        row = mx.arange(len(z))[:, None]
        # adds: a filled-up id may come twice
        return kl, (p * w.sum(axis=-1, keepdims=True)).at[row, ids].add(-w)

    return sum_by_chunks(formula, student, head, (ids, weights), learn, rows, frozen_head, softcap)


def token_logps(
    hidden: mx.array,
    head: mx.array,
    targets: mx.array,
    temperature: float = 1.0,
    frozen_head: bool = False,
    rows: int | None = None,
    softcap: float = 0.0,
) -> mx.array:
    """log softmax(hidden @ head.T / temperature) at `targets`, logits `capped` before they are
    divided: (n,) float32, differentiable in hidden and head. Each position has its own value and
    its own cotangent, so the way back makes a chunk's logits again.

    hidden: (n, D). head: (V, D). targets: (n,) token ids. frozen_head: the head is constant, and
    its (V, D) gradient is not formed. rows: positions in a chunk; default: as many as 256 MiB hold
    five times.
    """
    rows = rows or chunk_rows(head.shape[0])
    cuts = [slice(start, start + rows) for start in range(0, len(targets), rows)]

    def logits(h: mx.array, w: mx.array, wait_for: list[mx.array]) -> mx.array:
        # Each chunk waits for all of the one before: else the scheduler begins them all, and holds
        # all logits.
        waited: Any = mx.depends([h], wait_for) if wait_for else [h]
        return capped(wide_product(waited[0], w), softcap) / temperature

    @mx.custom_function
    def forward(h: mx.array, w: mx.array = head) -> mx.array:
        found: list[mx.array] = []
        for at in cuts:
            z = logits(h[at], w, found[-1:])
            found.append(
                mx.take_along_axis(z, targets[at, None], axis=-1)[:, 0] - mx.logsumexp(z, axis=-1)
            )
        return mx.concatenate(found)

    @forward.vjp
    def backward(primals, cotangent, output):  # type: ignore[no-untyped-def]
        h, w = (primals, head) if frozen_head else primals
        dh = list[mx.array]()
        dw = [] if frozen_head else head_zeros(w)
        for at in cuts:
            z = logits(h[at], w, [*dw, *dh[-1:]])
            p = mx.softmax(z, axis=-1)
            each = cotangent[at] / temperature
            g = (-p * each[:, None]).at[mx.arange(len(p)), targets[at]].add(each)
            g = g * cap_slope(z * temperature, softcap) if softcap else g
            g = g.astype(w.dtype)
            # w may be wider: a packed head is de-quantized to float32
            dh.append((g @ w).astype(h.dtype))
            dw = [d.astype(w.dtype) for d in head_added(dw, g, h[at])]
        return mx.concatenate(dh) if frozen_head else (mx.concatenate(dh), mx.concatenate(dw))

    found: Any = forward(hidden) if frozen_head else forward(hidden, head)
    return found


def _at(z: mx.array, index: mx.array) -> mx.array:
    return mx.take_along_axis(z, index[:, None], axis=-1)[:, 0]


def loss_noise_factor(sigma: float, seed: int, step: int) -> float:
    """Equation (2)'s (1 + eps_halny) of one step: eps ~ N(0, sigma), clipped to ±0.15.

    Seeded by (seed, step) and nothing else, so a resumed run meets the same wind. Exactly 1 for
    sigma 0.
    """
    if sigma == 0:
        return 1.0
    return 1.0 + float(
        np.clip(np.random.default_rng([seed, step]).normal(0.0, sigma), -HALNY_CLIP, HALNY_CLIP)
    )
