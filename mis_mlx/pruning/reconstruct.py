"""Repair a pruned student before training: fit each block's down_proj to the teacher's stream.

The fit is in closed form. Teacher and student march side by side, one block of each in memory.
Student block j (teacher layer k, next kept layer k') learns to deliver what the teacher has at the
entrance of k'. Each block sees the repaired stream of those before it. Related: FLAP and ReplaceMe
(arXiv 2505.02819); here the fit is per block, ridge-regularised and weighted per token.

Gemma has a norm behind its MLP. There a token's rms before it is taken to stay as it is, and the
result is judged on windows held out, after the norm's gains are fitted to it. A few channels of
Gemma's stream are a thousand times larger than the rest, so each counts by its own size, and those
that the norm makes small are left alone.

Of a mixture the routers learn to choose among the experts that are left: a block's experts are
asked once, each for all tokens; then its router alone is trained on their outputs, towards the
same goal (CerebrasResearch/reap, issue 3).
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from mis_mlx import cli
from mis_mlx.maths.reconstruction import HELD_OUT, HeldOut, NormalEquations
from mis_mlx.models.architectures import experts, families, modules
from mis_mlx.models.architectures.sizes import shape_of
from mis_mlx.models.opening import load
from mis_mlx.models.passing import stream, sweep
from mis_mlx.models.passing.stream import Batches, Hidden
from mis_mlx.types import Checkpoint, KeptUnits

ROUTER_BYTES = 2**28  # of outputs of all experts of a block
GAIN_DAMPING = 0.01  # of the mean channel, by which a gain is held back
POST_MLP_NORM = "post_feedforward_layernorm"  # of Gemma's blocks
SMALL_GAIN = 0.1  # of the median gain: smaller ones count as small
# of Adam on all tokens at once, and between looks at those held out
ROUTER_STEPS = 60
ROUTER_LOOK_STEPS = 5
# of Adam, times the root mean square of the router's weights: ten times as much unlearns what is
# rare
ROUTER_RATE = 5e-4


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
    of_experts = shape_of(student.config).experts
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
        if of_experts:
            router, error = train_router(small, turn.block, own, target, kinds)
            changed = {repaired_name(student): router}
        else:
            changed, error = fit_down_proj(turn, target, kinds=kinds, columns=columns)
        # The block is repaired in place, so the next one is fitted to the stream that it will see.
        turn.go()
        turn.block.clear()
        if error < 1.0:
            for name, new in changed.items():
                put(f"model.layers.{turn.number}.{name}", new)
        errors.append(error)
    return repaired, errors


def repaired_name(student: Checkpoint) -> str:
    """The name of the weight that changes in a block: of its MLP's last matrix, or its router."""
    return families.family(student.config).repaired


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


def held_out_windows(kinds: Sequence[int]) -> list[int]:
    """Which windows, of these kinds of text, are held out to judge a block by.

    Of every kind each fourth, or the last of fewer. Where there are several kinds, one of a single
    window judges nothing.
    """
    held_out = list[int]()
    several = len(set(kinds)) > 1
    for kind in sorted(set(kinds)):
        windows = [number for number, window_kind in enumerate(kinds) if window_kind == kind]
        every = min(HELD_OUT, len(windows))
        if not (several and every == 1):
            held_out += windows[every - 1 :: every]
    return sorted(held_out) or [len(kinds) - 1]


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
        weight = 1.0 / _rms(goal)
        into = stack.taken["down_proj"]
        if self.post_norm:
            # The norm divides by this length, which is taken to stay as it is. So the matrix lacks
            # that many times as much, and the error counts as before.
            length = _rms(self.linear(into).astype(mx.float32).reshape(-1, outputs))
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


def _rms(rows: mx.array) -> mx.array:
    """(..., D) -> (...), of each row, never 0."""
    return mx.maximum(mx.sqrt(mx.square(rows).mean(axis=-1)), 1e-6)


def _rows(states: mx.array) -> mx.array:
    """(B, T, D) -> (B T, D)."""
    return states.reshape(-1, states.shape[-1])


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
            of_channel = mx.square(goal / _rms(goal)[..., None]).mean(axis=(0, 1))
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
            rms = _rms(goal)[..., None]
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


