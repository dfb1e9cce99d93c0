"""The parts that sft, dpo and grpo share: flags, costs, checkpoints, the best student, the result.

A run that was killed and resumed ends bit-equal to one that was not.
"""

import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar

import mlx.core as mx
import mlx.nn as nn

from mis_mlx import cli
from mis_mlx.alignment import whole_model
from mis_mlx.alignment.whole_model import Loss, WholeModel
from mis_mlx.compute import precision
from mis_mlx.compute.logits import logit_bytes
from mis_mlx.data import examples
from mis_mlx.distillation import train_loop
from mis_mlx.gguf_export.model_card import name_of
from mis_mlx.hardware import memory
from mis_mlx.hardware.memory import needed_bytes
from mis_mlx.hardware.stage_cost import StageCost
from mis_mlx.hardware.thermal.run_monitor import Governed
from mis_mlx.maths import optimizer, rounding
from mis_mlx.maths.optimizer import GuardedAdamW
from mis_mlx.models.architectures import arch
from mis_mlx.models.architectures.families import family
from mis_mlx.models.opening import load
from mis_mlx.models.opening.model_size import ModelSize, model_of
from mis_mlx.models.passing import pass_cost, residency, stream
from mis_mlx.models.writing import lora, model_writer
from mis_mlx.planner import estimates
from mis_mlx.quantization import packed_format
from mis_mlx.reporting import progress
from mis_mlx.runs import run_loop
from mis_mlx.settings import recipe
from mis_mlx.storage import checkpoint as protocol
from mis_mlx.storage import run_folder
from mis_mlx.storage.files import DISK
from mis_mlx.storage.journal import Journal
from mis_mlx.types import (
    Checkpoint,
    Count,
    MisError,
    Off,
    Positive,
    Step,
    Tokens,
    Within,
    gib,
)

BEST = "best"
MODEL = "model"
ADAPTERS = "adapters"
HELD_OUT = "held_out.jsonl"
SCALES = "scales"  # what --fine-tune-type calls them
S = TypeVar("S", bound="Alignment")


@dataclass(frozen=True)
class Alignment(cli.Resumable, Governed, recipe.TrainingConfig):
    """The flags that sft, dpo and grpo share."""

    batch_size: Count = 4
    """rows, pairs or answers per micro-batch; split when memory is short, with the same result"""
    max_seq_length: Tokens = 512
    """maximum tokens per row; longer rows are truncated at the end, and counted"""
    save_every: Count = 20
    """steps between checkpoints; each one measures the held-out rows"""
    model: str | None = None
    """folder or hub id of the model to align; default: SmolLM2-135M-Instruct"""
    data: str | None = None
    """folder with train.jsonl and, optionally, valid.jsonl; default: generated tasks"""
    data_license: str | None = None
    """license of the data, or the consent it was given with; default: the LICENSE file next to it
    """
    scrub_pii: bool = False
    """replace e-mail addresses, phone numbers, PESEL and NIP numbers in the data before training,
    and count them
    """
    eval_rows: Count = 64
    """held-out rows measured at every checkpoint; the best checkpoint becomes the result"""
    fine_tune_type: Literal["full", "lora"] = "full"
    """train all weights, or mlx-lm's low-rank adapters on frozen weights"""
    num_layers: Annotated[int, Within(-1, 10**4)] = -1
    """blocks with adapters, counted from the last; -1: all"""
    rank: Count = 8
    """rank of the adapters"""
    scale: Positive = 20.0
    """scaling factor of the adapters"""
    fuse: Annotated[bool, Off("keep the adapters next to the model, not merged")] = True
    """merge the adapters into the weights at the end"""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """data type of the saved weights; default: the model's own, or bfloat16 if it is quantized"""

    @property
    def lora(self) -> lora.Lora | None:
        """The adapters asked for, if any."""
        if self.fine_tune_type != "lora":
            return None
        return lora.Lora(self.num_layers, self.rank, self.scale)


