"""Model folders that lie, and a process of its own that opens them: it may refuse, or read what the
reference reads.

A liar's header agrees with itself modulo 2^64, which is what an attacker would write; others have
bits flipped, pieces cut out or numbers replaced, in any file of the folder. One in eight is left as
it was.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from mis_mlx.storage.header_check import DTYPES

WRAP = 2**64
DIMS = [-1, -2, -4, -8, 0, 1, 2, 3, 4, 8, 16, *(2**n for n in (15, 16, 20, 30, 31, 32, 33))]
DIMS += [2**31 - 1, 2**32 + 1]
ODD: list[Any] = [-1, 0, 1, 2, 3, 7, 10**7, 2**31 - 1, 2**31, 2**40, 2**64, 0.5, -0.0, 1e308]
ODD += [True, False, None, "", "64", "../../evil", [], {}, [1] * 50, "x" * 5000, "\ud800", "NaN"]
# folders a process, its time and its memory
BATCH = 250
SECONDS = 120.0
MEMORY_BYTES = 6 * 2**30
INDEX = "model.safetensors.index.json"


def made(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """(header, tensor bytes) of a whole file."""
    (n,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + n]), data[8 + n :]


def flipped(data: bytes, rng: random.Random) -> bytes:
    """A few bits flipped, a piece cut out or doubled, or the end cut off."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(max(1, min(len(changed), rng.choice([8, 64, 4096, len(changed) or 1]))))
        kind = rng.randrange(4)
        if not changed:
            break
        if kind < 2:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del changed[at : at + rng.choice([1, 7, 8, 512])]
        else:
            changed[at:at] = changed[at : at + rng.choice([1, 8, 512])]
    return bytes(changed)


def lying(data: bytes, rng: random.Random) -> bytes:
    """One to three entries of the header lie, as far as it can in agreement modulo 2^64."""
    header, rest = split(data)
    header.pop("__metadata__", None)
    for name in rng.sample(sorted(header), rng.choice([1, 1, 2, 3])):
        entry = header[name]
        begin, end = entry["data_offsets"]
        kind = rng.randrange(6)
        if kind == 0:
            entry["shape"] = [rng.choice(DIMS) for _ in range(rng.randrange(6))]
            nbytes = DTYPES[entry["dtype"]][1]
            for dim in entry["shape"]:
                nbytes = nbytes * dim % WRAP
            entry["data_offsets"] = [begin, (begin + nbytes) % WRAP]
        elif kind == 1:
            entry["dtype"] = rng.choice([*DTYPES, "F64", "F7", "I4", ""])
        elif kind == 2:
            entry["data_offsets"] = rng.choice(
                [
                    [begin, end + 4],
                    [begin + WRAP, end + WRAP],
                    [end, begin],
                    [-4, end],
                    [begin],
                    [0, end],
                    [begin, rng.choice(DIMS)],
                ]
            )
        elif kind == 3:
            entry["shape"] = rng.choice(
                [
                    entry["shape"][::-1],
                    [*entry["shape"], 1],
                    [1, *entry["shape"]],
                    [2.5],
                    ["8"],
                    entry["shape"][:1],
                ]
            )
        elif kind == 4:
            header[
                rng.choice(["../x", "a\0b", "n" * 600, "lm_head.weight", name.replace("0", "9")])
            ] = header.pop(name)
        else:
            other = header[rng.choice(sorted(header))]
            entry["data_offsets"] = list(other["data_offsets"])
    return made(header, rest)


def odd(data: bytes, rng: random.Random) -> bytes:
    """A JSON object in which one or two values, at any depth, are odd ones, or gone."""
    whole = json.loads(data)
    for _ in range(rng.choice([1, 1, 2])):
        at: Any = whole
        while True:
            if not isinstance(at, dict) or not at:
                break
            key = rng.choice(sorted(at))
            if isinstance(at[key], dict) and at[key] and rng.random() < 0.8:
                at = at[key]
                continue
            if rng.random() < 0.15:
                del at[key]
            else:
                at[key] = rng.choice([*ODD, -at[key] if isinstance(at[key], int) else "?"])
            break
    return json.dumps(whole).encode()


def liar(folder: Path, whole: dict[str, bytes], rng: random.Random) -> None:
    """Write the folder `whole` with one file changed. Files are replaced, not written into."""
    name = rng.choice(
        [n for n in whole if n.endswith(".safetensors")] * 3
        + [n for n in whole if n.endswith(".json")]
    )
    data = whole[name]
    kind = rng.randrange(8)
    if kind:
        change = lying if name.endswith(".safetensors") else odd
        if kind == 1:
            change = flipped
        data = change(data, rng)
    for each in whole:
        path = folder / each
        if each == name or not path.exists() or path.read_bytes() != whole[each]:
            path.unlink(missing_ok=True)
            path.write_bytes(data if each == name else whole[each])