def train_router(
    source: stream.Stream,
    block: nn.Module,
    hidden: Hidden,
    goals: Hidden,
    kinds: Sequence[int],
) -> tuple[mx.array, float]:
    """Give the block the router that best takes `hidden` to `goals`, both [(B, T, D)].

    Returns (its rows (E, D) float32, the share of the error that they leave on batches held out).
    It stays as it is, and 1 is left, where none does better there. Tokens are weighted by 1 / rms
    of the goal, as in `fit_down_proj`. Unused batches are not fetched.
    """
    part, router = load.expert_part(source.checkpoint, block)
    old = router.weight
    dtype = hidden[0].dtype
    held_out = held_out_windows(kinds)
    # Outputs of all experts for a batch are E times as large as the batch: so many batches fit.
    most = max(2, ROUTER_BYTES // (hidden[0].nbytes * len(old)))
    learning = [b for b in range(len(hidden)) if b not in held_out]
    if not learning:
        return old.astype(mx.float32), 1.0

    def asked(numbers: Sequence[int]) -> _RouterBatch:
        some = numbers[:most]
        return _RouterBatch(source, block, [hidden[b] for b in some], [goals[b] for b in some])

    # Experts answer once, for all tokens of both sets: training asks only which answers count.
    training_set = asked(learning)
    held_out_set = asked(held_out)

    def error(weight: mx.array, batch: _RouterBatch) -> mx.array:
        router.weight = weight.astype(dtype)
        part.experts.expert_outputs = batch.expert_outputs
        mixed = part(batch.inputs).reshape(batch.beside.shape).astype(mx.float32)
        out = batch.beside + mixed
        return mx.square((batch.goal - out) * batch.weight).sum()

    weight = old.astype(mx.float32)
    best = weight
    first = float(error(weight, held_out_set))
    least = first
    size = float(mx.sqrt(mx.square(weight).mean()))
    adam = optim.Adam(ROUTER_RATE * size)
    for step in range(1, ROUTER_STEPS + 1):
        grads = {"gate": mx.grad(error)(weight, training_set)}
        weight = adam.apply_gradients(grads, {"gate": weight})["gate"]
        stream.evaluate_now(weight, adam.state)  # else sixty steps would be one graph
        if step % ROUTER_LOOK_STEPS == 0:
            now = float(error(weight, held_out_set))
            if now < least:
                best = weight
                least = now
    part.experts.expert_outputs = None  # the block computes its experts again
    router.weight = best.astype(old.dtype) if least < first else old
    return best, least / first if first else 1.0


class _RouterBatch:
    """Outputs of all experts of a block for some batches' tokens, and where these should arrive.

    Rows (n, ...): n tokens of all batches together.
    """

    def __init__(
        self,
        source: stream.Stream,
        block: nn.Module,
        hidden: Hidden,
        goals: Hidden,
    ):
        part, router = load.expert_part(source.checkpoint, block)
        beside = []
        inputs = []
        for x in hidden:
            # behind attention: the stream that the mixture's output is added to, and its input
            mask = load.mask(source.args, block, x)
            stream_in, experts_in = experts.attention_part(block, x, mask)
            stream.evaluate_now(stream_in, experts_in)
            beside.append(_rows(stream_in))
            inputs.append(_rows(experts_in)[None])
        self.inputs = mx.concatenate(inputs, axis=1)
        self.beside = mx.concatenate(beside).astype(mx.float32)
        self.goal = mx.concatenate([_rows(goal) for goal in goals]).astype(mx.float32)
        self.weight = 1.0 / _rms(self.goal)[:, None]
        # Every token chooses every expert: (1, n, E).
        count = len(router.weight)
        numbers = np.broadcast_to(np.arange(count), (1, len(self.goal), count))
        every = mx.array(numbers)
        self.expert_outputs = part.experts.outputs([self.inputs], [every])[0]
        stream.evaluate_now(self.inputs, self.beside, self.goal, self.weight, self.expert_outputs)
