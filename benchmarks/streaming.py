"""Is streaming free, and does it stay within memory? Synthetic models of random weights, made on
the spot.

    scripts/mis benchmarks/streaming.py        # about 15 minutes on 2 cores, 8 GB of disk

overlap: a float32 model of 2.4 GB, read past the page cache. Time of a streamed pass against
reading alone (all blocks into the slots, nothing computed) and computing alone (the same two slots,
nothing read), over the number of tokens in the pass; medians of interleaved rounds. budget:
`mis_mlx.distill` under --budget 600MiB on a 4-bit model of more than 4 GB in a shape that no real
model has, 820 blocks of hidden size 1,024 (a block of a real 8 B is 24 times as large):
calibration, the teacher's logits into the store, six blocks repaired, two steps of `sharded`; the
peak is that of the process, less what it held before it began. Writes
benchmarks/results/<machine>/streaming.json.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import mlx.core as mx
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mis_mlx.models.architectures import arch
from mis_mlx.models.opening import compute_type
from mis_mlx.models.passing import stream
from mis_mlx.storage import block_reader
from mis_mlx.storage.safetensors import write_tensors
from mis_mlx.types import Checkpoint

DENSE = {
    "num_hidden_layers": 40,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "vocab_size": 4096,
}
PACKED = {
    "num_hidden_layers": 820,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "vocab_size": 8192,
}
TOKENS = (16, 64, 128, 256, 512)
ROUNDS = 3
LENGTH = 64


def synthetic(folder: Path, sizes: dict[str, int], bits: int = 0) -> Path:
    """A llama of random weights, float32 or packed in groups of 64, written tensor by tensor, and a
    tokenizer.
    """
    config: dict[str, Any] = {
        "model_type": "llama",
        "num_attention_heads": sizes["hidden_size"] // 64,
        "num_key_value_heads": sizes["hidden_size"] // 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        **sizes,
    }
    if bits:
        config["quantization"] = {"group_size": 64, "bits": bits, "mode": "affine"}
    specs: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, shape in arch.tensors_of(config).items():
        if bits and len(shape) == 2:
            specs[name] = ("U32", (shape[0], shape[1] * bits // 32))
            for part in ("scales", "biases"):
                specs[f"{name.removesuffix('.weight')}.{part}"] = (
                    "F16",
                    (shape[0], shape[1] // 64),
                )
        else:
            specs[name] = ("F16" if bits else "F32", shape)
    folder.mkdir(parents=True)
    # 16 steps around zero, of the size of a real model's
    rng = np.random.default_rng(0)
    step = 0.02 / 2**bits

    def made(name: str) -> mx.array:
        kind, shape = specs[name]
        if kind == "U32":
            return mx.array(rng.integers(0, 2**32, shape, dtype=np.uint32))
        if len(shape) == 1:
            return mx.ones(shape, mx.float16 if bits else mx.float32)
        if bits:
            return mx.full(
                shape, step if name.endswith("scales") else -step * 2**bits / 2, mx.float16
            )
        return mx.array(rng.standard_normal(shape, dtype=np.float32) * 0.02)

    write_tensors(folder, specs, ((name, made(name)) for name in specs))
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=sizes["vocab_size"],
        special_tokens=["<|endoftext|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(topics.values(), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


class Filled(block_reader.Slots):
    """Slots that are filled once."""

    filled = 0

    def _begin(self, key: Any) -> Any:
        if self.filled < 2:
            self.filled += 1
            _, slot, wait = super()._begin(key)
            wait()
            return key, slot, lambda: None
        return key, self.free.pop(), lambda: None


class Still(stream.Stream):
    """A stream that reads two blocks alone: what it takes to compute, without a disk."""

    def __init__(self, *of: Any, **how: Any):
        super().__init__(*of, **how)
        self._blocks.__class__ = Filled


def forget(path: Path) -> None:
    """Take what is on the disk of a file out of the page cache; on macOS by msync(2), as it has no
    posix_fadvise.
    """
    with path.open("rb") as file:
        if sys.platform == "darwin":
            with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as pages:
                at = np.frombuffer(pages, np.uint8).ctypes.data
                # MS_INVALIDATE
                ctypes.CDLL(None).msync(ctypes.c_void_p(at), ctypes.c_size_t(len(pages)), 2)
        else:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def timed(into: list[float], checkpoint: Checkpoint) -> Iterator[None]:
    """Seconds of the block, begun with none of the model in the page cache."""
    for path in {t.file for t in checkpoint.tensors.values()}:
        forget(path)
    began = time.perf_counter()
    yield
    into.append(time.perf_counter() - began)


def overlap(checkpoint: Checkpoint) -> list[dict[str, float]]:
    """One row per number of tokens in a pass."""
    rows = []
    for tokens in TOKENS:
        length = min(tokens, 128)
        batches = [
            mx.random.randint(0, 4096, (1, length), key=mx.random.key(b))
            for b in range(max(1, tokens // length))
        ]
        reading: list[float] = []
        computing: list[float] = []
        streaming: list[float] = []
        for _ in range(ROUNDS):
            for kind, into in (
                (stream.Stream, reading),
                (Still, computing),
                (stream.Stream, streaming),
            ):
                source = kind(checkpoint, mx.float32, direct=True)
                hidden = source.embed(batches)
                for _ in source.blocks(range(2)):  # both slots are there, and their pages
                    pass
                with timed(into, checkpoint):
                    for _, block in source.blocks():
                        if into is not reading:
                            source.run_block(block, hidden)
        read, compute, streamed = map(statistics.median, (reading, computing, streaming))
        row = {"tokens": tokens, "read_s": read, "compute_s": compute, "streamed_s": streamed}
        rows.append(
            {
                **row,
                "ratio": streamed / max(read, compute),
                "serial_ratio": (read + compute) / max(read, compute),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def budget(folder: Path, out: Path, limit: str = "600MiB") -> dict[str, Any]:
    """What one run under `limit` took, by its own account."""
    flags = [
        "--teacher",
        folder,
        "--out",
        out,
        "--budget",
        limit,
        "--scenario",
        "none",
        "--layers",
        6,
    ]
    flags += ["--train", "sharded", "--iters", 2, "--batch-size", 1]
    flags += [
        "--reconstruct-samples",
        4,
        "--num-samples",
        4,
        "--max-seq-length",
        LENGTH,
        "--eval-windows",
        3,
    ]
    flags += ["--quantize", 0]
    command = [sys.executable, "-P", "-m", "mis_mlx.distill", *map(str, flags)]
    began = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    kept = (
        "params_teacher",
        "params_student",
        "mode",
        "peak_bytes",
        "budget_bytes",
        "bytes_teacher",
    )
    return {**{k: result[k] for k in kept}, "seconds": round(time.perf_counter() - began)}


def main() -> None:
    """Both parts, one JSON file."""
    # here, because a test runs this file without its folder on the path
    from laboratory import write

    with tempfile.TemporaryDirectory(dir=Path.cwd()) as temp:
        dense = compute_type.open_to_compute(synthetic(Path(temp) / "dense", DENSE))
        rows = overlap(dense)
        packed = compute_type.open_to_compute(synthetic(Path(temp) / "packed", PACKED, 4))
        found = budget(packed.path, Path(temp) / "run")
        print(json.dumps(found), flush=True)
        sizes = {"dense_bytes": dense.nbytes, "packed_bytes": packed.nbytes}
    write(
        "streaming",
        "scripts/mis benchmarks/streaming.py",
        {**sizes, "overlap": rows, "budget": found},
    )


if __name__ == "__main__":
    main()
