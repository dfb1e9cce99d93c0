"""Passes over a model one block at a time: read the next block while this one computes, use it, free it.

Every batch goes through block i before block i+1 comes, so weights are read once a pass however many batches there are.
As many blocks as there is room for stay in memory and are read once."""

import math
from collections import deque
from collections.abc import Callable, Iterator, MutableSequence, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mis_mlx import cli
from mis_mlx.hardware import lanes
from mis_mlx.models import arch, load, policy
from mis_mlx.models.config import shape_of
from mis_mlx.storage.block_reader import PAGE, Layout, Reader, layout, pages
from mis_mlx.storage.header_check import DTYPES
from mis_mlx.types import Checkpoint, MisError, TensorAt, gib

Batches = Sequence[mx.array]  # token ids [(B, T)]
Hidden = MutableSequence[mx.array]  # hidden states (B, T, D) of every batch; a list, or a disk.spool.Spool


class NotNumbers(MisError):
    """A weight or a block's output holds NaN or infinity: nothing may be ranked, repaired or rounded by that."""

    def __init__(self, what: str, dtype: mx.Dtype):
        remedy = "download the model again"
        if dtype == mx.float16:
            remedy = f"give --compute-dtype bfloat16 (and --resume where a run has begun), or {remedy}"
        super().__init__(f"{what}{' in float16' if dtype == mx.float16 else ''}: {remedy}")


