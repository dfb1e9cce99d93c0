"""The two sides of distillation: the teacher's targets for a step, and the student's loss against
them.

The teacher stays in memory or is streamed, by the plan; either way what crosses over is its final
hidden states, and the vocabulary is met chunk by chunk (maths/losses). Or it is read once, and its
sparse targets are on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mis_mlx.data import draws
from mis_mlx.data.token_windows import Windows, fingerprint
from mis_mlx.distillation.train_loop import train
from mis_mlx.hardware import lanes
from mis_mlx.maths import losses
from mis_mlx.maths.optimizer import GuardedAdamW
from mis_mlx.models import distributed, host_losses, load, pipeline_parallel, policy, stream
from mis_mlx.models.config import shape_of, softcap
from mis_mlx.planner.recipe import SAMPLES, TrainingConfig
from mis_mlx.storage import logit_store, run_folder
from mis_mlx.storage.files import Files
from mis_mlx.types import Checkpoint, MisError, Step

# token ids (B, T) int32; learn (B, T) float32: 1 where the prediction there counts
Batch = tuple[mx.array, mx.array]
# tokens (B, T), learn (B * T,), then the targets of these B * T positions
MicroBatch = tuple[mx.array, ...]


class StreamedTeacher:
    """Final hidden states of the teacher for any batches, and its vocabulary head: hidden(token ids
    [(B, T)]) -> [(B, T, D)], a streamed teacher read once for all of them; logits(hidden (n, D)) ->
    (n, V). room_bytes, direct: as of `stream.Stream`. temperature: T of eq. (2). cross_entropy: as
    of `losses.kl_sum`. same_head: a student's that is not trained is the teacher's, which need not
    be read.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        room_bytes: int | None = 0,
        direct: bool = False,
        temperature: float = 1.0,
        cross_entropy: float = 0.0,
        shares: Sequence[int] = (),
        same_head: bool = False,
    ):
        where = checkpoint, policy.compute_dtype(checkpoint), room_bytes, direct
        self._source = pipeline_parallel.Relay(*where, shares) if shares else stream.Stream(*where)
        self.hidden = self._source.forward
        self.temperature = temperature
        self._cross_entropy = cross_entropy
        self._same_head = same_head
        self.softcap = softcap(checkpoint.config)  # a student's logits are its teacher's family's

    @cached_property
    def logits(self) -> losses.Logits:
        """Of hidden states; the head is read when the first of them are asked for."""
        return partial(load.wide_logits, self._source.head())

    def _logits_by(self, frozen: mx.array) -> losses.Logits:
        """The same, beside a student's head (V, D) that is not trained."""
        if not self._same_head:
            return self.logits
        return lambda hidden: losses.capped(hidden.astype(frozen.dtype) @ frozen.T, self.softcap)

    def micro_batches(
        self, batches: Sequence[Batch], windows: Sequence[np.ndarray] = ()
    ) -> list[MicroBatch]:
        """Tokens (B, T), learn (B * T,), the teacher's hidden states (B * T, D); for cross-entropy
        labels (B * T,).
        """
        micro = []
        pieces = [lanes.cut(tokens) for tokens, _ in batches]
        coming = iter(self.hidden(list(chain.from_iterable(pieces))))
        for (tokens, learn), parts in zip(batches, pieces, strict=True):
            hidden = mx.concatenate([next(coming) for _ in parts])
            label = [labels(tokens)] if self._cross_entropy else []
            micro.append((tokens, learn.reshape(-1), hidden.reshape(-1, hidden.shape[-1]), *label))
        return micro

    def gradient_of(self, student: nn.Module) -> Callable[..., Any] | None:
        """As `train_loop.train` takes it."""
        return (
            partial(_on_host, self, student)
            if policy.name() == "cpu" and not self._cross_entropy
            else None
        )

    def frozen_slopes(self) -> Callable[..., tuple[float, mx.array]] | None:
        """As `sharded.steps` takes them."""

        def of(
            head: mx.array, batches: Sequence[MicroBatch], b: int, hidden: mx.array
        ) -> tuple[float, mx.array]:
            (_, learn, target) = batches[b]
            logits = self._logits_by(head)
            loss, slope, _ = host_losses.kl_gradients(
                hidden,
                head,
                target,
                logits,
                learn,
                self.temperature,
                frozen_head=True,
                softcap=self.softcap,
            )
            return loss, slope

        return of if policy.name() == "cpu" and not self._cross_entropy else None

    def kl_sum(
        self,
        hidden: mx.array,
        head: mx.array,
        learn: mx.array,
        *target: mx.array,
        frozen_head: bool = False,
    ) -> mx.array:
        """`losses.kl_sum` against this teacher's logits."""
        return losses.kl_sum(
            hidden,
            head,
            target[0],
            self._logits_by(head) if frozen_head else self.logits,
            learn,
            self.temperature,
            frozen_head=frozen_head,
            labels=target[1] if self._cross_entropy else None,
            cross_entropy=self._cross_entropy,
            softcap=self.softcap,
        )


