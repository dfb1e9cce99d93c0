"""Losses over a vocabulary: their value and gradients, whoever computes them.

Hidden states (n, D) of n positions meet the head (V, D) in chunks of positions. MLX computes every
loss (maths/losses). On a CPU its exp takes seven times as long as numpy's, so there numpy computes
the KL to a teacher, in as many threads as windows go side by side (compute/host_losses). Who trains
takes a `TokenLoss` and does not know which of the two it is; who plans asks for its `Footprint`.
"""

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mis_mlx.compute import host_losses, precision, streams
from mis_mlx.compute.slab_losses import Slabs
from mis_mlx.hardware.memory import COMMANDS_AHEAD
from mis_mlx.maths import losses
from mis_mlx.storage.files import as_mis_error

FLOAT_BYTES = 4  # of a logit: both back ends compute in float32
MLX_ARRAYS = 5  # (n, V) that MLX holds at a time of one chunk
# of `losses.kl_sum`, whose memory MLX takes before the first of them is done (measured on a CPU)
CHUNKS_AHEAD = 3
# (n, V) that MLX takes for tokens as targets of a frozen head (measured on a CPU: it counts 7, and
# the process grows by 2)
FROZEN_ARRAYS = 8
# (n, V) that a chunk makes, five of them alive at a time; a GPU may hold all it has begun
CHUNK_ARRAYS = 12
NUMPY_ARRAYS = 2  # (n, V) of one chunk: logits of student and teacher


class LossGradients(NamedTuple):
    """A loss in nats, summed over positions, and its gradients in hidden states and head.

    value: (). hidden: (n, D). head: (V, D); None where the head is frozen.
    """

    value: mx.array
    hidden: mx.array
    head: mx.array | None


# (hidden (n, D), head (V, D), loss_mask (n,), *targets of n positions, frozen_head=...) ->
# the sum in nats, differentiable in hidden and, unless it is frozen, in head
ByMLX = Callable[..., mx.array]
# the same arguments -> value and gradients, evaluated
ByNumpy = Callable[..., LossGradients]
# (hidden (n, D), slabs of the head, loss_mask (n,), *targets) -> (the sum in nats, its gradient in
# hidden), evaluated
BySlabs = Callable[..., tuple[mx.array, mx.array]]
# primals -> [hidden (n, D), head (V, D), *further outputs], lazy
Forward = Callable[..., Sequence[mx.array]]


