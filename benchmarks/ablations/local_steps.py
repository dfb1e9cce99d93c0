"""Local distillation: one student block at a time learns to do what the teacher does in its place.

Teacher and student march side by side, one block of each in memory: for models of which neither
fits. Student block j learns to map the teacher's stream at the entrance of its group of blocks to
the one at the exit (Puzzle's blockwise local distillation, arXiv 2411.19146). Some batches enter
from the student's own stream instead, so that it learns to make up for the blocks before it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mis_mlx import cli
from mis_mlx.compute import precision, streams
from mis_mlx.data import token_windows
from mis_mlx.distillation import train_loop
from mis_mlx.distillation.whole_model import WholeModel
from mis_mlx.maths import reconstruction
from mis_mlx.maths.optimizer import GuardedAdamW
from mis_mlx.models.architectures.sizes import shape_of
from mis_mlx.models.opening import load
from mis_mlx.models.passing import stream
from mis_mlx.models.passing.sweep import BlockTurn
from mis_mlx.models.writing import model_writer
from mis_mlx.pruning import reconstruct
from mis_mlx.settings.recipe import TrainingConfig
from mis_mlx.storage.checkpoint import sweep
from mis_mlx.storage.files import Files
from mis_mlx.storage.hidden_spool import Spool
from mis_mlx.types import Checkpoint, KeptUnits, Step

OWN_SHARE = 0.5
RECORD = "trained.json"  # in the student's folder: how many blocks are trained


def finished(student: Checkpoint) -> int:
    """How many blocks of a parts folder are trained: the first ones."""
    path = student.path / RECORD
    return int(json.loads(path.read_text(encoding="utf-8"))["blocks"]) if path.is_file() else 0


def scratch_bytes(teacher: Mapping[str, Any], student: Mapping[str, Any], tokens: int) -> int:
    """Disk that the hidden states of `tokens` tokens take when they are not held in memory, by the
    two configs.
    """
    size = precision.usual_dtype().size
    return tokens * (
        shape_of(teacher).hidden * size + shape_of(student).hidden * (size + mx.float32.size)
    )


@dataclass(frozen=True)
class _Streams:
    """Hidden states of all batches around one student block: three lists of (B, T, D)."""

    given: stream.Hidden  # the teacher's at the entrance of the group, in the student's channels
    own: stream.Hidden  # the student's there
    target: stream.Hidden  # the teacher's at the exit, all channels
    columns: mx.array | None

    @property
    def judges(self) -> Sequence[int]:
        """Which batches no step is made of; none where there are too few."""
        return (
            reconstruction.held_out_windows([0] * n)
            if (n := len(self.target)) >= reconstruction.HELD_OUT
            else range(0)
        )

    def held_out(self, block: nn.Module, args: Any) -> float:
        """The block's `error` per token on the batches that judge, from the student's own stream; 0
        where none do.
        """

        def both(own: mx.array, target: mx.array) -> mx.array:
            return mx.stack(
                [*error(args, block, own, reconstruct.in_student_channels(target, self.columns))]
            )

        # some are on disk
        one_by_one = (map(hidden.__getitem__, self.judges) for hidden in (self.own, self.target))
        of_batches = streams.parallel_map(both, *one_by_one)
        wrong, tokens = sum((np.array(each, np.float64) for each in of_batches), start=np.zeros(2))
        return float(wrong / max(tokens, 1.0))

    def micro_batches(
        self, recipe: TrainingConfig, own_share: float, step: int
    ) -> list[tuple[mx.array, mx.array]]:
        """(what goes in, what should come out), float32, for `step` counted over all blocks."""
        seen = [b for b in range(len(self.target)) if b not in self.judges]
        chosen = token_windows.order(len(seen), recipe.grad_accumulation_steps, step, recipe.seed)
        mine = np.random.default_rng([recipe.seed, step, 2]).random(len(chosen)) < own_share
        pairs = []
        for i, own in zip(chosen.tolist(), mine, strict=True):
            b = seen[i]
            into = (self.own if own else self.given)[b]
            out = reconstruct.in_student_channels(self.target[b], self.columns)
            pairs.append((into.astype(mx.float32), out.astype(mx.float32)))
        return pairs


def train(
    teacher: Checkpoint,
    pruned: Checkpoint,
    student: Checkpoint,
    keep: KeptUnits,
    batches: Sequence[mx.array],
    recipe: TrainingConfig,
    *,
    folder: Path,
    held: int,
    files: Files,
    own_share: float = OWN_SHARE,
    repair: bool = True,
    direct: bool = False,
) -> Iterator[Step]:
    """Train the blocks of `student`, the folder that model_writer.by_block made of `pruned`, that
    are not trained yet.

    batches: token ids, all of one shape (B, T). A block gets `recipe.iters` steps, each of
    `recipe.grad_accumulation_steps` batches, of which a seeded `own_share` enter from the student's
    own stream; before that its down_proj is refitted in closed form (`repair`). Hidden states: the
    first `held` batches of each stream stay in memory, the rest in `folder`. direct: read the
    teacher past the page cache. Yields each step; numbers count on from block to block, `loss` is
    the mean over tokens of |out - target|^2 / |target|^2.

    Every fourth batch judges a block and teaches nothing: steps after which it is further from the
    teacher there than before are undone. A trained block is on disk before the next one begins. A
    run that was killed goes on with the block it was at, from `pruned` again, once both models have
    marched up to it: it ends with the same bits.
    """
    sweep(student.path, files)
    done = finished(student)
    layers = len(keep.layers)
    if done == layers:
        return
    nbytes = scratch_bytes(teacher.config, pruned.config, sum(b.size for b in batches[held:]))
    files.require_space(folder, nbytes, "the spool of hidden states")
    spool = partial(Spool, folder, held, files)
    big = stream.Stream(teacher, precision.dtype_of(teacher), direct=direct)
    # for what is no block: those have memory of their own here
    small = stream.Stream(pruned, mx.float32)
    target = big.embed(batches, spool())
    own = small.embed(batches, spool())
    columns = reconstruct.kept_columns(keep)
    marching = reconstruct.advance_teacher(big, keep, target)
    for j in range(layers):
        streams = _Streams(spool(), own, target, columns)
        for h in target if own_share < 1 and j >= done else ():
            streams.given.append(entrance := reconstruct.in_student_channels(h, columns))
            mx.eval(entrance)
        next(marching)
        block = stream.load_checked(
            load.block(pruned if j >= done else student, j, small.args, mx.float32)
        )
        if j >= done:
            note = f"block {j + 1} of {layers}"
            refitted = dict[str, mx.array]()
            if repair:
                refitted, left = reconstruct.fit_down_proj(
                    BlockTurn(small, j, block, own), target, kinds=[0] * len(own), columns=columns
                )
                note += f": closed form left {left:.0%} of the error held out"
            begun = streams.held_out(block, small.args)
            yield from _steps(
                block,
                small.args,
                streams=streams,
                recipe=recipe,
                own_share=own_share,
                first=j * recipe.iters,
                note=note,
            )
            # from disk: no second copy of a block waits meanwhile
            if streams.held_out(block, small.args) > begun:
                cli.say(
                    f"local, block {j + 1}: further from the teacher on windows held out: its "
                    f"steps are undone"
                )
                block = load.block(pruned, j, small.args, mx.float32)
                block.load_weights(list(refitted.items()), strict=False)
            model_writer.replace_block(student, j, dict(tree_flatten(block.parameters())), files)
            files.replace_text(student.path / RECORD, json.dumps({"blocks": j + 1}))
        if j + 1 < layers:
            small.run_block(block, own)
        del block, streams


def error(args: Any, block: nn.Module, into: mx.array, want: mx.array) -> tuple[mx.array, mx.array]:
    """(sum over tokens of |out - want|^2 / |want|^2, how many tokens) of a block's output for
    `into`, (B, T, D).

    Relative to the token's own length: the first token of a window is a hundred times longer than
    the rest.
    """
    missing = mx.square(block(into, load.mask(args, block, into)) - want).sum(axis=-1)
    share = missing / mx.maximum(mx.square(want).sum(axis=-1), 1e-12)
    return share.sum(), mx.array(float(share.size))


def _steps(
    block: nn.Module,
    args: Any,
    streams: _Streams,
    recipe: TrainingConfig,
    own_share: float,
    first: int,
    note: str,
) -> Iterator[Step]:
    """The optimizer steps of one block, with moments of their own; `first`: steps of the blocks
    before it.
    """
    before = mx.get_peak_memory()  # of the march up to here, which the loop would forget

    optimizer = GuardedAdamW(weight_decay=recipe.weight_decay)
    cut = partial(streams.micro_batches, recipe, own_share)
    student = WholeModel(block, optimizer)
    for step in train_loop.steps(student, lambda n: cut(first + n), partial(error, args), recipe):
        notes = "; ".join(filter(None, (note, step.note)))
        yield replace(
            step, number=first + step.number, peak_bytes=max(before, step.peak_bytes), note=notes
        )
