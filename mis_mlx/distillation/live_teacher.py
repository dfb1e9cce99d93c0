"""The teacher's targets for a step, and the student's loss against them.

The teacher stays in memory or is streamed, by the plan. Either way only its final hidden states are
kept, and logits are made of them in chunks of positions (maths/losses). Or the teacher is read
once, and its sparse targets are on disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Protocol

import mlx.core as mx
import numpy as np

from mis_mlx.compute import precision, slab_draws, streams
from mis_mlx.compute.slab_losses import Slabs, sparse_kl_gradients
from mis_mlx.compute.token_losses import TokenLoss, teacher_kl
from mis_mlx.data import draws, token_windows
from mis_mlx.data.token_windows import Windows, fingerprint
from mis_mlx.distillation import train_loop
from mis_mlx.distillation.train_loop import F, MicroBatch
from mis_mlx.hardware.ledger import Ledger
from mis_mlx.hardware.stage_cost import BLOCKS, WINDOWS, StageCost
from mis_mlx.maths import losses
from mis_mlx.models.architectures.sizes import shape_of, softcap
from mis_mlx.models.opening import load
from mis_mlx.models.opening.model_size import ModelSize
from mis_mlx.models.passing import distributed, stream
from mis_mlx.models.passing.pass_cost import (
    forward_flops,
    pass_workspace,
    side_bytes,
    streamed_pass,
)
from mis_mlx.planner.distillation_spec import STORE, DistillationSpec
from mis_mlx.settings.recipe import TUNE_ITERS, TrainingConfig
from mis_mlx.storage import logit_store, run_folder
from mis_mlx.storage.files import Files
from mis_mlx.storage.logit_store import SAMPLES, TOP
from mis_mlx.types import Checkpoint, MisError, Step

# token ids (B, T) int32; loss_mask (B, T) float32: 1 where the prediction there counts
Batch = tuple[mx.array, mx.array]


class DistilledStudent(train_loop.Student[TokenLoss, F], Protocol[F]):
    """A student that learns from a teacher, by a TokenLoss."""

    @property
    def own_head(self) -> bool:
        """Whether its head is the one that pruning left, neither rounded nor trained."""


class StreamedTeacher:
    """The teacher's final hidden states for any batches, and its vocabulary head.

    hidden(token ids [(B, T)]) -> [(B, T, D)]; a streamed teacher is read once for all of them.
    logits(hidden (n, D)) -> (n, V). headroom_bytes, direct: as of `stream.Stream`. temperature: T
    of eq. (2). same_head: a student's head that is not trained is the teacher's, which then need
    not be read.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        headroom_bytes: int | None = 0,
        direct: bool = False,
        temperature: float = 1.0,
        same_head: bool = False,
    ):
        dtype = precision.dtype_of(checkpoint)
        self._source = stream.Stream(checkpoint, dtype, headroom_bytes, direct=direct)
        self.hidden = self._source.forward
        self.temperature = temperature
        self._same_head = same_head
        self.softcap = softcap(checkpoint.config)  # a student's logits are its teacher's family's

    @cached_property
    def logits(self) -> losses.Logits:
        """Logits of hidden states; the head is read when they are first asked for."""
        return partial(load.wide_logits, self._source.head())

    def head_slabs(self, rows: int) -> Iterator[tuple[int, losses.Logits]]:
        """(first token, logits of `rows` tokens and up), over the vocabulary; read as they come."""
        vocab = shape_of(self._source.checkpoint.config).vocab
        for start, part in self._source.head_parts(vocab, rows):
            yield start, partial(load.wide_logits, part)

    def _logits_by(self, frozen: mx.array) -> losses.Logits:
        """The same, where the student's head (V, D) is not trained."""
        if not self._same_head:
            return self.logits
        return lambda hidden: losses.apply_softcap(
            hidden.astype(frozen.dtype) @ frozen.T, self.softcap
        )

    def micro_batches(
        self, batches: Sequence[Batch], windows: Sequence[np.ndarray] = ()
    ) -> list[MicroBatch]:
        """Tokens (B, T), loss_mask (B * T,), the teacher's hidden states (B * T, D)."""
        micro_batches = []
        # One pass for all batches, so that a streamed teacher is read once a step. Each batch goes
        # in as many pieces as there are streams, which compute side by side.
        pieces = [streams.split_rows(tokens) for tokens, _ in batches]
        states = iter(self.hidden(list(chain.from_iterable(pieces))))
        for (tokens, loss_mask), parts in zip(batches, pieces, strict=True):
            hidden = mx.concatenate([next(states) for _ in parts])
            states_of_batch = hidden.reshape(-1, hidden.shape[-1])
            micro_batches.append((tokens, loss_mask.reshape(-1), states_of_batch))
        return micro_batches

    def token_loss(self, *, own_head: bool = False) -> TokenLoss:
        """The loss of a student against this teacher; targets as `micro_batches` gives them.

        own_head: the student's head is as its checkpoint has it, and stays so.
        """

        def logits_beside(head: mx.array) -> losses.Logits:
            return self._logits_by(head) if own_head else self.logits

        return teacher_kl(logits_beside, temperature=self.temperature, softcap=self.softcap)


