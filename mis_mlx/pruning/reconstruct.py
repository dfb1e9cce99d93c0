"""Repair a pruned student before training: fit each block's down_proj to the teacher's stream.

The fit is in closed form. Teacher and student march side by side, one block of each in memory.
Student block j (teacher layer k, next kept layer k') learns to deliver what the teacher has at the
entrance of k'. Each block sees the repaired stream of those before it. Related: FLAP and ReplaceMe
(arXiv 2505.02819); here the fit is per block, ridge-regularised and weighted per token.

Gemma has a norm behind its MLP. There a token's rms before it is taken to stay as it is, and the
result is judged on windows held out, after the norm's gains are fitted to it. A few channels of
Gemma's stream are a thousand times larger than the rest, so each counts by its own size, and those
that the norm makes small are left alone.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mis_mlx import cli
from mis_mlx.hardware.memory import TRAINED_BYTES, headroom_bytes
from mis_mlx.hardware.stage_cost import WINDOWS, StageCost
from mis_mlx.maths.reconstruction import (
    HELD_OUT,
    RIDGES,
    HeldOut,
    NormalEquations,
    held_out_windows,
    is_wide,
    precision,
    token_rms,
)
from mis_mlx.models.architectures import modules
from mis_mlx.models.opening.model_size import ModelSize
from mis_mlx.models.passing import stream, sweep
from mis_mlx.models.passing.pass_cost import (
    parallel_windows,
    pass_workspace,
    stream_bytes,
    streamed_pass,
)
from mis_mlx.models.passing.stream import Batches, Hidden
from mis_mlx.planner.distillation_spec import DistillationSpec
from mis_mlx.types import Checkpoint, KeptUnits

GAIN_DAMPING = 0.01  # of the mean channel, by which a gain is held back
POST_MLP_NORM = "post_feedforward_layernorm"  # of Gemma's blocks
SMALL_GAIN = 0.1  # of the median gain: smaller ones count as small


def reconstruct(
    teacher: Checkpoint,
    student: Checkpoint,
    keep: KeptUnits,
    batches: Batches,
    *,
    direct: bool = False,
    spool: Callable[[], Hidden] | None = None,
    put: Callable[[str, mx.array], None] | None = None,
    kinds: Sequence[int] = (),
) -> tuple[dict[str, mx.array], list[float]]:
    """({weight name: new weights, if they change}, share of error left per block).

    New weights are float32, whatever the models compute in: they are put into a student that
    trains in float32.

    batches: ids [(B, T)]. direct: read past the page cache. spool(): a place other than memory for
    hidden states. put(name, array): takes what changes, which then is not returned. kinds: of text,
    of each batch; each judges the fit (default: one).
    """
    if len(batches) < 2:
        why = "one window can judge a repair but not fit one, so every block stays unchanged"
        cli.say(f"reconstruct: {why}: give --reconstruct-samples 2 or more, or add text")
    repaired = dict[str, mx.array]()
    if put is None:
        put = repaired.__setitem__
    if spool is None:
        spool = list[mx.array]
    columns = kept_columns(keep)
    kinds = kinds or [0] * len(batches)
    big = stream.Stream(teacher, direct=direct)
    small = stream.Stream(student, direct=direct)
    # Both streams start at the embedding: every window's hidden states (B, T, D), which the blocks
    # change in place. Twice the hidden states and one block of each model are in memory.
    target = big.embed(batches, spool())
    own = small.embed(batches, spool())
    errors = list[float]()
    # `zip` asks the teacher first: its stream stands where the student's block should arrive before
    # that block is read.
    for _, turn in zip(advance_teacher(big, keep, target), small.sweep(own), strict=True):
        changed, error = fit_down_proj(turn, target, kinds=kinds, columns=columns)
        # The block is repaired in place, so the next one is fitted to the stream that it will see.
        turn.go()
        turn.block.clear()
        if error < 1.0:
            for name, new in changed.items():
                put(f"model.layers.{turn.number}.{name}", new)
        errors.append(error)
    return repaired, errors


def advance_teacher(teacher: stream.Stream, keep: KeptUnits, hidden: Hidden) -> Iterator[int]:
    """Take `hidden`, the teacher's embedding, in place through the blocks of each student block.

    Yields j where student block j has to arrive: at the entrance of the next kept layer, at last
    behind the last block. The first group begins with the first block, kept or not.
    """
    steps = teacher.sweep(hidden)
    done = 0
    for j, end in enumerate([*keep.layers[1:], teacher.layers]):
        for turn in itertools.islice(steps, end - done):
            turn.go()
            turn.block.clear()  # its weights are not to lie beside a fit
        done = end
        yield j


def kept_columns(keep: KeptUnits) -> mx.array | None:
    """Which channels (d,) of the teacher's stream the student has.

    Or a basis (D, d) of floats; or None: all.
    """
    if keep.basis is not None:
        return mx.array(np.asarray(keep.basis, np.float32))
    channels = keep.kept.get((-1, "hidden"))
    return None if channels is None else mx.array(list(channels))


def in_student_channels(hidden: mx.array, columns: mx.array | None) -> mx.array:
    """The teacher's hidden states (B, T, D) in the student's channels.

    They are picked, or turned into them in float32.
    """
    if columns is None:
        return hidden
    if columns.ndim == 1:
        return mx.take(hidden, columns, axis=-1)
    return (hidden.astype(mx.float32) @ columns).astype(hidden.dtype)


@dataclass(frozen=True)
class _Task:
    """One block to fit, every window's states before it, and where they should arrive."""

    turn: sweep.BlockTurn
    target: Hidden
    columns: mx.array | None  # the student's, of the teacher's channels
    held_out: Sequence[int]  # windows that judge

    @property
    def block(self) -> nn.Module:
        """The block to fit."""
        return self.turn.block

    def out(self, number: int) -> mx.array:
        """The block's output (B, T, d) for one window, lazy."""
        turn = self.turn
        return turn.source.run(turn.number, turn.block, number, turn.hidden[number])

    def goal(self, want: mx.array) -> mx.array:
        """Where the student's stream should arrive (B, T, d), float32, lazy."""
        return in_student_channels(want, self.columns).astype(mx.float32)