def open_run_model(settings: S) -> tuple[S, Path | None, Checkpoint]:
    """(settings; folder of a run that goes on, else None; the model to align).

    MisError where the model cannot be trained as asked.
    """
    # `save_every` decides which steps can become the best, so it may not differ.
    s, folder = run_loop.resumed(settings, run_loop.FREE_ANYWHERE)
    checkpoint = run_loop.open_model(s, s.model)
    if s.lora:
        s.lora.check(int(checkpoint.config["num_hidden_layers"]))
    elif s.fine_tune_type == SCALES:
        packed_format.check_learns(checkpoint)
    elif arch.is_quantized(checkpoint.tensors):
        raise MisError(
            f"{checkpoint.path} is quantized and cannot be trained whole: use --fine-tune-type lora"
            f", or of sft {SCALES}"
        )
    most = int(checkpoint.config.get("max_position_embeddings") or s.max_seq_length)
    if s.max_seq_length > most:
        raise MisError(
            f"--max-seq-length is {s.max_seq_length}, but the model's window is {most}: give "
            f"{most} or less"
        )
    return s, folder, checkpoint


def dtype_of(s: Alignment, checkpoint: Checkpoint) -> mx.Dtype:
    """The type that the model and its reference compute in: float32 for a model trained whole."""
    if s.lora:
        return precision.dtype_of(checkpoint)
    return mx.float32


def saved_dtype(s: Alignment, checkpoint: Checkpoint) -> str:
    """The type that the result's weights are saved in, as --dtype spells it."""
    if s.dtype is None and not arch.is_quantized(checkpoint.tensors):
        largest = max(checkpoint.tensors.values(), key=lambda tensor: tensor.nbytes)
        for dtype, name in model_writer.SAFETENSORS_NAMES.items():
            if name == largest.dtype:
                return dtype
    return s.dtype or "bfloat16"


def model_size(s: Alignment, checkpoint: Checkpoint) -> ModelSize:
    """The model in bytes, as it computes here."""
    return model_of(checkpoint, dtype=dtype_of(s, checkpoint))


def training_cost(
    s: Alignment,
    checkpoint: Checkpoint,
    rows: int,
    length: int,
    *,
    name: str = "align",
) -> StageCost:
    """The cost of training with `rows` sequences of `length` tokens in a micro-batch."""
    m = model_size(s, checkpoint)
    learning = optimizer.STATE_BYTES + optimizer.GRADIENT_BYTES
    peak_bytes = m.text_bytes
    if s.lora:
        trained = s.lora.params(m.config)
        activations = residency.activation_bytes(m, rows, length)
        peak_bytes += m.whole_work + learning * trained
        peak_bytes += activations + m.in_flight(activations)
        peak_bytes += logit_bytes(m.shape.vocab, rows * length, gpu=m.gpu) + m.widened_bytes
    else:
        trained = m.params
        accumulates = s.grad_accumulation_steps > 1
        peak_bytes += whole_model.step_bytes(m, rows, length, accumulates=accumulates)
    checkpoints = s.iters // s.save_every + 2
    written = checkpoints * learning * trained
    written += precision.DTYPES[saved_dtype(s, checkpoint)].size * m.params
    tokens = s.grad_accumulation_steps * rows * length
    return StageCost(
        name=name,
        read_bytes=m.nbytes,
        written_bytes=written,
        peak_bytes=peak_bytes,
        flops=s.iters * 3 * pass_cost.forward_flops(m, tokens, length),
        updated=s.iters * trained,
    )


def report_plan(s: Alignment, phases: Sequence[StageCost]) -> dict[str, Any]:
    """The result of a --dry-run of these phases under the budget; each is reported in a line.

    MisError with both numbers where a run that is none does not fit.
    """
    budget = memory.budget(s.budget_bytes)
    result = estimates.report_costs(phases, budget.limit_bytes, estimates.machine_rates())
    fits = "does not fit" if result["check_failed"] else "fits"
    cli.say(f"peak {gib(result['peak_bytes'])} {fits} the budget of {gib(budget.limit_bytes)}")
    if not s.dry_run:
        other = ", lower --batch-size or --max-seq-length, or use --fine-tune-type lora"
        estimates.require_fit(
            budget, *phases, other=f"{other}; alignment trains whole models in memory"
        )
    return result


