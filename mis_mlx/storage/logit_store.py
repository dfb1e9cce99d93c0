"""The logit store: a teacher's sparse targets on disk, written part by part, read by windows.

A folder holds part-00000.safetensors ... and targets.json, which lists every finished part with its
size and sha256. A part is complete or absent; a store that was stopped anywhere continues and ends
with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mis_mlx.storage.checkpoint import sweep
from mis_mlx.storage.files import DISK, as_mis_error
from mis_mlx.storage.header_check import check
from mis_mlx.storage.safetensors import write_arrays
from mis_mlx.types import MisError

MANIFEST = "targets.json"
TOP = 64  # of a position: its likeliest tokens, with their probabilities
SAMPLES = 32  # and how many are drawn of the others
KEPT_PARTS = 4  # parts that a reader holds in memory

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Spec:
    """What a store holds. Stores with equal specs have equal bytes."""

    top: int  # likeliest tokens of a position
    count: int  # tokens drawn of the others
    vocab: int
    windows: int
    length: int  # positions in a window
    teacher: str  # fingerprint
    data: str  # fingerprint
    seed: int
    temperature: float = 1.0  # T of eq. (2), by which logits were divided
    # Windows in a file: a crash can cost so many, and a reader reads so many at a time.
    part_windows: int = 32

    def dtypes(self) -> dict[str, type]:
        """The types of a part's arrays.

        sizes: distinct tokens of each position. ids, shares: of all positions, end to end.
        """
        sizes = np.uint8 if self.top + self.count < 2**8 else np.uint16
        ids = np.uint16 if self.vocab <= 2**16 else np.uint32
        return {"sizes": sizes, "ids": ids, "shares": np.float32}


def position_bytes(wide: bool) -> int:
    """What a position takes at the most. wide: the vocabulary has more than 2^16 tokens."""
    id_bytes = 4 if wide else 2
    share_bytes = 4
    return 1 + (TOP + SAMPLES) * (id_bytes + share_bytes)


def create(folder: Path, spec: Spec) -> Targets:
    """Begin the store in `folder`, or continue it. Hold the lock of the run.

    Damaged parts count as missing, and `notes` says so. MisError when `folder` holds other targets.
    """
    if not 1 <= spec.count < 2**16 - spec.top:
        most = 2**16 - spec.top - 1
        raise MisError(f"{spec.count} sampled tokens per position: choose 1 to {most}")
    with as_mis_error(folder, "the targets"):
        DISK.make_folder(folder)
    sweep(folder)
    new = not (folder / MANIFEST).exists()
    parts: dict[int, dict[str, Any]] = {}
    if not new:
        stored, parts = _manifest(folder)
        _check_same(folder, stored, spec)
    store = Targets(folder, spec, parts)
    for number in sorted(parts):
        if store.sound(number) is None:
            store.notes.append(
                f"{store.path(number).name} of the targets is damaged: it is made again"
            )
            del parts[number]
    if new:
        store.save()
    return store


def _check_same(folder: Path, stored: Spec, spec: Spec) -> None:
    """MisError when the store in `folder` holds other targets than `spec`."""
    for name, wanted in asdict(spec).items():
        other = getattr(stored, name)
        if other != wanted:
            both = f"{str(other)[:12]}, not {str(wanted)[:12]}"
            why = f"{folder} holds targets of another {name.replace('_', ' ')} ({both})"
            raise MisError(f"{why}: delete it, or choose another folder")


class Targets:
    """An open store. `parts`: the finished ones, {number: {bytes, sha256}}."""

    def __init__(self, folder: Path, spec: Spec, parts: dict[int, dict[str, Any]]):
        self.folder = folder
        self.spec = spec
        self.parts = parts
        self.notes: list[str] = []
        self.total = -(-spec.windows // spec.part_windows)
        self._coming: list[Arrays] = []  # windows of the part being filled
        self._part = lru_cache(KEPT_PARTS)(self._read)

    @property
    def bytes_per_token(self) -> float:
        """Bytes on disk for each position of the finished parts; 0 when there are none."""
        windows = sum(len(self._within(number)) for number in self.parts)
        nbytes = sum(facts["bytes"] for facts in self.parts.values())
        return nbytes / max(windows * self.spec.length, 1)

    def missing(self) -> list[int]:
        """Windows of the parts that are not there, rising: those that `put` takes, in its order."""
        windows: list[int] = []
        for number in range(self.total):
            if number not in self.parts:
                windows.extend(self._within(number))
        return windows

    def put(self, window: int, arrays: Arrays) -> None:
        """Take the targets of one window, by the names of `Spec.dtypes`.

        With its last window a part is committed. MisError when the disk has no room or refuses;
        committed parts stay. ValueError when another window is due.
        """
        number = window // self.spec.part_windows
        within = self._within(number)
        if number in self.parts or window != within[len(self._coming)]:
            raise ValueError(
                f"window {window} came, part {number} has {len(self._coming)} of its {len(within)}"
            )
        self._coming.append(arrays)
        if len(self._coming) == len(within):
            coming = self._coming
            self._coming = []
            self._commit(number, coming)

    def path(self, number: int) -> Path:
        """The file of a part, which may not be there yet."""
        return self.folder / f"part-{number:05d}.safetensors"

    def sound(self, number: int) -> bytes | None:
        """The bytes of a finished part, or None when they are not those that were written."""
        path = self.path(number)
        facts = self.parts[number]
        try:
            if path.stat().st_size != facts["bytes"]:
                return None
            data = path.read_bytes()
        except OSError:
            return None
        if hashlib.sha256(data).hexdigest() != facts["sha256"]:
            return None
        return data

    def _within(self, number: int) -> range:
        """The windows of a part."""
        start = number * self.spec.part_windows
        stop = min(start + self.spec.part_windows, self.spec.windows)
        return range(start, stop)

    def _commit(self, number: int, windows: list[Arrays]) -> None:
        """Write a part and list it."""
        arrays = {}
        for name, dtype in self.spec.dtypes().items():
            values = [window[name] for window in windows]
            arrays[name] = mx.array(np.concatenate(values).astype(dtype))
        # Space is asked for all parts that are left.
        part_bytes = sum(array.nbytes for array in arrays.values())
        left = part_bytes * (self.total - len(self.parts))
        what = "the rest of the targets"
        done = f"{len(self.parts)} of {self.total} parts are kept"
        remedy = f"free some and start again, {done}"
        with as_mis_error(self.folder, what, left, remedy):
            DISK.require_space(self.folder, left, what, remedy)
            with DISK.replacing(self.path(number)) as temp:
                facts = write_arrays(temp, arrays)
        self.parts[number] = facts
        self.save()

    def save(self) -> None:
        """Put targets.json in place."""
        listed = {str(number): facts for number, facts in sorted(self.parts.items())}
        text = json.dumps({**asdict(self.spec), "parts": listed}, indent=1)
        DISK.replace_text(self.folder / MANIFEST, text + "\n")

    def windows(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Targets of n windows: ids (n, T, m) int32 and weights (n, T, m) float32.

        weights: shares, which sum to 1 for a position. m: the most tokens that one has; entries of
        weight 0 fill up the others. MisError when a part is missing or damaged. Memory: the last
        few parts.
        """
        windows = [self._window(int(i)) for i in indices]
        sizes = np.stack([window["sizes"] for window in windows])
        filled = np.arange(sizes.max()) < sizes[..., None]
        ids = np.zeros(filled.shape, np.int32)
        ids[filled] = np.concatenate([window["ids"] for window in windows])
        weights = np.zeros(filled.shape, np.float32)
        weights[filled] = np.concatenate([window["shares"] for window in windows])
        return ids, weights

    def _window(self, index: int) -> Arrays:
        """One window's slice of its part's arrays."""
        number, in_part = divmod(index, self.spec.part_windows)
        part = self._part(number)
        sizes = part["sizes"]
        start = in_part * self.spec.length
        stop = start + self.spec.length
        # Positions have different numbers of entries: those before this window are counted.
        begin = int(sizes[:start].sum(dtype=np.int64))
        end = begin + int(sizes[start:stop].sum(dtype=np.int64))
        return {
            "sizes": sizes[start:stop],
            "ids": part["ids"][begin:end],
            "shares": part["shares"][begin:end],
        }

    def _read(self, number: int) -> dict[str, np.ndarray]:
        """A part's arrays, checked against the sha256 in targets.json."""
        path = self.path(number)
        if number not in self.parts:
            raise MisError(
                f"{path} is not written yet ({len(self.parts)} of {self.total} are): write the rest"
            )
        data = self.sound(number)
        if data is None:
            raise MisError(f"{path} is damaged: write the targets again, the other parts are kept")
        tensors, _ = check(path)
        dtypes = self.spec.dtypes()
        arrays: dict[str, np.ndarray] = {}
        for name, t in tensors.items():
            arrays[name] = np.frombuffer(data, dtypes[name], count=t.shape[0], offset=t.offset)
        return arrays


def _manifest(folder: Path) -> tuple[Spec, dict[int, dict[str, Any]]]:
    """What targets.json says: the spec, and the finished parts."""
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
        parts = {}
        for number, facts in content.pop("parts").items():
            parts[int(number)] = {"bytes": facts["bytes"], "sha256": facts["sha256"]}
        return Spec(**content), parts
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise MisError(
            f"{folder / MANIFEST} is damaged: delete {folder} and write the targets again"
        ) from None
