"""Passes over a model one block at a time: read the next block while this one computes, use it,
free it.

Every batch goes through block i before block i+1 comes, so weights are read once a pass however
many batches there are. As many blocks as there is room for stay in memory and are read once.
"""

import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableSequence, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mis_mlx import cli
from mis_mlx.hardware import lanes
from mis_mlx.models import arch, block_inputs, config, experts, families, load, policy
from mis_mlx.models.experts import Expert, Visit
from mis_mlx.storage.block_reader import PAGE, Reader, Slot, Slots
from mis_mlx.types import Checkpoint, MisError, TensorAt

evaluate_now = mx.eval  # what these were made of may be freed, or changed, after this line
CHECKED = 2**22  # numbers that are looked at together, with three bytes for each
HEAD_PART = 2**22  # numbers of a head that are read at a time where it comes in parts
GROUP_BYTES = 2**27  # of outputs of experts, (B, T, k, D), at a time
STACK = 8  # windows that a GPU takes through a block in one pass, at most,
STACK_BYTES = 2**27  # and what that pass may hold
Batches = Sequence[mx.array]  # token ids [(B, T)]
# hidden states (B, T, D) of every batch; a list, or a disk.spool.Spool
Hidden = MutableSequence[mx.array]


def pass_bytes(settings: Mapping[str, Any], tokens: int, length: int) -> int:
    """The most that a block's forward pass over so many tokens, in windows of `length`, holds in
    float32.
    """
    s = arch.widest(settings)
    per_token = (
        8 * s.hidden
        + 3 * arch.met(settings)
        + 2 * (s.heads + s.kv_heads) * s.head_dim
        + s.heads * length
    )
    return 4 * tokens * per_token