def fit_micro_batches(s: S, folder: Path | None, phase: Callable[[S], StageCost]) -> S:
    """`s` with its steps in the largest micro-batches for which `phase(s)` fits the budget.

    A run that goes on, in `folder`, keeps the size that it has. A micro-batch divides the one asked
    for, and a step stays what it was.
    """
    limit = memory.budget(s.budget_bytes).limit_bytes

    def in_parts(size: int) -> S:
        steps = s.grad_accumulation_steps * s.batch_size // size
        return replace(s, batch_size=size, grad_accumulation_steps=steps)

    if folder and run_folder.is_decided(folder):
        plan = run_folder.stored_settings(folder, run_folder.PLAN)
        return in_parts(int(plan["micro"]))
    for size in range(s.batch_size, 0, -1):
        if s.batch_size % size:
            continue
        if needed_bytes(phase(in_parts(size)).peak_bytes) <= limit:
            return in_parts(size)
    return in_parts(1)


@dataclass
class AlignmentRun(run_loop.OpenRun):
    """A student and the folder of its run. Made by `start_run`."""

    name: str  # of the command
    settings: Alignment
    checkpoint: Checkpoint
    planned_bytes: int  # of the plan's peak
    card: Mapping[str, Any]  # facts about the data, with its license
    best: tuple[int, float] | None = None  # (step, its held-out figure)

    @cached_property
    def model(self) -> nn.Module:
        """The model to train, in memory. Only the run holds it, which lets go of it at its end."""
        s = self.settings
        model = load.resident_model(self.checkpoint, dtype_of(s, self.checkpoint))
        stream.load_checked(model, f"{self.checkpoint.path}: ")
        if s.lora:
            lora.insert(model, s.lora, s.seed)
            mx.eval(model.parameters())
        return model

    def train(
        self,
        micro_batches: Callable[[int], Any],
        loss: Loss,
        held_out: Callable[[nn.Module], Mapping[str, float]],
        steps_of: Callable[..., Iterator[Step]] = train_loop.steps,
        judge: str = "loss",
    ) -> dict[str, Any]:
        """Train from the run's state to its end and write the best student; the run's result.

        micro_batches, loss: as in `train_loop.steps`; pure functions of the step and of the model.
        held_out(model): measures at every checkpoint; the one with the lowest `judge` becomes the
        result. It is measured again in the folder that is written. steps_of: called as
        `train_loop.steps`, yields the steps; `micro_batches` and it agree on what a step gets.
        """
        student = WholeModel(self.model, GuardedAdamW())

        def measure() -> Mapping[str, float]:
            self.model.eval()
            measured = held_out(self.model)
            self.model.train()
            return measured

        steps = partial(steps_of, student, micro_batches, loss, self.settings)
        self.learn(student, lambda: None, steps, measure, judge=judge)
        del student, steps  # the moments; the written folder takes the model's place
        return self._finish(held_out, judge)

    def learn(
        self,
        student: run_loop.Trained,
        begin: Callable[[], object],
        steps: Callable[[int], Iterator[Step]],
        measure: Callable[[], Mapping[str, float]],
        *,
        judge: str = "loss",
    ) -> None:
        """Make steps(start) to the run's end, and keep what the student is at its best.

        begin: of a new run. measure(): the student's held-out figures, at every checkpoint; the one
        with the lowest `judge` is the best.
        """
        s = self.settings

        def remember(number: int) -> dict[str, Any]:
            # Measured only at steps where every run of these settings measures: a stop does not
            # change the best.
            if number % s.save_every == 0 or number == s.iters:
                self._measure(number, student, measure, judge)
            return {"best": self.best}

        def recall(state: dict[str, Any]) -> None:
            number, value = state["best"]
            self.best = (number, value)
            self.best_weights()

        training = run_loop.CheckpointedTraining(
            run=self,
            trained=student,
            remember=remember,
            recall=recall,
            label=self.name,
        )
        training.finish(steps, training.start(begin), s.iters, s.save_every)

    @property
    def _held_out(self) -> Journal:
        """The held-out figures, by the number of their step."""
        return Journal(self.folder / HELD_OUT, ("number",))

    def best_weights(self) -> protocol.Saved:
        """The best weights so far. MisError where they are damaged: no others are the result."""
        best = self.folder / BEST
        for saved in protocol.whole_steps(best):
            if self.best and saved.number == self.best[0]:
                return saved
        raise MisError(
            f"{best} is damaged: delete the newest step of {self.folder / 'steps'}, and --resume "
            f"makes it again"
        )

    def _measure(
        self,
        number: int,
        student: run_loop.Trained,
        measure: Callable[[], Mapping[str, float]],
        judge: str,
    ) -> None:
        """Log the held-out figures; if the student is the best so far, save what it learned."""
        measured = {name: float(value) for name, value in measure().items()}
        self._held_out.add({"number": number, **measured})
        say_figures(f"step {number}", measured)
        value = measured[judge]
        if not math.isfinite(value):
            raise MisError(f"the held-out loss at step {number} is {value}: lower --learning-rate")
        if self.best is not None and value >= self.best[1]:
            return
        self.best = (number, value)
        # A run that was set back comes here again with the same bits.
        best = self.folder / BEST
        if (best / f"step-{number:08d}").exists() and any(
            saved.number == number for saved in protocol.whole_steps(best)
        ):
            return
        arrays = {
            key: named for key, named in student.arrays().items() if named and key != "optimizer"
        }
        # 3 of them: as many checkpoints may be damaged or undone as the steps can lose.
        protocol.save_step(
            best,
            number,
            arrays=arrays,
            state=measured,
            keep=3,
        )

    def _finish(
        self, held_out: Callable[[nn.Module], Mapping[str, float]], judge: str
    ) -> dict[str, Any]:
        """Write the best student as an ordinary folder, or its adapters; the run's result.

        Its figures are those of what was written.
        """
        s = self.settings
        best = self.best_weights()
        arrays = protocol.load_arrays(best, "model")
        if s.lora and not (self.folder / ADAPTERS).exists():
            config = self.checkpoint.config
            lora.write(arrays, s.lora, self.folder / ADAPTERS, config=config)
        out = self.folder / MODEL
        if s.lora and not s.fuse:
            out = self.folder / ADAPTERS
        elif not out.exists():
            self._write_model(arrays, out)
        params_trained = sum(math.prod(array.shape) for array in arrays.values())
        del arrays
        # Adapters by themselves are written bit by bit as they were measured.
        found: Mapping[str, float] | None = self._held_out.read().get((best.number,))
        if out.name == MODEL:
            found = self._measure_written(out, held_out, judge)
        return self.result(out, params_trained, found)

    def result(
        self, out: Path, params_trained: int, found: Mapping[str, float] | None, **more: Any
    ) -> dict[str, Any]:
        """The run's result, whose student is in `out`. found: the figures of what was written."""
        assert self.best
        number, _ = self.best
        steps = run_folder.metrics(self.folder)
        tokens = sum(step["tokens"] for step in steps)
        seconds = sum(step["seconds"] for step in steps)
        cli.say(f"{out}: the weights of step {number}, the best on the held-out rows")
        return self.finish(
            {
                "model": str(self.checkpoint.path),
                "student": str(out),
                "run": str(self.folder),
                "params_trained": params_trained,
                "best_step": number,
                "held_out_start": self._held_out.read().get((0,)),
                "held_out_best": found,
                "tokens": tokens,
                "tokens_per_s": round(tokens / max(seconds, 1e-9), 1),
                **more,
            }
        )

    def _write_model(self, arrays: dict[str, mx.array], out: Path) -> None:
        """Commit the folder `out`: these weights, or the model with these adapters added.

        Steps of 1e-6 are smaller than what separates two bfloat16 numbers: rounding to the nearest
        would take most of them back, so weights are rounded at random.
        """
        s = self.settings
        source = self.checkpoint
        learned: Callable[[str], mx.array] = arrays.__getitem__
        if s.lora:
            learned = lora.fused(source, arrays, s.lora)
        dtype = saved_dtype(s, source)
        config = {k: v for k, v in source.config.items() if not k.startswith("quantization")}
        config.pop("dtype", None)  # transformers 5 would believe it, not torch_dtype
        config["torch_dtype"] = dtype

        def take(name: str) -> mx.array:
            if family(config).always_float32(name):
                return learned(name)
            key = mx.random.key(zlib.crc32(f"{s.seed} {name}".encode()))
            return rounding.stochastic(learned(name), precision.DTYPES[dtype], key)

        extra = model_writer.keep_files(model_writer.read_keep(source.path))
        extra[run_folder.DATA] = dict(self.card)
        model_writer.write_model(
            config,
            take,
            source=source.path,
            out=out,
            dtype=dtype,
            extra=extra,
        )

    def _measure_written(
        self, out: Path, held_out: Callable[[nn.Module], Mapping[str, float]], judge: str
    ) -> dict[str, float] | None:
        """The held-out figures of the folder `out`, which takes the place of `model` in memory.

        None, and a sentence, where it does not fit: a packed model has become a dense one.
        """
        s = self.settings
        written = load.open_checkpoint(out, self.checkpoint.precision)
        dtype = dtype_of(s, self.checkpoint)
        more = model_of(written, dtype=dtype).whole_work
        more -= model_size(s, self.checkpoint).whole_work
        needed = self.planned_bytes + max(0, more)
        if needed > self.budget_bytes:
            cli.say(
                f"{out} is not measured: that takes {gib(needed)}, and the budget is "
                f"{gib(self.budget_bytes)}; {HELD_OUT} has the figures of its adapters"
            )
            return None
        del self.model
        self.model = load.resident_model(written, dtype)
        measured = {name: float(value) for name, value in held_out(self.model).items()}
        say_figures(str(out), measured)
        if not math.isfinite(measured[judge]):
            raise MisError(
                f"{out}: its held-out {judge} is {measured[judge]}: give --dtype float32"
            )
        return measured