@dataclass(frozen=True)
class TokenLoss:
    """A loss of final hidden states (n, D) and a head (V, D), summed over positions.

    by_mlx: computes it, for whoever differentiates. by_numpy: computes value and gradients where
    that is quicker; None: MLX computes these too. by_slabs: of a frozen head that comes in slabs;
    None: this loss needs it whole.
    """

    by_mlx: ByMLX
    by_numpy: ByNumpy | None = None
    by_slabs: BySlabs | None = None

    def gradients(
        self,
        hidden: mx.array,
        head: mx.array,
        loss_mask: mx.array,
        *targets: mx.array,
        frozen_head: bool = False,
    ) -> LossGradients:
        """Value and gradients, evaluated. loss_mask (n,): the weight of each position.

        frozen_head: the head's gradient is not formed.
        """
        if self.by_numpy:
            return self.by_numpy(hidden, head, loss_mask, *targets, frozen_head=frozen_head)

        def total(hidden: mx.array, head: mx.array = head) -> mx.array:
            return self.by_mlx(hidden, head, loss_mask, *targets, frozen_head=frozen_head)

        primals = [hidden] if frozen_head else [hidden, head]
        (value,), grads = mx.vjp(total, primals, [mx.array(1.0)])
        mx.eval(value, grads)
        return LossGradients(value, grads[0], None if frozen_head else grads[1])

    def vjp(
        self,
        forward: Forward,
        primals: Sequence[mx.array],
        loss_mask: mx.array,
        targets: Sequence[mx.array],
        *,
        width: int,
        windows: int,
        head_index: int | None = None,
        cotangents: Sequence[mx.array] = (),
        slabs: Slabs | None = None,
    ) -> tuple[mx.array, list[mx.array]]:
        """(the loss behind `forward` in nats, its gradients in `primals`), the gradients lazy.

        width: D. windows: of the micro-batch, which may go side by side. head_index: which of the
        primals is the head; None: none of them, the head gets no gradient. cotangents: of the
        further outputs of `forward`. slabs: what takes the place of the head that `forward` gives,
        for a loss that has `by_slabs`.
        """
        by_slabs = self.by_slabs
        if slabs and by_slabs:

            def slab_loss(hidden: mx.array, head: mx.array) -> LossGradients:
                return LossGradients(*by_slabs(hidden, slabs, loss_mask, *targets), head=None)

            shape = (loss_mask.size, width)
            loss, grads = _vjp_around(
                slab_loss, forward, primals, cotangents, shape=shape, windows=windows
            )
            return loss.value, grads
        frozen = head_index is None
        by_numpy = self.by_numpy
        if by_numpy:

            def numpy_loss(hidden: mx.array, head: mx.array) -> LossGradients:
                return by_numpy(hidden, head, loss_mask, *targets, frozen_head=frozen)

            loss, grads = _vjp_around(
                numpy_loss,
                forward,
                primals,
                cotangents,
                shape=(loss_mask.size, width),
                windows=windows,
            )
            if head_index is not None and loss.head is not None:
                grads[head_index] = grads[head_index] + loss.head
            return loss.value, grads

        def total(*primals: mx.array) -> list[mx.array]:
            hidden, head, *further = forward(*primals)
            return [self.by_mlx(hidden, head, loss_mask, *targets, frozen_head=frozen), *further]

        outputs, grads = mx.vjp(total, list(primals), [mx.array(1.0), *cotangents])
        return outputs[0], grads

    def map_windows(self, work: Callable[[mx.array], mx.array], tokens: mx.array) -> mx.array:
        """work(tokens (B, T)) of a whole model, lazy: windows side by side where numpy follows.

        MLX's loss is one graph with the model, and stays one.
        """
        return streams.map_rows(work, tokens) if self.by_numpy else work(tokens)

    def evaluate(self, grads: Any, windows: int) -> None:
        """Evaluate gradients of windows that went side by side (`map_windows`).

        Those of one graph are left lazy, so that each goes as soon as it is added to a sum.
        """
        if self.by_numpy:
            with streams.single_threaded_blas(windows):
                mx.eval(grads)


def _vjp_around(
    numpy_loss: Callable[[mx.array, mx.array], LossGradients],
    forward: Forward,
    primals: Sequence[mx.array],
    cotangents: Sequence[mx.array],
    *,
    shape: tuple[int, int],
    windows: int,
) -> tuple[LossGradients, list[mx.array]]:
    """(numpy_loss(hidden, head), the gradients in `primals`), with it between the two passes.

    shape: (n, D) of the hidden states. The backward pass is laid out before the forward pass is
    evaluated, so that MLX keeps only what the backward pass needs. But it begins with a gradient
    that is not known then. MLX reads a file when it evaluates the array, not when it opens the
    file: so the backward pass begins with a file, which numpy fills between the passes.
    """
    outputs: list[mx.array] = []

    def without_head(*primals: mx.array) -> list[mx.array]:
        outputs[:] = forward(*primals)
        hidden, _, *further = outputs
        return [hidden, *further]

    folder = Path(tempfile.gettempdir())
    remedy = "set TMPDIR to a folder with more room, then go on with --resume"
    with (
        as_mis_error(folder, "a gradient", 4 * math.prod(shape), remedy),
        # Without a buffer: one that does not fit would be written again when the file closes.
        tempfile.NamedTemporaryFile(prefix="mis_mlx-", suffix=".npy", buffering=0) as file,
    ):
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        hidden_grad: Any = mx.load(file.name)
        _, grads = mx.vjp(without_head, list(primals), [hidden_grad, *cotangents])
        hidden, head, *_ = outputs
        with streams.single_threaded_blas(windows):
            mx.eval(hidden)
        loss = numpy_loss(hidden, head)
        # Not by tofile, whose error does not say that a disk is full.
        left = np.asarray(loss.hidden.astype(mx.float32)).data.cast("B")
        while left:
            written = file.write(left)
            left = left[written:]
    # The file has no name now; it goes when MLX has read it.
    return loss, grads


