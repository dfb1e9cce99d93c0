"""Candidates measured: each as pruned, the best after a short distillation, and what that takes.

Every measurement is a line in a log before the next begins, so a search that was killed goes on from there."""

import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mis_mlx.data.token_windows import Windows
from mis_mlx.distillation import pipeline
from mis_mlx.evaluation import comparison
from mis_mlx.evaluation.speed import rounds
from mis_mlx.hardware import memory
from mis_mlx.maths.importance import Statistics
from mis_mlx.maths.optimizer import Diverged
from mis_mlx.models import arch, load, mlx_generate, model_writer, policy
from mis_mlx.models.config import Shape
from mis_mlx.models.stream import Batches
from mis_mlx.planner import estimates, phases
from mis_mlx.planner.recipe import spec_of
from mis_mlx.pruning import calibrate, reconstruct, rotate, select, shape_search, slicing
from mis_mlx.storage import checkpoint as protocol
from mis_mlx.storage import run_folder
from mis_mlx.storage.files import reported
from mis_mlx.storage.hidden_spool import Spool
from mis_mlx.types import Budget, Checkpoint, MisError

CANDIDATES, FINALISTS = "candidates.jsonl", "finalists.jsonl"
TOKENS = 16  # decoded for one timing
ROUNDS = 3  # of timings, the quickest counts
NOT_OURS = ("prune", "quantize", "measure")  # phases of a distillation that a finalist does not go through


