"""Passes over a model one block at a time: read the next block while this one computes.

Every batch goes through block i before block i+1 comes, so weights are read once a pass however
many batches there are. A block is freed after its use, unless there is room for it: as many blocks
as fit stay in memory and are read once.
"""

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mis_mlx import cli
from mis_mlx.compute import precision
from mis_mlx.models.architectures import (
    arch,
    block_inputs,
    experts,
    side_inputs,
)
from mis_mlx.models.architectures.experts import Attend, Expert, Visit
from mis_mlx.models.architectures.families import family, mixture
from mis_mlx.models.opening import load
from mis_mlx.models.opening.model_size import model_of
from mis_mlx.models.passing import residency, sweep
from mis_mlx.models.passing.sweep import Hidden
from mis_mlx.storage.block_reader import PAGE, Reader, Slot, Slots
from mis_mlx.types import Checkpoint, MisError, TensorAt

evaluate_now = mx.eval  # what the arrays were made of may be freed, or changed, after this line
CHECKED = 2**18  # numbers that are looked at together, with up to five bytes for each
# of a type of floats: integers as wide, and the bits of its exponent
EXPONENTS = {
    mx.float32: (mx.uint32, np.uint32(0x7F800000)),
    mx.float16: (mx.uint16, np.uint16(0x7C00)),
    mx.bfloat16: (mx.uint16, np.uint16(0x7F80)),
}
HEAD_PART = 2**22  # numbers of a head that are read at a time where it comes in parts
GROUP_BYTES = 2**27  # of outputs of experts, (B, T, k, D), at a time
Batches = Sequence[mx.array]  # token ids [(B, T)]
Arrays = dict[str, mx.array]  # by the names of their tensors