def say_figures(what: str, measured: Mapping[str, float]) -> None:
    """Held-out figures in a line."""
    figures = ", ".join(f"{name} {value:.4f}" for name, value in measured.items())
    cli.say(f"{what}, held out: {figures}")


def data(
    s: Alignment,
    checkpoint: Checkpoint,
    shapes: Sequence[str],
    answers: Sequence[str] = (),
    mask_prompt: bool = True,
) -> tuple[list[list[examples.Sequenced]], list[list[examples.Sequenced]], dict[str, Any]]:
    """(rows to train on, held-out rows, both encoded; facts about the data). Checks every row."""
    visited = s.iters * s.step_tokens
    rows = examples.load(s.data, shapes, s.data_license, scrub=s.scrub_pii, tokens=visited)
    tokenizer = load.tokenizer(checkpoint.path)
    train, cut = examples.encode(
        rows.train,
        tokenizer,
        length=s.max_seq_length,
        answers=answers,
        mask_prompt=mask_prompt,
    )
    valid, _ = examples.encode(
        rows.valid[: s.eval_rows],
        tokenizer,
        length=s.max_seq_length,
        answers=answers,
        mask_prompt=mask_prompt,
    )
    cli.say(*rows.notes)
    if cut:
        what = "answers" if answers else "rows"
        cli.say(f"{cut} {what} are truncated to {s.max_seq_length} tokens")
    card = {**rows.card, "fingerprint": examples.fingerprint([*train, *valid])}
    return train, valid, card


