"""Experts that go from a mixture: chosen by REAP, by how many tokens choose them, by lot; before
and after healing.

    scripts/mis benchmarks/experts.py    # half an hour on 2 cores; finished seeds are not run again

No real mixture is at hand: one is trained here, from random weights, on the built-in text (Python's
manual and Polish texts; SIZES below, a tokenizer of its own), by plain AdamW with the usual loss
for even loads. Three seeds, a mixture each. Of each 25 and 50 % of the experts go; then the routers
of what is left are healed, block by block; at last `distill` does all of it with its defaults. Bits
per byte of held-out text. What such a small mixture says of a large one is open. Writes
benchmarks/results/<machine>/experts.json after every seed.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from laboratory import resumed, start, write
from mlx.utils import tree_flatten
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mis_mlx import cli, distill, prune
from mis_mlx.data import preparation
from mis_mlx.judge import comparison
from mis_mlx.models.architectures import arch, families
from mis_mlx.models.opening import compute_type, load
from mis_mlx.models.writing import model_writer
from mis_mlx.pruning import reconstruct
from mis_mlx.reporting.text import markdown_table
from mis_mlx.types import Checkpoint

SIZES: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "vocab_size": 4096,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "eos_token_id": 0,
}
MIXTRAL = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 8}
WAYS: tuple[Any, ...] = ("reap", "frequency", "random")
EVEN = 0.01  # weight of the loss for even loads (arXiv 2101.03961, eq. 4)


@dataclass(frozen=True)
class Settings:
    """How much."""

    iters: int = 500
    """steps that make the mixture"""
    tokens: int = 128
    """in a window"""
    windows: int = 32
    """to calibrate on, and twice as many others to heal on"""
    eval_windows: int = 48
    """held out, of each text"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """of weights, batches and calibration"""
    family: Literal["qwen3_moe", "mixtral"] = "qwen3_moe"
    """of the mixture"""
    place: str | None = None
    """folder in which trained mixtures stay, and are found again; default: they are thrown away"""


class Gate(nn.Module):
    """A router that remembers its logits (..., E) until they are taken."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.weight = inner.weight
        self._seen: list[mx.array] = []

    def __call__(self, x: mx.array) -> mx.array:
        """As a linear layer."""
        self._seen.append(out := x @ self.weight.T)
        return out

    def unevenness(self, k: int) -> mx.array:
        """1 where all experts get equally many tokens."""
        chance = mx.softmax(self._seen.pop(), axis=-1).reshape(-1, SIZES["num_experts"])
        least = mx.sort(chance, axis=-1)[:, -k][:, None]
        return (
            (mx.stop_gradient((chance >= least).mean(axis=0)) * chance.mean(axis=0)).sum()
            * len(chance[0])
            / k
        )


