"""Gemma 4 E2B, trimmed and rounded under 5 GiB: bytes, memory and minutes of its true shape.

    scripts/mis benchmarks/e2b.py --work FOLDER      # 13 GB of disk, an hour or more on 2 cores
    scripts/mis benchmarks/e2b.py --work FOLDER --model gemma-4-e4b

The weights are random, so nothing is learned about losses. They are made here, packed in 4 bits as
`mlx_lm.convert -q` packs them, some rows at a time, and so is a tokenizer of as many tokens as the
embedding has rows. Then come the two commands that take the shortest time:

    scripts/mis prune --scenario none --vocab 0.5x --num-samples 1 --max-seq-length 64 ...
    scripts/mis quantize --q-method round --target-bpw None ...

`--only quantize` runs the second command alone. It reads a model that is made for it in slices, in
bfloat16 and of the shape that `prune` leaves.

One calibration window is enough, since only tokens are ranked, by other windows. 4 bits a weight,
8 for the embedding. Planned is what the command asks its budget for; measured is by how much the
process grew at most, on Linux with numpy's and MLX's arrays.

Writes benchmarks/results/<machine>/MODEL.json after every row, or MODEL-quantize.json, and goes on
where it was stopped.
The model stays in FOLDER until all rows are there.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Literal

import laboratory
import mlx.core as mx
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mis_mlx import cli, prune, quantize
from mis_mlx.hardware import memory
from mis_mlx.hardware.stage_cost import StageCost
from mis_mlx.models.architectures import arch
from mis_mlx.models.architectures.families import shape_of
from mis_mlx.models.opening import compute_type
from mis_mlx.models.writing import model_writer
from mis_mlx.planner import estimates
from mis_mlx.pruning import vocabulary
from mis_mlx.storage import safetensors
from mis_mlx.types import MisError

BITS = 4
GROUP = 64
STEP = 0.005  # between two neighbouring values of a weight; they go from -8 to 7 steps
PART = 2**24  # weights that are drawn at a time
# bfloat16 of any sign, from 2^-7 to 2^-5 in size: the bits that are drawn, and the others
SMALL_BITS = np.uint16(0x80FF)
SMALL = np.uint16(0x3C00)
LEARNED = 8192  # tokens of the tokenizer that are learned from text; the others join two of these
SPECIAL = "<bos>", "<eos>"
SHARES = {"half": "0.5x", "quarter": "0.25x"}
NORMS = ("norm.weight", "layer_scalar", "scale")  # these are near 1


@dataclass(frozen=True)
class Settings:
    """Where, and of which model."""

    work: str = "e2b"
    """folder for the models, with 13 GB of room; they are removed at the end"""
    model: str = "gemma-4-e2b"
    """a shape that comes with the package, such as gemma-4-e2b or gemma-4-e4b"""
    max_seq_length: int = 64
    """tokens of a window in which the model says which tokens it expects"""
    budget: str = "5GiB"
    """of both commands"""
    only: Literal["quantize"] | None = None
    """this command alone, on a model that is made for it; default: both, one after the other"""
    step: str | None = None
    """prune or quantize: this alone, in a process of its own; it prints what it took"""
    source: str = ""
    """the folder that this step reads"""
    vocab: str = ""
    """the tokens that `prune` keeps"""


def packed_specs(config: dict[str, Any]) -> safetensors.Specs:
    """{tensor: (type, shape)} of a model of this config whose matrices have 4 bits."""
    specs = dict[str, safetensors.Spec]()
    for name, shape in arch.tensors_of(config).items():
        if len(shape) != 2:
            specs[name] = ("BF16", shape)
            continue
        rows, columns = shape
        stem = name.removesuffix(".weight")
        specs[name] = ("U32", (rows, columns * BITS // 32))
        specs[f"{stem}.scales"] = ("BF16", (rows, columns // GROUP))
        specs[f"{stem}.biases"] = ("BF16", (rows, columns // GROUP))
    return specs


def drawn(specs: safetensors.Specs) -> Iterator[tuple[str, safetensors.Tensor]]:
    """Every tensor by name; matrices come in parts of some rows, so none is whole in memory."""
    for number, (name, spec) in enumerate(specs.items()):
        yield name, safetensors.InParts(spec, parts(name, spec, seed=number))


def parts(name: str, spec: safetensors.Spec, seed: int) -> Iterator[mx.array]:
    """The rows of one tensor, `PART` weights at a time. spec: its type and shape (rows, ...)."""
    kind, shape = spec
    rows = shape[0]
    step = max(1, PART * rows // math.prod(shape))
    rng = np.random.default_rng(seed)
    for start in range(0, rows, step):
        part_shape = (min(step, rows - start), *shape[1:])
        if kind == "U32":
            words = rng.integers(0, 2**32, part_shape, dtype=np.uint32)
            yield mx.array(words)
        elif name.endswith(".scales"):
            yield mx.full(part_shape, STEP, mx.bfloat16)
        elif name.endswith(".biases"):
            yield mx.full(part_shape, -(2 ** (BITS - 1)) * STEP, mx.bfloat16)
        elif len(shape) > 1:
            words = rng.integers(0, 2**16, part_shape, dtype=np.uint16)
            yield mx.array(words & SMALL_BITS | SMALL).view(mx.bfloat16)
        else:
            noise = mx.array(rng.standard_normal(part_shape, dtype=np.float32))
            centre = 1.0 if name.endswith(NORMS) else 0.0
            yield (centre + 0.02 * noise).astype(mx.bfloat16)


def write_tokenizer(folder: Path, size: int) -> None:
    """A byte-level BPE of `size` tokens: some are learned from Python's manual, others join two."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(size, LEARNED),
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(topics.values(), trainer)
    spec = json.loads(tokenizer.to_str())
    joined_ids = spec["model"]["vocab"]
    learned = [text for text in joined_ids if text not in SPECIAL]
    rng = np.random.default_rng(0)
    while len(joined_ids) < size:
        left, right = (learned[i] for i in rng.integers(0, len(learned), 2))
        if left + right not in joined_ids:
            joined_ids[left + right] = len(joined_ids)
            spec["model"]["merges"].append([left, right])
    (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), "utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings |= {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_model(folder: Path, config: dict[str, Any]) -> dict[str, float]:
    """Make the new folder of a packed model of random weights; what that took."""
    began = time.monotonic()
    packing = {"group_size": GROUP, "bits": BITS, "mode": "affine"}
    config = {**config, "bos_token_id": 0, "eos_token_id": 1, "quantization": packing}
    write_folder(folder, config, packed_specs(config))
    return {"seconds": round(time.monotonic() - began, 1)}