class TextTargets:
    """The text itself as the source: a target with all its mass on one token.

    KL to that is cross-entropy.
    """

    def __init__(self, softcap: float = 0.0):
        self._softcap = softcap

    def token_loss(self, *, own_head: bool = False) -> TokenLoss:
        """The cross-entropy of a student; targets as `micro_batches` gives them."""
        return TokenLoss(partial(losses.sampled_kl_sum, softcap=self._softcap))

    def micro_batches(
        self, batches: Sequence[Batch], windows: Sequence[np.ndarray] = ()
    ) -> list[MicroBatch]:
        """Tokens (B, T), loss_mask (B * T,), the next tokens as ids, their weights (B * T, 1)."""
        micro_batches = list[MicroBatch]()
        for tokens, loss_mask in batches:
            ids = next_tokens(tokens)[:, None]
            micro_batches.append((tokens, loss_mask.reshape(-1), ids, mx.ones((tokens.size, 1))))
        return micro_batches


def next_tokens(tokens: mx.array) -> mx.array:
    """The token after each of tokens (B, T): (B * T,).

    The last column has none: what stands there does not count, for `loss_mask` is 0.
    """
    return mx.roll(tokens, -1, 1).reshape(-1)


def step_micro_batches(
    source: TargetSource, data: Windows, recipe: TrainingConfig, step: int
) -> list[MicroBatch]:
    """The micro-batches of a step, this machine's of several: a pure function of its number."""
    size = recipe.batch_size
    windows = draws.drawn_batch(data, size * recipe.grad_accumulation_steps, step, recipe.seed)
    own = distributed.shard(windows)
    parts = [own[start : start + size] for start in range(0, len(own), size)]
    batches = [(mx.array(data.tokens[part]), mx.array(data.loss_mask[part])) for part in parts]
    return source.micro_batches(batches, parts)


def steps(
    student: DistilledStudent[F],
    source: TargetSource,
    data: Windows,
    recipe: TrainingConfig,
    start: int = 0,
    factor: Callable[[int], float] = lambda step: 1.0,
) -> Iterator[Step]:
    """Optimizer steps `start` to `recipe.iters` towards `source`, as `train_loop.steps`."""
    return train_loop.steps(
        student,
        partial(step_micro_batches, source, data, recipe),
        source.token_loss(own_head=student.own_head),
        recipe,
        start=start,
        factor=factor,
    )


def visited_windows(data: Windows, recipe: TrainingConfig) -> np.ndarray:
    """The windows of the data that a run's steps train on, rising: those that need targets."""
    in_a_step = recipe.batch_size * recipe.grad_accumulation_steps
    steps = range(recipe.iters)
    batches = (draws.drawn_batch(data, in_a_step, step, recipe.seed) for step in steps)
    return token_windows.drawn(len(data.tokens), batches)