def tokenizer(folder: Path) -> None:
    """Byte-level BPE of the built-in text's own, into `folder`."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZES["vocab_size"],
        special_tokens=["<|endoftext|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    rows = [*preparation.load(None).train, *preparation.load(preparation.MIS).train]
    made.train_from_iterator((str(row["text"]) for row in rows), trainer)
    made.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def mixture(s: Settings, seed: int, folder: Path) -> Checkpoint:
    """Train one and put it into `folder`."""
    folder.mkdir(parents=True)
    tokenizer(folder)
    config = SIZES | (MIXTRAL if s.family == "mixtral" else {})
    (folder / "config.json").write_text(json.dumps(config))
    named = {}
    for number, (name, shape) in enumerate(arch.tensors_of(config).items()):
        noise = mx.random.normal(shape, key=mx.random.key(1000 * seed + number))
        named[name] = mx.ones(shape) if "norm" in name else 0.02 * noise
    mx.save_safetensors(str(folder / "model.safetensors"), named)
    model = load.resident_model(compute_type.open_to_compute(folder), mx.float32)
    gates = []
    for block in model.model.layers:
        part = block[families.family(config).mlp]
        part.gate = Gate(part.gate)
        gates.append(part.gate)
    tokens = preparation.prepare(None, load.tokenizer(folder), s.tokens).train.tokens
    rates = optim.schedulers.join_schedules(
        [optim.linear_schedule(0.0, 2e-3, 50), optim.cosine_decay(2e-3, s.iters - 50, 1e-4)], [50]
    )
    adam = optim.AdamW(rates, betas=[0.9, 0.95])
    random = np.random.default_rng(seed)

    def loss(model: nn.Module, batch: mx.array) -> mx.array:
        plain = nn.losses.cross_entropy(model(batch)[:, :-1], batch[:, 1:]).mean()
        return plain + EVEN * sum(gate.unevenness(SIZES["num_experts_per_tok"]) for gate in gates)

    step: Callable[..., Any] = nn.value_and_grad(model, loss)
    for number in range(s.iters):
        batch = mx.array(tokens[random.integers(0, len(tokens), 8)])
        value, host_gradients = step(model, batch)
        adam.update(model, host_gradients)
        mx.eval(model.parameters(), adam.state, value)
        if number % 50 == 0 or number == s.iters - 1:
            cli.say(
                f"seed {seed}, step {number} of {s.iters}: {value.item():.3f} nats a token, loads' "
                f"share in it"
            )
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    return compute_type.open_to_compute(folder)


def bits(s: Settings, data: preparation.Data, model: Checkpoint) -> dict[str, float]:
    """Bits per byte by held-out text."""
    found = {}
    for name, held_out in data.held_out.items():
        chosen = comparison.spread_windows(held_out, s.eval_windows)
        rows = comparison.rows_of(comparison.compare({"model": model}, chosen), chosen)
        found[name] = round(next(r.value for r in rows if r.metric == "bpb"), 4)
    return found


def healed(
    s: Settings, data: preparation.Data, teacher: Checkpoint, student: Checkpoint, seed: int
) -> Checkpoint:
    """The student with its routers healed, in a folder beside it; the shares of error left are
    said.
    """
    keep = model_writer.read_keep(student.path)
    assert keep
    windows = preparation.calibration(data.train, 2 * s.windows, seed, 2)
    changed, left = reconstruct.reconstruct(teacher, student, keep, windows)
    cli.say(
        f"{student.path.name}: error left in each block "
        f"{', '.join(f'{share:.2f}' for share in left)}"
    )
    weights = dict(load.weights(student, "", mx.float32)) | changed
    out = student.path.with_name(f"{student.path.name}-healed")
    out.mkdir()
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (out / file).write_bytes((student.path / file).read_bytes())
    mx.save_safetensors(str(out / "model.safetensors"), weights)
    return compute_type.open_to_compute(out)


def seed_rows(s: Settings, seed: int, place: Path) -> dict[str, Any]:
    """{row: {text: bits per byte}} of one mixture."""
    kept = Path(s.place or place) / f"{s.family}-{seed}"
    teacher = compute_type.open_to_compute(kept) if kept.exists() else mixture(s, seed, kept)
    data = preparation.prepare(None, load.tokenizer(teacher.path), s.tokens)
    rows = {"teacher": bits(s, data, teacher)}
    for share in ("0.75x", "0.5x"):
        for by in WAYS:
            out = place / f"{share}-{by}"
            prune.run(
                prune.Settings(
                    model=str(teacher.path),
                    mlx_path=str(out),
                    experts=share,
                    experts_by=by,
                    scenario="none",
                    importance="rms",
                    num_samples=s.windows,
                    max_seq_length=s.tokens,
                    dtype="float32",
                    seed=seed,
                )
            )
            student = compute_type.open_to_compute(out)
            rows[f"{share}, {by}"] = bits(s, data, student)
            rows[f"{share}, {by}, healed"] = bits(
                s, data, healed(s, data, teacher=teacher, student=student, seed=seed)
            )
        distill.run(
            distill.Settings(
                teacher=str(teacher.path),
                out=str(place / share),
                experts=share,
                seed=seed,
                max_seq_length=s.tokens,
                bench_tokens=0,
            )
        )
        rows[f"{share}, distill's defaults"] = bits(
            s, data, compute_type.open_to_compute(place / share / "distilled")
        )
        rows[f"{share}, the same in 4 bits"] = bits(
            s, data, compute_type.open_to_compute(place / share / "model")
        )
    return rows


def table(seeds: dict[str, dict[str, dict[str, float]]]) -> str:
    """Markdown: what each row adds to the teacher's bits per byte, a seed after the other."""
    first = next(iter(seeds.values()))
    texts = list(first["teacher"])
    body = []
    for row in first:
        shown = []
        for text in texts:
            own = [
                rows[row][text] - (rows["teacher"][text] if row != "teacher" else 0)
                for rows in seeds.values()
            ]
            shown.append(" ".join(f"{value:{'' if row == 'teacher' else '+'}.3f}" for value in own))
        body.append([row, *shown])
    return markdown_table(["bits per byte", *texts], body)


def main(s: Settings) -> None:
    """Every seed that is not there yet."""
    name = "experts" + ("" if s.family == "qwen3_moe" else f"-{s.family}")
    given = {
        "iters": s.iters,
        "tokens": s.tokens,
        "windows": s.windows,
        "eval_windows": s.eval_windows,
        "sizes": SIZES,
    }
    seeds = resumed(name, given, ["seeds"]).get("seeds", {})
    for seed in s.seeds:
        if str(seed) not in seeds:
            with tempfile.TemporaryDirectory() as temp:
                seeds[str(seed)] = seed_rows(s, seed, Path(temp))
            write(name, "scripts/mis benchmarks/experts.py", {"given": given, "seeds": seeds})
    print(table(seeds))


if __name__ == "__main__":
    start(Settings, main)