class TextTargets:
    """The text itself as the source: KL to a target that has all its mass on one token, which is
    cross-entropy.
    """

    def __init__(self, softcap: float = 0.0):
        self.kl_sum = partial(losses.sampled_kl_sum, softcap=softcap)

    def micro_batches(
        self, batches: Sequence[Batch], windows: Sequence[np.ndarray] = ()
    ) -> list[MicroBatch]:
        """Tokens (B, T), learn (B * T,), the next tokens as ids and their weights (B * T, 1)."""
        return [
            (t, learn.reshape(-1), labels(t)[:, None], mx.ones((t.size, 1))) for t, learn in batches
        ]


def labels(tokens: mx.array) -> mx.array:
    """The token after each of tokens (B, T), (B * T,); the last column's are nothing, `learn` is 0
    there.
    """
    return mx.roll(tokens, -1, 1).reshape(-1)


def _on_host(
    source: StreamedTeacher, student: nn.Module, tokens: mx.array, learn: mx.array, target: mx.array
) -> tuple[tuple[mx.array, mx.array], Any]:
    """What `nn.value_and_grad` gives of `student_loss`, evaluated; the vocabulary by numpy, windows
    side by side. The way back is laid out before the way forth is gone, so that only what it needs
    is kept: from a cotangent of zeros, whose memory numpy then fills.
    """
    trained = dict(tree_flatten(student.trainable_parameters()))
    cotangent = mx.zeros((tokens.size, student.args.hidden_size))
    hidden: list[mx.array] = []

    def forth(*arrays: mx.array) -> mx.array:
        student.update(tree_unflatten(list(zip(trained, arrays, strict=True))))
        hidden.append(lanes.rows(student.model, tokens).reshape(cotangent.shape))
        return hidden[0]

    with lanes.together(len(tokens)):
        _, slopes = mx.vjp(forth, list(trained.values()), [cotangent])
        student.update(tree_unflatten(list(trained.items())))
        mx.eval(hidden, cotangent)
    name = "lm_head.weight" if hasattr(student, "lm_head") else "model.embed_tokens.weight"
    how = source.logits, learn, source.temperature, name not in trained
    loss, below, of_head = host_losses.kl_gradients(
        hidden[0], load.head_weight(student), target, *how, softcap=source.softcap
    )
    host_losses.view(cotangent)[:] = host_losses.view(below)
    found = dict(zip(trained, slopes, strict=True))
    del slopes
    if of_head is not None:
        found[name] = found[name] + of_head
    with lanes.together(len(tokens)):
        mx.eval(found)
    return (mx.array(loss), learn.sum()), tree_unflatten(list(found.items()))


def student_loss(
    source: TargetSource, student: nn.Module, tokens: mx.array, learn: mx.array, *target: mx.array
) -> tuple[mx.array, mx.array]:
    """(sum of KL in nats, tokens that count) of a micro-batch, of a resident student."""
    hidden = student.model(tokens)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    return source.kl_sum(hidden, load.head_weight(student), learn, *target), learn.sum()


def step_micro_batches(
    source: TargetSource, data: Windows, recipe: TrainingConfig, step: int
) -> list[MicroBatch]:
    """The micro-batches of a step, this machine's of several: a pure function of its number."""
    at = distributed.shard(
        draws.batch(data, recipe.batch_size * recipe.grad_accumulation_steps, step, recipe.seed)
    )
    parts = [at[i : i + recipe.batch_size] for i in range(0, len(at), recipe.batch_size)]
    return source.micro_batches(
        [(mx.array(data.tokens[p]), mx.array(data.learn[p])) for p in parts], parts
    )


def steps(
    student: nn.Module,
    source: TargetSource,
    data: Windows,
    recipe: TrainingConfig,
    optimizer: GuardedAdamW,
    start: int = 0,
    factor: Callable[[int], float] = lambda step: 1.0,
) -> Iterator[Step]:
    """Optimizer steps `start` to `recipe.iters`, as `train_loop.train`."""
    micro_batches = partial(step_micro_batches, source, data, recipe)
    loss = partial(student_loss, source)
    quicker = source.gradient_of(student) if isinstance(source, StreamedTeacher) else None
    return train(
        student, micro_batches, loss, optimizer, recipe, start, factor, gradient_of=quicker
    )


def visited(data: Windows, recipe: TrainingConfig) -> np.ndarray:
    """The windows of the data that a run's steps train on, rising: those that need targets."""
    in_a_step = recipe.batch_size * recipe.grad_accumulation_steps
    batches = [draws.batch(data, in_a_step, step, recipe.seed) for step in range(recipe.iters)]
    return np.unique(np.concatenate(batches))


