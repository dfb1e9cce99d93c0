"""What training a student takes, each strategy and what belongs to it: bytes, memory, operations.

`resident_cost`: the student fits with gradients and moments. `blockwise_cost`: with 8-bit moments
and one block's gradient. `sharded_cost`: streamed, some blocks trainable at a time. `tuning_cost`:
packed, whose scales learn.
"""

import math
from dataclasses import replace

from mis_mlx.compute.slab_losses import slab_bytes
from mis_mlx.distillation import state_cost
from mis_mlx.distillation.state_cost import STATE_BYTES, block_state_bytes
from mis_mlx.hardware.stage_cost import StageCost
from mis_mlx.models import arch
from mis_mlx.models.pass_cost import (
    SMALL_BYTES,
    forward_flops,
    headroom_bytes,
    parallel_windows,
    pass_workspace,
    resident_blocks,
    side_bytes,
    streamed_pass,
)
from mis_mlx.planner.block_cost import activation_bytes, backward_bytes
from mis_mlx.planner.distillation_spec import SCALES, DistillationSpec
from mis_mlx.quantization import rounding_cost
from mis_mlx.settings.recipe import TUNE_ITERS
from mis_mlx.settings.workloads import SAVED_BYTES

PACKED_UPDATE_ARRAYS = 4  # opened moments, a new weight, and codes (measured)


def store_cost(job: DistillationSpec, limit: int) -> StageCost:
    """The teacher's sampled logits for all training tokens.

    One pass for as many windows as memory takes.
    """
    t = job.teacher
    length = job.max_seq_length
    steps = max(job.iters, job.rounding.steps(TUNE_ITERS))
    windows = steps * job.batch_size * job.grad_accumulation_steps
    one_window = streamed_pass(
        "", t, tokens=length, micro_tokens=length, length=length, spool=False
    )
    window_bytes = length * t.hidden_bytes + side_bytes(t, length)
    extra = headroom_bytes(limit, one_window.peak_bytes, t.gpu) // window_bytes
    at_once = 1 + min(extra, windows - 1)
    return StageCost(
        name="logit store",
        read_bytes=math.ceil(windows / at_once) * one_window.read_bytes,
        written_bytes=windows * length * job.target_bytes,
        peak_bytes=one_window.peak_bytes + (at_once - 1) * window_bytes,
        flops=windows * one_window.flops,
        held_tokens=at_once * length,
    )


def resident_cost(job: DistillationSpec, micro: int, limit: int) -> StageCost:
    """The student whole in memory, with as much of the teacher as there is room for.

    Or with the teacher's stored logits.
    """
    m = job.student
    length = job.max_seq_length
    nbytes = state_cost.training_bytes(
        m,
        micro,
        length,
        loss=job.loss,
        accumulates=job.step > micro * length,
    )
    one_step = StageCost(
        name="distil",
        read_bytes=m.nbytes,
        written_bytes=m.nbytes,
        peak_bytes=nbytes,
        flops=3 * forward_flops(m, job.step, length),
        updated=m.params,
    )
    activations = activation_bytes(m, micro, length)
    return _taught(
        job, one_step, micro, limit=limit, saved=SAVED_BYTES * m.params, work=activations
    )


def blockwise_cost(job: DistillationSpec, micro: int, limit: int) -> StageCost:
    """The student's blocks in memory, updated one after the other (distillation/sharded).

    The teacher as in `resident_cost`.
    """
    m = job.student
    layers = m.shape.layers
    trained = m.blocks_params // layers
    state = sum(block_state_bytes(m.config, i) for i in range(layers))
    work = backward_peak_bytes(job, micro)
    flops = 4 * forward_flops(m, job.step, job.max_seq_length, head=False)
    flops += 4.0 * job.step * m.head_params
    one_step = StageCost(
        name="distil",
        read_bytes=m.nbytes,
        written_bytes=m.nbytes,
        peak_bytes=state + work,
        flops=flops,
        updated=layers * trained,
    )
    return _taught(
        job,
        one_step,
        micro,
        limit=limit,
        saved=state,
        work=work - 4 * m.head_params,
        same_head=job.same_head,
    )