_Rows = tuple[mx.array, mx.array]  # inputs of down_proj (n, F), what its output lacks (n, D)


DOWN_PROJ = {"down_proj": ("mlp", "down_proj")}


class _FitTokens:
    """The tokens that a block's down_proj is fitted to, stack by stack."""

    def __init__(self, task: _Task, post_norm: "_PostNorm | None"):
        self.task = task
        self.post_norm = post_norm
        self.linear = task.block.mlp.down_proj
        # by which errors are divided: Granite adds only a share of what down_proj gives
        self.scale = mx.array(getattr(task.block, "residual_multiplier", 1.0))
        if post_norm:
            self.scale = post_norm.sizes

    def tokens(self, stack: sweep.Stack) -> tuple[mx.array, mx.array, mx.array]:
        """Inputs of down_proj (n, F), what its output lacks (n, D), each token's weight (n,)."""
        task = self.task
        outputs, inputs = self.linear.weight.shape
        want = sweep.joined([task.target[number] for number in stack.numbers])
        goal = task.goal(want).reshape(-1, outputs)
        missing = (goal - stack.out.astype(mx.float32).reshape(-1, outputs)) / self.scale
        # A window's first token is a hundred times longer than the rest: unweighted, the fit would
        # be to it alone.
        weight = 1.0 / token_rms(goal)
        into = stack.taken["down_proj"]
        if self.post_norm:
            # The norm divides by this length, which is taken to stay as it is. So the matrix lacks
            # that many times as much, and the error counts as before.
            length = token_rms(self.linear(into).astype(mx.float32).reshape(-1, outputs))
            missing = missing * length[:, None]
            weight = weight / length
        return into.reshape(-1, inputs), missing, weight

    def products(self, stack: sweep.Stack) -> tuple[list[mx.array], list[_Rows]]:
        """(sums of the windows that are learned from, [(inputs, missing)] of those held out).

        The latter are kept as tokens, for a sum of products a kind would be as large as the fit.
        """
        parts = [sweep.split(x, len(stack.numbers)) for x in self.tokens(stack)]
        learned = []
        held_out = []
        for number, inputs, missing, weight in zip(stack.numbers, *parts, strict=True):
            if number in self.task.held_out:
                rows = HeldOut.of(inputs, missing, weight)
                held_out.append((rows.inputs, rows.missing))
            else:
                learned.append((inputs, missing, weight))
        if not learned:
            return [], held_out
        all_inputs, all_missing, weights = map(sweep.joined, zip(*learned, strict=True))
        return list(NormalEquations.products(all_inputs, all_missing, weights)), held_out