def write_dense(folder: Path, config: dict[str, Any], vocab: str) -> None:
    """Make the new folder of a model in bfloat16 with the shape that `prune --vocab` leaves."""
    rows = vocabulary.size(vocab, None, config["vocab_size"])
    cut = vocabulary.with_rows(config, rows)
    student = arch.student_config(cut, shape_of(cut))
    student |= {"bos_token_id": 0, "eos_token_id": 1}
    specs = {name: ("BF16", shape) for name, shape in arch.tensors_of(student).items()}
    write_folder(folder, student, specs)


def write_folder(folder: Path, config: dict[str, Any], specs: safetensors.Specs) -> None:
    """Make the new folder of a model of random weights, with a tokenizer; whole or absent."""
    written, specs, tensors = model_writer.published(config, specs, drawn(specs))
    unfinished = folder.with_name(f"{folder.name}-unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    safetensors.write_tensors(unfinished, specs, tensors)
    (unfinished / "config.json").write_text(json.dumps(written))
    write_tokenizer(unfinished, config["vocab_size"])
    unfinished.rename(folder)


def step(s: Settings) -> dict[str, Any]:
    """Run one command on `source` into `work`; what was planned and what it took."""
    planned = [0]
    check = estimates.require_fit

    def fit(budget: Any, *phases: StageCost, **how: Any) -> None:
        own = memory.PROCESS_BYTES
        planned.extend(phase.peak_bytes + own for phase in phases)
        check(budget, *phases, **how)

    estimates.require_fit = fit  # type: ignore[assignment]
    laboratory.count_anew()
    before = laboratory.largest()
    began = time.monotonic()
    common: dict[str, Any] = {"model": s.source, "mlx_path": s.work, "budget": s.budget}
    with redirect_stdout(sys.stderr):
        if s.step == "prune":
            prune.run(
                prune.Settings(
                    scenario="none",
                    vocab=s.vocab,
                    num_samples=1,
                    max_seq_length=s.max_seq_length,
                    **common,
                )
            )
        else:
            quantize.run(quantize.Settings(q_method="round", target_bpw=None, **common))
    return {
        "seconds": round(time.monotonic() - began, 1),
        "planned_bytes": max(planned),
        "mlx_bytes": mx.get_peak_memory(),
        "grown_bytes": laboratory.largest() - before,
        "before_bytes": before,
        "busy": laboratory.busy("at its end"),
    }


def in_process(s: Settings, name: str, source: Path, out: Path, vocab: str = "") -> dict[str, Any]:
    """What `step` says of the step `name`, in a process of its own."""
    shutil.rmtree(out, ignore_errors=True)
    line = [sys.executable, __file__, "--step", name, "--source", str(source)]
    line += ["--work", str(out), "--budget", s.budget]
    line += ["--max-seq-length", str(s.max_seq_length)]
    if vocab:
        line += ["--vocab", vocab]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise MisError(f"{name} of {source} ended with exit code {done.returncode}")
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    made = compute_type.open_to_compute(out)
    return {**row, "bytes": made.nbytes, "params": arch.params(made.config)}


class Rows:
    """The rows of a results file that are there, and those that come."""

    def __init__(self, s: Settings):
        self._name = f"{s.model}-{s.only}" if s.only else s.model
        self._command = f"scripts/mis benchmarks/e2b.py --work FOLDER --model {s.model}"
        if s.only:
            self._command += f" --only {s.only}"
        self._given = {
            "model": s.model,
            "budget": s.budget,
            "max_seq_length": s.max_seq_length,
        }
        self.rows = laboratory.resumed(self._name, self._given, ["rows"]).get("rows", {})

    def keep(self, label: str, row: dict[str, Any]) -> None:
        """Store a row."""
        self.rows[label] = row
        cli.say(f"{label}: {row}")
        found = {"given": self._given, "rows": self.rows}
        laboratory.write(self._name, self._command, found)


def quantized_alone(s: Settings, rows: Rows) -> None:
    """The rows of `quantize`, each on a model that is made for it."""
    for label, share in SHARES.items():
        if f"{label}, quantize" in rows.rows:
            continue
        dense = Path(s.work) / f"{s.model}-{label}-alone"
        if not dense.exists():
            write_dense(dense, arch.PUBLISHED[s.model], share)
        rounded = dense.with_name(f"{dense.name}-rounded")
        rows.keep(f"{label}, quantize", in_process(s, "quantize", dense, rounded))
        shutil.rmtree(dense)
        shutil.rmtree(rounded)


def trimmed_and_rounded(s: Settings, rows: Rows) -> None:
    """The rows of both commands, one after the other."""
    teacher = Path(s.work) / s.model
    if not teacher.exists():
        made = write_model(teacher, arch.PUBLISHED[s.model])
        checkpoint = compute_type.open_to_compute(teacher)
        size = {"bytes": checkpoint.nbytes, "params": arch.params(checkpoint.config)}
        rows.keep("whole", {**made, **size})
    for label, share in SHARES.items():
        trimmed = teacher.with_name(f"{s.model}-{label}")
        rounded = teacher.with_name(f"{s.model}-{label}-rounded")
        if f"{label}, quantize" in rows.rows:
            continue
        if f"{label}, prune" not in rows.rows or not trimmed.exists():
            made = in_process(s, "prune", source=teacher, out=trimmed, vocab=share)
            rows.keep(f"{label}, prune", made)
        rows.keep(f"{label}, quantize", in_process(s, "quantize", trimmed, rounded))
        shutil.rmtree(trimmed)
        shutil.rmtree(rounded)
    shutil.rmtree(teacher)


def main(s: Settings) -> None:
    """All rows that are missing; or one step of a row."""
    if s.step:
        print(json.dumps(step(s)))
        return
    if s.model not in arch.PUBLISHED:
        raise MisError(f"--model {s.model}: choose from {', '.join(sorted(arch.PUBLISHED))}")
    if s.only:
        quantized_alone(s, Rows(s))
    else:
        trimmed_and_rounded(s, Rows(s))


if __name__ == "__main__":
    laboratory.start(Settings, main)