def files_of(model: Path) -> dict[str, bytes]:
    """What `liar` changes: weights, index, config."""
    changed = [
        p for p in model.iterdir() if p.suffix == ".safetensors" or p.name in (INDEX, "config.json")
    ]
    return {p.name: p.read_bytes() for p in changed}


def opened(folder: Path) -> str:
    """What became of one folder: "refused", or "read" when it passed and every byte is what the
    reference reads.

    AssertionError when the reference parser refuses what passed, or reads other bytes, or the model
    has no numbers.
    """
    import mlx.core as mx
    import numpy as np
    import safetensors

    from mis_mlx.models.opening import load
    from mis_mlx.storage.safetensors import lazy
    from mis_mlx.types import MisError

    try:
        checkpoint = load.open_checkpoint(folder)
    except MisError as error:
        assert str(error) and "\n" not in str(error), error
        return "refused"
    reference: dict[str, Any] = {}
    for path in sorted({at.file for at in checkpoint.tensors.values()}):
        # SafetensorError: it refuses what we took
        reference |= dict(safetensors.deserialize(path.read_bytes()))
    assert reference.keys() == checkpoint.tensors.keys()
    arrays = lazy(checkpoint.tensors, checkpoint.tensors)
    for name, theirs in reference.items():
        ours = arrays[name]
        assert tuple(ours.shape) == tuple(theirs["shape"]), name
        raw = (
            np.array(mx.contiguous(ours.reshape(-1)).view(mx.uint8))
            if ours.size
            else np.zeros(0, np.uint8)
        )
        assert raw.tobytes() == bytes(theirs["data"]), name
    model = load.resident_model(checkpoint, mx.float32)
    logits = model(mx.array([[1, 2, 3]]))
    mx.eval(logits)
    assert logits.shape == (1, 3, checkpoint.config["vocab_size"])
    return "read"


def unguarded(folder: Path) -> str:
    """Without the gate: MLX reads the files as they are. Errors and oracle as in `opened`."""
    import mlx.core as mx
    import safetensors

    for path in sorted(folder.glob("model*.safetensors")):
        try:
            arrays = mx.load(str(path))
            mx.eval(arrays)
        except (RuntimeError, ValueError):
            return "refused"
        assert isinstance(arrays, dict)
        reference = dict(safetensors.deserialize(path.read_bytes()))
        assert {n: tuple(a.shape) for n, a in arrays.items()} == {
            n: tuple(t["shape"]) for n, t in reference.items()
        }
    return "read"


def serve(model: Path, room: Path, first: int, count: int, gate: bool = True) -> None:
    """A process's side: folders `first` ... of the endless list, one line each as it is done."""
    with contextlib.suppress(ValueError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    whole = files_of(model)
    for number in range(first, first + count):
        liar(room, whole, random.Random(number))
        try:
            ended = opened(room) if gate else unguarded(room)
        except BaseException as error:
            ended = f"wrong {type(error).__name__}: {' '.join(str(error).split())[:150]}"
        print(number, ended, flush=True)


def tried(
    model: Path, room: Path, first: int, count: int, gate: bool = True
) -> tuple[Counter[str], list[str]]:
    """Folders first ... first + count - 1: how many were refused and read, and sentences about all
    that went wrong.

    A process that dies or hangs is noted with the folder that it had, and the next one goes on
    after it.
    """
    found = Counter[str]()
    bad = list[str]()
    at = first
    end = first + count
    while at < end:
        shutil.rmtree(room, ignore_errors=True)
        room.mkdir(parents=True)
        batch = min(BATCH, end - at)
        argv = [sys.executable, "-m", __name__, str(model), str(room), str(at), str(batch)]
        argv += [] if gate else ["unguarded"]
        root = str(Path(__file__).parents[2])
        process = subprocess.Popen(
            argv,
            env={**os.environ, "PYTHONPATH": root},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            said = process.communicate(timeout=SECONDS if gate else 10.0)[0]
            why = ""
        except subprocess.TimeoutExpired:
            process.kill()
            said = process.communicate()[0]
            why = f"no end in {SECONDS:g} s"
        lines = [line.split(" ", 1) for line in said.splitlines() if " " in line]
        for number, ended in lines:
            found[ended.split()[0]] += 1
            if ended.startswith("wrong"):
                bad.append(f"folder {number}: {ended}")
        at += len(lines)
        if len(lines) < batch:
            found["hung" if why else "crashed"] += 1
            bad.append(f"folder {at}: {why or f'the process ended with {process.returncode}'}")
            at += 1
    return found, bad


if __name__ == "__main__":
    serve(
        Path(sys.argv[1]),
        Path(sys.argv[2]),
        first=int(sys.argv[3]),
        count=int(sys.argv[4]),
        gate=len(sys.argv) == 5,
    )