@contextmanager
def start_run(
    s: Alignment,
    folder: Path | None,
    checkpoint: Checkpoint,
    *,
    micro: int,
    planned: Mapping[str, Any],
    card: Mapping[str, Any],
    name: str,
    same: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[AlignmentRun]:
    """The run, new or continued (`folder`).

    micro: rows, pairs or answers in a micro-batch. planned: by `report_plan`. card: facts about the
    data, with its "fingerprint". name: of the command. same: fingerprints of what else a resumed
    run must share, by their names in `run_folder.WORDS`.
    """
    seconds = planned["seconds"]
    if folder is None:
        cli.say(progress.promise(seconds))
    new = f"{name_of(checkpoint.path)}-{name}"
    entered = run_loop.entered(folder, new, out=s.out, asked=s.given)
    with progress.run(name, {name: seconds}), entered as place:
        limit = memory.budget(s.budget_bytes)
        place.decide(asdict(s), {"mode": "resident", "micro": micro}, limit)
        opened_run = run_loop.open_run(
            place,
            {**run_folder.origin(checkpoint, card["fingerprint"]), **same},
            same=(*run_folder.SAME, *same),
            thermal=s,
            limit=limit,
        )
        with opened_run as run:
            if not (run.folder / run_folder.DATA).exists():
                facts = json.dumps(dict(card), indent=2, ensure_ascii=False)
                DISK.replace_text(run.folder / run_folder.DATA, facts)
            yield AlignmentRun(
                **vars(run),
                name=name,
                settings=s,
                checkpoint=checkpoint,
                planned_bytes=planned["peak_bytes"],
                card=card,
            )
