"""The teacher's targets: kept logits, written in one pass, and the steps that learn from them.

Of a position its likeliest tokens are kept with their probabilities, and some that are drawn of the
others (storage/logit_store). The teacher passes over the windows that the steps will use, and is
gone when the student learns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np

from mis_mlx.compute import slab_draws
from mis_mlx.compute.slab_losses import sparse_kl_gradients
from mis_mlx.data import draws, token_windows
from mis_mlx.data.token_windows import Windows, fingerprint
from mis_mlx.distillation import train_loop
from mis_mlx.distillation.block_student import BlockStudent
from mis_mlx.distillation.train_loop import MicroBatch
from mis_mlx.hardware.memory import headroom_bytes
from mis_mlx.hardware.stage_cost import WINDOWS, StageCost
from mis_mlx.maths.losses import Logits
from mis_mlx.models.architectures.families import shape_of
from mis_mlx.models.opening import load
from mis_mlx.models.passing import distributed, stream
from mis_mlx.models.passing.pass_cost import side_bytes, streamed_pass
from mis_mlx.planner.distillation_spec import STORE, DistillationSpec
from mis_mlx.settings.recipe import TUNE_ITERS, TrainingConfig
from mis_mlx.storage import logit_store, run_folder
from mis_mlx.storage.logit_store import SAMPLES, TOP
from mis_mlx.types import Checkpoint, MisError, Step


def visited_windows(data: Windows, recipe: TrainingConfig) -> np.ndarray:
    """The windows of the data that a run's steps train on, rising: those that need targets."""
    in_a_step = recipe.batch_size * recipe.grad_accumulation_steps
    steps = range(recipe.iters)
    batches = (draws.drawn_batch(data, in_a_step, step, recipe.seed) for step in steps)
    return token_windows.drawn(len(data.tokens), batches)


