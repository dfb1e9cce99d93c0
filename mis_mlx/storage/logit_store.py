"""The logit store: a teacher's sparse targets on disk, written part by part, read window by window.

A folder holds part-00000.safetensors ... and targets.json, which lists every finished part with its
size and sha256. A part is there whole or not at all; a store that was stopped anywhere goes on and
ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from mis_mlx.storage.checkpoint import sweep
from mis_mlx.storage.files import Files, file_sha256, reported
from mis_mlx.storage.header_check import check
from mis_mlx.storage.safetensors import write_arrays
from mis_mlx.types import MisError

MANIFEST = "targets.json"
KEPT_PARTS = 4  # parts that a reader holds in memory

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Spec:
    """What a store holds. Equal specs, equal bytes."""

    kind: Literal["sampled"]  # stands in targets.json
    count: int  # samples of a position
    vocab: int
    windows: int
    length: int  # positions in a window
    teacher: str  # fingerprint
    data: str  # fingerprint
    seed: int
    # windows in a file: what a crash can cost, and what a reader reads at a time
    part_windows: int = 32

    def dtypes(self) -> dict[str, type]:
        """Of a part's arrays: sizes, distinct tokens of each position; ids and counts of all
        positions end to end.
        """
        small = np.uint8 if self.count < 2**8 else np.uint16
        return {
            "sizes": small,
            "ids": np.uint16 if self.vocab <= 2**16 else np.uint32,
            "counts": small,
        }


def create(folder: Path, spec: Spec, files: Files) -> Targets:
    """Begin the store in `folder`, or go on with it; damaged parts count as missing, and `notes`
    says so. Hold the lock of the run. MisError when `folder` holds other targets.
    """
    if not 1 <= spec.count < 2**16:
        raise MisError(f"{spec.count} sampled tokens a position: take 1 to {2**16 - 1}")
    with reported(folder, "the targets"):
        files.make_folder(folder)
    sweep(folder, files)
    new = not (folder / MANIFEST).exists()
    there, parts = (spec, {}) if new else _manifest(folder)
    for name, wanted in asdict(spec).items():
        if (other := getattr(there, name)) != wanted:
            both = f"{str(other)[:12]}, not {str(wanted)[:12]}"
            why = f"{folder} holds targets of another {name.replace('_', ' ')} ({both})"
            raise MisError(f"{why}: delete it, or choose another folder")
    store = Targets(folder, spec, parts, files)
    for number in sorted(parts):
        if store.sound(number) is None:
            store.notes.append(
                f"{store.path(number).name} of the targets is damaged: it is made again"
            )
            del parts[number]
    if new:
        store.save()
    return store


class Targets:
    """A store that is open: `spec`, and `parts`, the finished ones: {number: {bytes, sha256}}."""

    def __init__(self, folder: Path, spec: Spec, parts: dict[int, dict[str, Any]], files: Files):
        self.folder = folder
        self.spec = spec
        self.parts = parts
        self._files = files
        self.notes: list[str] = []
        self.total = -(-spec.windows // spec.part_windows)
        self._coming: list[Arrays] = []  # windows of the part being filled
        self._part = lru_cache(KEPT_PARTS)(self._read)

    @property
    def bytes_per_token(self) -> float:
        """Bytes on disk for each position of the finished parts; 0 when there are none."""
        tokens = sum(len(self._within(number)) for number in self.parts) * self.spec.length
        return sum(facts["bytes"] for facts in self.parts.values()) / max(tokens, 1)

    def missing(self) -> list[int]:
        """Windows of the parts that are not there, rising: what `put` wants, in the order it wants
        them.
        """
        return [
            w
            for number in range(self.total)
            if number not in self.parts
            for w in self._within(number)
        ]

    def put(self, window: int, arrays: Arrays) -> None:
        """Take the targets of one window, by the names of `Spec.dtypes`; with its last window a
        part is committed. MisError when the disk has no room or refuses: committed ones stay.
        ValueError when another window is due.
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

    def adopt(self, number: int) -> None:
        """Count a part whose file was made elsewhere, and lies here now, as finished."""
        path = self.path(number)
        self.parts[number] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        self.save()

    def path(self, number: int) -> Path:
        """Where a part lies, or will."""
        return self.folder / f"part-{number:05d}.safetensors"

    def sound(self, number: int) -> bytes | None:
        """The bytes of a finished part, or None when they are not those that were written."""
        path = self.path(number)
        facts = self.parts[number]
        try:
            data = path.read_bytes() if path.stat().st_size == facts["bytes"] else b""
        except OSError:
            return None
        return data if hashlib.sha256(data).hexdigest() == facts["sha256"] else None

    def _within(self, number: int) -> range:
        start = number * self.spec.part_windows
        return range(start, min(start + self.spec.part_windows, self.spec.windows))

    def _commit(self, number: int, windows: list[Arrays]) -> None:
        kinds = self.spec.dtypes()
        arrays = {
            n: mx.array(np.concatenate([w[n] for w in windows]).astype(kind))
            for n, kind in kinds.items()
        }
        left = sum(a.nbytes for a in arrays.values()) * (self.total - len(self.parts))
        what = "the rest of the targets"
        done = f"{len(self.parts)} of {self.total} parts are kept"
        remedy = f"free some and start again, {done}"
        with reported(self.folder, what, left, remedy):
            self._files.require_space(self.folder, left, what, remedy)
            with self._files.replacing(self.path(number)) as temp:
                facts = write_arrays(temp, arrays, self._files)
        self.parts[number] = facts
        self.save()

    def save(self) -> None:
        """Put targets.json in place."""
        listed = {str(number): facts for number, facts in sorted(self.parts.items())}
        text = json.dumps({**asdict(self.spec), "parts": listed}, indent=1)
        self._files.replace_text(self.folder / MANIFEST, text + "\n")

    def windows(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Targets of n windows: ids (n, T, m) int32, weights (n, T, m) float32, which are counts /
        N.

        m: the most that a position has; entries of weight 0 fill the others up. MisError when a
        part is missing or damaged. Memory: the last few parts.
        """
        windows = [self._window(int(i)) for i in indices]
        sizes = np.stack([w["sizes"] for w in windows])
        filled = np.arange(sizes.max()) < sizes[..., None]
        ids = np.zeros(filled.shape, np.int32)
        weights = np.zeros(filled.shape, np.float32)
        ids[filled] = np.concatenate([w["ids"] for w in windows])
        weights[filled] = np.concatenate([w["counts"] for w in windows]) / np.float32(
            self.spec.count
        )
        return ids, weights

    def _window(self, index: int) -> Arrays:
        number, at = divmod(index, self.spec.part_windows)
        part = self._part(number)
        length = self.spec.length
        rows = slice(at * length, (at + 1) * length)
        begin = int(part["sizes"][: rows.start].sum(dtype=np.int64))
        entries = slice(begin, begin + int(part["sizes"][rows].sum(dtype=np.int64)))
        return {
            "sizes": part["sizes"][rows],
            "ids": part["ids"][entries],
            "counts": part["counts"][entries],
        }

    def _read(self, number: int) -> dict[str, np.ndarray]:
        path = self.path(number)
        if number not in self.parts:
            raise MisError(
                f"{path} is not written yet ({len(self.parts)} of {self.total} are): write the rest"
            )
        if (data := self.sound(number)) is None:
            raise MisError(f"{path} is damaged: write the targets again, the other parts are kept")
        tensors, _ = check(path)
        kinds = self.spec.dtypes()
        return {
            name: np.frombuffer(data, kinds[name], t.shape[0], t.offset)
            for name, t in tensors.items()
        }


def _manifest(folder: Path) -> tuple[Spec, dict[int, dict[str, Any]]]:
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
        parts = {
            int(n): {key: facts[key] for key in ("bytes", "sha256")}
            for n, facts in content.pop("parts").items()
        }
        return Spec(**content), parts
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise MisError(
            f"{folder / MANIFEST} is damaged: delete {folder} and write the targets again"
        ) from None
