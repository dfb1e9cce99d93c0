"""Cached distillation: the teacher read once, its sparse targets on disk, then students trained without it.

A window's targets depend on the teacher, the window and the seed alone: not on how many windows went through the
teacher together, nor on where writing was stopped."""

from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from mis_mlx.data import token_windows
from mis_mlx.distillation.live_teacher import MicroBatch, StreamedTeacher
from mis_mlx.maths import losses
from mis_mlx.models import distributed
from mis_mlx.models.config import shape_of
from mis_mlx.planner.recipe import SAMPLES, TrainingConfig
from mis_mlx.storage import logit_store, run_folder
from mis_mlx.storage.files import Files
from mis_mlx.types import Batch, Checkpoint, MisError


def visited(n_windows: int, recipe: TrainingConfig) -> np.ndarray:
    """The windows of the data that a run's steps train on, rising: those that need targets."""
    each = recipe.batch_size * recipe.grad_accumulation_steps
    steps = [token_windows.order(n_windows, each, step, recipe.seed) for step in range(recipe.iters)]
    return np.unique(np.concatenate(steps))


def write(
    checkpoint: Checkpoint,
    teacher: Callable[[], StreamedTeacher],
    data: token_windows.Windows,
    folder: Path,
    files: Files,
    *,
    count: int = SAMPLES,
    seed: int = 0,
    windows_per_pass: int = 64,
    show: Callable[[int, str], None] = lambda done, text: None,
    together: bool = False,
) -> logit_store.Targets:
    """The finished store of `data`'s targets in `folder`: made, or what is missing of it. Hold the run's lock.

    checkpoint: the teacher's. teacher(): opens it; not called when nothing is missing. It is passed through once for
    every `windows_per_pass` windows. count: samples a position. show(windows done, text). Several machines share the
    missing parts out, and all have the whole store in the end. together: they share the teacher too
    (models/pipeline_parallel), so all make as many passes as who makes most."""
    n, length = data.tokens.shape
    spec = logit_store.Spec(
        "sampled", count, shape_of(checkpoint.config).vocab, n, length, run_folder.origin(checkpoint, "")["teacher"],
        token_windows.fingerprint(data), seed,
    )  # fmt: skip
    store = logit_store.create(folder, spec, files)
    parts = distributed.broadcast_json(lambda: sorted({w // spec.part_windows for w in store.missing()}))
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
            store.put(w, _targets(source, hidden[at][0], spec, w * length))
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


def _targets(teacher: StreamedTeacher, hidden: mx.array, spec: logit_store.Spec, first: int) -> dict[str, np.ndarray]:
    """A window's arrays for the store, from its hidden states (T, D); `first`: the number of its first position."""
    parts, rows = [], losses.chunk_rows(spec.vocab)
    for start in range(0, len(hidden), rows):
        z = teacher.logits(hidden[start : start + rows])
        parts.append(losses.sample(z, spec.count, spec.seed, first + start))
    return {name: np.concatenate(arrays) for name, arrays in zip(spec.dtypes(), zip(*parts, strict=True), strict=True)}


class Cached:
    """A store in the place of a Teacher: `live_teacher.steps` trains against it, with no teacher in memory. windows:
    which windows of the training data the store's are, rising (`visited`); default: all of them."""

    def __init__(self, store: logit_store.Targets, windows: np.ndarray | None = None):
        self._store = store
        self._windows = np.arange(store.spec.windows) if windows is None else windows
        if len(self._windows) != store.spec.windows:
            raise ValueError(f"{len(self._windows)} windows for a store of {store.spec.windows}")

    def micro_batches(self, batches: Sequence[Batch], windows: Sequence[np.ndarray]) -> list[MicroBatch]:
        """Tokens, learn, ids and weights (B * T, m)."""
        made = []
        for batch, wanted in zip(batches, windows, strict=True):
            rows = np.searchsorted(self._windows, wanted)
            if not np.array_equal(np.take(self._windows, rows, mode="clip"), wanted):
                raise ValueError(f"windows {wanted} are not all in {self._store.folder}")
            flat = [mx.array(a.reshape(batch.learn.size, -1)) for a in self._store.windows(rows)]
            made.append((batch.tokens, batch.learn.reshape(-1), *flat))
        return made

    def kl_sum(
        self, hidden: mx.array, head: mx.array, learn: mx.array, *target: mx.array, frozen_head: bool = False
    ) -> mx.array:
        """Sum of the KL in nats of a student's hidden states (n, D) and head (V, D) against stored targets."""
        if head.shape[0] != (vocab := self._store.spec.vocab):
            raise MisError(f"the targets are for {vocab} tokens, the student has {head.shape[0]}: use its teacher")
        ids, weights = target
        return losses.sampled_kl_sum(hidden, head, ids, weights, learn, frozen_head=frozen_head)
