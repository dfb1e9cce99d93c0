"""Mend a pruned student before training: refit each block's down_proj to the teacher's stream, in
closed form.

Teacher and student march side by side, one block of each in memory. Student block j (teacher layer
k, next kept layer k') learns to deliver what the teacher has at the entrance of k'. Each block sees
the mended stream of those before it. Related: FLAP and ReplaceMe (arXiv 2505.02819); here the fit
is per block, ridge-regularised and weighted per token.

Gemma has a norm behind its MLP. There a token's rms before it is taken to stay as it is, and what
comes of that is judged on windows held out, after the norm's gains are fitted to it. A few channels
of Gemma's stream are a thousand times larger than the rest, so each counts by its own size, and
those that the norm makes small are left alone.

Of a mixture the routers learn to choose among the experts that are left: a block's experts are
asked once, each for all tokens; then its router alone is trained on what they said, towards the
same goal (CerebrasResearch/reap, issue 3).
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from mis_mlx import cli
from mis_mlx.hardware import lanes
from mis_mlx.maths.reconstruction import HELD_OUT, HeldOut, NormalEquations
from mis_mlx.models import experts, families, load, stream
from mis_mlx.models.stream import Batches, Hidden
from mis_mlx.planner.compression_size import ROUTER_BYTES
from mis_mlx.types import Checkpoint, KeptUnits

DAMPED = 0.01  # of the mean channel, by which a gain is held back
# of Gemma's blocks; of the median gain: what counts as small
BEHIND = "post_feedforward_layernorm"
SMALL = 0.1
# of Adam on all tokens at once, and between looks at those held out
STEPS = 60
LOOK = 5
# of Adam, times the root mean square of the router's weights: ten times as much unlearns what is
# rare
RATE = 5e-4


def reconstruct(
    teacher: Checkpoint,
    student: Checkpoint,
    keep: KeptUnits,
    batches: Batches,
    direct: bool = False,
    spool: Callable[[], Hidden] | None = None,
    put: Callable[[str, mx.array], None] | None = None,
    kinds: Sequence[int] = (),
) -> tuple[dict[str, mx.array], list[float]]:
    """({weight name: new matrix (out, in) float32, if it changes}, share of error left per block),
    of ids [(B, T)].

    direct: read past the page cache. spool(): a place other than memory for hidden states.
    put(name, array): takes what changes, which then is not returned. kinds: of text, of each batch;
    each judges the fit (default: one).
    """
    if len(batches) < 2:
        why = "one window can judge a repair but not teach one, so every block stays as it is"
        cli.say(f"reconstruct: {why}: give --reconstruct-samples 2 or more, or bring more text")
    columns = kept_columns(keep)
    place = spool or list[mx.array]
    big, small = (stream.Stream(model, direct=direct) for model in (teacher, student))
    target = big.embed(batches, place())
    own = small.embed(batches, place())
    marching = groups(big, keep, target)
    of = families.family(student.config)
    mended = dict[str, mx.array]()
    left = list[float]()
    kinds = kinds or [0] * len(batches)
    for _, (j, block) in zip(marching, small.blocks(), strict=True):  # the teacher's first
        weight, error = (heal if of.experts else partial(refit, columns=columns))(
            small, block, own, target, kinds
        )
        small.through(block, own)
        changed = {mended_name(student): weight} | (
            {f"{BEHIND}.weight": block[BEHIND].weight} if of.sandwich else {}
        )
        block.clear()
        small.finite(own[0])
        for name, new in changed.items() if error < 1.0 else ():
            (put or mended.__setitem__)(f"model.layers.{j}.{name}", new)
        left.append(error)
    return mended, left


def mended_name(student: Checkpoint) -> str:
    """Of what changes in a block: the last matrix of its MLP, or the router of its experts."""
    of = families.family(student.config)
    return f"{of.mlp}.{of.router if of.experts else 'down_proj'}.weight"


def groups(teacher: stream.Stream, keep: KeptUnits, hidden: Hidden) -> Iterator[int]:
    """Take `hidden`, the teacher's embedding, through the blocks that each student block stands
    for, in place.

    Yields j where student block j has to arrive: at the entrance of the next kept layer, at last
    behind the last block. The first group begins with the first block, kept or not.
    """
    blocks = teacher.blocks()
    done = 0
    for j, end in enumerate([*keep.layers[1:], teacher.layers]):
        for _, block in itertools.islice(blocks, end - done):
            teacher.through(block, hidden)
            block.clear()  # its weights are not to lie beside a fit
        done = end
        yield j


def judges(kinds: Sequence[int]) -> list[int]:
    """Which windows, of these kinds of text, are held out to judge a block by: of every kind each
    fourth, or the last of fewer. Where there are several kinds, one of a single window judges
    nothing.
    """
    held_out = list[int]()
    several = len(set(kinds)) > 1
    for kind in sorted(set(kinds)):
        windows = [number for number, of in enumerate(kinds) if of == kind]
        every = min(HELD_OUT, len(windows))
        if not (several and every == 1):
            held_out += windows[every - 1 :: every]
    return sorted(held_out) or [len(kinds) - 1]


def kept_columns(keep: KeptUnits) -> mx.array | None:
    """Which channels (d,) of the teacher's stream the student has; a basis (D, d) of floats; or
    None: all.
    """
    if keep.basis is not None:
        return mx.array(np.asarray(keep.basis, np.float32))
    channels = keep.kept.get((-1, "hidden"))
    return None if channels is None else mx.array(list(channels))


def narrow(hidden: mx.array, columns: mx.array | None) -> mx.array:
    """The teacher's hidden states (B, T, D) in the student's channels: picked, or turned into them
    in float32.
    """
    if columns is None:
        return hidden
    if columns.ndim == 1:
        return mx.take(hidden, columns, axis=-1)
    return (hidden.astype(mx.float32) @ columns).astype(hidden.dtype)


@dataclass(frozen=True)
class _Stack:
    """Windows that go through a block in one pass: their numbers, their states and where these
    should arrive.
    """

    numbers: Sequence[int]
    into: mx.array  # (n, T, D)
    want: mx.array  # (n, T, D of the teacher)


def _stacks(source: stream.Stream, hidden: Hidden, target: Hidden) -> Iterator[_Stack]:
    """All windows, as many at a time as a pass takes."""
    for first, some in source.stacks(hidden):
        numbers = range(first, first + len(some))
        yield _Stack(
            numbers, stream.joined(some), stream.joined([target[number] for number in numbers])
        )


def refit(
    source: stream.Stream,
    block: nn.Module,
    hidden: Hidden,
    target: Hidden,
    kinds: Sequence[int],
    columns: mx.array | None,
) -> tuple[mx.array, float]:
    """Give the block the down_proj that best takes `hidden` to `target`, the teacher's stream
    behind its group: (that matrix (D, F) float32, the share of the error that it leaves on windows
    held out). It stays as it is, and 1 is left, where none does better there: few tokens against a
    wide FFN are soon learned by heart.

    Tokens are weighted by 1 / rms of the teacher's stream, because the next norm divides by it: the
    first token of a window is a hundred times longer than the rest.
    """
    # of its output, added
    linear = block.mlp.down_proj
    share = mx.array(getattr(block, "residual_multiplier", 1.0))
    held_out = judges(kinds)
    each: mx.array = share
    back: np.ndarray | float = 1.0
    settled: Callable[[], float] | None = None
    if BEHIND in block:
        each, back, settled = _behind(source, block, hidden, target, columns, held_out)
    block.mlp.down_proj = tap = stream.InputRecorder(linear)
    outputs, inputs = linear.weight.shape
    fit = NormalEquations(inputs, outputs)
    judging = list[HeldOut]()

    def tokens(stack: _Stack) -> tuple[mx.array, mx.array, mx.array]:
        """What goes into the matrix (n, F), what its output lacks (n, D), and how much each token
        counts (n,).
        """
        out = source.run(source.at, block, stack.numbers[0], stack.into)
        goal = narrow(stack.want, columns).astype(mx.float32).reshape(-1, outputs)
        missing = (goal - out.astype(mx.float32).reshape(-1, outputs)) / each
        weight = 1.0 / _rms(goal)
        into = tap.take()
        if settled:
            length = _rms(linear(into).astype(mx.float32).reshape(-1, outputs))
            missing = missing * length[:, None]
            weight = weight / length
        return into.reshape(-1, inputs), missing, weight

    def products(stack: _Stack) -> tuple[list[mx.array], list[mx.array]]:
        """(the sums of the windows that are learned from; the tokens of those held out, for a sum
        of products a kind would be as large as the fit).
        """
        parts = [stream.split(x, len(stack.numbers)) for x in tokens(stack)]
        windows = list(zip(stack.numbers, *parts, strict=True))
        learned = [of for number, *of in windows if number not in held_out]
        judges_of = [HeldOut.of(*of) for number, *of in windows if number in held_out]
        sums = (
            list(fit.products(*map(stream.joined, zip(*learned, strict=True)))) if learned else []
        )
        return sums, [array for held in judges_of for array in (held.inputs, held.missing)]

    coming = lanes.each(products, _stacks(source, hidden, target))
    held_numbers = iter(sorted(held_out))
    for sums, tokens_of in coming:
        if sums:
            fit.add(*sums)
        for rows, missing in zip(tokens_of[::2], tokens_of[1::2], strict=True):
            judging.append(HeldOut(rows, missing, kinds[next(held_numbers)]))
        del sums, tokens_of  # as large as the fit: not beside the next ones
    block.mlp.down_proj = linear
    # else those held out judge what the norm makes of it
    update, error = fit.judged(judging, whole=not settled)
    update *= back  # in place, as the sum is: what the fit is made of is still there
    update += np.asarray(linear.weight.astype(mx.float32))
    weight = mx.array(update.astype(np.float32, copy=False))
    linear.weight = weight.astype(linear.weight.dtype)
    stream.evaluate_now(weight, linear.weight)
    return weight, settled() if settled and error < 1.0 else error


def _rms(rows: mx.array) -> mx.array:
    return mx.maximum(mx.sqrt(mx.square(rows).mean(axis=-1)), 1e-6)


def _behind(
    source: stream.Stream,
    block: nn.Module,
    hidden: Hidden,
    target: Hidden,
    columns: mx.array | None,
    held_out: Sequence[int],
) -> tuple[mx.array, np.ndarray, Callable[[], float]]:
    """Of the norm behind Gemma's MLP, arguments as of `refit`: (each channel's size (D,), by which
    its errors count; what an update (D, F) of down_proj is multiplied by (D, 1), which was fitted
    to `missing / each`, times each token's rms; and `settled()`, which then fits the gains: the
    share of the error that is left on windows held out. Where that is none less, it is 1, and the
    norm and down_proj are as they were).
    """
    norm = block[BEHIND]
    old = block.mlp.down_proj.weight
    goals = (narrow(want, columns).astype(mx.float32) for want in target)
    squares = [
        np.array(mx.square(goal / _rms(goal)[..., None]).mean(axis=(0, 1))) for goal in goals
    ]
    each = mx.array(np.sqrt(np.maximum(np.mean(squares, axis=0), 1e-12)))
    gain = np.array(norm(mx.ones_like(norm.weight)).astype(mx.float32), np.float64)
    back = np.array(each) * gain / (gain**2 + (SMALL * np.median(np.abs(gain))) ** 2)

    def sums(windows: Iterable[int]) -> np.ndarray:
        """(3, D) of squares of what the norm gives, its products with what is missing, and squares
        of that.
        """
        found, block[BEHIND] = np.zeros((3, len(gain))), (tap := stream.InputRecorder(norm))
        for b in windows:
            goal = narrow(target[b], columns).astype(mx.float32)
            missing = goal - source.run(source.at, block, b, hidden[b]).astype(mx.float32)
            given = norm(tap.take()).astype(mx.float32)
            given, missing = (x / each / _rms(goal)[..., None] for x in (given, missing))
            found += np.array(
                mx.stack([given * given, given * missing, missing * missing]).sum(axis=(1, 2))
            )
        block[BEHIND] = norm
        return found

    before = sums(held_out)[2].sum()

    def settled() -> float:
        squares, products, _ = sums(b for b in range(len(target)) if b not in held_out)
        more = products / (squares + DAMPED * squares.mean())  # of every channel's gain
        squares, products, missing = sums(held_out)
        left = float((missing - 2 * more * products + more**2 * squares).sum() / before)
        if left < 1.0:
            norm.weight = norm.weight + mx.array((more * gain).astype(np.float32)).astype(
                norm.weight.dtype
            )
        else:
            block.mlp.down_proj.weight = old
        return min(left, 1.0)

    return each, back[:, None], settled


def heal(
    source: stream.Stream, block: nn.Module, hidden: Hidden, goals: Hidden, kinds: Sequence[int]
) -> tuple[mx.array, float]:
    """Give the block the router that best takes `hidden` to `goals`, both [(B, T, D)]: (its rows
    (E, D) float32, the share of the error that they leave on batches held out). It stays as it is,
    and 1 is left, where none does better there. Tokens are weighted by 1 / rms of the goal, as in
    `refit`. Unused batches are not fetched.
    """
    of = families.family(source.checkpoint.config)
    part = block[of.mlp]
    router = part[of.router]
    old = router.weight
    kind = hidden[0].dtype
    most = max(2, ROUTER_BYTES // (hidden[0].nbytes * len(old)))
    held_out = judges(kinds)
    sets = [
        [b for b in range(len(hidden)) if (b in held_out) == held][:most] for held in (False, True)
    ]
    if not sets[0]:
        return old.astype(mx.float32), 1.0
    parts = [
        _Asked(source, block, [hidden[b] for b in of_set], [goals[b] for b in of_set])
        for of_set in sets
    ]

    def error(weight: mx.array, at: _Asked) -> mx.array:
        router.weight = weight.astype(kind)
        part.experts.said = at.said
        out = at.beside + part(at.inputs).reshape(at.beside.shape).astype(mx.float32)
        return mx.square((at.goal - out) * at.weight).sum()

    best = weight = old.astype(mx.float32)
    least = first = float(error(weight, parts[1]))
    adam = optim.Adam(RATE * float(mx.sqrt(mx.square(weight).mean())))
    for step in range(1, STEPS + 1):
        weight = adam.apply_gradients({"gate": mx.grad(error)(weight, parts[0])}, {"gate": weight})[
            "gate"
        ]
        stream.evaluate_now(weight, adam.state)
        if step % LOOK == 0 and (now := float(error(weight, parts[1]))) < least:
            best = weight
            least = now
    part.experts.said = None
    router.weight = best.astype(old.dtype) if least < first else old
    return best, least / first if first else 1.0


class _Asked:
    """What all experts of a block say to some batches' tokens, and what would be right. Rows (n,
    ...).
    """

    def __init__(self, source: stream.Stream, block: nn.Module, hidden: Hidden, goals: Hidden):
        of = families.family(source.checkpoint.config)
        part = block[of.mlp]
        pairs = list[tuple[mx.array, mx.array]]()
        for x in hidden:
            pairs.append(experts.before(block, x, load.mask(source.args, block, x)))
            stream.evaluate_now(*pairs[-1])
        beside, inputs = zip(*pairs, strict=True)
        self.inputs = mx.concatenate([n.reshape(1, -1, n.shape[-1]) for n in inputs], axis=1)
        self.beside = mx.concatenate([h.reshape(-1, h.shape[-1]) for h in beside]).astype(
            mx.float32
        )
        self.goal = mx.concatenate([g.reshape(-1, g.shape[-1]) for g in goals]).astype(mx.float32)
        self.weight = 1.0 / _rms(self.goal)[:, None]
        count = len(part[of.router].weight)
        every = mx.array(np.broadcast_to(np.arange(count), (1, len(self.goal), count)))
        self.said = part.experts.outputs([self.inputs], [every])[0]
        stream.evaluate_now(self.inputs, self.beside, self.goal, self.weight, self.said)