def fit_down_proj(
    turn: sweep.BlockTurn,
    target: Hidden,
    *,
    kinds: Sequence[int],
    columns: mx.array | None,
) -> tuple[dict[str, mx.array], float]:
    """Give the turn's block the down_proj that best takes its windows to `target`.

    target: the teacher's stream behind the block's group. Returns ({name: new weights in float32}:
    that matrix (D, F) and the gains (D,) of a norm behind it, the share of the error that they
    leave on windows held out). Both stay as they are, and 1 is left, where none does better there:
    few tokens against a wide FFN are soon learned by heart.

    Tokens are weighted by 1 / rms of the teacher's stream, because the next norm divides by it: the
    first token of a window is a hundred times longer than the rest.
    """
    task = _Task(turn, target, columns, held_out=held_out_windows(kinds))
    linear = turn.block.mlp.down_proj
    post_norm = _PostNorm(task) if POST_MLP_NORM in turn.block else None
    # One pass: each stack's products are added to G (F, F) and the cross products (F, D); tokens
    # held out stay as they are.
    outputs, inputs = linear.weight.shape
    fit = NormalEquations(inputs, outputs)
    judging = list[HeldOut]()
    tokens = _FitTokens(task, post_norm)
    held_numbers = iter(sorted(task.held_out))
    for sums, held_out in turn.look(tokens.products, DOWN_PROJ):
        if sums:
            fit.add(*sums)
        for rows, missing in held_out:
            judging.append(HeldOut(rows, missing, kinds[next(held_numbers)]))
        del sums, held_out  # as large as the fit: not beside the next ones
    # The ridge is the one that does best on tokens held out, which then join the sums. Behind a
    # norm they do not: they still have to judge what the norm makes of it.
    update, error = fit.best_update(judging, with_held_out=post_norm is None)
    # in place, as the sum is: what the fit is made of is still there
    if post_norm:
        update *= post_norm.factors
    update += np.asarray(linear.weight.astype(mx.float32))
    weight = mx.array(update.astype(np.float32, copy=False))
    linear.weight = weight.astype(linear.weight.dtype)
    stream.evaluate_now(weight, linear.weight)
    changed = {"mlp.down_proj.weight": weight}
    if post_norm and error < 1.0:
        gains, error = post_norm.fit_gains()
        changed[f"{POST_MLP_NORM}.weight"] = gains
    return changed, error


class _PostNorm:
    """The norm behind Gemma's MLP, in a fit of the down_proj before it.

    sizes (D,): of each channel, by which its errors count. factors (D, 1): what an update (D, F) of
    down_proj is multiplied by, which was fitted to `missing / sizes`, times each token's rms.
    """

    def __init__(self, task: _Task):
        self.task = task
        self.norm = task.block[POST_MLP_NORM]
        self.old = task.block.mlp.down_proj.weight
        self.sizes = mx.array(self._channel_sizes())
        # The gain of each channel: what the norm makes of ones. Where it is small, the inverse
        # would blow up an update; the damped one leaves such channels alone.
        ones = mx.ones_like(self.norm.weight)
        self.gain = np.array(self.norm(ones).astype(mx.float32), np.float64)
        small = SMALL_GAIN * np.median(np.abs(self.gain))
        factors = np.array(self.sizes) * self.gain / (self.gain**2 + small**2)
        self.factors = factors[:, None]
        self.before = self._sums(task.held_out)[2].sum()

    def _channel_sizes(self) -> np.ndarray:
        """(D,) rms of each channel of the goal, over tokens of length 1 each."""
        squares = []
        for want in self.task.target:
            goal = self.task.goal(want)
            of_channel = mx.square(goal / token_rms(goal)[..., None]).mean(axis=(0, 1))
            squares.append(np.array(of_channel))
        return np.sqrt(np.maximum(np.mean(squares, axis=0), 1e-12))

    def _sums(self, windows: Iterable[int]) -> np.ndarray:
        """Sums over tokens (3, D): given^2, given * missing, missing^2.

        given: what the norm gives. missing: what the stream lacks.
        """
        task = self.task
        recorder = modules.InputRecorder(self.norm)
        task.block[POST_MLP_NORM] = recorder
        total = np.zeros((3, len(self.gain)))
        for b in windows:
            goal = task.goal(task.target[b])
            rms = token_rms(goal)[..., None]
            missing = goal - task.out(b).astype(mx.float32)
            missing = missing / self.sizes / rms
            given = self.norm(recorder.take()).astype(mx.float32) / self.sizes / rms
            # No name for the stack: it would stay beside the next window.
            sums = mx.stack([given * given, given * missing, missing * missing]).sum(axis=(1, 2))
            total += np.array(sums)
        task.block[POST_MLP_NORM] = self.norm
        return total

    def fit_gains(self) -> tuple[mx.array, float]:
        """Fit the gains to the new down_proj.

        Returns (the norm's weights (D,) float32, the share of the error left on windows held out).
        Where that is none less, it is 1, and the norm and down_proj are as they were.
        """
        old = self.norm.weight.astype(mx.float32)
        windows = range(len(self.task.target))
        squares, products, _ = self._sums(b for b in windows if b not in self.task.held_out)
        # Least squares of one number a channel: by which share its gain grows.
        growth = products / (squares + GAIN_DAMPING * squares.mean())
        squares, products, missing = self._sums(self.task.held_out)
        rest = missing - 2 * growth * products + growth**2 * squares
        left = float(rest.sum() / self.before)
        if left >= 1.0:
            self.task.block.mlp.down_proj.weight = self.old
            return old, 1.0
        change = mx.array((growth * self.gain).astype(np.float32))
        gains = old + change
        rounded = gains.astype(self.norm.weight.dtype)
        stream.evaluate_now(gains, rounded)
        self.norm.weight = rounded
        return gains, left