def write_store(
    checkpoint: Checkpoint,
    teacher: Callable[[], StreamedTeacher],
    data: Windows,
    folder: Path,
    files: Files,
    *,
    count: int = SAMPLES,
    top: int = TOP,
    seed: int = 0,
    windows_per_pass: int = 64,
    show: Callable[[int, str], None] = lambda done, text: None,
) -> logit_store.Targets:
    """The finished store of `data`'s targets in `folder`; only what is missing is made.

    Hold the run's lock. A window's targets depend on the teacher, the window and the seed alone:
    not on how many windows went through the teacher together, nor on where writing was stopped.

    checkpoint: the teacher's. teacher(): opens it; not called when nothing is missing. It is passed
    through once for every `windows_per_pass` windows. top, count: as of `slab_draws.sample`.
    show(windows done, text).
    """
    n, length = data.tokens.shape
    shape = shape_of(checkpoint.config)
    spec = logit_store.Spec(
        kind="top and sampled",
        top=top,
        count=count,
        vocab=shape.vocab,
        windows=n,
        length=length,
        teacher=run_folder.origin(checkpoint, "")["teacher"],
        data=fingerprint(data),
        seed=seed,
    )
    store = logit_store.create(folder, spec, files)
    missing = store.missing()
    if not missing:
        return store
    done = n - len(missing)
    source = teacher()
    for start in range(0, len(missing), windows_per_pass):
        group = missing[start : start + windows_per_pass]
        hidden = source.hidden([mx.array(data.tokens[window][None]) for window in group])
        targets = slab_draws.sample(
            [states[0] for states in hidden],
            partial(source.head_slabs, slab_draws.slab_rows(length, shape.hidden)),
            count,
            seed,
            [window * length for window in group],
            top=top,
        )
        for window, arrays in zip(group, targets, strict=True):
            store.put(window, dict(zip(spec.dtypes(), arrays, strict=True)))
            done += 1
            show(done, f"{store.bytes_per_token:.0f} bytes/token")
    return store


class CachedTeacher:
    """A store in the place of a teacher: `steps` trains against it, and no teacher is in memory.

    windows: which windows of the training data the store's are, rising (`visited_windows`).
    softcap: of the student's logits.
    """

    def __init__(self, store: logit_store.Targets, windows: np.ndarray, softcap: float = 0.0):
        self._store = store
        self._windows = windows
        self._softcap = softcap
        if len(self._windows) != store.spec.windows:
            raise ValueError(f"{len(self._windows)} windows for a store of {store.spec.windows}")

    def micro_batches(
        self, batches: Sequence[Batch], windows: Sequence[np.ndarray]
    ) -> list[MicroBatch]:
        """Tokens (B, T), loss_mask (B * T,), ids and weights (B * T, m).

        windows: which windows of the data each batch holds, (B,).
        """
        micro_batches = []
        for (tokens, loss_mask), wanted in zip(batches, windows, strict=True):
            rows = np.searchsorted(self._windows, wanted)
            if not np.array_equal(np.take(self._windows, rows, mode="clip"), wanted):
                raise ValueError(f"windows {wanted} are not all in {self._store.folder}")
            targets = [mx.array(a.reshape(loss_mask.size, -1)) for a in self._store.windows(rows)]
            micro_batches.append((tokens, loss_mask.reshape(-1), *targets))
        return micro_batches

    def token_loss(self, *, own_head: bool = False) -> TokenLoss:
        """The KL of a student to the sampled targets, which `micro_batches` reads from the store.

        MisError from the loss where the student has another vocabulary.
        """
        return TokenLoss(self._kl_sum, by_slabs=self._kl_by_slabs)

    def _kl_by_slabs(
        self, hidden: mx.array, slabs: Slabs, loss_mask: mx.array, *target: mx.array
    ) -> tuple[mx.array, mx.array]:
        """The same, of a frozen head that comes in slabs; and its gradient in hidden."""
        return sparse_kl_gradients(hidden, slabs, loss_mask, *target, softcap=self._softcap)

    def _kl_sum(
        self,
        hidden: mx.array,
        head: mx.array,
        loss_mask: mx.array,
        *target: mx.array,
        frozen_head: bool = False,
    ) -> mx.array:
        """`losses.sampled_kl_sum`, of a student with this store's vocabulary."""
        vocab = self._store.spec.vocab
        if head.shape[0] != vocab:
            raise MisError(
                f"the targets are for {vocab} tokens, but the student has {head.shape[0]}: use its "
                f"teacher"
            )
        return losses.sampled_kl_sum(
            hidden, head, loss_mask, *target, frozen_head=frozen_head, softcap=self._softcap
        )


