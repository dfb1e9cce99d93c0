"""Log-probabilities of tokens in chunks of positions, and eq. (2)'s halny factor.

No (tokens x vocabulary) tensor of a batch ever exists as a whole: hidden states come in and meet
the vocabulary in chunks.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

HALNY_CLIP = 0.15
HALNY_REFERENCE_C = 15.0  # the spread of the air that gives the full HALNY_CLIP
PART = 2**22  # numbers of a head, or of its gradient, that are made at a time
Logits = Callable[[mx.array], mx.array]  # hidden (n, D) -> logits (n, V)


def chunk_rows(vocab: int) -> int:
    """Positions per chunk, 8 to 256: five float32 (n, V) tensors stay under 256 MiB."""
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


def next_tokens(tokens: mx.array) -> mx.array:
    """The token after each of tokens (B, T): (B * T,).

    The last column has none: what stands there does not count, for `loss_mask` is 0.
    """
    return mx.roll(tokens, -1, 1).reshape(-1)


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
        # A chunk waits for the previous one: otherwise the scheduler begins all chunks, and holds
        # all logits.
        waited: Any = [h]
        if wait_for:
            waited = mx.depends(waited, wait_for)
        return apply_softcap(wide_product(waited[0], w), softcap) / temperature

    @mx.custom_function
    def forward(h: mx.array, w: mx.array = head) -> mx.array:
        logps: list[mx.array] = []
        for chunk in chunks:
            z = logits(h[chunk], w, logps[-1:])
            drawn = mx.take_along_axis(z, targets[chunk][:, None], axis=-1)[:, 0]
            logps.append(drawn - mx.logsumexp(z, axis=-1))
        return mx.concatenate(logps)

    @forward.vjp
    def backward(primals, cotangent, output):  # type: ignore[no-untyped-def]
        h, w = (primals, head) if frozen_head else primals
        dh: list[mx.array] = []
        # In parts: a GPU's addmm makes a new array for its sum, and Metal holds the old one until
        # its command is done, of which ten are in flight: that is 160 MiB, not ten times V x D.
        dw = [] if frozen_head else [mx.zeros_like(part) for part in _head_parts(w)]
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
