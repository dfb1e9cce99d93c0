"""Log-probabilities of given tokens from hidden states and a vocabulary head, chunk of positions by chunk.

As in maths/losses, no (tokens x vocabulary) tensor of a whole batch is ever built; here each position has its own value
and its own cotangent, so the way back makes the chunk's logits again."""

from typing import Any

import mlx.core as mx

from mis_mlx.maths.losses import chunk_rows


def token_logps(
    hidden: mx.array,
    head: mx.array,
    targets: mx.array,
    temperature: float = 1.0,
    frozen_head: bool = False,
    rows: int | None = None,
) -> mx.array:
    """log softmax(hidden @ head.T / temperature) at `targets`: (n,) float32, differentiable in hidden and head.

    hidden: (n, D). head: (V, D). targets: (n,) token ids. frozen_head: the head is constant, and its (V, D)
    gradient is not formed. rows: positions in a chunk; default: as many as 256 MiB hold five times."""
    rows = rows or chunk_rows(head.shape[0])
    cuts = [slice(start, start + rows) for start in range(0, len(targets), rows)]

    def logits(h: mx.array, w: mx.array, wait_for: list[mx.array]) -> mx.array:
        # Each chunk waits for all of the one before: else the scheduler begins them all, and holds all logits.
        waited: Any = mx.depends([h], wait_for) if wait_for else [h]
        return (waited[0] @ w.T).astype(mx.float32) / temperature

    @mx.custom_function
    def forward(h: mx.array, w: mx.array = head) -> mx.array:
        found: list[mx.array] = []
        for at in cuts:
            z = logits(h[at], w, found[-1:])
            found.append(mx.take_along_axis(z, targets[at, None], axis=-1)[:, 0] - mx.logsumexp(z, axis=-1))
        return mx.concatenate(found)

    @forward.vjp
    def backward(primals, cotangent, output):  # type: ignore[no-untyped-def]
        h, w = (primals, head) if frozen_head else primals
        dh, dw = list[mx.array](), [] if frozen_head else [mx.zeros_like(w)]
        for at in cuts:
            p = mx.softmax(logits(h[at], w, [*dw, *dh[-1:]]), axis=-1)
            each = cotangent[at] / temperature
            g = (-p * each[:, None]).at[mx.arange(len(p)), targets[at]].add(each).astype(w.dtype)
            dh.append((g @ w).astype(h.dtype))  # w may be wider: a packed head is de-quantized to float32
            dw = [mx.addmm(d, g.T, h[at]).astype(w.dtype) for d in dw]
        return mx.concatenate(dh) if frozen_head else (mx.concatenate(dh), *dw)

    found: Any = forward(hidden) if frozen_head else forward(hidden, head)
    return found