def stacked(settings: Mapping[str, Any], tokens: int, length: int) -> int:
    """How many batches of so many tokens, in windows of `length`, a GPU takes in one pass. One
    window is little work for it, and it waits for each to be evaluated. Experts are met batch by
    batch, and so are blocks that take more than hidden states.
    """
    if config.shape_of(settings).experts or not block_inputs.plain(settings):
        return 1
    windows = max(1, tokens // length)
    return max(1, min(STACK // windows, STACK_BYTES // pass_bytes(settings, tokens, length)))


class NotNumbers(MisError):
    """A weight or a block's output holds NaN or infinity: nothing may be ranked, repaired or
    rounded by that.
    """

    def __init__(self, what: str, dtype: mx.Dtype):
        remedy = "download the model again"
        if dtype == mx.float16:
            remedy = (
                f"give --compute-dtype float32 (and --resume where a run has begun), or {remedy}"
            )
        super().__init__(f"{what}{' in float16' if dtype == mx.float16 else ''}: {remedy}")


class InputRecorder(nn.Module):
    """Stands where `inner` stood and remembers what went into it: (B, T, in)."""

    def __init__(self, inner: Any):
        super().__init__()
        self.inner = inner
        self._seen: list[mx.array] = []  # underscore: not a parameter

    def __call__(self, x: mx.array) -> mx.array:
        self._seen.append(x)
        return self.inner(x)

    def take(self) -> mx.array:
        """The input of the first call that was not taken yet."""
        return self._seen.pop(0)


class Stream:
    """One model on disk, gone through in blocks. dtype: of its computations; default: as the policy
    has it.

    room_bytes: memory for what may stay between passes: the head first, then blocks 0, 1, 2 ...;
    None: everything. direct: read past the page cache; for a model that the budget does not hold.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: mx.Dtype | None = None,
        room_bytes: int | None = 0,
        direct: bool = False,
    ):
        self.checkpoint, self.dtype = checkpoint, dtype or policy.compute_dtype(checkpoint)
        self.args = load.model_args(checkpoint.config)
        self.layers = int(checkpoint.config["num_hidden_layers"])
        self.reader = Reader(checkpoint.tensors, direct)
        blocks: dict[int, dict[str, TensorAt]] = {i: {} for i in range(self.layers)}
        apart = defaultdict[tuple[int, int], dict[str, TensorAt]](dict)
        for name, t in checkpoint.tensors.items():
            if (i := arch.block_of(name)) is not None:
                e = experts.expert_of(name)
                (blocks[i] if e is None else apart[i, e])[name] = t
        self._blocks = Slots(self.reader, blocks)
        self._experts = Slots(self.reader, apart) if apart else None
        # those in memory, the last used at the end
        self._hot = OrderedDict[tuple[int, int], tuple[Expert, Slot]]()
        kind = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
        stored = {t.dtype for n, t in checkpoint.tensors.items() if arch.block_of(n) is not None}
        # Weights stored as they are computed with are used where they were read; others are
        # converted. Packed ones that stay packed need their slot as long as the block lives,
        # whatever type its norms have.
        others = any(kind.get(d, self.dtype) != self.dtype for d in stored)
        self._copies = not policy.keeps_packed() if "U32" in stored else others
        self._kept: dict[int, nn.Module] = {}
        self._norm: nn.Module | None = None
        self._head: nn.Module | None = None
        self._checked: set[str] = set()
        self.at = 0  # block that was given out last
        self.sides = block_inputs.of_config(checkpoint.config)  # of the pass that is under way
        self.first = 0  # of the blocks that may stay
        self._keep_head, self.keeps, self.keeps_experts = self._plan(room_bytes)

    def _plan(self, room_bytes: int | None) -> tuple[bool, int, int]:
        """(whether the head stays, how many blocks stay, how many experts besides)."""
        s = config.shape_of(self.checkpoint.config)
        prefix = load.head_prefix(self.checkpoint)
        if room_bytes is None:
            return True, self.layers, self.layers * s.experts
        head = [t for n, t in self.checkpoint.tensors.items() if n.startswith(prefix)]
        packed = policy.keeps_packed() and any(t.dtype == "U32" for t in head)
        room = room_bytes - (
            sum(t.nbytes for t in head) if packed else s.vocab * s.hidden * self.dtype.size
        )
        if room < 0:
            return False, 0, 0
        sizes = [0, 0]  # of a block without its experts, of an expert
        for name, shape in arch.layer_tensors(self.checkpoint.config).items():
            if (e := experts.expert_of(name)) in (None, 0):
                sizes[e is not None] += math.prod(shape) * self.dtype.size
        if not self._copies:
            sizes = [slots.nbytes + PAGE for slots in (self._blocks, self._experts) if slots]
        keeps = min(self.layers, room // sizes[0])
        return True, keeps, (room - keeps * sizes[0]) // sizes[1] if s.experts else 0

    def blocks(self, order: Sequence[int] | None = None) -> Iterator[tuple[int, nn.Module]]:
        """(i, block i with evaluated weights) in `order`, each at most once; all of them by
        default.

        Whoever asks for the next block has evaluated everything that the last one went into.
        """
        order = range(self.layers) if order is None else order
        coming = self._blocks.each([i for i in order if i not in self._kept])
        with closing(coming):
            for i in cli.counted("block", order, len(order)):
                self.at = i
                if i in self._kept:
                    yield i, self._kept[i]
                    continue
                _, slot, raw = next(coming)
                each = partial(self._each_expert, i) if self._experts else None
                made = load.block(self.checkpoint, i, self.args, self.dtype, self._own(raw), each)
                block = self._checked_once(made, f"model.layers.{i}.", slot, self._blocks)
                yield i, block
                if i - self.first < self.keeps:
                    self._kept[i] = block
                    continue
                # the caller's loop variable still names the module: let go of its weights now
                block.clear()
                if not self._copies:
                    self._blocks.free.append(slot)

    def _own(self, raw: dict[str, mx.array]) -> dict[str, mx.array]:
        """Tensors that may leave their slot, if any do: times 1 the few that need no conversion."""
        return (
            {n: a * 1 if a.dtype == self.dtype else a for n, a in raw.items()}
            if self._copies
            else raw
        )

    def _checked_once(self, module: Any, name: str, slot: Slot, slots: Slots) -> Any:
        """A module evaluated, and at its first time looked at; then its slot is free, where it has
        left that.
        """
        if name in self._checked:
            mx.eval(module.parameters())
        else:
            load_checked(module, f"{self.checkpoint.path}: {name}")
            self._checked.add(name)
        if self._copies:
            slots.free.append(slot)
        return module

    def _each_expert(self, i: int, numbers: Sequence[int]) -> Iterator[tuple[int, Expert]]:
        """Those of block i: the ones in memory first, as the last used ones are, then the others
        from disk.
        """
        assert self._experts
        for e in (here := [e for e in numbers if (i, e) in self._hot]):
            self._hot.move_to_end((i, e))
            yield e, self._hot[i, e][0]
        coming = self._experts.each([(i, e) for e in numbers if e not in here])
        with closing(coming):
            for (_, e), slot, raw in coming:
                expert = load.expert(self.checkpoint, i, e, self.dtype, self._own(raw))
                expert.settle = evaluate_now
                self._checked_once(expert, f"model.layers.{i}.expert {e}.", slot, self._experts)
                yield e, expert
                self._hot[i, e] = expert, slot
                if len(self._hot) > self.keeps_experts:
                    _, (_, slot) = self._hot.popitem(last=False)
                    if not self._copies:
                        self._experts.free.append(slot)

    def embed(self, batches: Batches, hidden: Hidden | None = None) -> Hidden:
        """Token ids [(B, T)] -> hidden states [(B, T, D)] at the input of the first block.

        Only the rows that occur are read. hidden: where to put them; default: a new list."""
        hidden = [] if hidden is None else hidden
        self.sides = block_inputs.of_config(self.checkpoint.config, self._channels(batches))
        for tokens in batches:
            ids, inverse = np.unique(np.array(tokens), return_inverse=True)
            hidden.append(self._embedded(ids, inverse.reshape(tokens.shape)))
        return hidden

    def _embedded(self, ids: np.ndarray, places: np.ndarray) -> mx.array:
        """What goes into the first block: (..., D) of token ids[places]; ids rise."""
        table = load.embedding(self.checkpoint, self.dtype, self._stored(load.EMBEDDING, ids))
        load_checked(table, f"{self.checkpoint.path}: {load.EMBEDDING}")
        scale = load.embedding_scale(self.checkpoint.config, self.dtype)
        out = table(mx.array(places.astype(np.int32)))
        out = out if scale is None else out * scale
        mx.eval(out)
        return out

    def _channels(self, batches: Batches) -> block_inputs.TokenChannels | None:
        """What each block gets of each token beside hidden states; only rows of tokens that occur
        are read.
        """
        if not families.family(self.checkpoint.config).per_layer:
            return None
        channels = block_inputs.TokenChannels(self.checkpoint.config, batches)
        where = f"{self.checkpoint.path}: "
        projection = load_checked(load.side_projection(self.checkpoint, self.dtype), where)

        def of_tokens(ids: np.ndarray) -> mx.array:
            every = np.arange(len(ids))
            table = load.side_rows(self.checkpoint, self.dtype, self._stored(arch.PER_LAYER, ids))
            load_checked(table, f"{where}{arch.PER_LAYER}")
            found = projection(table(mx.array(every.astype(np.int32))), self._embedded(ids, every))
            mx.eval(found)
            return found

        channels.fill(of_tokens, self.dtype)
        return channels

    def run(self, i: int, block: nn.Module, b: int, hidden: mx.array) -> mx.array:
        """The hidden states (B, T, D) of the b-th batch of the pass behind block i; lazy. What
        later blocks use of it beside these is kept. hidden: of that batch, or of a stack (`stacks`)
        that begins with it.
        """
        inputs = self.sides.inputs(i, b, hidden)
        outputs = block_inputs.run(block, inputs, load.mask(self.args, block, hidden))
        return self.sides.keep(i, b, outputs)

    def _stored(self, prefix: str, rows: np.ndarray | None = None) -> dict[str, mx.array]:
        """All tensors of this prefix, or some of their rows as stored, in memory of their own."""
        tensors = {n: t for n, t in self.checkpoint.tensors.items() if n.startswith(prefix)}
        if rows is None and len(tensors) == 1:  # not packed
            return {n: self._converted(t) for n, t in tensors.items()}
        return {
            n: self.reader.rows(t, np.arange(t.shape[0]) if rows is None else rows)
            for n, t in tensors.items()
        }

    def _converted(self, t: TensorAt) -> mx.array:
        """A tensor in the type of computations, read and converted in parts: a head is too large to
        be there twice.
        """
        bits = {2: mx.uint16, 4: mx.uint32}[self.dtype.size]  # numpy has no bfloat16
        found: Any = mx.zeros(t.shape, bits)
        evaluate_now(found)
        into = np.asarray(memoryview(found))
        for rows in np.array_split(np.arange(t.shape[0]), -(-math.prod(t.shape) // HEAD_PART)):
            into[rows] = np.asarray(self.reader.rows(t, rows).astype(self.dtype).view(bits))
        return found.view(self.dtype)

    def norm(self, hidden: Hidden) -> Hidden:
        """Every batch after the last RMSNorm, in place."""
        if self._norm is None:
            norm = load.final_norm(self.checkpoint, self.dtype, self._stored(load.NORM))
            self._norm = load_checked(norm, f"{self.checkpoint.path}: {load.NORM}")
        for b, h in enumerate(hidden):
            hidden[b] = self._norm(h)
            mx.eval(hidden[b])
        return hidden

    def head(self) -> nn.Module:
        """The vocabulary head, for `load.logits`; read anew each time unless there is room to keep
        it.
        """
        if self._head is not None:
            return self._head
        head = self._made_head(None)
        self._head = head if self._keep_head else None
        return head

    def _made_head(self, rows: np.ndarray | None) -> nn.Module:
        prefix = load.head_prefix(self.checkpoint)
        made = load.head(self.checkpoint, self.dtype, self._stored(prefix, rows))
        return load_checked(made, f"{self.checkpoint.path}: {prefix}")

    def head_parts(self, vocab: int, rows: int) -> Iterator[tuple[int, nn.Module]]:
        """(first token, head of `rows` tokens), as `head`, over the first `vocab` tokens; each read
        when asked for.
        """
        for start in range(0, vocab, rows):
            yield start, self._made_head(np.arange(start, min(start + rows, vocab)))

    def through(self, block: nn.Module, hidden: Hidden) -> Hidden:
        """Every batch's hidden states (B, T, D) through one block, in place, evaluated batch by
        batch.
        """
        outs = self.mixed(block, hidden) if self._experts else None
        outs = outs or self.each(partial(self.run, self.at, block), hidden)
        for b, out in enumerate(outs):
            hidden[b] = self.finite(out) if b == 0 else out
        return hidden

    def each(self, work: Callable[[int, mx.array], mx.array], hidden: Hidden) -> Iterator[mx.array]:
        """`work` of every batch's number and (B, T, D), in order and evaluated: on a GPU several in
        one pass, under the number of the first of them, on a CPU side by side. Rows of a batch do
        not know of each other, so they are what they are one by one, but for their last bits.
        """
        if policy.name() == "cpu":
            yield from lanes.each(work, range(len(hidden)), hidden)
            return
        for first, some in self.stacks(hidden):
            out = work(first, joined(some))
            evaluate_now(out)
            yield from split(out, len(some))

    def stacks(self, hidden: Iterable[mx.array]) -> Iterator[tuple[int, list[mx.array]]]:
        """The batches in as many at a time as a pass takes, all of one shape, behind the number of
        the first of them; one by one on a CPU, and where a block takes more than hidden states.
        """
        first = 0
        some = list[mx.array]()
        for batch in hidden:
            if some and (batch.shape != some[0].shape or len(some) == self._at_once(some[0])):
                yield first, some
                first += len(some)
                some = []
            some.append(batch)
        if some:
            yield first, some

    def _at_once(self, batch: mx.array) -> int:
        if policy.name() == "cpu":
            return 1
        windows, length, _ = batch.shape
        return stacked(self.checkpoint.config, windows * length, length)

    def back_at_once(self, batch: mx.array) -> int:
        """How many batches like this one go back through a block together: as many as lanes, or
        half a stack.
        """
        if policy.name() == "cpu":
            return lanes.count()
        return max(1, self._at_once(batch) // 2)

    def mixed(
        self, block: nn.Module, hidden: Hidden, visit: Visit | None = None
    ) -> Iterator[mx.array]:
        """Every batch's hidden states (B, T, D) behind a block that has experts, of which each is
        read once for as many batches as GROUP_BYTES hold the outputs of.

        visit(batch, expert, gates (n,), neurons (n, F), outputs (n, D)): what the expert did for
        the n tokens of a batch that chose it; gates sum to 1 for every token.
        """
        of = families.family(self.checkpoint.config)
        part = block[of.mlp]
        inside = block[of.mlp].experts
        each = (
            hidden[0].nbytes * self.checkpoint.config["num_experts_per_tok"] if len(hidden) else 1
        )
        for first in range(0, len(hidden), size := max(1, GROUP_BYTES // each)):
            beside = []
            inputs = list[mx.array]()
            chosen = []
            gates = list[np.ndarray]()
            for b in range(first, min(first + size, len(hidden))):
                h, into = experts.before(block, hidden[b], load.mask(self.args, block, hidden[b]))
                beside.append(h)
                inputs.append(into)
                chosen.append(inside.chosen(part, inputs[-1]))
                mx.eval(beside[-1], inputs[-1], chosen[-1])
                if visit:
                    odds = (
                        part[of.router](inputs[-1])
                        .astype(mx.float32)
                        .reshape(*chosen[-1].shape[:-1], -1)
                    )
                    odds = mx.take_along_axis(odds, chosen[-1], axis=-1)
                    gates.append(np.array(mx.softmax(odds, axis=-1)).reshape(-1))
            inside.ready = inside.outputs(inputs, chosen, visit, gates, first)
            for h, x in zip(beside, inputs, strict=True):
                out = h + part(x)
                mx.eval(out)
                yield out

    def finite(self, out: mx.array) -> mx.array:
        """`out`, which the last block gave for a pass's first batch. NotNumbers where it holds NaN
        or infinity.
        """
        if not mx.isfinite(out).all().item():
            what = f"block {self.at} of {self.layers} gives values that are not numbers"
            raise NotNumbers(f"{self.checkpoint.path}: {what}", self.dtype)
        return out

    def forward(self, batches: Batches, hidden: Hidden | None = None) -> Hidden:
        """One pass: ids [(B, T)] -> final hidden states [(B, T, D)]. On a CPU, and of one batch
        everywhere, they are the resident model's to the bit; of several in one pass to 1e-5. As
        `embed`.
        """
        hidden = self.embed(batches, hidden)
        for _, block in self.blocks():
            self.through(block, hidden)
        return self.norm(hidden)


def joined(some: Sequence[mx.array]) -> mx.array:
    """Batches (B, T, D) one after the other: (n B, T, D)."""
    return mx.concatenate(list(some)) if len(some) > 1 else some[0]


def split(array: mx.array, parts: int) -> list[mx.array]:
    """What `joined` has put together, in as many parts."""
    return list(mx.split(array, parts)) if parts > 1 else [array]


def not_numbers(array: mx.array) -> int:
    """How many numbers of an array are NaN or infinite."""
    step = max(1, CHECKED // math.prod(array.shape[1:]))
    parts: Any = (
        (array[at : at + step] for at in range(0, len(array), step)) if array.ndim else [array]
    )
    return sum(int(np.count_nonzero(~np.array(mx.isfinite(part)))) for part in parts)


def load_checked(module: nn.Module, where: str = "") -> nn.Module:
    """Evaluate a lazily opened module, return it. NotNumbers names, behind `where`, a tensor with
    NaN or infinity.
    """
    mx.eval(module.parameters())
    for name, array in dict[str, mx.array](tree_flatten(module.parameters())).items():
        if mx.issubdtype(array.dtype, mx.floating) and (bad := not_numbers(array)):
            raise NotNumbers(f"{where}{name} holds {bad} values that are not numbers", array.dtype)
    return module