def backward_peak_bytes(job: DistillationSpec, micro: int) -> int:
    """What a step holds besides weights and moments while blocks' own weights are trained.

    As in distillation/sharded.
    """
    sizes = [math.prod(shape) for shape in arch.layer_tensors(job.student.config).values()]
    update = parallel_windows(job.student) * PACKED_UPDATE_ARRAYS * 4 * max(sizes)
    return _step_bytes(job, micro, gradient=4 * sum(sizes), update=4 * sum(sizes) + update)


def _step_bytes(
    job: DistillationSpec,
    micro: int,
    *,
    gradient: int,
    update: int = 0,
    of_stream: int = 0,
    slabs: bool = False,
) -> int:
    """What a step holds besides what learns, block by block, in micro-batches of `micro` windows.

    The input of each block, the head, and the largest of: the loss, the backward pass of a block,
    its update. gradient: of a block; windows side by side have one each. of_stream: what more the
    pass through a block takes in every stream. slabs: the head comes in slabs.
    """
    m = job.student
    s = m.shape
    length = job.max_seq_length
    # gradients of earlier micro-batches, to which those of the next are added
    summed = gradient if job.step > micro * length else 0
    activations = activation_bytes(m, micro, length) // s.layers  # of a block
    backward = backward_bytes(m, micro, length) + summed
    backward += min(parallel_windows(m), micro) * (gradient + of_stream)
    head = 4 * s.vocab * s.hidden
    loss = job.loss.logit_bytes(s.vocab, micro * length)
    if slabs:
        head = slab_bytes(micro * length, s.hidden)
        loss = activations + summed
    elif job.loss.on_host:
        loss += activations + summed
    else:
        loss += backward
    sides = side_bytes(replace(m, item=4), job.step)
    states = 4 * s.layers * job.step * m.channels
    ahead = m.in_flight(activations)
    return SMALL_BYTES + sides + states + head + max(loss, backward, update) + ahead


