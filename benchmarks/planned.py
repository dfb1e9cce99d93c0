"""What the plan says a phase takes of memory, beside what the process took: is a budget what it
says?

    scripts/mis benchmarks/planned.py [--only CASE]    # two hours on 2 cores, 6 GB of disk

Distillations of a few steps with the default's sizes in all else: the default, which cuts no block;
`half-vocab` of the same teacher, and that under 400 MiB, nearly the least that trains it; of a
4-bit teacher, and of the same in float32 under 500 MiB, which answers from disk; of gemma-3-270m.
Of random weights: the shape of a 0.5 B model with 152 thousand tokens, whole under 5 GiB, under 2
GiB, which trains it in parts, and under 850 MiB; a mixture of experts; six blocks of LFM2 350M; and
Gemma 4 E2B's blocks, eight of them, half as wide. And `sft` of the default teacher. Before each
phase the system is told to count the process's largest resident set anew (Linux), so that numpy's
share and MLX's both count. Planned and measured are of the whole process.

Writes benchmarks/results/<machine>/planned.json after every case, and goes on where it was stopped;
`--only` runs a case anew. Every case keeps the commit that it ran at.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import e2b
import laboratory
import streaming

from mis_mlx import cli, distill, sft
from mis_mlx.alignment import alignment_run
from mis_mlx.distillation.pipeline import Run
from mis_mlx.hardware import memory
from mis_mlx.hardware.stage_cost import StageCost
from mis_mlx.models.architectures import arch
from mis_mlx.models.architectures.families import family
from mis_mlx.models.opening import resolve
from mis_mlx.storage import run_folder

HALF = {
    "num_hidden_layers": 24,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "vocab_size": 151_936,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
MIXTURE = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_hidden_layers": 4,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 16_384,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 1024,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
# six blocks of LFM2 350M
HYBRID = {
    "model_type": "lfm2",
    "architectures": ["Lfm2ForCausalLM"],
    "num_hidden_layers": 6,
    "hidden_size": 1024,
    "intermediate_size": 4608,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 65_536,
    "conv_L_cache": 3,
    "layer_types": ["conv", "conv", "full_attention"] * 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
# Gemma 4 E2B's kinds of blocks, half as wide; the last four use the keys of those before
GEMMA4 = {
    "num_hidden_layers": 8,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 4,
    "num_kv_shared_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 4,
    "hidden_size_per_layer_input": 128,
    "vocab_size": 32_768,
    "vocab_size_per_layer_input": 32_768,
}
BRIEF: dict[str, Any] = {
    "iters": 2,
    "save_every": 1,
    "num_samples": 4,
    "reconstruct_samples": 4,
    "eval_windows": 3,
    "q_iters": 2,
    "eval_prompts": 8,
    "lose": None,
}
SMALLER = {"scenario": "half-vocab"}
CASES: dict[str, dict[str, Any]] = {
    "default": {"lose": 0.1},
    "half-vocab": SMALLER,
    "half-vocab, 400 MiB": SMALLER | {"budget": "400MiB", "q_iters": None},
    "0.5 B shape, 5 GiB": {"scenario": "none", "budget": "5GiB"},
    "0.5 B shape, 2 GiB": SMALLER | {"budget": "2GiB", "q_iters": None},
    "0.5 B shape, 850 MiB": SMALLER | {"budget": "850MiB", "q_iters": None},
    "4-bit teacher": SMALLER | {"conversations": 0},
    "gemma-3-270m": SMALLER,
    "mixture": {"scenario": "fewer-experts"},
    "LFM2's blocks": SMALLER,
    "Gemma 4's blocks": SMALLER,
    "streamed answers": SMALLER | {"budget": "500MiB", "q_iters": None, "conversations": 0},
    "sft": {"iters": 2, "save_every": 1, "eval_rows": 8},
}


@dataclass(frozen=True)
class Settings:
    """Which of them."""

    only: str | None = None
    """a case by its name, such as default or `0.5 B shape, 2 GiB`, anew; default: all that are not
    stored"""
    teacher: str | None = None
    """of one run alone, in a process of its own"""
    out: str | None = None
    """its run folder"""


def whole_run(name: str, teacher: str, out: Path) -> None:
    """The run of a case; print {phase: the largest resident set in it, in bytes}."""
    taken = dict[str, int]()
    plain = Run.phase

    @contextmanager
    def phase(course: Run, label: str) -> Iterator[None]:
        with plain(course, label):
            laboratory.count_anew()
            yield
        taken[label] = max(taken.get(label, 0), laboratory.largest())

    Run.phase = phase  # type: ignore[method-assign,assignment]
    asked = distill.Settings(teacher=teacher, out=str(out), **BRIEF)
    with redirect_stdout(sys.stderr):
        distill.run(asked.with_values(**CASES[name]))
    print(json.dumps(taken))


def fine_tuning(teacher: str, out: Path) -> None:
    """Train by `sft`; print {"sft": [planned bytes, bytes it took]}."""
    planned = list[int]()
    plain = alignment_run.report_plan

    def report_plan(s: alignment_run.Alignment, phases: Sequence[StageCost]) -> dict[str, Any]:
        planned.append(memory.needed_bytes(phases[0].peak_bytes))
        memory.give_back()
        laboratory.count_anew()
        return plain(s, phases)

    alignment_run.report_plan = report_plan
    with redirect_stdout(sys.stderr):
        sft.run(sft.Settings(model=teacher, out=str(out), **CASES["sft"]))
    print(json.dumps({"sft": [planned[0], laboratory.largest()]}))


def case(name: str, teacher: str, temp: Path) -> dict[str, Any]:
    """{phase: (planned bytes, measured bytes)} of a run in a process of its own."""
    out = temp / "run"
    line = [sys.executable, __file__, "--only", name, "--teacher", teacher, "--out", str(out)]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
    taken = json.loads(done.stdout.splitlines()[-1])
    if name == "sft":
        return {"mode": "sft", "budget_bytes": memory.budget(None).limit_bytes, "phases": taken}
    planned = next(r for r in run_folder.records(out / run_folder.PHASES) if "planned" in r)
    rows = {}
    for phase in planned["planned"]:
        if phase["phase"] in taken:
            rows[phase["phase"]] = phase["peak_bytes"], taken[phase["phase"]]
    return {"mode": planned["mode"], "budget_bytes": planned["budget_bytes"], "phases": rows}


def teacher_of(name: str, temp: Path) -> Path:
    """The teacher of a case; made in `temp` where it has random weights or is packed."""
    if name.startswith("0.5"):
        half = temp / "half"
        return half if half.exists() else streaming.synthetic(half, HALF)
    if name == "gemma-3-270m":
        return resolve.resolve_model(name).path
    shapes = {"mixture": MIXTURE, "LFM2's blocks": HYBRID}
    shapes["Gemma 4's blocks"] = {**arch.PUBLISHED["gemma-4-e2b"], **GEMMA4}
    if name in shapes:
        return drawn(temp / name.split()[0], shapes[name])
    teacher = resolve.resolve_model(None).path
    if name == "4-bit teacher":
        return laboratory.packed(teacher, temp / "packed")
    if name == "streamed answers":
        packed = laboratory.packed(teacher, temp / "packed")
        return laboratory.unpacked(packed, temp / "float32")
    return teacher


def drawn(folder: Path, config: dict[str, Any]) -> Path:
    """The new folder of a model of random weights in bfloat16, with a tokenizer of its size."""
    config = {**config, "bos_token_id": 0, "eos_token_id": 1}
    tensors = arch.tensors_of(config, stacked=family(config).stacked)
    e2b.write_folder(folder, config, {name: ("BF16", shape) for name, shape in tensors.items()})
    return folder


def main(s: Settings) -> None:
    """All cases; or the run of one."""
    if s.teacher and s.only and s.out:
        if s.only == "sft":
            return fine_tuning(s.teacher, Path(s.out))
        return whole_run(s.only, s.teacher, Path(s.out))
    given = {"brief": BRIEF}
    stored = laboratory.resumed("planned", given, ["cases"]).get("cases", {})
    found = {name: stored[name] for name in CASES if name in stored}
    with tempfile.TemporaryDirectory() as temp:
        for name in [s.only] if s.only else [n for n in CASES if n not in found]:
            version = laboratory.version()  # before hours in which somebody may commit
            found[name] = {
                "git": version,
                **case(name, str(teacher_of(name, Path(temp))), Path(temp)),
            }
            for label, (planned, taken) in found[name]["phases"].items():
                said = (
                    f"planned {planned / 2**20:.0f} MiB, took {taken / 2**20:.0f}: "
                    f"{planned / taken - 1:+.0%}"
                )
                cli.say(f"{name}, {label}: {said}")
            laboratory.write(
                "planned", "scripts/mis benchmarks/planned.py", {"given": given, "cases": found}
            )


if __name__ == "__main__":
    laboratory.start(Settings, main)
