"""What calibrating, cutting and repairing a model take: bytes, memory, operations.

Does not know how it is done (pruning/calibrate, pruning/reconstruct), nor the training after it (planner/phases)."""

from dataclasses import replace

from mis_mlx.models import arch
from mis_mlx.planner import estimates
from mis_mlx.planner.estimates import ModelSize, StageCost, streamed_pass
from mis_mlx.planner.job import VOCABULARY_WINDOWS, DistillationSpec


def vocabulary(teacher: ModelSize, length: int, limit: int) -> StageCost:
    """Ask a teacher with all of its tokens which it expects."""
    return streamed_pass("vocabulary", teacher, VOCABULARY_WINDOWS * length, length, length, limit, spool=False)


def prune(job: DistillationSpec, limit: int) -> StageCost:
    """Choose the tokens, calibrate, then copy what is kept, tensor by tensor."""
    t, length = job.teacher, job.length
    p = streamed_pass("prune", t, job.calibration * length, length, length, limit, head=False)
    peak, read, written, flops = p.peak_bytes, p.read_bytes, p.written_bytes, p.flops
    copied = estimates.tensor_bytes(job.shown or t)
    if job.shown and job.shown.shape != t.shape:
        asked = vocabulary(job.shown, length, limit)
        peak, read, flops = max(peak, asked.peak_bytes), read + asked.read_bytes, flops + asked.flops
    if job.rotation:  # two passes, D x D sums and their eigenvectors in float64; tensors turned in float32
        square, wide = t.shape.hidden**2, 4 * max(t.shape.vocab, t.shape.ffn) * t.shape.hidden
        peak, copied = max(peak, p.peak_bytes + 5 * 8 * square), copied + 2 * wide
        turn = 4.0 * square * (t.shape.layers + 1) * job.calibration * length
        read, written, flops = read + 2 * p.read_bytes, written + 2 * p.written_bytes, flops + 2 * p.flops + turn
    peak, read, written = max(peak, copied), read + t.nbytes, written + job.student.nbytes
    return replace(p, peak_bytes=peak, read_bytes=read, written_bytes=written, flops=flops)


def repair(job: DistillationSpec) -> StageCost:
    """Both models side by side, every down_proj refitted (pruning/reconstruct), whose inputs are kept meanwhile; the
    new ones wait in memory."""
    m, length, tokens = job.student, job.length, job.repair * job.length
    small = streamed_pass("", m, tokens, length, length, head=False, spool=False)
    fit_bytes, fit_flops = estimates.refit(m, tokens)
    beside = small.peak_bytes + fit_bytes + 4 * m.shape.layers * m.shape.ffn * m.shape.hidden
    beside += tokens * m.shape.ffn * m.item
    big = streamed_pass("repair", job.teacher, tokens, length, length, head=False, spool=False, beside_bytes=beside)
    flops = big.flops + small.flops + m.shape.layers * fit_flops
    return replace(big, read_bytes=big.read_bytes + m.nbytes, flops=flops)


def repair_parts(job: DistillationSpec, limit: int) -> StageCost:
    """The same for a student in parts, each of which is written: a window at a time, hidden states on disk as far as
    they find no room, and a block's output computed once more."""
    t, m, length, tokens = job.teacher, job.student, job.length, job.repair * job.length
    fit_bytes, fit_flops = estimates.refit(m, tokens)
    body = max(each.body_bytes(estimates.workspace_bytes(each, length, length)) for each in (t, m))
    peak = t.slots_bytes + m.slots_bytes + body + max(fit_bytes, 4 * m.block_params) + estimates.SMALL_BYTES
    peak += 4 * m.shape.ffn * m.shape.hidden
    theirs, ours = t.shape.hidden * t.item, m.shape.hidden * m.item  # of a token
    held = min(tokens, estimates.room(limit, peak, t.gpu) // (length * (theirs + ours)) * length)
    moved = (tokens - held) * (theirs * (t.shape.layers + 1) + ours * (m.shape.layers + 1))
    read, written = t.shape.layers * t.block_bytes + m.nbytes + moved, moved
    written += 4 * (arch.params(m.config) + m.shape.layers * m.block_params)
    flops = estimates.forward_flops(t, tokens, length, False) + 2 * estimates.forward_flops(m, tokens, length, False)
    return StageCost(
        "repair", read, written, peak + held * (theirs + ours), flops + m.shape.layers * fit_flops,
        spooled_bytes=(tokens - held) * (theirs + ours), held_tokens=held,
    )  # fmt: skip