class InputRecorder(nn.Module):
    """Stands where `inner` stood and remembers what went into it: (B, T, in)."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self._seen: list[mx.array] = []  # underscore: not a parameter

    def __call__(self, x: mx.array) -> mx.array:
        """`inner(x)`, with x kept until `take`."""
        self._seen.append(x)
        return self.inner(x)

    def take(self) -> mx.array:
        """The input of the last call, forgotten here."""
        return self._seen.pop()


class _Slot:
    """A buffer that blocks are read into again and again; new memory for each would cost 4x the time."""

    def __init__(self, nbytes: int):
        if nbytes + PAGE >= 2**31:
            raise MisError(f"One block takes {gib(nbytes)} on disk, the most is 2 GiB: quantize the model first")
        self._whole = mx.zeros((nbytes + PAGE,), mx.uint8)
        mx.eval(self._whole)
        whole: Any = self._whole
        view = memoryview(whole)
        self._first = -np.frombuffer(view, np.uint8).ctypes.data % PAGE
        self.view = view[self._first : self._first + nbytes]

    def arrays(self, tensors: dict[str, TensorAt], where: Layout) -> dict[str, mx.array]:
        """The tensors as stored. They share this buffer: all that reads them is evaluated before a refill."""
        arrays = {}
        for name, t in tensors.items():
            begin = self._first + where.at[name]
            raw = self._whole[begin : begin + t.nbytes]
            attribute, size = DTYPES[t.dtype]
            if t.offset % size:  # Metal and vector units want whole elements at whole addresses: copy
                raw = raw * 1
            arrays[name] = raw.view(getattr(mx, attribute)).reshape(t.shape)
        mx.eval(arrays)
        return arrays


class Stream:
    """One model on disk, gone through in blocks.

    room_bytes: memory for what may stay between passes: the head first, then blocks 0, 1, 2 ...; None: everything.
    direct: read past the page cache; for a model that the budget does not hold."""

    def __init__(self, checkpoint: Checkpoint, dtype: mx.Dtype, room_bytes: int | None = 0, direct: bool = False):
        self.checkpoint, self.dtype = checkpoint, dtype
        self.args = load.model_args(checkpoint.config)
        self.layers = int(checkpoint.config["num_hidden_layers"])
        self._reader = Reader(checkpoint.tensors, direct)
        self._tensors: list[dict[str, TensorAt]] = [{} for _ in range(self.layers)]
        for name, t in checkpoint.tensors.items():
            if (i := arch.block_of(name)) is not None:
                self._tensors[i][name] = t
        self._layouts = [layout(t) for t in self._tensors]
        self._slot_bytes = max(at.nbytes for at in self._layouts)
        self._free: list[_Slot] = []
        kind = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
        stored = {t.dtype for tensors in self._tensors for t in tensors.values()}
        packed = "U32" in stored
        # Weights stored as they are computed with are used where they were read; others are converted. Packed ones that
        # stay packed need their slot as long as the block lives, whatever type its norms have.
        others = packed or any(kind.get(d, dtype) != dtype for d in stored)
        self._copies = others and not (packed and policy.keeps_packed())
        self._kept: dict[int, nn.Module] = {}
        self._norm: nn.Module | None = None
        self._head: nn.Module | None = None
        self._checked: set[int] = set()
        self._at = 0  # block that was given out last
        self._keep_head, self.keeps = (True, self.layers) if room_bytes is None else self._plan(room_bytes)

    @property
    def read_bytes(self) -> int:
        """Bytes of weights asked from the disk so far."""
        return self._reader.nbytes

    def _plan(self, room_bytes: int) -> tuple[bool, int]:
        """(whether the head stays, how many blocks stay)."""
        s, prefix = shape_of(self.checkpoint.config), load.head_prefix(self.checkpoint)
        head = [t for n, t in self.checkpoint.tensors.items() if n.startswith(prefix)]
        packed = policy.keeps_packed() and any(t.dtype == "U32" for t in head)
        room = room_bytes - (sum(t.nbytes for t in head) if packed else s.vocab * s.hidden * self.dtype.size)
        if room < 0:
            return False, 0
        dense = sum(map(math.prod, arch.layer_tensors(self.checkpoint.config).values())) * self.dtype.size
        return True, min(self.layers, room // (dense if self._copies else self._slot_bytes + PAGE))

    def stays(self, i: int) -> bool:
        """Whether block i is kept once it has been used."""
        return i < self.keeps

    def blocks(self, order: Sequence[int] | None = None) -> Iterator[tuple[int, nn.Module]]:
        """(i, block i with evaluated weights) in `order`, each at most once; all of them by default.

        Whoever asks for the next block has evaluated everything that the last one went into."""
        order = range(self.layers) if order is None else order
        todo = deque(i for i in order if i not in self._kept)
        coming = self._begin(todo.popleft()) if todo else None
        try:
            for i in cli.counted("block", order, len(order)):
                self._at = i
                if i in self._kept:
                    yield i, self._kept[i]
                    continue
                assert coming is not None
                (slot, wait), coming = coming, None
                wait()
                coming = self._begin(todo.popleft()) if todo else None
                block = self._make(i, slot)
                if self._copies:
                    self._free.append(slot)
                yield i, block
                if self.stays(i):
                    self._kept[i] = block
                    continue
                block.clear()  # the caller's loop variable still names the module: let go of its weights now
                if not self._copies:
                    self._free.append(slot)
        finally:
            if coming:  # left in the middle: nobody may still be writing into a slot that is free
                coming[1]()
                self._free.append(coming[0])

    def _begin(self, i: int) -> tuple[_Slot, Callable[[], None]]:
        slot = self._free.pop() if self._free else _Slot(self._slot_bytes)
        parts = []
        for e in self._layouts[i].extents:
            parts.append((e.file, e.begin, e.end, slot.view[e.at : e.at + pages(e.end - e.begin)]))
        return slot, self._reader.begin(parts)

    def _make(self, i: int, slot: _Slot) -> nn.Module:
        raw = slot.arrays(self._tensors[i], self._layouts[i])
        if self._copies:  # times 1: the few that need no conversion must leave the slot too
            raw = {n: a * 1 if a.dtype == self.dtype else a for n, a in raw.items()}
        block = load.block(self.checkpoint, i, self.args, self.dtype, raw)
        if i in self._checked:
            mx.eval(block.parameters())
        else:
            load_checked(block, f"{self.checkpoint.path}: model.layers.{i}.")
            self._checked.add(i)
        return block

    def embed(self, batches: Batches, hidden: Hidden | None = None) -> Hidden:
        """Token ids [(B, T)] -> hidden states [(B, T, D)] at the input of the first block.

        Only the rows that occur are read. hidden: where to put them; default: a new list."""
        hidden = [] if hidden is None else hidden
        tensors = {n: t for n, t in self.checkpoint.tensors.items() if n.startswith(load.EMBEDDING)}
        scale = load.embedding_scale(self.checkpoint.config, self.dtype)
        for tokens in batches:
            ids, inverse = np.unique(np.array(tokens), return_inverse=True)
            rows = {name: self._rows(t, ids) for name, t in tensors.items()}
            table = load.embedding(self.checkpoint, self.dtype, rows)
            load_checked(table, f"{self.checkpoint.path}: {load.EMBEDDING}")
            out = table(mx.array(inverse.reshape(tokens.shape).astype(np.int32)))
            out = out if scale is None else out * scale
            mx.eval(out)
            hidden.append(out)
        return hidden

    def _stored(self, prefix: str) -> dict[str, mx.array]:
        """All tensors of this prefix as stored, in memory of their own."""
        tensors = {n: t for n, t in self.checkpoint.tensors.items() if n.startswith(prefix)}
        return {name: self._rows(t, np.arange(t.shape[0])) for name, t in tensors.items()}

    def _rows(self, t: TensorAt, ids: np.ndarray) -> mx.array:
        """Rows `ids` (rising) of a stored matrix, or elements of a vector, in one new array."""
        size = t.nbytes // t.shape[0]
        rows: Any = mx.zeros((len(ids) * size,), mx.uint8)
        mx.eval(rows)
        view, wanted = memoryview(rows), []
        starts = np.flatnonzero(np.diff(ids, prepend=-2) != 1)  # of runs of neighbours
        for a, b in zip(starts, [*starts[1:], len(ids)], strict=True):
            at = t.offset + int(ids[a]) * size
            wanted.append((t.file, at, at + int(b - a) * size, view[a * size : b * size]))
        self._reader.begin(wanted)()
        return rows.view(getattr(mx, DTYPES[t.dtype][0])).reshape(len(ids), *t.shape[1:])

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
        """The vocabulary head, for `load.logits`; read anew each time unless there is room to keep it."""
        if self._head is not None:
            return self._head
        prefix = load.head_prefix(self.checkpoint)
        head = load.head(self.checkpoint, self.dtype, self._stored(prefix))
        load_checked(head, f"{self.checkpoint.path}: {prefix}")
        if self._keep_head:
            self._head = head
        return head

    def through(self, block: nn.Module, hidden: Hidden) -> Hidden:
        """Every batch's hidden states (B, T, D) through one block, in place, evaluated batch by batch."""
        for b, out in enumerate(lanes.each(lambda into: block(into, load.mask(self.args, block, into)), hidden)):
            hidden[b] = self.finite(out) if b == 0 else out
        return hidden

    def finite(self, out: mx.array) -> mx.array:
        """`out`, which the last block gave for a pass's first batch. NotNumbers where it holds NaN or infinity."""
        if not mx.isfinite(out).all().item():
            what = f"block {self._at} of {self.layers} gives values that are not numbers"
            raise NotNumbers(f"{self.checkpoint.path}: {what}", self.dtype)
        return out

    def forward(self, batches: Batches, hidden: Hidden | None = None) -> Hidden:
        """One pass: token ids [(B, T)] -> final hidden states [(B, T, D)], those of the resident model to the bit.

        hidden: as in `embed`."""
        hidden = self.embed(batches, hidden)
        for _, block in self.blocks():
            self.through(block, hidden)
        return self.norm(hidden)


def evaluate_now(*arrays: Any) -> None:
    """Evaluate now: what these were made of may be freed, or changed, after this line."""
    mx.eval(*arrays)


def load_checked(module: nn.Module, where: str = "") -> nn.Module:
    """Evaluate a lazily opened module, return it. NotNumbers names, behind `where`, a tensor with NaN or infinity."""
    mx.eval(module.parameters())
    for name, array in dict[str, mx.array](tree_flatten(module.parameters())).items():
        if mx.issubdtype(array.dtype, mx.floating) and (bad := (~mx.isfinite(array)).sum().item()):
            raise NotNumbers(f"{where}{name} holds {bad} values that are not numbers", array.dtype)
    return module