def _fit_cost(m: ModelSize, tokens: int, workspace: int) -> StageCost:
    """A block's closed-form fit.

    Normal equations, and tokens held out as they are; besides them what a block's pass takes
    (`workspace`) and float32 batches of products, then what solving makes of the sums, and the
    block where it is a copy. Held-out tokens judge every ridge, then join the sums. Solvers are
    numpy's in float64, or LAPACK's in float32 of wide layers, of which four operations count as
    one.
    """
    f = m.wide.ffn
    d = m.shape.hidden
    item = np.dtype(precision(f)).itemsize
    held_out = max(1, tokens // HELD_OUT)
    sums = item * f * (f + d) + 4 * held_out * (f + d)
    products = 4 * parallel_windows(m) * f * (f + d) + workspace
    solving = f * (item * f + max(2 * item, 16) * d)
    # BLAS packs parts of what it solves: as much was measured on F = 3,242, less on 1,024.
    solving += min(TRAINED_BYTES, 2 * f * (f + d))
    solving += 0 if m.as_stored else m.block_work
    judged = 2.0 * len(RIDGES) * held_out * f * d
    solves = len(RIDGES) + 1
    # The host factorizes (F, F) and uses that; in float32 MLX does the latter, the former counts
    # a quarter.
    host = solves * f**2 * (2 / 3 * f / 4 if is_wide(f) else 2 / 3 * f + 2 * d)
    flops = 2.0 * tokens * f * (f + d) + solves * f * f * (2 / 3 * f + 4 * d) + judged
    peak_bytes = sums + max(products, solving)
    return StageCost("fit", peak_bytes=peak_bytes, flops=flops - host, host_flops=host)


def repair_cost(job: DistillationSpec, limit: int, item: int = 0) -> StageCost:
    """Both models side by side, every down_proj fitted anew.

    item: bytes of a number in the student's parts, each of which is written, with hidden states on
    disk as far as they find no room; 0: the student is one file, and its new matrices wait in
    memory.
    """
    length = job.max_seq_length
    tokens = job.reconstruct_samples * length
    t = job.teacher
    m = job.student
    if item:
        block_bytes = item * m.largest_block_params
        m = replace(m, block_bytes=block_bytes, as_stored=item == m.item == 4)
    layers = m.shape.layers
    big, small = (
        streamed_pass("", model, tokens=tokens, length=length, head=False, spool=False)
        for model in (t, m)
    )
    workspace = pass_workspace(t, tokens, length, length)
    body = m.body_bytes(pass_workspace(m, tokens, length, length))
    read = big.read_bytes + m.nbytes
    work = _fit_cost(m, tokens, body)
    matrix = 4 * m.shape.hidden * m.shape.ffn
    peak_bytes = stream_bytes(t, tokens) + stream_bytes(m, tokens) + t.in_flight(workspace)
    window = length * (t.hidden_bytes + m.hidden_bytes)
    held = job.reconstruct_samples
    written = 0
    stays = {}
    if item:
        writing = body + 4 * m.largest_block_params
        peak_bytes += matrix + max(t.body_bytes(workspace), work.peak_bytes, writing)
        held = min(held, headroom_bytes(limit, peak_bytes) // window)
        stays[WINDOWS] = held
        written = item * (m.params + layers * m.largest_block_params)
    else:
        peak_bytes += layers * matrix + max(t.body_bytes(workspace), work.peak_bytes)
    spooled = tokens - held * length
    visits = t.hidden_bytes * (t.shape.layers + 1) + m.hidden_bytes * (layers + 1)
    return StageCost(
        name="repair",
        read_bytes=read + spooled * visits,
        written_bytes=written + spooled * visits,
        peak_bytes=peak_bytes + held * window,
        flops=big.flops + 2 * small.flops + layers * work.flops,
        scratch_bytes=spooled * (t.hidden_bytes + m.hidden_bytes),
        stays=stays,
        host_flops=layers * work.host_flops,
    )