TargetSource = StreamedTeacher | TextTargets | CachedTeacher  # where a step's targets come from


def hold(ledger: Ledger, job: DistillationSpec, micro: int, *, same_head: bool = False) -> None:
    """Write down what the teacher of a job holds beside its student; nothing if it is not live."""
    length = job.max_seq_length
    if job.targets == "live":
        hold_teacher(
            ledger, job.teacher, job.step_tokens, micro * length, length=length, same_head=same_head
        )


def hold_teacher(
    ledger: Ledger,
    t: ModelSize,
    tokens: int,
    micro_tokens: int,
    *,
    length: int,
    same_head: bool = False,
) -> None:
    """Write down what a teacher that is streamed at every step of `tokens` holds.

    It passes before the student's step begins. same_head: the student's is its head, too.
    """
    workspace = pass_workspace(t, tokens, micro_tokens, length)
    ledger.hold("teacher's slots", t.slots_bytes)
    ledger.hold("teacher's hidden states", tokens * t.hidden_bytes)
    ledger.hold("what its blocks share", side_bytes(t, tokens))
    if not same_head:
        ledger.hold("teacher's head", t.head_work + t.widened_bytes)
    ledger.moment("teacher's pass", body=t.body_bytes(workspace))


def keep_blocks(ledger: Ledger, t: ModelSize, steps: int) -> int:
    """Fill the budget with a teacher's blocks; bytes read of all of them in so many steps.

    Those that stay are read once, the others in every step.
    """
    pinned = ledger.fill(BLOCKS, t.block_work, t.shape.layers)
    return t.block_bytes * (pinned + steps * (t.shape.layers - pinned))


def taught(one_step: StageCost, ledger: Ledger, job: DistillationSpec, micro: int) -> StageCost:
    """All steps of a student that learns from a teacher, whose blocks stay as far as there is room.

    one_step: its operations are of one step, its bytes of all. ledger: with what `hold` writes.
    """
    t = job.teacher
    length = job.max_seq_length
    flops = one_step.flops
    if job.targets == "live":
        read = keep_blocks(ledger, t, job.iters) + t.head_bytes
        flops += forward_flops(t, job.step_tokens, length)
    else:
        read = job.iters * job.step_tokens * job.target_bytes
    return replace(
        one_step,
        read_bytes=one_step.read_bytes + read,
        peak_bytes=ledger.peak_bytes,
        flops=job.iters * flops,
        stays=ledger.filled,
        updated=job.iters * one_step.updated,
    )


def store_cost(job: DistillationSpec, limit: int) -> StageCost:
    """The teacher's sampled logits for all training tokens, as `write_store` makes them.

    One pass for as many windows as memory takes; its head comes in slabs, twice.
    """
    t = job.teacher
    length = job.max_seq_length
    steps = max(job.iters, job.rounding.steps(TUNE_ITERS))
    windows = steps * job.batch_size * job.grad_accumulation_steps
    one = streamed_pass("", t, tokens=length, length=length, head=False, spool=False)
    targets = length * slab_draws.state_bytes(TOP, SAMPLES)
    states = length * t.hidden_bytes + side_bytes(t, length)
    ledger = Ledger(limit, t.gpu)
    ledger.hold("pass of one window", one.peak_bytes)
    ledger.hold("slab of the head", slab_draws.slab_bytes(length, t.shape.hidden, t.shape.vocab))
    ledger.hold("targets of one window", targets)
    at_once = 1 + ledger.fill("further windows", states + targets, windows - 1)
    return StageCost(
        name=STORE,
        read_bytes=math.ceil(windows / at_once) * (one.read_bytes + 2 * t.head_bytes),
        written_bytes=windows * length * job.target_bytes,
        peak_bytes=ledger.peak_bytes,
        flops=windows * (one.flops + 4.0 * length * t.head_params),
        stays={WINDOWS: at_once},
    )
