"""What training a student takes, each strategy and what belongs to it: bytes, memory, operations.

`resident_cost`: the student fits with gradients and moments. `blockwise_cost`: with 8-bit moments
and one block's gradient. `sharded_cost`: streamed, some blocks trainable at a time. `tuning_cost`:
packed, whose scales learn.
"""

import math
from dataclasses import replace

from mis_mlx.compute import slab_draws
from mis_mlx.compute.slab_losses import slab_bytes
from mis_mlx.distillation import state_cost
from mis_mlx.distillation.state_cost import STATE_BYTES, block_state_bytes
from mis_mlx.hardware.memory import process_bytes
from mis_mlx.hardware.stage_cost import StageCost
from mis_mlx.models.architectures import arch
from mis_mlx.models.passing import distributed
from mis_mlx.models.passing.pass_cost import (
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
from mis_mlx.planner.distillation_spec import SCALES, STORE, DistillationSpec
from mis_mlx.quantization import rounding_cost
from mis_mlx.settings.recipe import TUNE_ITERS
from mis_mlx.settings.workloads import SAVED_BYTES
from mis_mlx.storage import logit_store

PACKED_UPDATE_ARRAYS = 4  # opened moments, a new weight, and codes (measured)


def store_cost(job: DistillationSpec, limit: int) -> StageCost:
    """The teacher's sampled logits for all training tokens.

    One pass for as many windows as memory takes; its head comes in slabs, twice.
    """
    t = job.teacher
    length = job.max_seq_length
    vocab = t.shape.vocab
    steps = max(job.iters, job.rounding.steps(TUNE_ITERS))
    windows = steps * job.batch_size * job.grad_accumulation_steps
    blocks = streamed_pass(
        "", t, tokens=length, micro_tokens=length, length=length, head=False, spool=False
    )
    slab = slab_draws.slab_bytes(length, t.shape.hidden, vocab)
    kept = slab_draws.state_bytes(logit_store.TOP, logit_store.SAMPLES)
    one_window = replace(
        blocks,
        read_bytes=blocks.read_bytes + 2 * t.head_bytes,
        peak_bytes=blocks.peak_bytes + slab + length * kept,
        flops=blocks.flops + 4.0 * length * t.head_params,
    )
    window_bytes = length * (t.hidden_bytes + kept) + side_bytes(t, length)
    extra = headroom_bytes(limit, one_window.peak_bytes, t.gpu) // window_bytes
    at_once = 1 + min(extra, windows - 1)
    return StageCost(
        name=STORE,
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
        loss=job.loss_footprint,
        accumulates=job.step_tokens > micro * length,
    )
    one_step = StageCost(
        name="distil",
        read_bytes=m.nbytes,
        written_bytes=m.nbytes,
        peak_bytes=nbytes,
        flops=3 * forward_flops(m, job.step_tokens, length),
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
    trained = m.all_block_params // layers
    state = sum(block_state_bytes(m.config, i) for i in range(layers))
    work = backward_peak_bytes(job, micro)
    flops = 4 * forward_flops(m, job.step_tokens, job.max_seq_length, head=False)
    flops += 4.0 * job.step_tokens * m.head_params
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
    summed = gradient if job.step_tokens > micro * length else 0
    activations = activation_bytes(m, micro, length) // s.layers  # of a block
    backward = backward_bytes(m, micro, length) + summed
    backward += min(parallel_windows(m), micro) * (gradient + of_stream)
    head = 4 * s.vocab * s.hidden
    loss = job.loss_footprint.logit_bytes(s.vocab, micro * length)
    if slabs:
        head = slab_bytes(micro * length, s.hidden, s.vocab)
        loss = activations + summed
    elif job.loss_footprint.on_host:
        loss += activations + summed
    else:
        loss += backward
    sides = side_bytes(replace(m, item=4), job.step_tokens)
    states = 4 * s.layers * job.step_tokens * m.channels
    ahead = m.in_flight(activations)
    return SMALL_BYTES + sides + states + head + max(loss, backward, update) + ahead


def tuning_cost(job: DistillationSpec, micro: int, limit: int, iters: int) -> StageCost:
    """The packed student, whose scales learn block by block (distillation/packed_student).

    What learns, its gradients and moments, where they fit; else they are in files, a block at a
    time in memory. The integers of one block, and of as many others as there is room for.
    """
    gpu = job.student.gpu
    in_memory = _scales_in_memory(job, micro, limit, iters)
    fits = in_memory.peak_bytes + process_bytes(limit, gpu) <= limit
    if fits or distributed.size() > 1:  # machines send each other what is in memory
        return in_memory
    on_disk = _scales_on_disk(job, micro, limit, iters)
    return min(in_memory, on_disk, key=lambda cost: cost.peak_bytes)


def learning_scales(job: DistillationSpec) -> int:
    """Scales and biases of the student's blocks."""
    return 2 * job.student.all_block_params // job.rounding.q_group_size


def _scales_in_memory(job: DistillationSpec, micro: int, limit: int, iters: int) -> StageCost:
    """`tuning_cost`, with all that learns in memory."""
    m = job.student
    trained = learning_scales(job)
    step = _step_of_scales(job, micro)
    step = replace(step, peak_bytes=step.peak_bytes + STATE_BYTES * trained)
    saved = SAVED_BYTES * trained
    work = _work_of_scales(job, micro)
    job = replace(job, iters=iters)
    least = _taught(job, step, micro, limit=0, saved=saved, work=work)
    step = _with_kept_blocks(job, step, headroom_bytes(limit, least.peak_bytes, m.gpu))
    return _taught(job, step, micro, limit=limit, saved=saved, work=work)


def _scales_on_disk(job: DistillationSpec, micro: int, limit: int, iters: int) -> StageCost:
    """`tuning_cost`, with what learns and its moments in a file a block.

    Checkpoints are second names of these files. Room is for gradients first, which would be written
    and read at every step, then for integers, which are only read.
    """
    m = job.student
    layers = m.shape.layers
    trained = learning_scales(job)
    of_block = 4 * _learning_in_block(job)
    step = _step_of_scales(job, micro)
    # values of the block that computes; its gradients, as they came and as a vector
    step = replace(step, peak_bytes=step.peak_bytes + 3 * of_block)
    work = _work_of_scales(job, micro)
    job = replace(job, iters=iters)
    least = _taught(job, step, micro, limit=0, saved=0, work=work)
    room = headroom_bytes(limit, least.peak_bytes, m.gpu)
    held = min(layers, room // of_block)
    step = replace(step, peak_bytes=step.peak_bytes + held * of_block)
    step = _with_kept_blocks(job, step, room - held * of_block)
    put_away = (layers - held) * of_block
    state = SAVED_BYTES * trained
    # values on the way there and back, all for the update, which writes all of it
    read = step.read_bytes + iters * (2 * 4 * trained + state + put_away)
    written = step.written_bytes + 4 * trained + iters * (state + put_away)
    step = replace(step, read_bytes=read, written_bytes=written, held_gradients=held)
    # a block's new file is there before the old one goes
    files = state + SAVED_BYTES * _learning_in_block(job) + put_away
    step = replace(step, state_bytes=files)
    return _taught(job, step, micro, limit=limit, saved=0, work=work)


def _learning_in_block(job: DistillationSpec) -> int:
    """Scales and biases of a block, of the largest."""
    return 2 * job.student.largest_block_params // job.rounding.q_group_size


def _work_of_scales(job: DistillationSpec, micro: int) -> int:
    """What a step of scales that learn holds beside what learns and integers."""
    of_block = 4 * _learning_in_block(job)
    return _step_bytes(
        job,
        micro,
        gradient=of_block,
        # values and moments, old and new; gradients as a vector and by name
        update=8 * of_block,
        slabs=job.targets == "cached",
        of_stream=rounding_cost.learning_matrix_bytes(job.student),
    )


def _step_of_scales(job: DistillationSpec, micro: int) -> StageCost:
    """One step of scales that learn, without them. No block stays in memory."""
    m = job.student
    flops = 4 * forward_flops(m, job.step_tokens, job.max_seq_length, head=False)
    flops += 4.0 * job.step_tokens * m.head_params
    # a block comes while another one computes, and leaves its slot
    integers = 2 * _packed_block(job) + _integers_bytes(job)
    return StageCost(
        name=SCALES,
        read_bytes=0,
        written_bytes=rounding_cost.packed_bytes(m, job.rounding),
        peak_bytes=integers + _work_of_scales(job, micro),
        flops=flops,
        updated=learning_scales(job),
    )


def _with_kept_blocks(job: DistillationSpec, step: StageCost, room: int) -> StageCost:
    """The step, with as many blocks' integers in memory as there is room for, in bytes."""
    layers = job.student.shape.layers
    integers = _integers_bytes(job)
    kept = min(layers, room // integers)
    reads = layers + 2 * job.iters * (layers - kept)
    peak = step.peak_bytes + kept * integers
    return replace(step, read_bytes=reads * _packed_block(job), peak_bytes=peak, kept=kept)


def _packed_block(job: DistillationSpec) -> int:
    """Bytes of a rounded block on disk."""
    m = job.student
    share = m.all_block_params / m.params / m.shape.layers
    return int(share * rounding_cost.packed_bytes(m, job.rounding))


def _integers_bytes(job: DistillationSpec) -> int:
    """Integers of a block in memory: as on disk on Metal; a CPU has a byte for each."""
    m = job.student
    return _packed_block(job) if m.gpu else m.largest_block_params


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
    waits = 2 * (job.step_tokens // (micro * length)) + 2
    pinned = 0
    if job.targets == "live":
        # The teacher's workspace and the student's activations do not meet, its head and hidden
        # states do.
        workspace = pass_workspace(t, job.step_tokens, micro * length, length)
        peak += max(0, t.body_bytes(workspace) - work) + t.slots_bytes
        head_read = 0
        if not same_head:
            peak += t.head_work + t.widened_bytes
            head_read = t.head_bytes
        peak += job.step_tokens * t.hidden_bytes + side_bytes(t, job.step_tokens)
        pinned = resident_blocks(t, headroom_bytes(limit, peak, t.gpu))
        read = head_read + t.block_bytes * (pinned + iters * (t.shape.layers - pinned))
        flops += forward_flops(t, job.step_tokens, length)
        waits += _teachers_pass(job, micro).waits
    else:
        read = iters * job.step_tokens * job.target_bytes
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
        tokens=job.step_tokens,
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
    block_bytes = 4 * m.largest_block_params
    shards = math.ceil(layers / shard)
    visits = math.ceil(job.iters / steps_per_shard(job, shard))
    # the mean number of blocks above a shard, and of those that are read again: the last one
    # turns in memory
    blocks_above = [layers - min(layers, (i + 1) * shard) for i in range(shards)]
    above = sum(blocks_above) / shards
    again = sum(max(0, n - 1) for n in blocks_above) / shards
    state = shard * block_state_bytes(m.config)
    peak = 2 * block_bytes + state + backward_peak_bytes(job, micro)
    read = 4.0 * m.largest_block_params * (layers - shard + again)
    block_flops = forward_flops(m, job.step_tokens, length, head=False) / layers
    head_flops = 4.0 * job.step_tokens * m.head_params
    flops = block_flops * (layers - 1 + 2 * above + 3 * shard) + head_flops
    if job.targets == "live":
        teacher = _teachers_pass(job, micro)
        peak += teacher.peak_bytes
        if not job.same_head:
            peak += t.head_work
        read += teacher.read_bytes
        flops += forward_flops(t, job.step_tokens, length)
    else:
        read += job.step_tokens * job.target_bytes
    trained = block_bytes * min(layers, visits * shard)
    # A resume needs one checkpoint of every visit.
    checkpoints = max(job.iters // job.save_every + 2, 2 * visits)
    return StageCost(
        name="distil",
        read_bytes=int(job.iters * read + visits * 4 * m.head_params + trained),
        written_bytes=trained + state * checkpoints,
        peak_bytes=peak,
        flops=job.iters * flops,
        updated=job.iters * m.largest_block_params * shard,
    )


def steps_per_shard(job: DistillationSpec, shard: int) -> int:
    """Steps that a shard is trained before the next one comes.

    All have had their turn when the run ends.
    """
    return math.ceil(job.iters / math.ceil(job.student.shape.layers / shard))