def write_store(
    checkpoint: Checkpoint,
    teacher: Callable[[], StreamedTeacher],
    data: Windows,
    folder: Path,
    files: Files,
    *,
    count: int = SAMPLES,
    seed: int = 0,
    windows_per_pass: int = 64,
    show: Callable[[int, str], None] = lambda done, text: None,
    together: bool = False,
) -> logit_store.Targets:
    """The finished store of `data`'s targets in `folder`: made, or what is missing of it. Hold the
    run's lock.

    A window's targets depend on the teacher, the window and the seed alone: not on how many windows
    went through the teacher together, nor on where writing was stopped.

    checkpoint: the teacher's. teacher(): opens it; not called when nothing is missing. It is passed
    through once for every `windows_per_pass` windows. count: samples a position. show(windows done,
    text). Several machines share the missing parts out, and all have the whole store in the end.
    together: they share the teacher too (models/pipeline_parallel), so all make as many passes as
    who makes most.
    """
    n, length = data.tokens.shape
    spec = logit_store.Spec(
        "sampled",
        count,
        shape_of(checkpoint.config).vocab,
        n,
        length,
        run_folder.origin(checkpoint, "")["teacher"],
        fingerprint(data),
        seed,
    )
    store = logit_store.create(folder, spec, files)
    parts = distributed.broadcast_json(
        lambda: sorted({w // spec.part_windows for w in store.missing()})
    )
    mine = set(distributed.shard(parts))
    missing = [w for w in store.missing() if w // spec.part_windows in mine]
    passes = -(-len(missing) // windows_per_pass)
    if together:
        passes = max(distributed.all_gather(passes))
    done = n - len(missing)
    source = teacher() if passes else None
    for start in range(0, passes * windows_per_pass, windows_per_pass):
        assert source is not None
        group = missing[start : start + windows_per_pass]
        hidden = source.hidden([mx.array(data.tokens[w][None]) for w in group])
        for at, w in enumerate(group):
            store.put(w, _drawn(source, hidden[at][0], spec, w * length))
            show(done := done + 1, f"{store.bytes_per_token:.0f} bytes/token")
    _exchange(store, files)
    return store


def _exchange(store: logit_store.Targets, files: Files) -> None:
    """Every part that some machine has, to those that lack it."""
    held = [set(numbers) for numbers in distributed.all_gather(sorted(store.parts))]
    for number in range(store.total):
        if having := [rank for rank, numbers in enumerate(held) if number in numbers]:
            if len(having) < len(held):
                distributed.broadcast_file(store.path(number), files, having[0])
            if number not in store.parts:
                store.adopt(number)


def _drawn(
    teacher: StreamedTeacher, hidden: mx.array, spec: logit_store.Spec, first: int
) -> dict[str, np.ndarray]:
    """A window's arrays for the store, from its hidden states (T, D); `first`: the number of its
    first position.
    """
    starts, how = (
        range(0, len(hidden), rows := losses.chunk_rows(spec.vocab)),
        (spec.count, spec.seed),
    )
    parts = [
        losses.sample(teacher.logits(hidden[at : at + rows]), *how, first + at) for at in starts
    ]
    return {
        name: np.concatenate(arrays)
        for name, arrays in zip(spec.dtypes(), zip(*parts, strict=True), strict=True)
    }


class Cached:
    """A store in the place of a teacher: `steps` trains against it, with none in memory. windows:
    which windows of the training data the store's are, rising (`visited`). softcap: of the
    student's logits.
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
        """Tokens, learn, ids and weights (B * T, m). windows: which of the data each batch holds,
        (B,).
        """
        made = []
        for (tokens, learn), wanted in zip(batches, windows, strict=True):
            rows = np.searchsorted(self._windows, wanted)
            if not np.array_equal(np.take(self._windows, rows, mode="clip"), wanted):
                raise ValueError(f"windows {wanted} are not all in {self._store.folder}")
            flat = [mx.array(a.reshape(learn.size, -1)) for a in self._store.windows(rows)]
            made.append((tokens, learn.reshape(-1), *flat))
        return made

    def kl_sum(
        self,
        hidden: mx.array,
        head: mx.array,
        learn: mx.array,
        *target: mx.array,
        frozen_head: bool = False,
    ) -> mx.array:
        """Sum of the KL in nats of a student's hidden states (n, D) and head (V, D) against stored
        targets.
        """
        if head.shape[0] != (vocab := self._store.spec.vocab):
            raise MisError(
                f"the targets are for {vocab} tokens, the student has {head.shape[0]}: use its "
                f"teacher"
            )
        return losses.sampled_kl_sum(
            hidden, head, learn, *target, frozen_head=frozen_head, softcap=self._softcap
        )


TargetSource = StreamedTeacher | TextTargets | Cached  # where a step's targets come from