def head_rows(hidden: int, vocab: int) -> int:
    """Rows of a head (vocab, hidden) that are read at a time where it comes in parts."""
    return min(vocab, max(1, HEAD_PART // hidden))


class NotNumbers(MisError):
    """A weight or a block's output holds NaN or infinity.

    Nothing may be ranked, repaired or rounded by that.
    """

    def __init__(self, what: str, dtype: mx.Dtype):
        remedy = "download the model again"
        if dtype == mx.float16:
            what = f"{what} in float16"
            remedy = (
                f"give --compute-dtype float32 (and --resume if a run has begun), or set "
                f"MIS_MLX_POLICY=cpu where a command has no such flag, or {remedy}"
            )
        super().__init__(f"{what}: {remedy}")


class Stream:
    """One model on disk, computed block by block.

    dtype: of its computations; default: the checkpoint's. headroom_bytes: memory for what may stay
    between passes: the head first, then blocks 0, 1, 2 ...; None: everything. direct: read past the
    page cache; for a model that the budget does not hold.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: mx.Dtype | None = None,
        headroom_bytes: int | None = 0,
        direct: bool = False,
    ):
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self.dtype = dtype or precision.dtype_of(checkpoint)
        self.args = family(checkpoint.config).model_args()
        self.layers = int(checkpoint.config["num_hidden_layers"])

        # Blocks and experts are read into slots, one in use while the next one is filled.
        self.reader = Reader(checkpoint.tensors, direct)
        by_block, by_expert = residency.slot_groups(checkpoint)
        self._blocks = Slots(self.reader, by_block)
        self._experts: Slots | None = None
        if by_expert:
            self._experts = Slots(self.reader, by_expert)
        size = model_of(checkpoint, dtype=self.dtype)
        # whether weights leave their slot, which is free then; else the block keeps it
        self._copies = not size.as_stored

        # What stays in memory. Experts: the ones last used, the latest at the end.
        self._kept: dict[int, nn.Module] = {}
        self._hot = OrderedDict[tuple[int, int], tuple[Expert, Slot]]()
        self._norm: nn.Module | None = None
        self._head: nn.Module | None = None
        slot_bytes = []
        if not self._copies:
            for slots in (self._blocks, self._experts):
                if slots:
                    slot_bytes.append(slots.nbytes + PAGE)
        self._keep_head, self.resident_blocks, self.resident_experts = residency.plan(
            size, headroom_bytes, slot_bytes
        )

        self._checked: set[str] = set()  # modules whose weights were searched for NaN
        self.block_index = 0  # block that was given out last
        self.sides = side_inputs.of_config(checkpoint.config)  # of the pass that is under way

    def blocks(self, order: Sequence[int] | None = None) -> Iterator[tuple[int, nn.Module]]:
        """(i, block i with evaluated weights) in `order`, each at most once; default: all.

        The caller must have evaluated everything that came out of a block before it asks for the
        next one: the block's memory is used again.
        """
        if order is None:
            order = range(self.layers)
        coming = self._blocks.each([i for i in order if i not in self._kept])
        with closing(coming):  # left in the middle, the read under way must still end
            for i in cli.show_progress("block", order):
                self.block_index = i
                if i in self._kept:
                    yield i, self._kept[i]
                    continue
                _, slot, raw = next(coming)
                block = self.opened(i, self._own(raw))
                self._check_once(block, f"model.layers.{i}.", slot, self._blocks)
                yield i, block
                if i < self.resident_blocks:
                    self._kept[i] = block
                    continue
                # somebody still names the block or a layer of it: their weights go now
                for module in block.modules():
                    module.clear()
                if not self._copies:
                    self._blocks.free.append(slot)

    def opened(self, i: int, raw: Arrays) -> nn.Module:
        """Block i with its weights, lazy. raw: its tensors as stored, by full name."""
        read_experts = None
        if self._experts:  # they are read when the block asks for them
            read_experts = partial(self._read_experts, i)
        return load.block(
            self.checkpoint, i, self.args, self.dtype, raw=raw, read_experts=read_experts
        )

    def _own(self, raw: Arrays) -> Arrays:
        """Tensors out of their slot, if weights leave it: a conversion copies, and times 1 does."""
        if not self._copies:
            return raw
        own = {}
        for name, array in raw.items():
            computed = arch.type_of(self.checkpoint.config, name, self.dtype)
            own[name] = array * 1 if array.dtype == computed else array
        return own

    def _check_once(self, module: nn.Module, name: str, slot: Slot, slots: Slots) -> None:
        """Evaluate a module, and check its weights the first time that it is read.

        Then its slot is free, where the weights have left it.
        """
        if name in self._checked:
            mx.eval(module.parameters(), mx.random.state)
        else:
            load_checked(module, f"{self.checkpoint.path}: {name}")
            self._checked.add(name)
        if self._copies:
            slots.free.append(slot)

    def _read_experts(self, i: int, numbers: Sequence[int]) -> Iterator[tuple[int, Expert]]:
        """(e, expert e of block i): first those in memory, then the others from disk.

        The experts that stay in memory are the ones last used.
        """
        assert self._experts
        in_memory = [e for e in numbers if (i, e) in self._hot]
        for e in in_memory:
            key = (i, e)
            self._hot.move_to_end(key)
            yield e, self._hot[key][0]
        from_disk = [(i, e) for e in numbers if e not in in_memory]
        coming = self._experts.each(from_disk)
        with closing(coming):
            for key, slot, raw in coming:
                _, e = key
                expert = load.expert(self.checkpoint, i, e, self.dtype, raw=self._own(raw))
                # its outputs are evaluated before the next expert takes its memory
                expert.on_output = evaluate_now
                name = f"model.layers.{i}.expert {e}."
                self._check_once(expert, name, slot, self._experts)
                yield e, expert
                self._hot[key] = expert, slot
                if len(self._hot) > self.resident_experts:
                    _, (_, slot) = self._hot.popitem(last=False)
                    if not self._copies:
                        self._experts.free.append(slot)

    def embed(self, batches: Batches, hidden: Hidden | None = None) -> Hidden:
        """Token ids [(B, T)] -> hidden states [(B, T, D)] at the input of the first block.

        Only the rows that occur are read. hidden: where to put them; default: a new list.
        """
        if hidden is None:
            hidden = []
        self.sides = side_inputs.of_config(self.checkpoint.config, self._channels(batches))
        for tokens in batches:
            ids, rows = np.unique(np.array(tokens), return_inverse=True)
            embedded = self._embedded(ids, rows.reshape(tokens.shape))
            evaluate_now(embedded)
            hidden.append(embedded)
        return hidden

    def _embedded(self, ids: np.ndarray, rows: np.ndarray) -> mx.array:
        """The scaled embedding (..., D) of token ids[rows]; ids rise."""
        table = load.embedding(self.checkpoint, self.dtype, self._stored(load.EMBEDDING, ids))
        load_checked(table, f"{self.checkpoint.path}: {load.EMBEDDING}")
        scale = family(self.checkpoint.config).embedding_scale(self.dtype)
        out = table(mx.array(rows.astype(np.int32)))
        if scale is not None:
            out = out * scale
        mx.eval(out)  # now, so that the table can go
        return out

    def _channels(self, batches: Batches) -> side_inputs.TokenChannels | None:
        """The per-layer inputs of the tokens that occur; None where the family has none.

        Only rows of these tokens are read.
        """
        if not family(self.checkpoint.config).side_width:
            return None
        channels = side_inputs.TokenChannels(self.checkpoint.config, batches)
        where = f"{self.checkpoint.path}: "
        architecture = family(self.checkpoint.config)
        model = load_checked(load.side_model(self.checkpoint, self.dtype), where)

        def of_tokens(ids: np.ndarray) -> mx.array:
            """Channels (m, L, P) of token ids (m,)."""
            # Nothing is named that can go while the result is computed: all of it is large.
            table = load.side_rows(self.checkpoint, self.dtype, self._stored(arch.PER_LAYER, ids))
            model.model.embed_tokens_per_layer = load_checked(table, f"{where}{arch.PER_LAYER}")
            every = np.arange(len(ids))
            index = mx.array(every.astype(np.int32))
            channels = architecture.side_channels(model, index, self._embedded(ids, every))
            mx.eval(channels)
            return channels

        channels.fill(of_tokens, self.dtype)
        return channels

    def run(self, i: int, block: nn.Module, b: int, hidden: mx.array) -> mx.array:
        """The hidden states (B, T, D) of the b-th batch of the pass behind block i; lazy.

        Keys and values that later blocks use are kept. hidden: of that batch, or of a stack
        (`sweep.Stack`) that begins with it.
        """
        inputs = self.sides.inputs(i, b, hidden)
        mask = load.mask(self.args, block, hidden)
        outputs = block_inputs.run(block, inputs, mask)
        return self.sides.keep(i, b, outputs)

    def _stored(self, prefix: str, rows: np.ndarray | None = None) -> Arrays:
        """All tensors of this prefix, or some of their rows as stored, in memory of their own."""
        tensors = {n: t for n, t in self.checkpoint.tensors.items() if n.startswith(prefix)}
        not_packed = len(tensors) == 1
        arrays = {}
        for name, tensor in tensors.items():
            if rows is None and not_packed:
                arrays[name] = self._converted(tensor)
            else:
                ids = np.arange(tensor.shape[0]) if rows is None else rows
                arrays[name] = self.reader.rows(tensor, ids)
        return arrays

    def _converted(self, tensor: TensorAt) -> mx.array:
        """A tensor in the type of computations, read and converted in parts.

        A head is too large to be in memory twice.
        """
        bits = {2: mx.uint16, 4: mx.uint32}[self.dtype.size]  # numpy has no bfloat16
        array: Any = mx.zeros(tensor.shape, bits)
        evaluate_now(array)
        into = np.asarray(memoryview(array))
        parts = -(-math.prod(tensor.shape) // HEAD_PART)
        for rows in np.array_split(np.arange(tensor.shape[0]), parts):
            into[rows] = np.asarray(self.reader.rows(tensor, rows).astype(self.dtype).view(bits))
        return array.view(self.dtype)

    def norm(self, hidden: Hidden) -> Hidden:
        """Every batch after the last RMSNorm, in place."""
        if self._norm is None:
            norm = load.final_norm(self.checkpoint, self.dtype, self._stored(load.NORM))
            self._norm = load_checked(norm, f"{self.checkpoint.path}: {load.NORM}")
        for b, states in enumerate(hidden):
            hidden[b] = self._norm(states)
            mx.eval(hidden[b])
        return hidden

    def head(self) -> nn.Module:
        """The vocabulary head, for `load.logits`; read again each time unless there is room."""
        if self._head is not None:
            return self._head
        head = self._read_head(None)
        if self._keep_head:
            self._head = head
        return head

    def _read_head(self, rows: np.ndarray | None) -> nn.Module:
        """The head, or the part of it for some tokens (rising), checked."""
        prefix = load.head_prefix(self.checkpoint)
        head = load.head(self.checkpoint, self.dtype, self._stored(prefix, rows))
        return load_checked(head, f"{self.checkpoint.path}: {prefix}")

    def head_parts(self, vocab: int, rows: int) -> Iterator[tuple[int, nn.Module]]:
        """(first token, head of `rows` tokens), over the first `vocab` tokens.

        Each part is read when it is asked for.
        """
        for start in range(0, vocab, rows):
            stop = min(start + rows, vocab)
            yield start, self._read_head(np.arange(start, stop))

    def run_block(self, block: nn.Module, hidden: Hidden) -> Hidden:
        """Every batch's hidden states (B, T, D) through one block, in place.

        block: the one that was given out last, or another in its place.
        """
        return sweep.BlockTurn(self, self.block_index, block, hidden).go()

    def sweep(
        self,
        hidden: Hidden,
        order: Sequence[int] | None = None,
        *,
        keep: bool = False,
        last: bool = True,
    ) -> Iterator[sweep.BlockTurn]:
        """Every block, with the batches before it: models/passing/sweep."""
        return sweep.sweep(self, hidden, order, keep=keep, last=last)

    @property
    def mixture(self) -> bool:
        """Whether blocks have experts, each of which is read when it is needed."""
        return self._experts is not None

    @property
    def resident(self) -> bool:
        """Whether all weights of blocks are in memory, once a pass has read them."""
        return self.resident_blocks >= self.layers and not self.mixture

    def run_experts(
        self,
        block: nn.Module,
        hidden: Hidden,
        visit: Visit | None = None,
        attend: Attend | None = None,
    ) -> Iterator[mx.array]:
        """Every batch's hidden states (B, T, D) behind a block that has experts, evaluated.

        Each expert is read once for as many batches as GROUP_BYTES hold the outputs of.
        visit(batch, expert, gates (n,), neurons (n, F), outputs (n, D)): what the expert did for
        the n tokens of a batch that chose it; gates sum to 1 for every token. attend: what a batch
        goes through before the experts; default: attention over its own tokens.
        """
        of_experts = mixture(self.checkpoint.config)
        assert of_experts
        part = block[of_experts.mlp]  # with its experts, and their router
        if attend is None:

            def attend(_: int, hidden: mx.array) -> tuple[mx.array, mx.array]:
                return experts.attention_part(block, hidden, load.mask(self.args, block, hidden))

        count = len(hidden)
        size = 1
        if count:
            output_bytes = hidden[0].nbytes * self.checkpoint.config["num_experts_per_tok"]
            size = max(1, GROUP_BYTES // output_bytes)
        for first in range(0, count, size):
            numbers = range(first, min(first + size, count))
            yield from experts.run_group(
                part,
                hidden,
                numbers,
                attend,
                visit=visit,
                router=part[of_experts.router],
                evaluate=evaluate_now,
            )

    def finite(self, out: mx.array) -> mx.array:
        """`out` itself, which the last block gave for a pass's first batch.

        NotNumbers where it holds NaN or infinity.
        """
        if not mx.isfinite(out).all().item():
            what = f"block {self.block_index} of {self.layers} gives values that are not numbers"
            raise NotNumbers(f"{self.checkpoint.path}: {what}", self.dtype)
        return out

    def forward(self, batches: Batches, hidden: Hidden | None = None) -> Hidden:
        """One pass: ids [(B, T)] -> final hidden states [(B, T, D)].

        On a CPU, and for one batch everywhere, they are the resident model's to the bit; for
        several in one pass to 1e-5. hidden: as of `embed`.
        """
        hidden = self.embed(batches, hidden)
        for turn in self.sweep(hidden):
            turn.go()
        return self.norm(hidden)


def not_numbers(array: mx.array) -> int:
    """How many numbers of an array are NaN or infinite: those have all bits of the exponent.

    A device is waited for once, however large the array is.
    """
    kind, exponent = EXPONENTS[array.dtype]
    words: Any = array.view(kind)
    evaluate_now(words)
    # By numpy, which reads the memory where it is: MLX takes 15 times as long on a CPU.
    there = np.asarray(memoryview(words)).reshape(-1)
    found = 0
    for start in range(0, len(there), CHECKED):  # part by part, for `&` makes a copy
        ones = there[start : start + CHECKED] & exponent
        found += int(np.count_nonzero(ones == exponent))
    return found


def load_checked(module: nn.Module, where: str = "") -> nn.Module:
    """Evaluate a lazily opened module, and return it.

    NotNumbers names, behind `where`, a tensor with NaN or infinity.
    """
    # Draws of the module's first weights would stay in the generator: 16 KB a block and pass.
    mx.eval(mx.random.state)
    parameters = Arrays(tree_flatten(module.parameters()))
    for name, array in parameters.items():
        mx.eval(array)  # one by one: a CPU opens several packed ones together, and held all twice
        if not mx.issubdtype(array.dtype, mx.floating):
            continue
        bad = not_numbers(array)
        if bad:
            raise NotNumbers(f"{where}{name} holds {bad} values that are not numbers", array.dtype)
    return module