def split(held_out: Windows, ranking: int, judging: int) -> tuple[Windows, Windows]:
    """(windows that rank candidates, others that judge finalists): what was selected on does not judge."""
    count = len(held_out.tokens)
    if count < 4:
        raise MisError(f"the held-out text has {count} windows, a search takes 4 or more: bring more text")
    at = np.unique(np.linspace(0, count - 1, min(ranking, count // 2)).round().astype(int))
    rest = np.setdiff1d(np.arange(count), at)
    return held_out.pick(at), comparison.chosen(held_out.pick(rest), judging)


@dataclass
class CandidateTrials:
    """What the measurements share. repair: windows of token ids (1, T) for the closed-form fit, or none."""

    run: pipeline.Run
    dtype: str
    samples: Batches
    repair: Batches
    ranking: Windows
    judging: Windows

    @property
    def _spool(self) -> Callable[[], Spool] | None:
        """Makes a place for hidden states of calibration, where memory does not hold them."""
        held = self.run.plan.held_windows("prune")
        return None if held >= len(self.samples) else partial(Spool, self.run.folder, held, self.run.files)

    @cached_property
    def statistics(self) -> Statistics:
        """One streamed calibration, for all candidates. Without the weather: shapes must not depend on the wind."""
        teacher, place = self.run.teacher, self._spool() if self._spool else None
        return calibrate.calibrate(teacher, self.samples, policy.compute_dtype(teacher), hidden=place)[0]

    @cached_property
    def _directions(self) -> rotate.Directions:
        """Of the stream, measured when the first candidate is narrower than the teacher."""
        teacher = self.run.teacher
        return rotate.measured(teacher, self.samples, policy.compute_dtype(teacher), self._spool or list)

    @cached_property
    def _final_hidden(self) -> Any:
        return comparison.final_hidden(self.run.teacher, self.ranking)

    def prune(self, shape: Shape, out: Path) -> Checkpoint:
        """The teacher cut to `shape` by plain importance, as the new folder `out`."""
        cut = select.PruningConfig(scenario="none", importance="rms", **_sizes(shape))
        teacher = self.run.teacher
        made, keep = select.select_units(teacher.config, self.statistics, cut)
        keep, tensor = select.turned(teacher, made, keep, lambda: self._directions)
        slicing.write_student(teacher, made, keep, out, self.dtype, self.run.files, tensor)
        return load.open_checkpoint(out)

    def score(self, shape: Shape) -> float:
        """KL(teacher || candidate) in nats per token on the ranking windows; from the log where it stands there.
        Infinite where it is no number. The candidate's folder is gone again."""
        log = self.run.folder / CANDIDATES
        if (record := find(log, shape)) is None:
            with tempfile.TemporaryDirectory(prefix=".tmp-candidate-", dir=self.run.folder) as temp:
                student = self.prune(shape, Path(temp) / "pruned")
                if self.repair:
                    student = self._repaired(student, Path(temp) / "repaired")
                both = {"teacher": self.run.teacher, "student": student}
                measured = comparison.compare(both, self.ranking, self._final_hidden)
            values = {metric: _finite(measured["student", metric].mean()) for metric in ("nll", "kl")}
            record = {**_sizes(shape), "params": arch.params(student.config), **values}
            self.run.files.append(log, json.dumps(record))
        return math.inf if record["kl"] is None else float(record["kl"])

    def _repaired(self, pruned: Checkpoint, out: Path) -> Checkpoint:
        keep = model_writer.read_keep(pruned.path)
        assert keep is not None
        mended, _ = reconstruct.reconstruct(self.run.teacher, pruned, keep, self.repair)

        def take(name: str) -> mx.array:
            return mended[name] if name in mended else load.dense(pruned, name)

        model_writer.write_model(pruned.config, take, pruned.path, out, self.dtype, self.run.files)
        return load.open_checkpoint(out)

    def final(self, shape: Shape, cached: int | None) -> dict[str, Any]:
        """The record of a finalist: distilled for a few steps, judged before and after; from the log if there. cached:
        tokens in the KV cache when it is timed; None: it is not."""
        log, sub = self.run.folder / FINALISTS, self.run.folder / "finalists" / shape_search.label(shape)
        if (record := find(log, shape)) is None:
            record = self._measured(shape, sub, cached)
            self.run.files.append(log, json.dumps(record))
        if sub.exists():
            self.run.files.discard(sub)
        return record

    def _measured(self, shape: Shape, sub: Path, cached: int | None) -> dict[str, Any]:
        """Distil a finalist in the folder `sub`; a training that has begun there goes on in its own way."""
        run = self.run
        with reported(run.folder, "the folder of a finalist"):
            run.files.make_folder(sub)
        protocol.sweep(sub, run.files)
        folder = sub / "pruned"
        pruned = load.open_checkpoint(folder) if folder.exists() else self.prune(shape, folder)
        small = estimates.model_of(arch.student_config(run.teacher.config, shape))
        job = spec_of(estimates.model_of(run.teacher), small, run.recipe)
        if not (sub / run_folder.PLAN).exists():
            way = phases.make(job, run.plan.budget_bytes, run.plan.rates).way
            run.files.replace_text(sub / run_folder.PLAN, json.dumps(way))
        plan = phases.one(job, run.plan.budget_bytes, run.plan.rates, **run_folder.stored_plan(sub))
        trained = self._train(replace(run, recipe=plan.recipe(run.recipe), folder=sub, plan=plan), pruned)
        record = {**_sizes(shape), "params": arch.params(pruned.config), **guarded(run_folder.metrics(sub), trained)}
        models = {"teacher": run.teacher, "pruned": pruned, **({"distilled": trained} if trained else {})}
        for (model, metric), values in comparison.compare(models, self.judging).items():
            record[f"{metric}_{model}"] = [_finite(v) for v in values]
        if cached is not None and trained:
            record["decode_s"] = timed(trained.path, cached, halves=False).block_s
        return record

    def _train(self, c: pipeline.Run, pruned: Checkpoint) -> Checkpoint | None:
        """The distilled student; None where three steps in a row were no numbers."""
        out = c.folder / "distilled"
        try:
            pipeline.distil(c, pruned, out, self.dtype)
        except Diverged:
            return None
        except MisError as error:  # what can be resumed is the search, not the finalist's own folder
            raise MisError(str(error).replace(str(c.folder), str(self.run.folder))) from error.__cause__
        return load.open_checkpoint(out)


def _sizes(shape: Shape) -> dict[str, Any]:
    return {axis: getattr(shape, axis) for axis in shape_search.AXES}


def find(log: Path, shape: Shape) -> dict[str, Any] | None:
    """The line of a shape; None where there is none yet."""
    return next((r for r in run_folder.records(log) if all(r.get(a) == n for a, n in _sizes(shape).items())), None)


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def guarded(steps: Sequence[Mapping[str, Any]], trained: object) -> dict[str, Any]:
    """What the guard did in a training: steps skipped and clipped, and whether it had to stop it."""
    notes = [str(r.get("note", "")) for r in steps]
    skipped, clipped = (sum(word in note for note in notes) for word in ("skipped", "clipped"))
    return {"steps": len(notes), "skipped": skipped, "clipped": clipped, "diverged": trained is None}


def timed(folder: Path, cached: int, halves: bool = True) -> shape_search.Decoding:
    """Seconds of a token by the quickest of some, stock mlx-lm, `cached` tokens in the KV cache. halves: a second
    timing with half of the blocks says what a block takes; else all counts as one block."""
    model, tokenizer = mlx_generate.open_model(folder)
    ids = mlx_generate.prompt_ids(tokenizer, "In the evening the wind came down from the pass.", 8)
    layers = model.model.layers

    def quickest(count: int) -> float:
        model.model.layers = layers[:count]
        try:
            cache = mlx_generate.filled_cache(model, cached)
            stamps, _ = rounds.clocked(mlx_generate.greedy(model, ids, TOKENS, cache))
        finally:
            model.model.layers = layers
        return min(b - a for a, b in pairwise(stamps))

    total, half = len(layers), max(1, len(layers) // 2)
    if not halves:
        return shape_search.Decoding(min(quickest(total), quickest(total)), 0.0)
    pairs = [(quickest(total), quickest(half)) for _ in range(ROUNDS)]  # in turn, so that a slow spell hits both
    whole, part = map(min, zip(*pairs, strict=True))
    block = whole / total  # all that there is: one block, or a machine too busy to tell half of the blocks from all
    if part < whole and half < total:
        block = min((whole - part) / (total - half), block)
    return shape_search.Decoding(block, max(0.0, whole - total * block))


def work(
    s: Any, whole: Checkpoint, checkpoint: Checkpoint, shapes: Sequence[Shape], limit: Budget
) -> tuple[dict[str, list[estimates.StageCost]], phases.MemoryPlan]:
    """What a search with these settings takes to rank and to train and judge finalists, each student counted as the
    largest one; and that one's distillation. checkpoint: `whole` with the tokens that stay."""
    shown, length, rates = estimates.model_of(whole), s.max_seq_length, estimates.machine_rates()
    t = estimates.model_of(checkpoint, dtype=policy.compute_dtype(whole))  # nobody can read these first rows
    configs = [arch.student_config(checkpoint.config, x) for x in shapes]
    most = (max(configs, key=arch.params), max(configs, key=lambda c: c["num_hidden_layers"]))
    plans = [phases.make(spec_of(t, estimates.model_of(c), s, shown=shown), limit.limit_bytes, rates) for c in most]
    made = max(plans, key=lambda p: p.peak_bytes)
    m, count, finals = made.job.student, min(s.evaluations, len(shapes)), min(s.finalists, len(shapes))
    known = estimates.TENSOR_BYTES * t.tensors
    own = known + memory.process_bytes(max(0, limit.limit_bytes - known))  # as in a plan, whose phases have it

    def times(p: estimates.StageCost, n: int, name: str, written: int, beside: int = own) -> estimates.StageCost:
        return replace(p, name=name, read_bytes=n * p.read_bytes, written_bytes=n * written, flops=n * p.flops,
                       peak_bytes=p.peak_bytes + beside)  # fmt: skip

    prune = next(p for p in made.phases if p.name == "prune")
    rank = [times(prune, 1, "calibrate", prune.written_bytes - m.nbytes, 0)]
    one = estimates.compared([t, m], s.rank_windows, length)
    one = replace(one, peak_bytes=max(one.peak_bytes, estimates.tensor_bytes(t)))
    rank.append(times(one, count, f"rank {count} candidates", m.nbytes))
    if s.repair_samples:
        mend = phases.repair(replace(made.job, repair=s.repair_samples))
        rank.append(times(mend, count, "repair each of them", m.nbytes))
    ours = [p for p in made.phases if p.name not in NOT_OURS]
    trained = [times(p, finals, f"{p.name}, {finals} finalists", p.written_bytes, 0) for p in ours]
    judged = estimates.compared([t, m, m], s.eval_windows, length)
    return {"rank": rank, "finalists": [*trained, times(judged, finals, "judge them", 2 * m.nbytes)]}, made
