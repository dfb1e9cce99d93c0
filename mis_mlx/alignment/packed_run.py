"""sft of a packed model whose scales, biases and norms learn, block by block; integers stay.

As PEQA has it (arXiv 2305.14152), with biases and norms besides.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from mis_mlx.alignment import alignment_run, padded_rows
from mis_mlx.alignment.alignment_run import Alignment, AlignmentRun
from mis_mlx.alignment.padded_rows import MULTIPLE, Rows
from mis_mlx.compute.slab_losses import Seen, Slabs, sparse_kl_gradients
from mis_mlx.distillation import train_loop
from mis_mlx.distillation.block_student import BlockStudent, scales_cost
from mis_mlx.distillation.strategies import process_around
from mis_mlx.distillation.train_loop import MicroBatch
from mis_mlx.hardware import memory
from mis_mlx.hardware.stage_cost import INTEGERS, StageCost
from mis_mlx.maths import stats
from mis_mlx.maths.losses import next_tokens
from mis_mlx.models.architectures.families import family
from mis_mlx.models.opening import load
from mis_mlx.models.opening.model_size import model_of
from mis_mlx.models.passing.pass_cost import forward_flops
from mis_mlx.planner.distillation_spec import DistillationSpec
from mis_mlx.quantization import learned_scales, packed_format, scale_state
from mis_mlx.runs import run_loop
from mis_mlx.settings.recipe import QuantizationConfig
from mis_mlx.storage import checkpoint as protocol
from mis_mlx.storage import run_folder
from mis_mlx.types import Checkpoint, MisError

RATE = 2e-3  # peak learning rate, relative to what learns


def training_cost(s: Alignment, checkpoint: Checkpoint, longest: int, held_out: int) -> StageCost:
    """The cost of steps on rows of at most `longest` tokens, and of measuring `held_out` rows."""
    limit = memory.budget(s.budget_bytes).limit_bytes
    length = -(-longest // MULTIPLE) * MULTIPLE
    m = model_of(checkpoint, dtype=mx.float32)
    kinds = packed_format.formats(checkpoint).values()
    packed = QuantizationConfig(
        q_group_size=min(kind.group for kind in kinds),  # type: ignore[misc]
        target_bpw=8 * m.nbytes / m.params,
    )
    job = DistillationSpec(
        teacher=m,
        student=m,
        iters=s.iters,
        batch_size=s.batch_size,
        grad_accumulation_steps=s.grad_accumulation_steps,
        max_seq_length=length,
        save_every=s.save_every,
        rounding=packed,
    )
    # what the plan's own process does not have
    streams = process_around(job, trains=True) - process_around(job, trains=False)
    cost = scales_cost(job, s.batch_size, limit - streams, s.iters)
    measured = (s.iters // s.save_every + 3) * held_out  # the result's too
    flops = cost.flops + measured * forward_flops(m, length, length)
    return replace(cost.beside(streams), name="sft", flops=flops)


def train(
    alignment: AlignmentRun, s: Alignment, planned: StageCost, *, train: Rows, valid: Rows
) -> dict[str, Any]:
    """Train to the run's end and write the best student as a folder; the run's result.

    s: with micro-batches as planned. The figures are those of the folder that was written.
    """
    run_loop.forget_text()
    checkpoint = alignment.checkpoint
    loss = partial(answer_gradients, softcap=family(checkpoint.config).softcap or 0.0)

    def micro_batches(step: int) -> list[MicroBatch]:
        return [_with_targets(*arrays) for arrays in train.micro_batches(s, step)]

    def measured(student: BlockStudent) -> Mapping[str, float]:
        return measure(student, valid, loss, s.batch_size)

    kept = planned.stays[INTEGERS]
    with scale_state.place(planned, alignment.folder) as state:
        student = BlockStudent(checkpoint, "scales", state=state, kept=kept)
        steps = partial(train_loop.steps, student, micro_batches, loss, s)
        alignment.learn(student, student.begin, steps, partial(measured, student))
        del student, steps  # the written folder takes its place
    best = alignment.best_weights()
    learned = dict[str, mx.array]()
    for file in best.path.glob(f"*{protocol.ARRAYS}"):
        learned |= protocol.load_arrays(best, file.stem)  # with moments, which nobody asks for
    out = alignment.folder / alignment_run.MODEL
    if not out.exists():
        extra = {run_folder.DATA: dict(alignment.card)}
        learned_scales.write_learned(checkpoint, learned.get, out, extra)
    count = sum(array.size for name, array in learned.items() if name in checkpoint.tensors)
    del learned
    with scale_state.place(planned, alignment.folder) as state:
        student = BlockStudent(load.open_checkpoint(out), "scales", state=state, kept=kept)
        student.begin()
        found = measured(student)
    alignment_run.say_figures(str(out), found)
    if not np.isfinite(found["loss"]):
        why = f"{out}: its held-out loss is {found['loss']}, as what was learned is beyond float16"
        raise MisError(f"{why}: lower --learning-rate")
    return alignment.result(out, count, found)


def _with_targets(tokens: mx.array, loss_mask: mx.array, count: mx.array) -> MicroBatch:
    """A micro-batch of `Rows` as a student of blocks takes it: the next token is all of a target.

    count: unused.
    """
    ids = next_tokens(tokens).reshape(-1, 1)
    return tokens, loss_mask.reshape(-1), ids, mx.ones(ids.shape)


def answer_gradients(
    hidden: mx.array,
    slabs: Slabs,
    loss_mask: mx.array,
    ids: mx.array,
    weights: mx.array,
    *,
    softcap: float,
    seen: Seen = lambda start, p, slopes: None,
) -> tuple[mx.array, mx.array]:
    """`sparse_kl_gradients` where only positions that count meet the head: few do in a long prompt.

    The KL to one token is its cross-entropy.
    """
    places = mx.array(np.flatnonzero(np.array(loss_mask)))
    total, pull = sparse_kl_gradients(
        hidden[places],
        slabs,
        loss_mask[places],
        ids[places],
        weights[places],
        softcap=softcap,
        seen=seen,
    )
    return total, mx.zeros_like(hidden).at[places].add(pull)


def measure(
    student: BlockStudent, rows: Rows, loss: Callable[..., Any], batch_size: int
) -> dict[str, float]:
    """{"loss": nats per token to be learned, "right": share of rows} of all rows.

    A row is right where every token to be learned is the likeliest one, as when the model answers
    greedily. "right_low", "right_high": the 95 % interval, of enough rows (maths/stats).
    """
    total = 0.0
    count = 0.0
    right = list[bool]()
    for batch in padded_rows.by_length("held out: batch", rows.lengths, batch_size):
        tokens, loss_mask = padded_rows.padded([rows.rows[i] for i in batch])
        slabs = list[np.ndarray]()
        batches = [_with_targets(tokens, loss_mask, mx.array(0.0))]
        found = student.look(batches, partial(loss, seen=partial(_add_likeliest, slabs)))
        total += found.loss * found.tokens
        count += found.tokens
        likeliest = np.stack(slabs)  # (slabs, 2, n)
        best = likeliest[:, 0].argmax(axis=0)
        chosen = likeliest[best, 1, np.arange(len(best))]
        lines, places = np.nonzero(np.array(loss_mask))
        wrong = set(lines[chosen != np.array(tokens)[lines, places + 1]])
        right += [line not in wrong for line in range(len(batch))]
    mean, low, high = stats.interval(np.array(right))
    figures = {"loss": total / max(count, 1.0), "right": mean}
    if np.isfinite(low):
        figures |= {"right_low": low, "right_high": high}
    return figures


def _add_likeliest(slabs: list[np.ndarray], start: int, p: mx.array, slopes: Any) -> None:
    """Add the probability and the id of the likeliest token of a slab, (2, n). p: (n, tokens)."""
    ids = p.argmax(axis=1) + start
    slabs.append(np.array(mx.stack([p.max(axis=1), ids.astype(mx.float32)])))