def tuning_cost(job: DistillationSpec, micro: int, limit: int, iters: int) -> StageCost:
    """The packed student, whose scales learn block by block (distillation/packed_student).

    What learns, its gradients and moments; the integers of one block, and of as many others as
    there is room for.
    """
    m = job.student
    job = replace(job, iters=iters)
    layers = m.shape.layers
    trained = _learned_params(job)
    packed_block = rounding_cost.packed_bytes(m, job.rounding) // layers
    # a block comes while another one computes, and is unpacked
    blocks = 2 * packed_block + m.block_params
    work = _step_bytes(
        job,
        micro,
        gradient=4 * trained // layers,
        slabs=job.targets == "cached",
        of_stream=rounding_cost.learning_matrix_bytes(m),
    )
    flops = 4 * forward_flops(m, job.step, job.max_seq_length, head=False)
    flops += 4.0 * job.step * m.head_params
    one_step = StageCost(
        name=SCALES,
        read_bytes=packed_block,
        written_bytes=rounding_cost.packed_bytes(m, job.rounding),
        peak_bytes=STATE_BYTES * trained + blocks + work,
        flops=flops,
        updated=trained,
    )
    saved = SAVED_BYTES * trained
    least = _taught(job, one_step, micro, limit=0, saved=saved, work=work)
    kept = min(layers, headroom_bytes(limit, least.peak_bytes, m.gpu) // m.block_params)
    read = packed_block * (layers + 2 * iters * (layers - kept))
    one_step = replace(
        one_step,
        read_bytes=read,
        peak_bytes=one_step.peak_bytes + kept * m.block_params,
        kept=kept,
    )
    return _taught(job, one_step, micro, limit=limit, saved=saved, work=work)


def _learned_params(job: DistillationSpec) -> int:
    """Scales and biases of the packed student's blocks."""
    return 2 * job.student.blocks_params // job.rounding.q_group_size


def scales_bytes(job: DistillationSpec, steps: int) -> int:
    """Files of a packed student whose scales learn: the result, and two checkpoints."""
    if not steps:
        return 0
    packed = rounding_cost.packed_bytes(job.student, job.rounding)
    return packed + 2 * SAVED_BYTES * _learned_params(job)


def _taught(
    job: DistillationSpec,
    one_step: StageCost,
    micro: int,
    *,
    limit: int,
    saved: int,
    work: int,
    same_head: bool = False,
) -> StageCost:
    """A student whole in memory with all its steps, its checkpoints, and its teacher.

    one_step: the student and one step of it. saved: bytes of a checkpoint. work: of the student's
    bytes those held only after the teacher's pass. same_head: the student has the teacher's head in
    memory anyway.
    """
    t = job.teacher
    length = job.max_seq_length
    iters = job.iters
    peak = one_step.peak_bytes
    flops = one_step.flops
    # of a step: loss and gradients of every micro-batch, the norm, the update
    waits = 2 * (job.step // (micro * length)) + 2
    pinned = 0
    if job.targets == "live":
        # The teacher's workspace and the student's activations do not meet, its head and hidden
        # states do.
        workspace = pass_workspace(t, job.step, micro * length, length)
        peak += max(0, t.body_bytes(workspace) - work) + t.slots_bytes
        head_read = 0
        if not same_head:
            peak += t.head_work + t.widened_bytes
            head_read = t.head_bytes
        peak += job.step * t.hidden_bytes + side_bytes(t, job.step)
        pinned = resident_blocks(t, headroom_bytes(limit, peak, t.gpu))
        read = head_read + t.block_bytes * (pinned + iters * (t.shape.layers - pinned))
        flops += forward_flops(t, job.step, length)
        waits += _teachers_pass(job, micro).waits
    else:
        read = iters * job.step * job.target_bytes
    return replace(
        one_step,
        read_bytes=one_step.read_bytes + read,
        written_bytes=one_step.written_bytes + (iters // job.save_every + 2) * saved,
        peak_bytes=peak + pinned * t.block_work,
        flops=iters * flops,
        pinned=pinned,
        updated=iters * one_step.updated,
        waits=iters * waits,
    )


def _teachers_pass(job: DistillationSpec, micro: int) -> StageCost:
    """The teacher's pass over one step, up to its head, hidden states in memory."""
    length = job.max_seq_length
    return streamed_pass(
        "",
        job.teacher,
        tokens=job.step,
        micro_tokens=micro * length,
        length=length,
        head=False,
        spool=False,
    )


def sharded_cost(job: DistillationSpec, micro: int, shard: int) -> StageCost:
    """The student streamed from float32 files, `shard` blocks in memory and trained.

    As in distillation/sharded.
    """
    t = job.teacher
    m = job.student
    layers = m.shape.layers
    length = job.max_seq_length
    block_bytes = 4 * m.block_params
    shards = math.ceil(layers / shard)
    visits = math.ceil(job.iters / steps_per_shard(job, shard))
    # the mean number of blocks above a shard, and of those that are read again: the last one
    # turns in memory
    blocks_above = [layers - min(layers, (i + 1) * shard) for i in range(shards)]
    above = sum(blocks_above) / shards
    again = sum(max(0, n - 1) for n in blocks_above) / shards
    state = shard * block_state_bytes(m.config)
    peak = 2 * block_bytes + state + backward_peak_bytes(job, micro)
    read = 4.0 * m.block_params * (layers - shard + again)
    block_flops = forward_flops(m, job.step, length, head=False) / layers
    head_flops = 4.0 * job.step * m.head_params
    flops = block_flops * (layers - 1 + 2 * above + 3 * shard) + head_flops
    if job.targets == "live":
        teacher = _teachers_pass(job, micro)
        peak += teacher.peak_bytes
        if not job.same_head:
            peak += t.head_work
        read += teacher.read_bytes
        flops += forward_flops(t, job.step, length)
    else:
        read += job.step * job.target_bytes
    trained = block_bytes * min(layers, visits * shard)
    # A resume needs one checkpoint of every visit.
    checkpoints = max(job.iters // job.save_every + 2, 2 * visits)
    return StageCost(
        name="distil",
        read_bytes=int(job.iters * read + visits * 4 * m.head_params + trained),
        written_bytes=trained + state * checkpoints,
        peak_bytes=peak,
        flops=job.iters * flops,
        updated=job.iters * m.block_params * shard,
    )


def steps_per_shard(job: DistillationSpec, shard: int) -> int:
    """Steps that a shard is trained before the next one comes.

    All have had their turn when the run ends.
    """
    return math.ceil(job.iters / math.ceil(job.student.shape.layers / shard))