def write_store(
    teacher: Checkpoint,
    data: Windows,
    folder: Path,
    *,
    temperature: float = 1.0,
    count: int = SAMPLES,
    top: int = TOP,
    seed: int = 0,
    windows_per_pass: int = 64,
    direct: bool = False,
    show: Callable[[int, str], None] = lambda done, text: None,
) -> logit_store.Targets:
    """The finished store of `data`'s targets in `folder`; only what is missing is made.

    Hold the run's lock. A window's targets depend on the teacher, T, the window and the seed alone:
    not on how many windows went through the teacher together, nor on where writing was stopped.

    temperature: T of eq. (2). Tokens are ranked and drawn by softmax(z_t / T), so that a target is
    an unbiased estimate of that. top, count: as of `slab_draws.sample`. The teacher is passed
    through once for every `windows_per_pass` windows, and not opened where nothing is missing.
    direct: as of `stream.Stream`. show(windows done, text).
    """
    n, length = data.tokens.shape
    shape = shape_of(teacher.config)
    spec = logit_store.Spec(
        top=top,
        count=count,
        vocab=shape.vocab,
        windows=n,
        length=length,
        teacher=run_folder.origin(teacher, "")["teacher"],
        data=fingerprint(data),
        seed=seed,
        temperature=temperature,
    )
    store = logit_store.create(folder, spec)
    missing = store.missing()
    if not missing:
        return store
    done = n - len(missing)
    source = stream.Stream(teacher, direct=direct)
    slab_rows = slab_draws.slab_rows(length, shape.hidden)

    def slabs() -> Iterator[tuple[int, Logits]]:
        for start, part in source.head_parts(shape.vocab, slab_rows):
            yield start, partial(_softer_logits, part, temperature)

    for start in range(0, len(missing), windows_per_pass):
        group = missing[start : start + windows_per_pass]
        hidden = source.forward([mx.array(data.tokens[window][None]) for window in group])
        targets = slab_draws.sample(
            [states[0] for states in hidden],
            slabs,
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


def _softer_logits(part: load.nn.Module, temperature: float, hidden: mx.array) -> mx.array:
    """Logits (n, V) over T."""
    return load.wide_logits(part, hidden) / temperature


class KeptTargets:
    """A store in the place of a teacher.

    windows: which windows of the training data the store's are, rising (`visited_windows`).
    softcap: of the student's logits.
    """

    def __init__(self, store: logit_store.Targets, windows: np.ndarray, softcap: float = 0.0):
        self._store = store
        self._windows = windows
        if len(windows) != store.spec.windows:
            raise ValueError(f"{len(windows)} windows for a store of {store.spec.windows}")
        # (hidden, slabs of the head, loss_mask, ids, shares) -> (nats, their gradient in hidden)
        self.loss = partial(
            sparse_kl_gradients, softcap=softcap, temperature=store.spec.temperature
        )

    def micro_batch(self, data: Windows, windows: np.ndarray) -> MicroBatch:
        """Tokens (B, T), loss_mask (B * T,), ids and shares (B * T, m) of windows (B,)."""
        rows = np.searchsorted(self._windows, windows)
        if not np.array_equal(np.take(self._windows, rows, mode="clip"), windows):
            raise ValueError(f"windows {windows} are not all in {self._store.folder}")
        tokens = data.tokens[windows]
        ids, shares = self._store.windows(rows)
        return (
            mx.array(tokens),
            mx.array(data.loss_mask[windows].reshape(-1)),
            mx.array(ids.reshape(tokens.size, -1)),
            mx.array(shares.reshape(tokens.size, -1)),
        )

    def micro_batches(self, data: Windows, recipe: TrainingConfig, step: int) -> list[MicroBatch]:
        """Those of a step, this machine's of several: a pure function of its number."""
        size = recipe.batch_size
        windows = draws.drawn_batch(data, size * recipe.grad_accumulation_steps, step, recipe.seed)
        own = distributed.shard(windows)
        return [
            self.micro_batch(data, own[start : start + size]) for start in range(0, len(own), size)
        ]

    def steps(
        self,
        student: BlockStudent,
        data: Windows,
        recipe: TrainingConfig,
        start: int = 0,
        factor: Callable[[int], float] = lambda step: 1.0,
    ) -> Iterator[Step]:
        """Optimizer steps `start` to `recipe.iters` towards the targets, as `train_loop.steps`.

        MisError where the student has another vocabulary.
        """
        vocab = self._store.spec.vocab
        if student.vocab != vocab:
            raise MisError(
                f"the targets are for {vocab} tokens, but the student has {student.vocab}: use its "
                f"teacher"
            )
        micro_batches = partial(self.micro_batches, data, recipe)
        return train_loop.steps(student, micro_batches, self.loss, recipe, start, factor)


def store_cost(job: DistillationSpec, limit: int) -> StageCost:
    """The teacher's targets for all training tokens, as `write_store` makes them.

    One pass for as many windows as memory takes; its head comes in slabs, twice.
    """
    t = job.teacher
    length = job.max_seq_length
    steps = max(job.iters, job.rounding.steps(TUNE_ITERS))
    windows = steps * job.batch_size * job.grad_accumulation_steps
    one = streamed_pass("", t, tokens=length, length=length, head=False, spool=False)
    targets = length * slab_draws.state_bytes(TOP, SAMPLES)
    states = length * t.hidden_bytes + side_bytes(t, length)
    slab = slab_draws.slab_bytes(length, t.shape.hidden, t.shape.vocab)
    peak_bytes = one.peak_bytes + slab + targets
    further = headroom_bytes(limit, peak_bytes) // (states + targets)
    at_once = 1 + min(windows - 1, further)
    peak_bytes += (at_once - 1) * (states + targets)
    return StageCost(
        name=STORE,
        read_bytes=math.ceil(windows / at_once) * (one.read_bytes + 2 * t.head_bytes),
        written_bytes=windows * length * job.target_bytes,
        peak_bytes=peak_bytes,
        flops=windows * (one.flops + 4.0 * length * t.head_params),
        stays={WINDOWS: at_once},
    )