def teacher_kl(
    logits_beside: Callable[[mx.array], losses.Logits],
    *,
    temperature: float = 1.0,
    softcap: float = 0.0,
) -> TokenLoss:
    """KL to a teacher's logits at this temperature; targets: its hidden states (n, D_t).

    logits_beside(the student's head (V, D)): what makes the teacher's logits of these states.
    softcap: of the student's logits.
    """

    def by_mlx(
        hidden: mx.array,
        head: mx.array,
        loss_mask: mx.array,
        target: mx.array,
        *,
        frozen_head: bool = False,
    ) -> mx.array:
        teacher_logits = logits_beside(head)
        return losses.kl_sum(
            hidden,
            head,
            target,
            teacher_logits,
            loss_mask=loss_mask,
            temperature=temperature,
            frozen_head=frozen_head,
            softcap=softcap,
        )

    def by_numpy(
        hidden: mx.array,
        head: mx.array,
        loss_mask: mx.array,
        target: mx.array,
        *,
        frozen_head: bool = False,
    ) -> LossGradients:
        value, hidden_grad, head_grad = host_losses.kl_gradients(
            hidden,
            head,
            target,
            logits_beside(head),
            loss_mask=loss_mask,
            temperature=temperature,
            frozen_head=frozen_head,
            softcap=softcap,
        )
        return LossGradients(mx.array(value), hidden_grad, head_grad)

    return TokenLoss(by_mlx, by_numpy if precision.numpy_is_quicker() else None)


def likelihood_gradients(z: mx.array, drawn: mx.array) -> mx.array:
    """d log softmax(z)[drawn] / d z (n, V), for logits z (n, V) float32 and tokens drawn (n,).

    It is 1 at the drawn token minus softmax(z). The logits are used up: on a CPU their memory
    becomes the result, so nothing may be computed from them afterwards.
    """
    if precision.numpy_is_quicker():
        return host_losses.likelihood_gradients(z, drawn)
    tokens = mx.arange(z.shape[-1])
    one_hot = (tokens == drawn[:, None]).astype(mx.float32)
    return one_hot - mx.softmax(z, axis=-1)


@dataclass(frozen=True)
class Footprint:
    """What a loss holds while it is computed.

    on_host: numpy computes it. gpu: of the machine, whose commands in flight hold arrays too.
    """

    on_host: bool = False
    gpu: bool = False

    @property
    def streams(self) -> int:
        """How many windows go side by side through a whole model (`TokenLoss.map_windows`).

        Each then has gradients of its own. 0: model and loss are one graph.
        """
        return streams.count_on(gpu=self.gpu) if self.on_host else 0

    def logit_bytes(self, vocab: int, positions: int, *, student_alone: bool = False) -> int:
        """Logits in flight: chunks of float32 arrays (n, V).

        student_alone: the head gets no gradient, and no teacher's logits stand beside. A GPU holds
        the arrays that it needs and those of the commands in flight, one each, for (n, V) fills a
        command buffer.
        """
        rows = losses.chunk_rows(vocab)
        if self.on_host:
            return NUMPY_ARRAYS * min(positions, rows) * vocab * FLOAT_BYTES
        chunks = math.ceil(positions / rows)
        arrays = MLX_ARRAYS * min(CHUNKS_AHEAD, chunks)
        if student_alone:
            arrays = min(arrays, FROZEN_ARRAYS)
        if self.gpu:
            arrays = min(MLX_ARRAYS + COMMANDS_AHEAD, CHUNK_ARRAYS * chunks)
        return arrays * rows * vocab * FLOAT_BYTES


IN_ONE_GRAPH = Footprint()  # MLX computes it, on a CPU
